"""The offloading engine: runs causal language models that do not fit into the GPU.

Importing this package is cheap: nothing here imports torch until `Engine` is accessed (PEP 562).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.errors import EngineError
from engine.job import Completion, Job, Sampling
from engine.policy import Policy

if TYPE_CHECKING:
    from engine.asking.generation import Generation
    from engine.engine import Engine

__distribution__ = "flexgen-helm"
"""Tells this package from any other distribution's top-level `engine`; the plugin checks it."""

__all__ = ["Completion", "Engine", "EngineError", "Generation", "Job", "Policy", "Sampling"]


def __getattr__(name: str) -> object:
    if name == "Engine":
        from engine.engine import Engine

        return Engine
    if name == "Generation":
        from engine.asking.generation import Generation

        return Generation
    raise AttributeError(f"module 'engine' has no attribute {name!r}")
