"""The interface that every engine offers its callers, in this process or in others."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import closing
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack, overload

from engine.asking.pending import AsyncPending, Call, Finished, Pending
from engine.errors import JobError
from engine.job import Completion, Job, is_whole
from engine.policy import Policy

if TYPE_CHECKING:
    import torch

    from engine.asking.generation import Generation, Settings


class Front(ABC):
    """Runs jobs through a causal language model; subclasses say what computes them.

    Calls from several threads are served together: jobs that arrive while a sweep runs join the next one. It is a
    context manager.
    """

    policy: Policy

    @property
    @abstractmethod
    def window(self) -> int | None:
        """The maximum number of positions of a sequence; None when the model sets no limit."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """The number of token ids of the model's vocabulary."""

    @property
    @abstractmethod
    def pad_token(self) -> int:
        """The token id with which `generate` pads rows."""

    @abstractmethod
    def _accepted(self, jobs: Iterable[Job]) -> tuple[dict[int, Any], Finished]:
        """Return by position the jobs that can run, in the engine's internal form, and completions for the others."""

    @abstractmethod
    def _submit(self, call: Call) -> None:
        """Accept a call; raise the fault that ended the engine, or `EngineError` when it is closed."""

    @abstractmethod
    def _abandon(self, call: Call) -> None:
        """Drop the jobs of a call that have not ended."""

    @abstractmethod
    def close(self) -> None:
        """Stop serving and release all memory; waiting calls fail."""

    def run(self, jobs: Iterable[Job]) -> list[Completion]:
        """Run `jobs` and return their completions in the same order."""
        jobs = list(jobs)
        found = dict(self.stream(jobs))
        return [found[index] for index in range(len(jobs))]

    def stream(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Completion]]:
        """Yield (position in `jobs`, completion), each as soon as its sweep ends.

        A bad job fails in its own `Completion.error`; raises `EngineError` only for faults of the engine. Jobs of a
        generator that is closed early are dropped.
        """
        return _each(self.sweeps(jobs))  # jobs are submitted when this is called, not when the first is asked for

    def sweeps(self, jobs: Iterable[Job]) -> Pending:
        """`stream`, but yield all completions of a sweep at once, as soon as it ends (for one transaction a sweep)."""
        accepted, bad = self._accepted(jobs)
        pending = Pending(accepted, bad, self._abandon)
        self._submit(pending.call)
        return pending

    async def astream(self, jobs: Iterable[Job]) -> AsyncIterator[tuple[int, Completion]]:
        """`stream` for a coroutine: `async for index, completion in engine.astream(jobs)`, in a running asyncio loop.

        Jobs are submitted when the first result is awaited, and dropped when the generator is closed or its task is
        cancelled. Calls of several tasks are served together.
        """
        accepted, bad = self._accepted(jobs)
        pending = AsyncPending(accepted)
        try:
            self._submit(pending.call)
            for index, completion in bad:
                yield index, completion
            async for index, completion in pending.completions():
                yield index, completion
        finally:
            self._abandon(pending.call)

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
        from engine.asking.generation import Generation, jobs_of, prompts_of, rows_of, sequences_of

        pad = self.pad_token if pad_token_id is None else pad_token_id
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, job: Job) -> None:
        """Raise `JobError` for a job that this model cannot run."""
        job.check()
        job.check_fits(self.vocab_size, self.window, self.policy.pad_to_seq_len)


def _each(sweeps: Pending) -> Iterator[tuple[int, Completion]]:
    with closing(sweeps):
        for finished in sweeps:
            yield from finished
