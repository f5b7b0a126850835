"""Lets torch make few kernels of a chain of elementwise operations, where it can for a device."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any, Generic, TypeVar

import torch

_LOG = logging.getLogger(__name__)


T = TypeVar("T")


class Fused(Generic[T]):
    """A function of tensors, compiled by `torch.compile` at its first call on a device of `kinds`.

    Elsewhere, and where compiling fails (for want of Triton or of a C++ compiler; it is logged once), `otherwise` is
    called, or the function as it is. Compiling takes seconds, and torch keeps the result for later processes.
    """

    def __init__(
        self, function: Callable[..., T], kinds: Collection[str], *, otherwise: Callable[..., T] | None = None
    ) -> None:
        self._function = function
        self._kinds = kinds
        self._otherwise = otherwise or function
        self._compiled: Callable[..., T] | None = None
        self._fails = False

    def __call__(self, like: torch.Tensor, *arguments: Any) -> T:
        """The function's result; the first argument says on which device."""
        if self._fails or like.device.type not in self._kinds:
            return self._otherwise(like, *arguments)
        if self._compiled is None:
            self._compiled = torch.compile(self._function, dynamic=True)
        try:
            return self._compiled(like, *arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._fails = True
            reason = " ".join(str(error).split())[:200]
            _LOG.warning("%s is not compiled, and slower: %s", self._function.__name__.strip("_"), reason)
            return self._otherwise(like, *arguments)
