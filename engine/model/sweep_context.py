"""What the code inside a model's layers needs to know of the sweep that calls them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from engine.batch.reach import Reach
from engine.errors import UnsupportedError
from engine.kernels.invariant.mode import BatchInvariant

if TYPE_CHECKING:
    import torch
    from torch import nn

    from engine.batch.rows import Rows
    from engine.cache.key_value import KVCache
    from engine.cache.shape import KVShape
    from engine.cache.state import StateCache
    from engine.model.attention.mask import MaskNotes


@dataclass
class SweepContext:
    """What the attention function needs to know of the current sweep; the executor sets it before each layer call."""

    layer: int = 0
    probed: KVShape | None = None
    """Found out by `probe_kv_shape` since the layer in hand was called."""
    handed_on: int | None = None
    """Values besides hidden states that the layer that was called on `meta` last returned; None if it did not."""
    left: torch.dtype | None = None
    """What layers that were called on `meta` left, where one left wider numbers than it was given."""
    is_plain: bool = True
    """Whether no layer that was probed has caps, sinks or a window."""
    reaches: dict[int, Reach] = field(default_factory=dict)
    """Of each layer, which tokens a token attends to."""
    arithmetic: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """What the model's own code is to be called in."""
    is_stock: bool = False
    """Whether the model's modules are to compute with functions of transformers alone."""
    is_checking: bool = False
    """Whether layers are called to see if rows meet outside attention, which then keeps them apart."""
    hands_masks: bool = False
    """Whether layers are called with something in place of a mask, which their indexers want."""
    handed_row_bytes: int = 0
    """What layers hand on of a row besides its hidden state, to the next one; 0 where they hand on nothing."""
    puts_down: bool = False
    """Whether layers are called with a mapping in which they put down what later layers read."""
    attended: int = 0
    """While `is_checking`: how often the layer in hand has attended."""
    ask_experts: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Computes experts for several micro-batches at once; None: they are computed for the one in hand."""
    masks: MaskNotes = field(init=False)
    """Those that the model made for the layers that are probed."""
    batch: Rows = field(init=False)
    cache: KVCache = field(init=False)
    states: StateCache = field(init=False)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's result must have the same bits whatever is computed beside it."""
        return isinstance(self.arithmetic, BatchInvariant)

    def around_layer(self) -> AbstractContextManager[Any]:
        """What a layer is to be called in, whose modules are attached to the arithmetic."""
        return self.arithmetic.attached() if isinstance(self.arithmetic, BatchInvariant) else self.arithmetic

    def apart(self) -> AbstractContextManager[None]:
        """Inside, code of ours that a layer calls is computed as if it was called outside."""
        return self.arithmetic.apart() if isinstance(self.arithmetic, BatchInvariant) else nullcontext()

    def left_out(self) -> AbstractContextManager[None]:
        """Inside, torch's own functions compute, for one sequence alone."""
        return self.arithmetic.left_out() if isinstance(self.arithmetic, BatchInvariant) else nullcontext()

    def note(self, shape: KVShape, reach: Reach | None = None, *, is_plain: bool = False) -> None:
        """Keep what the layer in hand has shown; raises `UnsupportedError` the second time."""
        if self.probed is not None:
            raise UnsupportedError("its layers attend more than once")
        self.probed = shape
        self.reaches[self.layer] = reach or Reach()
        self.is_plain &= is_plain
