"""Protects: an adapter whose package is not installed says how to get it."""

from __future__ import annotations

import sys

import pytest

from engine.errors import InstallationError
from flexgen_helm.run import main


def test_serving_without_a_web_framework(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "none"]) == 2
    assert "pip install 'flexgen-helm[serve]'" in capsys.readouterr().err


def test_a_provider_without_its_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "inspect_ai", None)
    monkeypatch.setitem(sys.modules, "inspect_ai.model", None)
    monkeypatch.delitem(sys.modules, "flexgen_helm.adapters.inspect_provider", raising=False)
    with pytest.raises(InstallationError, match=r"pip install 'flexgen-helm\[inspect\]'"):
        import flexgen_helm.adapters.inspect_provider  # noqa: F401
