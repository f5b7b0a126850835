"""Protects: a module's functions are looked at unless it is called as when it only moved and changed single numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import companies
import pytest
import torch
from torch import nn

from engine.kernels.invariant import known_calls
from engine.kernels.invariant.mode import BatchInvariant

Change = Callable[[torch.Tensor], torch.Tensor]


class Watching(BatchInvariant):
    """Counts the functions that it sees."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


class Layer(nn.Module):
    """A norm, a product, and whatever `change` does in between."""

    def __init__(self, change: Callable[[Layer, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.change = change
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 8)
        self.matrix = nn.Parameter(torch.randn(8, 8))
        self.calls = 0
        self.kept: list[torch.Tensor] = []

    def forward(self, rows: torch.Tensor, more: Any = None) -> torch.Tensor:
        return rows + self.up(self.change(self, self.norm(rows)).relu())


class Scaled(nn.Module):
    """A module within a layer that adds numbers up."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows * self.weight / rows.abs().sum(-1, keepdim=True)


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_calls, "DEVICES", frozenset({"cpu"}))


def _attached(*modules: nn.Module) -> Watching:
    mode = Watching()
    for module in modules:
        for each in module.modules():
            if each is module or type(each) in (nn.LayerNorm, nn.Linear):
                mode.attach(each)
    return mode


@torch.no_grad()
def _seen(mode: Watching, layer: nn.Module, *args: Any) -> int:
    before = mode.count
    with mode.attached():
        layer(*args)
    return mode.count - before


def _counted(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    layer.calls += 1
    return rows if layer.calls < 5 else rows.mean(-1, keepdim=True) + rows


def _collected(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
    layer.kept.append(rows)
    return rows


QUIET: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
    "nothing": lambda layer, rows: rows,
    "halves turned": lambda layer, rows: torch.cat((-rows[:, 4:], rows[:, :4]), dim=-1) * 2.0,
    "a mask": lambda layer, rows: torch.where(rows > 0, rows, rows.new_zeros(())).to(torch.float64).float(),
}
LOUD: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {
    "a product": lambda layer, rows: rows @ layer.matrix,
    "a linear function": lambda layer, rows: nn.functional.linear(rows, layer.matrix),
    "a sum": lambda layer, rows: rows + rows.sum(-1, keepdim=True),
    "softmax": lambda layer, rows: rows.softmax(-1),
    "a branch": lambda layer, rows: rows if rows[0, 0] > 0 else rows.mean(0, keepdim=True) + rows,
    "a number": lambda layer, rows: rows * rows[0, 0].item(),
    "rows chosen by number": lambda layer, rows: torch.cat((rows[rows[:, 0] > 0], rows))[: len(rows)],
    "places": lambda layer, rows: rows.index_select(0, torch.nonzero(rows[:, 0] > -9)[:, 0]),
    "equal numbers": lambda layer, rows: rows if torch.equal(rows, rows) else -rows,
    "a count of calls": _counted,
    "a list": _collected,
}


@pytest.mark.parametrize("change", QUIET)
def test_a_layer_that_moves_and_changes_single_numbers_is_looked_at_once(change: str) -> None:
    layer = Layer(QUIET[change])
    plain = Layer(QUIET[change])
    plain.load_state_dict(layer.state_dict())
    mode = _attached(layer)
    assert _seen(mode, layer, torch.randn(5, 8)) > 0
    for _ in range(3):
        rows = torch.randn(5, 8)
        assert _seen(mode, layer, rows) == 0
        with torch.no_grad(), mode:
            found, alone = layer(rows), torch.cat([layer(row[None]) for row in rows])
        assert torch.equal(found, alone)
        torch.testing.assert_close(found, plain(rows))


@pytest.mark.parametrize("change", LOUD)
def test_any_other_layer_is_looked_at_whenever_it_is_called(change: str) -> None:
    layer = Layer(LOUD[change])
    mode = _attached(layer)
    assert all(_seen(mode, layer, torch.randn(5, 8)) > 0 for _ in range(6))


@torch.no_grad()
def test_a_hidden_product_keeps_its_bits_in_any_company() -> None:
    layer = Layer(LOUD["a product"])
    mode = _attached(layer)
    rows = torch.randn(70, 8)
    for _ in range(3):
        with mode.attached():
            assert torch.equal(layer(rows), torch.cat([layer(row[None]) for row in rows]))


@pytest.mark.parametrize(
    "other",
    [
        (torch.randn(6, 8),),
        (torch.randn(8, 5).T,),
        (torch.randn(5, 8), 2),
        (torch.randn(5, 8), True),
        (torch.randn(5, 8), {"more": [torch.ones(2)]}),
    ],
)
def test_a_call_of_another_form_is_looked_at(other: tuple[Any, ...]) -> None:
    layer = Layer(QUIET["nothing"])
    mode = _attached(layer)
    for _ in range(2):
        _seen(mode, layer, torch.randn(5, 8), 1)
    assert _seen(mode, layer, *other) > 0
    assert _seen(mode, layer, *other) == 0
    assert _seen(mode, layer, torch.randn(5, 8), 1) == 0


def test_what_may_hold_anything_is_looked_at_always(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(QUIET["nothing"])
    mode = _attached(layer)
    assert all(_seen(mode, layer, torch.randn(5, 8), object()) > 0 for _ in range(3))
    monkeypatch.setattr(known_calls, "DEVICES", frozenset({"cuda"}))  # a host reads its own memory unseen
    assert all(_seen(mode, layer, torch.randn(5, 8), "host") > 0 for _ in range(3))


def test_a_module_within_that_adds_up_is_looked_at_alone() -> None:
    scaled = Scaled()
    layer = Layer(lambda layer, rows: scaled(rows).neg().neg())
    mode = _attached(layer, scaled)
    whole = _seen(mode, layer, torch.randn(5, 8))
    within = _seen(mode, layer, torch.randn(5, 8))
    assert 0 < within < whole
    assert _seen(mode, layer, torch.randn(5, 8)) == within


def test_what_a_module_within_tells_is_told_to_the_layer() -> None:
    class Chooser(nn.Module):
        def forward(self, rows: torch.Tensor) -> Any:
            return rows.argmax(-1).tolist() if rows.ndim == 1 else int(rows[0].argmax())

    chooser = Chooser()
    layer = Layer(lambda layer, rows: rows if chooser(rows) < 4 else rows.mean(0, keepdim=True) + rows)
    mode = _attached(layer, chooser)
    alone = _seen(mode, chooser, torch.randn(5, 8))
    assert all(_seen(mode, layer, torch.randn(5, 8)) > alone for _ in range(4))


def test_code_that_is_called_apart_is_looked_at_and_counts_for_nothing() -> None:
    def attend(layer: Layer, rows: torch.Tensor) -> torch.Tensor:
        with mode.apart():
            return rows @ layer.matrix

    layer = Layer(attend)
    mode = _attached(layer)
    whole = _seen(mode, layer, torch.randn(5, 8))
    assert 0 < _seen(mode, layer, torch.randn(5, 8)) < whole


@torch.no_grad()
def test_an_attached_module_is_torchs_own_outside_the_mode() -> None:
    layer, rows = Layer(QUIET["nothing"]), torch.randn(5, 8)
    expected = layer(rows)
    mode = _attached(layer)
    assert torch.equal(layer(rows), expected)
    assert mode.count == 0


def test_a_call_that_fails_leaves_nothing_known() -> None:
    layer = Layer(LOUD["a product"])
    mode = _attached(layer)
    layer.change = lambda layer, rows: rows.cumprod(0)
    for _ in range(2):
        with pytest.raises(Exception, match="cumprod"):
            _seen(mode, layer, torch.randn(5, 8))
    layer.change = QUIET["nothing"]
    assert _seen(mode, layer, torch.randn(5, 8)) > 0
    assert torch.ones(2).cumprod(0).sum() == 2  # the mode is left


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_company_changes_no_bit_of_layers_that_are_not_looked_at(dtype: str, build: Callable[[str], Path]) -> None:
    """OPT's layers add, multiply and take the larger number, which rounds alike in a vector and alone."""
    policy = {"device": "cpu", "dtype": dtype, "batch-invariant": True}
    assert companies.num_changed(build("opt"), companies.make_jobs(10, 100), policy, 4) == 0
