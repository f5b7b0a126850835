"""Final norm and head, of stock models and of the engine, on the last hidden states of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.errors import NumericsError
from engine.model.causal_model import CausalModel
from engine.verification.chain import Table
from engine.verification.difference import Meter
from engine.verification.scored import Scored, Scoring
from engine.verification.text import Text


def score(
    texts: Sequence[Text],
    rows: Sequence[torch.Tensor],
    states: Table,
    model: CausalModel,
    most: int,
    meter: Meter | None,
) -> list[Scored]:
    """Score each text by its logits; with a meter, also compare with rows of several texts in one call.

    rows: the rows of each text's states. most: the rows whose logits are made at once. Raises `NumericsError` for
    logits that are not finite.
    """
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    scored = []

    def compare() -> None:
        if meter is not None and waiting:
            hidden, theirs = (torch.cat(parts) for parts in zip(*waiting, strict=True))
            with model.sweeping.arithmetic:
                ours = model.head(hidden.flip(0)).flip(0)
            meter.add(ours, theirs)
        waiting.clear()

    for text, of_text in zip(texts, rows, strict=True):
        scoring = Scoring(text)
        for part in of_text[text.first_asked :].split(most):
            hidden = states.take(part)
            logits = model.head(hidden)
            scoring.add(logits)
            if sum(len(one) for one, _ in waiting) + len(part) > most:
                compare()
            waiting.append((hidden, logits))
        scored.append(scoring.done())
        if not scored[-1].is_finite:
            raise NumericsError(
                f"stock layers of transformers make logits in {str(model.dtype).removeprefix('torch.')} that are not "
                "finite; verify with another dtype in the policy (float32 or bfloat16)"
            )
    compare()
    return scored
