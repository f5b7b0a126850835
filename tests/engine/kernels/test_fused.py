"""Protects: what is compiled gives the same numbers, and where compiling fails the operations run as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from engine.kernels import fused
from engine.kernels.fused import Fused
from engine.kernels.invariant.mode import plain_arithmetic


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is taken for an accelerator."""
    monkeypatch.setattr(fused, "_KINDS", ("cpu",))


def twice(values: torch.Tensor, factor: int) -> torch.Tensor:
    return values * factor


def test_where_compiling_fails_it_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[str] = []

    def refuse(function: Callable[..., Any], **_: Any) -> Callable[..., Any]:
        def compiled(*_: Any) -> torch.Tensor:
            tried.append(function.__name__)
            raise RuntimeError("no C compiler\nwas found")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)
    function = Fused(twice)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert function(torch.ones(2), 2).tolist() == [2, 2]
    assert tried == ["twice"]
    assert [record.getMessage() for record in caplog.records] == [
        "twice runs as several kernels, slower: no C compiler was found"
    ]


def test_memory_that_runs_out_is_no_fault_of_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def exhausted(*_: Any) -> torch.Tensor:
        calls.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", lambda *_, **__: exhausted)
    function = Fused(twice)
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            function(torch.ones(2), 2)
    assert len(calls) == 2


def test_nothing_is_compiled_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_KINDS", ("cuda",))
    monkeypatch.setattr(torch, "compile", None)
    assert Fused(twice)(torch.ones(2), 3).tolist() == [3, 3]


def test_where_a_kernel_cannot_be_had_the_operations_run_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> Callable[..., torch.Tensor]:
        raise ImportError("no Triton here")

    function = Fused(twice, make)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert function(torch.ones(2), 2).tolist() == [2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "twice runs as several kernels, slower: no Triton here"
    ]


def test_what_is_compiled_can_be_where_arithmetic_is_plain() -> None:
    compiled = torch.compile(twice, backend="eager", dynamic=True)
    with plain_arithmetic():
        assert compiled(torch.ones(2), 2).tolist() == [2, 2]
