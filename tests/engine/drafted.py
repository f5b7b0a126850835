"""Engines with a draft model whose drafts do not depend on times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine import Engine
from engine.drafting.pace import Pace


class Always(Pace):
    """Drafts as many tokens in every sweep, so that tests do not depend on times."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fixed = size

    def size(self, count: int, rows: int) -> int:
        return self.fixed

    def pays_to_begin(self, tokens: int, left: int, count: int, size: int) -> bool:
        return True


def drafting(model: Path, draft: Path, size: int, **policy: Any) -> Engine:
    """An engine that drafts `size` tokens for each sequence in every sweep, all weights in place."""
    engine = Engine.from_pretrained(str(model), policy={"device": "cpu", **policy, "draft-model": str(draft)})
    assert engine.parts.draft is not None
    engine.parts.draft.drafts.pace = Always(size)
    engine.wait_until_loaded()
    return engine
