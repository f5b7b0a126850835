"""Possible faults of an installation, each in one line with its remedy; imports neither HELM nor the engine."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util

PACKAGES = {"absl": "absl-py", "docx": "python-docx"}
"""Packages of HELM's scenarios and metrics whose names differ from those they are imported by."""
CURE_FOR_THE_PAIR = "run `pip install --force-reinstall torch torchvision`, or `pip uninstall -y torchvision`"


def torch_problem() -> str | None:
    """Say what is wrong when torch cannot be imported."""
    try:
        importlib.import_module("torch")
    except Exception as error:
        return f"torch cannot be imported ({_one_line(error)}); run `pip install --force-reinstall torch`"
    return None


def torchvision_problem() -> str | None:
    """Say what is wrong when torchvision is there but was built for another torch.

    transformers imports it for every model as soon as it is installed, so a wrong pair breaks text models too.
    """
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:
        pair = f"torchvision {version('torchvision')} does not work with torch {version('torch')}"
        return f"{pair} ({_one_line(error)}), so no model can be imported; {CURE_FOR_THE_PAIR}"
    return None


def lacks(error: ModuleNotFoundError) -> str:
    """Say which package is needed, and how to get it."""
    name = (error.name or "").partition(".")[0]
    return f"needs the package {name}; run `pip install {PACKAGES.get(name, name)}`"


def model_problem() -> str | None:
    """Say what would break every model, in one line with its cure."""
    return torch_problem() or torchvision_problem()


def version(distribution: str) -> str | None:
    """Version of an installed distribution, None if there is none."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(error: Exception) -> str:
    lines = str(error).split("\n")
    return f"{type(error).__name__}: {lines[0].strip()}"
