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
from engine.opening import Parts, explained, open_parts
from engine.planning.devices import Device, devices_of, stands_for_several
from engine.policy import Policy
from engine.schedule.sequence import Sequence as Scheduled
from engine.schedule.timing import SweepTiming
from engine.stages.following import Following
from engine.sweep_loop import SweepLoop
from engine.verification.layerwise import Driven, Findings, LayerwiseComparison
from engine.verification.text import Text
from engine.weights.encoded.filling import Fill, fill_from
from engine.weights.members.loader import Loader


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
        loader = Loader(
            parts.loading,
            [parts.weights, *([] if parts.draft is None else [parts.draft.weights])],
            parts.arena.device,
            lambda error: explained(error, parts.policy),
        )
        self._loop: SweepLoop | Following = (
            SweepLoop(parts, loader, self._observe)
            if parts.line is None or parts.line.member.leads
            else Following(parts.line, parts.lanes, loader, parts.weights.check_source)
        )

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
        if member is None and (policy.stages > 1 or len(_devices(policy)) > 1):
            from engine.workers.remote_engine import RemoteEngine

            return cast("Engine", RemoteEngine(model, policy, window=window))
        description = with_window(describe(model), window)
        with_digest = member is None or member.index == 0  # of several, one reads all files
        return cls.open(description, policy, fill_from(description, policy, with_digest=with_digest), member)

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
        if policy.stages > 1 and (member is None or not member.stages):
            raise ConfigError(
                f"stages {policy.stages}: one process has one stage of a model; open it with Engine.from_pretrained"
            )
        return cls(open_parts(description, policy, fill, member))

    def follow(self) -> None:
        """Compute what the stage that leads tells, where this engine is another one, until that ends.

        To be called once, in a thread that does nothing else. Raises what goes wrong.
        """
        assert isinstance(self._loop, Following)
        try:
            accelerator.make_current(self.parts.arena.device)
            self._loop.run()
        except BaseException as error:
            raise explained(error, self.policy) from error

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
        if self.parts.line is not None:
            raise UnsupportedError(
                "comparing with stock layers needs all of them in one process, and this one has a stage: set stages: 1"
            )
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
            lane = parts.lanes[0]
            try:
                return LayerwiseComparison(
                    Driven(
                        model=parts.model,
                        weights=parts.weights,
                        stream=parts.stream,
                        cache=lane.cache,
                        states=lane.states,
                        room=lane.room,
                        plan=parts.plan,
                        limits=lane.executor.limits,
                        steps=lane.executor.steps,
                        share_prefix=parts.policy.share_prefix,
                        window=parts.window,
                        checkpoint=None if parts.weights.source is None else parts.path,
                    )
                ).run(texts, progress)
            except Exception as error:
                raise explained(error, parts.policy) from error

    @property
    def num_sweeps(self) -> int:
        """Passes over the weights so far."""
        return sum(lane.executor.num_sweeps for lane in self.parts.lanes)

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
