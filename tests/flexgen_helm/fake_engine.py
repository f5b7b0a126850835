"""The one double: an engine with the same `sweeps` whose answers follow from the job alone, without a model."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from engine import Completion, EngineError, Job
from engine.errors import NumericsError


class FakeEngine:
    """Answers a job by hashing it; equal jobs get equal answers, others other ones."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.calls: list[list[Job]] = []
        self.closed = False
        self.observer: Any = None
        self.fault: EngineError | None = None
        """Raised by `sweeps` after `fault_after` completions."""
        self.fault_after = 0
        self.bad_tokens: set[int] = set()
        """Jobs whose prompt has one of these fail alone."""
        self.let_go = threading.Event()
        """Cleared, `sweeps` waits before it yields."""
        self.let_go.set()
        self._lock = threading.Lock()

    def sweeps(self, jobs: Sequence[Job]) -> Iterator[list[tuple[int, Completion]]]:
        with self._lock:
            self.calls.append(list(jobs))
        self.let_go.wait()
        for count, (index, job) in enumerate(reversed(list(enumerate(jobs)))):  # out of order, as sweeps may end
            if self.fault is not None and count == self.fault_after:
                raise self.fault
            yield [(index, self.answer(job))]

    def run(self, jobs: Sequence[Job]) -> list[Completion]:
        finished = [pair for sweep in self.sweeps(jobs) for pair in sweep]
        return [completion for _, completion in sorted(finished, key=lambda pair: pair[0])]

    def weights_digest(self) -> None:
        """It reads no weights."""

    def close(self) -> None:
        self.closed = True

    def answer(self, job: Job) -> Completion:
        try:
            job.check()
        except EngineError as error:
            return Completion(error=error)
        if self.bad_tokens & set(job.prompt):
            return Completion(error=NumericsError("its logits are not finite"))
        sampling = job.sampling
        asked = [list(job.prompt), sampling.temperature and [sampling.seed, sampling.top_k, sampling.top_p]]
        numbers = _numbers(repr(asked))
        tokens = [next(numbers) % (len(self.tokenizer) - 10) + 10 for _ in range(job.max_new_tokens)]
        text = self.tokenizer.decode(tokens) if tokens else ""
        stops = [text.index(stop) for stop in job.stop if isinstance(stop, str) and stop in text]
        if stops:
            text = text[: min(stops)]
            tokens = tokens[
                : next(n for n in range(len(tokens) + 1) if len(self.tokenizer.decode(tokens[:n])) >= len(text))
            ]
        prompt_logprobs = (None, *(-(token % 7) - 0.5 for token in job.prompt[1:]))
        return Completion(
            text=text,
            tokens=tuple(tokens),
            logprobs=tuple(-(token % 5) - 0.25 for token in tokens),
            prompt_logprobs=prompt_logprobs if job.prompt_logprobs else None,
            finish_reason="stop" if stops else "length",
        )


def _numbers(text: str) -> Iterator[int]:
    count = 0
    while True:
        digest = hashlib.sha256(f"{count} {text}".encode()).digest()
        yield from (int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4))
        count += 1
