"""Files that hold pictures: which can be written, and how they are."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import ConfigError, InstallationError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")


def check_picture(path: Path, flag: str) -> None:
    """Raise `ConfigError` where no picture can be written at `path`, `InstallationError` where nothing can draw it."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{flag} {path}: name a file that ends in {' or '.join(SUFFIXES)}")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{flag} {path} cannot be written: name a file in a directory that is there")
    if importlib.util.find_spec("matplotlib") is None:
        raise InstallationError(f"{flag} needs matplotlib; run `pip install 'flexgen-helm[plot]'`")


@contextmanager
def picture(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches, written to `path` at the end; `ConfigError` where it cannot be written."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure
    try:
        with matplotlib.rc_context({"svg.hashsalt": "flexgen-helm", "svg.fonttype": "none"}):
            figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
