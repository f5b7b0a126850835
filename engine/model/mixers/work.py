"""Counts the device memory that a module's temporary tensors need, without computing."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.model.mixers.mixer import Mixer
from engine.model.rows_apart import mapped

_ROWS = 256
"""The rows of one sequence: whole chunks in the families that cut sequences into chunks."""


def work_row_bytes(mixer: Mixer) -> int:
    """The peak bytes of the module's temporary tensors per row of a prompt, without its arguments.

    It must be called before the module is attached, while its parameters are on `meta`. Memory that single operations
    use internally is not counted.
    """
    given = mapped(lambda like: like.new_empty(1, _ROWS, *like.shape[2:], device="meta"), mixer.given)
    buffers = [(module, dict(module._buffers)) for module in mixer.module.modules()]
    try:
        mixer.module.to("meta")
        with torch.no_grad(), torch.device("meta"), Live() as live:
            mixer.on(given, mixer.new_states())
    finally:
        for module, before in buffers:
            module._buffers.update(before)
    most: int = live.most
    return most // _ROWS


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, as long as each has a live view."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._now = 0
        self._views: dict[int, int] = {}
        """The number of live views by memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {id(each) for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        for made in tree_leaves(output):
            if isinstance(made, torch.Tensor) and id(made) not in given:
                self._hold(made)
        self.most = max(self.most, self._now)
        return output

    def _hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self._views:
            self._now += size
        self._views[key] = self._views.get(key, 0) + 1
        weakref.finalize(tensor, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._views[key] -= 1
        if not self._views[key]:
            del self._views[key]
            self._now -= size
