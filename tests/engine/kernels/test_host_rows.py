"""Protects: what our C functions make of rows is what torch makes of them in float64, whatever their strides."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from engine.kernels.elementwise.gates import Activation
from engine.kernels.elementwise.norms import Scaling
from engine.kernels.elementwise.rotations import rotated
from engine.kernels.host import functions, rows

_SIZES = torch.tensor([1e-3, 1.0, 30.0, 1e3]).repeat(100)[:, None]
"""Of the numbers in rows."""


@pytest.mark.parametrize("width", [1536, 37])
@pytest.mark.parametrize("is_half", [False, True])
def test_gated_products(width: int, is_half: bool) -> None:
    """Also of two halves of the same rows; of gates that are beyond what e to the x holds."""
    both = torch.randn(1, 400, 2 * width) * _SIZES
    gate, up = both.chunk(2, dim=-1) if is_half else (both[..., :width].clone(), torch.randn(1, 400, width))
    for activation in Activation:
        found, right = rows.gate_product(gate, up, activation), activation(gate.double()) * up.double()
        assert ((found - right).abs() <= 2e-6 * (right.abs() + up.abs())).all()


def test_gates_that_are_no_numbers_stay_so() -> None:
    gate, up = torch.randn(3, 40), torch.randn(3, 40)
    gate[1, 7], gate[2, 39] = torch.nan, torch.inf
    for activation in Activation:
        found = rows.gate_product(gate, up, activation)
        assert torch.equal(found.isfinite(), (activation(gate) * up).isfinite())


@pytest.mark.parametrize("width", [576, 37])
@pytest.mark.parametrize(
    ("scaling", "plus"), [(Scaling.ROUNDED, 0.0), (Scaling.WIDE, 0.0), (Scaling.WIDE_FROM_ONE, 1.0)]
)
def test_norms(width: int, scaling: Scaling, plus: float) -> None:
    numbers, weight = torch.randn(2, 400, width) * _SIZES, torch.randn(width)
    right = F.rms_norm(numbers.double(), (width,), weight.double() + plus, eps=1e-5)
    found = rows.norm(numbers, weight, 1e-5, scaling)
    assert (found - right).abs().max() <= 2e-6 * float(right.abs().max())
    assert torch.equal(rows.norm(numbers.mT.contiguous().mT, weight, 1e-5, scaling), found)


def test_rotations() -> None:
    """As layers leave queries and keys; only a part of a head; tables that have each number once."""
    query, key = torch.randn(1, 300, 6, 64).transpose(1, 2), torch.randn(1, 300, 2, 64).transpose(1, 2)
    cosine, sine = torch.randn(1, 300, 64), torch.randn(1, 300, 64)
    for found, right in zip(
        rows.rotate(query, key, cosine, sine, 2), apply_rotary_pos_emb(query, key, cosine, sine), strict=True
    ):
        assert (found - right).abs().max() <= 4e-6
    for turned, per_pair in ((32, 2), (32, 1)):
        tables = cosine[..., :turned], sine[..., :turned]
        for found, right in zip(
            rows.rotate(query, key, *tables, per_pair), rotated(query, key, *tables, per_pair), strict=True
        ):
            assert (found - right).abs().max() <= 4e-6


@pytest.fixture
def _forgetful() -> Iterator[None]:
    """The functions are looked for anew, then and afterwards."""
    functions.loaded.cache_clear()
    yield
    functions.loaded.cache_clear()


@pytest.mark.usefixtures("_forgetful")
def test_without_a_compiler_there_is_none_and_a_line_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CC", "/nowhere/cc")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert rows.kernel_for(torch.device("cpu"), torch.float32, rows.norm) is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "prompts run on torch's kernels, slower on the CPU"
    ]
