"""Protects: on the CPU a model's answers are transformers', with our C functions between its products and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest import mock

import parity
import pytest
from parity import JOBS, POLICIES
from transformers import PreTrainedModel

from engine import Engine
from engine.kernels.host import functions, library


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize(("family", "names"), [
    ("llama", {"attend_prompts", "gate_rows", "norm_rows", "rotate_rows"}),
    ("gemma2", {"gate_rows", "norm_rows", "rotate_rows"}),  # scores have a cap
])  # fmt: skip
def test_equals_transformers(
    family: str,
    names: set[str],
    is_compiled: bool,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = mock.Mock(side_effect=library.run)
    monkeypatch.setattr(library, "run", called)
    if not is_compiled:
        monkeypatch.setattr(functions, "loaded", lambda: None)
    with Engine.from_pretrained(str(build(family)), policy={**POLICIES["device"], "device": "cpu"}) as engine:
        done = engine.run(JOBS)
    found, largest = parity.differences(parity.expect(reference(family)), done)
    assert not found
    assert largest < parity.TOLERANCE
    assert {call.args[0].__name__ for call in called.call_args_list} == (names if is_compiled else set())
