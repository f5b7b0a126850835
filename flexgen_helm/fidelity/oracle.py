"""What a run's requests are compared with: an oracle that scores given tokens and, where it can, decodes its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.job import Completion, Job


@dataclass(frozen=True, kw_only=True)
class Forced:
    """What one forward over a prompt and given new tokens says of them; natural logs, unmodified distribution."""

    prompt_logprobs: tuple[float | None, ...] | None
    """The prompt's log-probabilities, as in `Completion`."""
    logprobs: tuple[float, ...]
    """The log-probability of each new token."""
    margins: tuple[float, ...]
    """The lead of the likeliest token over the second likeliest at each new token, and after the last one."""


class Oracle(Protocol):
    """Plain `transformers`, as a whole model or layer by layer."""

    decodes: bool
    """Whether it decodes on its own, also where our engine has no answer."""

    def force(self, job: Job, tokens: Sequence[int]) -> Forced:
        """Score `tokens` as the continuation of the job's prompt; `EngineError` where that is not finite."""

    def greedy(self, job: Job, ours: Completion) -> Completion:
        """What it decodes greedily, without log-probabilities.

        An oracle that does not decode gives `ours` where it agrees with every token, else the tokens up to its first
        own choice, that choice included, without text and finish reason.
        """
