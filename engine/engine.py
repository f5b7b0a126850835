"""The engine: loads a model by a policy, takes jobs from any thread, and serves them together, sweep by sweep."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Unpack, overload

import torch

from engine.checkpoint.description import ModelDescription, describe, with_window
from engine.errors import EngineError, JobError, UnsupportedError
from engine.generation import Generation, Settings, jobs_of, prompts_of, rows_of, sequences_of
from engine.job import Completion, Job, is_whole
from engine.member import Member
from engine.memory.tiers import Tier
from engine.opening import Fill, Parts, explained, fill_from, open_parts
from engine.pending import AsyncPending, Finished, Pending
from engine.policy import Policy
from engine.schedule.sequence import Sequence as Scheduled
from engine.schedule.timing import SweepTiming
from engine.sweep_loop import SweepLoop
from engine.verification.layerwise import Driven, Findings, LayerwiseComparison
from engine.verification.text import Text


class Engine:
    """Runs jobs through a causal language model that may be larger than the device.

    Calls from several threads are served together: jobs that arrive while a sweep runs join the next one. A context
    manager; `close` frees page-locked memory and offload files.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        """What the engine works with, for those who look on; the engine's thread changes it."""
        self.tokenizer = parts.tokenizer
        self.policy = parts.policy
        self.plan = parts.plan
        self.window = parts.window
        """Most positions of a sequence; None when the model sets no limit."""
        self.observer: Callable[[SweepTiming], None] | None = None
        """Called in the engine's thread after each sweep, before its completions are delivered; must be quick."""
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
        """Load `model`, a hub id or directory, as `policy` says.

        policy: the name of a shipped one, a YAML file, a mapping, or "auto". window: most positions of a sequence, in
        place of what the model's files tell. member: which this is of several engines that share the weights. Raises
        `ConfigError`, `CheckpointError`, `UnsupportedError`, or `CapacityError` when the policy does not fit the memory
        at hand. Returns when the checkpoint is known to fit the model; its weights are read while the first jobs run.
        """
        policy = Policy.load(policy)
        description = with_window(describe(model), window)
        return cls.open(description, policy, fill_from(description, policy), member)

    @classmethod
    def open(cls, description: ModelDescription, policy: Policy, fill: Fill, member: Member | None = None) -> Engine:
        """Open the described model with weights that `fill` puts in place (benchmarks fill random ones).

        What `fill` returns is iterated in the background while the first sweep runs, and waits where it must.
        """
        return cls(open_parts(description, policy, fill, member))

    def run(self, jobs: Iterable[Job]) -> list[Completion]:
        """Run `jobs` and return their completions in the same order."""
        jobs = list(jobs)
        completions: list[Completion | None] = [None] * len(jobs)
        for index, completion in self.stream(jobs):
            completions[index] = completion
        assert all(completion is not None for completion in completions)
        return [completion for completion in completions if completion is not None]

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Completion]]:
        """Yield (position in `jobs`, completion), each as soon as its sweep ends.

        A bad job fails in its own `Completion.error`; raises `EngineError` only for faults of the engine. Jobs of a
        generator that is closed early are dropped.
        """
        return _each(self.sweeps(jobs))  # jobs are submitted when this is called, not when the first is asked for

    def sweeps(self, jobs: Iterable[Job], entered: Callable[[list[int]], None] | None = None) -> Pending:
        """`stream`, but yield all completions of a sweep at once, as soon as it ends (for one transaction a sweep).

        `entered` is called in the engine's thread with the positions of jobs whose first sweep is about to begin.
        """
        sequences, bad = self._checked(jobs)
        pending = Pending(sequences, bad, self._loop.abandon, entered)
        self._loop.submit(pending.call)
        return pending

    async def astream(self, jobs: Iterable[Job]) -> AsyncIterator[tuple[int, Completion]]:
        """`stream` for a coroutine: `async for index, completion in engine.astream(jobs)`, in a running asyncio loop.

        Jobs are submitted when the first result is awaited, and dropped when the generator is closed or its task is
        cancelled. Calls of several tasks are served together.
        """
        sequences, bad = self._checked(jobs)
        pending = AsyncPending(sequences)
        try:
            self._loop.submit(pending.call)
            for index, completion in bad:
                yield index, completion
            async for index, completion in pending.completions():
                yield index, completion
        finally:
            self._loop.abandon(pending.call)

    @overload
    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = ...,
        *,
        return_dict: Literal[False] = ...,
        **settings: Unpack[Settings],
    ) -> torch.Tensor: ...

    @overload
    def generate(
        self, input_ids: Any, attention_mask: Any = ..., *, return_dict: Literal[True], **settings: Unpack[Settings]
    ) -> Generation: ...

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = 50,
        top_p: float = 1.0,
        stop: str | Iterable[str | Iterable[int]] | None = None,
        num_return_sequences: int = 1,
        seed: int | None = None,
        pad_token_id: int | None = None,
        return_dict: bool = False,
    ) -> torch.Tensor | Generation:
        """Continue prompts, as `transformers.GenerationMixin.generate` does; names and defaults are its.

        input_ids: token ids, a tensor or array `[prompts, length]` or `[length]`, or lists of any lengths.
        attention_mask: of the same form; tokens with a 0 are padding, on whichever side.
        temperature, top_k, top_p: only with `do_sample`; None or 0 as top_k samples among all tokens.
        stop: a string, or strings or lists of token ids; a row ends before it
            (transformers' `stop_strings` keeps it).
        num_return_sequences: completions of each prompt, neighbours in the result; needs `do_sample` to differ.
        seed: the same gives the same samples; completion i of all gets seed + i. None draws them.
        pad_token_id: fills rows up to the longest; None: the model's, else its end-of-text.

        Returns int64 `[prompts * num_return_sequences, longest]` on the CPU: the row as given, the new tokens with
        end-of-text if it came, padding; with `return_dict`, a `Generation`. Raises `JobError`, before anything is
        computed, for a prompt that cannot be served, and when one fails.
        """
        pad = self.parts.pad_token if pad_token_id is None else pad_token_id
        if not is_whole(pad) or not -(2**63) <= pad < 2**63:
            raise JobError(f"pad_token_id {pad} is no token id")
        rows = rows_of(input_ids)
        jobs = jobs_of(
            prompts_of(rows, attention_mask),
            max_new_tokens=max_new_tokens,
            do_sample=do_sample,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            num_return_sequences=num_return_sequences,
            seed=seed,
        )
        for number, job in enumerate(jobs):
            try:
                self._check(job)
            except JobError as error:
                raise JobError(f"row {number // num_return_sequences} of input_ids: {error}") from None
        completions = self.run(jobs)
        for number, done in enumerate(completions):
            if done.error is not None:
                raise type(done.error)(
                    f"row {number // num_return_sequences} of input_ids: {done.error}"
                ) from done.error
        whole = [row for row in rows for _ in range(num_return_sequences)]
        sequences = sequences_of(whole, completions, int(pad))
        return Generation(sequences=sequences, completions=tuple(completions)) if return_dict else sequences

    def compare_with_stock(
        self,
        jobs: Sequence[Job],
        completions: Sequence[Completion],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Findings:
        """Compute what `completions` tell of `jobs` once more, beside stock layers of transformers, layer by layer.

        Each layer's weights arrive once, for both. Jobs that failed must be left out. `progress` is told how many of
        the stages are done. Other jobs wait until this returns. Raises `JobError` for a job that this model cannot
        run, and otherwise as `LayerwiseComparison.run`.
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
        """Passes over the weights so far."""
        return self.parts.executor.num_sweeps

    def placed_bytes(self) -> dict[Tier, int]:
        """Bytes held on each tier now: weights, slots and staging, KV cache, activations off the device.

        Weights on disk count, too, where they are read from the checkpoint itself.
        """
        held = dict(self.parts.arena.num_bytes)
        return {**held, "disk": held["disk"] + self.parts.weights.adopted_bytes}

    def wait_until_loaded(self) -> None:
        """Return when all weights are in place; raises `EngineError` if they cannot be. Jobs need not wait for it."""
        self.parts.weights.wait()

    def weights_digest(self) -> str | None:
        """SHA-256 that the checkpoint's weight files are known by (`WeightDigest`), once all are read.

        None where the weights come from no files. Raises `EngineError` if they cannot be read, or were changed.
        """
        digest = self.parts.weights.digest
        return None if digest is None else digest.wait()

    def close(self) -> None:
        """Stop serving and free page-locked memory and offload files; waiting calls fail."""
        if self._loop.close():
            self.parts.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _observe(self, timing: SweepTiming) -> None:
        if self.observer is not None:
            self.observer(timing)

    def _checked(self, jobs: Iterable[Job]) -> tuple[dict[int, Scheduled], Finished]:
        """Sequences for what can run of `jobs`, by position, and the completions of what cannot."""
        sequences: dict[int, Scheduled] = {}
        bad: Finished = []
        for index, job in enumerate(jobs):
            try:
                self._check(job)
                sequences[index] = Scheduled.of(job)
            except EngineError as error:
                bad.append((index, Completion(error=error)))
        return sequences, bad

    def _check(self, job: Job) -> None:
        """Raise `JobError` for a job that this model cannot run."""
        job.check()
        job.check_fits(self.parts.model.vocab_size, self.window, self.policy.pad_to_seq_len)


def _each(sweeps: Pending) -> Iterator[tuple[int, Completion]]:
    with closing(sweeps):
        for finished in sweeps:
            yield from finished
