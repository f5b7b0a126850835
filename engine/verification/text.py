"""Texts whose tokens are all known, and their scheduling (pure)."""

from __future__ import annotations

from dataclasses import dataclass

from engine.job import Completion, Job
from engine.schedule.sequence import Sequence


@dataclass(frozen=True, kw_only=True)
class Text:
    """A job and the tokens that the engine generated for it, for comparison."""

    job: Job
    tokens: tuple[int, ...]
    """The tokens of the completion."""
    end_token: int | None = None
    """The end-of-text token after them, if the engine reached it."""

    @classmethod
    def of(cls, job: Job, completion: Completion) -> Text:
        """The text of a job that did not fail."""
        return cls(job=job, tokens=completion.tokens, end_token=completion.end_token)

    @property
    def known(self) -> tuple[int, ...]:
        """The generated tokens in order, the end-of-text token included."""
        return self.tokens if self.end_token is None else (*self.tokens, self.end_token)

    def fed(self, window: int | None) -> list[int]:
        """The token ids whose hidden states are compared, at least one; no more than `window` have a position."""
        if self.job.max_new_tokens == 0:
            return list(self.job.prompt[: max(1, len(self.job.prompt) - 1)])
        return [*self.job.prompt, *self.tokens][:window]

    @property
    def first_asked(self) -> int:
        """The first of the fed tokens after which a log-probability is requested."""
        return 0 if self.job.prompt_logprobs else len(self.job.prompt) - 1


@dataclass(eq=False, kw_only=True)
class KnownSequence(Sequence):
    """A sequence whose tokens are known before they are computed."""

    known: tuple[int, ...]
    """The tokens that it generates."""

    @classmethod
    def of_text(cls, text: Text) -> KnownSequence:
        """The sequence that the engine makes of the text's job."""
        prompt = list(text.job.prompt)
        return cls(job=text.job, tokens=prompt, num_prompt=len(prompt), known=text.known)

    def draft(self) -> tuple[int, ...]:
        """The right part of the engine's own draft: rows of wrong tokens have nothing to be compared with."""
        guess = super().draft()
        coming = self.known[len(self.generated_logprobs) : -1]  # the last one is never fed back
        right = next((i for i, pair in enumerate(zip(guess, coming, strict=False)) if pair[0] != pair[1]), len(guess))
        return guess[: min(right, len(coming))]

    def advance(self, count: int) -> None:
        """Append the next `count` tokens, as far as they are known."""
        done = len(self.generated_logprobs)
        new = self.known[done : done + count]
        self.tokens += new
        self.generated_logprobs += [0.0] * len(new)

    @property
    def is_told(self) -> bool:
        """Whether all known tokens have been computed."""
        return self.job.max_new_tokens == 0 or len(self.generated_logprobs) >= len(self.known)
