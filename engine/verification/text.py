"""Texts that are known to their end, and how the scheduler meets them again (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.job import Completion, Job
from engine.schedule.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Text:
    """A job and what the engine made of it: the tokens of a computation that is compared."""

    job: Job
    tokens: tuple[int, ...]
    """Those that the completion tells."""
    end_token: int | None = None
    """The end-of-text token behind them, if the engine came to it."""

    @classmethod
    def of(cls, job: Job, completion: Completion) -> Text:
        """The text of a job that did not fail."""
        return cls(job=job, tokens=completion.tokens, end_token=completion.end_token)

    @property
    def known(self) -> tuple[int, ...]:
        """Generated tokens as they followed from each other, the end-of-text token included."""
        return self.tokens if self.end_token is None else (*self.tokens, self.end_token)

    def fed(self, window: int | None) -> list[int]:
        """Token ids whose hidden states are compared, one at least; no more than `window` have a position."""
        if self.job.max_new_tokens == 0:
            return list(self.job.prompt[: max(1, len(self.job.prompt) - 1)])
        return [*self.job.prompt, *self.tokens][:window]

    @property
    def first_asked(self) -> int:
        """The first of the fed tokens behind which a log-probability is asked for."""
        return 0 if self.job.prompt_logprobs else len(self.job.prompt) - 1


@dataclass(eq=False, kw_only=True)
class KnownSequence(Sequence):
    """A sequence whose tokens are known before they are computed."""

    known: tuple[int, ...]
    """Those that it generates."""

    @classmethod
    def of_text(cls, text: Text) -> KnownSequence:
        """The sequence that the engine makes of the text's job."""
        prompt = list(text.job.prompt)
        return cls(job=text.job, tokens=prompt, num_prompt=len(prompt), known=text.known)

    def draft(self) -> tuple[int, ...]:
        """What of the engine's own draft is right: the rows of wrong tokens have nothing to be compared with."""
        guess = super().draft()
        coming = self.known[len(self.generated_logprobs) : -1]  # the last one is never fed back
        right = next((i for i, pair in enumerate(zip(guess, coming, strict=False)) if pair[0] != pair[1]), len(guess))
        return guess[: min(right, len(coming))]

    def advance(self, count: int) -> None:
        """Take the next `count` tokens, as far as they are known."""
        done = len(self.generated_logprobs)
        new = self.known[done : done + count]
        self.tokens += new
        self.generated_logprobs += [0.0] * len(new)

    @property
    def is_told(self) -> bool:
        """Whether everything that is known has been computed."""
        return self.job.max_new_tokens == 0 or len(self.generated_logprobs) >= len(self.known)
