"""The engine: loads a model by a policy, takes jobs from any thread, and serves them together, sweep by sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from engine.asking.front import Front
from engine.asking.pending import Call, Finished, Pending
from engine.checkpoint.description import ModelDescription, describe, with_window
from engine.errors import ConfigError, EngineError, JobError, UnsupportedError
from engine.job import Completion, Job
from engine.member import Member
from engine.memory import accelerator
from engine.memory.cores import usable_cores
from engine.memory.tiers import Tier
from engine.opening import Fill, Parts, explained, fill_from, open_parts
from engine.planning.devices import Device, devices_of, stands_for_several
from engine.policy import Policy
from engine.schedule.sequence import Sequence as Scheduled
from engine.schedule.timing import SweepTiming
from engine.sweep_loop import SweepLoop
from engine.verification.layerwise import Driven, Findings, LayerwiseComparison
from engine.verification.text import Text


class Engine(Front):
    """Runs jobs through a causal language model that may be larger than the device.

    Calls from several threads are served together: jobs that arrive while a sweep runs join the next one. A context
    manager; `close` frees page-locked memory and offload files.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        """What the engine consists of, for observers; the engine's thread changes it."""
        self.tokenizer = parts.tokenizer
        self.policy = parts.policy
        self.plan = parts.plan
        self.observer: Callable[[SweepTiming], None] | None = None
        """Called in the engine's thread after each sweep, before its completions are delivered; it must be fast."""
        self._loop = SweepLoop(parts, self._observe)

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        policy: Policy | str | Path | Mapping[str, Any] = "auto",
        *,
        window: int | None = None,
        member: Member | None = None,
    ) -> Engine:
        """Load `model`, a hub id (`org/model` or `org/model@revision`) or a directory, as `policy` says.

        policy: the name of a shipped one, a YAML file, a mapping, or "auto". window: the maximum number of positions of
        a sequence, in place of the model's own. member: which of several engines this is, in a process of its own.

        Where the policy's `device` selects several devices, the engine runs in a process for each (`RemoteEngine`),
        with the same interface except `parts`. Raises `ConfigError`, `CheckpointError`, `UnsupportedError`, or
        `CapacityError` when the policy does not fit the available memory. Returns when the checkpoint is known to fit
        the model; its weights are read while the first jobs run.
        """
        policy = Policy.load(policy)
        if member is None and len(_devices(policy)) > 1:
            from engine.workers.remote_engine import RemoteEngine

            return cast("Engine", RemoteEngine(model, policy, window=window))
        description = with_window(describe(model), window)
        return cls.open(description, policy, fill_from(description, policy), member)

    @classmethod
    def open(cls, description: ModelDescription, policy: Policy, fill: Fill, member: Member | None = None) -> Engine:
        """Open the described model with weights that `fill` puts in place (benchmarks fill in random ones).

        The iterable that `fill` returns is consumed in the background while the first sweep runs, which waits for it
        where needed.
        """
        if not isinstance(policy.device, str):
            raise ConfigError(
                f"device [{', '.join(policy.device)}]: one process computes on one device; name one, or open the model "
                "with Engine.from_pretrained"
            )
        return cls(open_parts(description, policy, fill, member))

    @property
    def window(self) -> int | None:
        """The maximum number of positions of a sequence; None when the model sets no limit."""
        return self.parts.window

    @property
    def vocab_size(self) -> int:
        """The number of token ids of the model's vocabulary."""
        return self.parts.model.vocab_size

    @property
    def pad_token(self) -> int:
        """The token id with which `generate` pads rows: the model's padding token, else its end-of-text."""
        return self.parts.pad_token

    def sweeps_of_checked(self, jobs: Iterable[Job], entered: Callable[[list[int]], None]) -> Pending:
        """`sweeps` for jobs that the caller has checked for this model, so that tokens are not checked again.

        `entered` is called in the engine's thread with the positions of jobs whose first sweep is about to begin.
        """
        pending = Pending(dict(enumerate(map(Scheduled.of, jobs))), [], self._abandon, entered)
        self._submit(pending.call)
        return pending

    def compare_with_stock(
        self,
        jobs: Sequence[Job],
        completions: Sequence[Completion],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Findings:
        """Compute `completions` of `jobs` again, together with stock layers of transformers; compare layer by layer.

        Each layer's weights arrive once, for both. Jobs that failed must be left out. `progress` gets the numbers of
        finished and of all stages. Other jobs wait until this returns. Raises `JobError` for a job that this model
        cannot run, and otherwise what `LayerwiseComparison.run` raises.
        """
        if (group := self.parts.group) is not None:
            raise UnsupportedError(
                f"each of {group.count} engines has a part of the weights (gather-weights), and they compute together "
                "only; open the model on one device to compare it with stock layers"
            )
        texts = []
        for job, completion in zip(jobs, completions, strict=True):
            self._check(job)
            if completion.error is not None:
                raise JobError(f"a job that failed has nothing to compare: {completion.error}")
            texts.append(Text.of(job, completion))
        with self._loop.lend() as parts:
            try:
                return LayerwiseComparison(
                    Driven(
                        model=parts.model,
                        weights=parts.weights,
                        stream=parts.stream,
                        cache=parts.cache,
                        states=parts.states,
                        room=parts.room,
                        plan=parts.plan,
                        limits=parts.executor.limits,
                        share_prefix=parts.policy.share_prefix,
                        window=parts.window,
                        checkpoint=None if parts.weights.source is None else parts.path,
                    )
                ).run(texts, progress)
            except Exception as error:
                raise explained(error, parts.policy) from error

    @property
    def num_sweeps(self) -> int:
        """The number of passes over the weights so far."""
        return self.parts.executor.num_sweeps

    def placed_bytes(self) -> dict[Tier, int]:
        """The bytes held on each tier now: weights, device buffers and staging, KV cache, activations off the device.

        Weights on disk count even where they are read from the checkpoint itself.
        """
        held = dict(self.parts.arena.num_bytes)
        return {**held, "disk": held["disk"] + self.parts.weights.adopted_bytes}

    def wait_until_loaded(self) -> None:
        """Wait until all weights are loaded; raises `EngineError` if they cannot be. Jobs need not wait for it."""
        self.parts.weights.wait()

    def weights_digest(self) -> str | None:
        """The SHA-256 that identifies the checkpoint's weight files (`WeightDigest`), once all are read.

        None where the weights come from no files. Raises `EngineError` if they cannot be read, or were changed.
        """
        digest = self.parts.weights.digest
        return None if digest is None else digest.wait()

    def close(self) -> None:
        """Stop serving and free page-locked memory and offload files; waiting calls fail."""
        if self._loop.close():
            self.parts.close()

    def _observe(self, timing: SweepTiming) -> None:
        if self.observer is not None:
            self.observer(timing)

    def _submit(self, call: Call) -> None:
        self._loop.submit(call)

    def _abandon(self, call: Call) -> None:
        self._loop.abandon(call)

    def _accepted(self, jobs: Iterable[Job]) -> tuple[dict[int, Scheduled], Finished]:
        sequences: dict[int, Scheduled] = {}
        bad: Finished = []
        for index, job in enumerate(jobs):
            try:
                self._check(job)
                sequences[index] = Scheduled.of(job)
            except EngineError as error:
                bad.append((index, Completion(error=error)))
        return sequences, bad


def _devices(policy: Policy) -> tuple[str, ...]:
    """The devices that a policy selects on this machine; at most one where it selects one."""
    if not stands_for_several(policy.device):
        return ()
    seen = [
        Device(name=str(each), model=accelerator.name_of(each), num_bytes=accelerator.total_memory(each))
        for each in accelerator.devices()
    ]
    return devices_of(policy.device, seen, usable_cores())
