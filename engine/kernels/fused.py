"""Replaces a chain of elementwise operations by one kernel, where a device can have it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

_LOG = logging.getLogger(__name__)
_KINDS = ("cuda", "xpu")

T = TypeVar("T")


class Fused(Generic[T]):
    """A function of tensors, compiled at its first call on an accelerator: by `torch.compile`, or as `make` says.

    On the host it is called uncompiled, and so it is where compiling fails for want of Triton or a C compiler, which is
    logged once. Roundings to 16 bits are kept as written. Torch stores compiled code for later processes.
    """

    def __init__(self, function: Callable[..., T], make: Callable[[], Callable[..., T]] | None = None) -> None:
        self._function = function
        self._make = make or self._by_torch
        self._compiled: Callable[..., T] | None = None
        self._fails = False

    def __call__(self, like: torch.Tensor, *arguments: Any) -> T:
        """Call the function; the device is that of the first argument."""
        if self._fails or like.device.type not in _KINDS:
            return self._function(like, *arguments)
        try:
            if self._compiled is None:
                self._compiled = self._make()
            return self._compiled(like, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._fails = True
            reason = " ".join(str(error).split())[:200]
            _LOG.warning("%s runs as several kernels, slower: %s", self._function.__name__.strip("_"), reason)
            return self._function(like, *arguments)

    def _by_torch(self) -> Callable[..., T]:
        return torch.compile(self._function, dynamic=True, options={"emulate_precision_casts": True})
