"""Scores a text's tokens by the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.verification.text import Text


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The scores of a text's tokens under a model's unmodified distribution; natural logs."""

    prompt_logprobs: tuple[float | None, ...] | None
    """The prompt's log-probabilities, as in `Completion`."""
    logprobs: tuple[float, ...]
    """The log-probability of each new token."""
    greedy: tuple[int, ...]
    """The greedy choice in the place of each new token, under the job's rules, and after the last one, if the window
    has a position for it."""
    margins: tuple[float, ...]
    """The difference between the log-probabilities of the likeliest and the second likeliest token there, without
    rules."""
    is_finite: bool
    """Whether all logits are finite."""


class Scoring:
    """Accumulates the logits after a text's tokens from `Text.first_asked` on, piece by piece."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._ids = [*text.job.prompt, *text.tokens]
        self._at = text.first_asked
        self._logprobs: list[float] = []
        self._greedy: list[int] = []
        self._margins: list[float] = []
        self._is_finite = True

    def add(self, logits: torch.Tensor) -> None:
        """Add the next float32 logits `[rows, vocabulary]`."""
        rows = logits.log_softmax(dim=-1)
        likeliest = rows.topk(2, dim=-1).values
        self._is_finite &= bool(logits.isfinite().all())
        following = self._ids[self._at + 1 : self._at + 1 + len(rows)]
        chosen = torch.tensor(following, dtype=torch.long, device=rows.device)
        self._logprobs += rows[: len(following)].gather(-1, chosen[:, None])[:, 0].tolist()
        self._margins += (likeliest[:, 0] - likeliest[:, 1]).tolist()
        self._greedy += self._choices(logits)
        self._at += len(rows)

    def _choices(self, logits: torch.Tensor) -> list[int]:
        rules, size = self._text.job.sampling.rules, len(self._text.job.prompt)
        choices: list[int] = logits.argmax(dim=-1).tolist()
        if rules is not None:
            for row, choice in enumerate(logits):
                generated = self._at + row + 1 - size
                if generated >= 0:
                    choices[row] = int(rules.apply(self._ids[size : size + generated], choice).argmax())
        return choices

    def done(self) -> Scored:
        """The scores by all logits."""
        text, before = self._text, len(self._text.job.prompt) - 1 - self._text.first_asked
        logprobs = tuple(self._logprobs)
        scored = (None, *logprobs[:before]) if text.job.prompt_logprobs else None
        return Scored(
            prompt_logprobs=scored,
            logprobs=logprobs[before:],
            greedy=tuple(self._greedy[before:]),
            margins=tuple(self._margins[before:]),
            is_finite=self._is_finite,
        )
