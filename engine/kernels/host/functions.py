"""Our C functions over float32 numbers on the host."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from pathlib import Path

from engine.kernels.host import library

_LOG = logging.getLogger(__name__)
_HERE = Path(__file__).parent


@cache
def loaded() -> ctypes.CDLL | None:
    """The compiled functions; None (after one log line) where they are not available."""
    try:
        library.on_torch_threads()
        return ctypes.CDLL(str(library.compiled("host", sorted(_HERE.glob("*.c")), sorted(_HERE.glob("*.h")))))
    except library.FAILURES as error:
        _LOG.warning("prompts run on torch's kernels, slower on the CPU: %s", library.reason_of(error))
        return None
