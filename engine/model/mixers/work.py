"""What a module takes of the device while it is at work, counted without numbers."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.model.mixers.mixer import Mixer
from engine.model.rows_apart import mapped

_ROWS = 256
"""Of one sequence: whole chunks of those that families cut it into."""


def work_row_bytes(mixer: Mixer) -> int:
    """Bytes that the module's tensors have at their most for each row of a prompt, beyond what it is given.

    To be called before it is attached, while its parameters are on `meta`. What single operations take besides is not
    seen.
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
    """Counts the bytes of the tensors that operations make, as long as there is a tensor on them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._now = 0
        self._views: dict[int, int] = {}
        """By memory: how many tensors are on it."""

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
