"""The reference of a comparison: an oracle that scores given tokens and, if it can, decodes its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.job import Completion, Job


@dataclass(frozen=True, kw_only=True)
class Forced:
    """The result of one forward pass over a prompt and given new tokens; natural logs, unmodified distribution."""

    prompt_logprobs: tuple[float | None, ...] | None
    """The prompt's log-probabilities, as in `Completion`."""
    logprobs: tuple[float, ...]
    """The log-probability of each new token."""
    margins: tuple[float, ...]
    """The lead of the likeliest token over the second likeliest at each new token, and after the last one."""


class Oracle(Protocol):
    """Plain `transformers`, as a whole model or layer by layer."""

    decodes: bool
    """Whether it can decode, also if our engine has no answer."""

    def force(self, job: Job, tokens: Sequence[int]) -> Forced:
        """Score `tokens` as the continuation of the job's prompt; `EngineError` where that is not finite."""

    def greedy(self, job: Job, ours: Completion) -> Completion:
        """Decode greedily, without log-probabilities.

        An oracle that cannot decode returns `ours` if it agrees with every token, else the tokens up to and including
        its first different choice, without text and finish reason.
        """
