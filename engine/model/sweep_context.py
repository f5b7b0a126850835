"""The state of a sweep that code inside a model's layers needs."""

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
    """The state of the current sweep for the attention function; the executor sets it before each layer call."""

    layer: int = 0
    probed: KVShape | None = None
    """What `probe_kv_shape` found since the current layer was called."""
    handed_on: int | None = None
    """Values in addition to hidden states that the layer called last on `meta` returned; None if there were none."""
    left: torch.dtype | None = None
    """The outputs of layers that were called on `meta`, where one returned a wider dtype than it was given."""
    is_plain: bool = True
    """Whether no probed layer has caps, sinks or a window."""
    reaches: dict[int, Reach] = field(default_factory=dict)
    """The tokens that a token attends to, by layer."""
    arithmetic: AbstractContextManager[Any] = field(default_factory=nullcontext)
    """The arithmetic mode in which the model's own code is called."""
    is_stock: bool = False
    """Whether the model's modules are to compute with functions of transformers alone."""
    is_checking: bool = False
    """Whether layers are called to check if rows interact outside attention, which then keeps them apart."""
    hands_masks: bool = False
    """Whether layers get a placeholder for a mask, which their indexers need."""
    handed_row_bytes: int = 0
    """The bytes per row that layers pass on in addition to the hidden state; 0 where there are none."""
    puts_down: bool = False
    """Whether layers are called with a mapping in which they store what later layers read."""
    attended: int = 0
    """While `is_checking`: how often the current layer has called attention."""
    ask_experts: Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    """Computes experts for several micro-batches at once; None: they are computed for the current one."""
    masks: MaskNotes = field(init=False)
    """The masks that the model made for the probed layers."""
    batch: Rows = field(init=False)
    cache: KVCache = field(init=False)
    states: StateCache = field(init=False)

    @property
    def is_batch_invariant(self) -> bool:
        """Whether a row's result must have the same bits whatever the rest of the batch."""
        return isinstance(self.arithmetic, BatchInvariant)

    def around_layer(self) -> AbstractContextManager[Any]:
        """The mode in which a layer is called whose modules are attached to the arithmetic."""
        return self.arithmetic.attached() if isinstance(self.arithmetic, BatchInvariant) else self.arithmetic

    def apart(self) -> AbstractContextManager[None]:
        """Inside, code of ours that a layer calls is computed as if it were called outside of it."""
        return self.arithmetic.apart() if isinstance(self.arithmetic, BatchInvariant) else nullcontext()

    def left_out(self) -> AbstractContextManager[None]:
        """Inside, torch's own functions compute, for one sequence alone."""
        return self.arithmetic.left_out() if isinstance(self.arithmetic, BatchInvariant) else nullcontext()

    def note(self, shape: KVShape, reach: Reach | None = None, *, is_plain: bool = False) -> None:
        """Store the findings about the current layer; raises `UnsupportedError` the second time."""
        if self.probed is not None:
            raise UnsupportedError("its layers attend more than once")
        self.probed = shape
        self.reaches[self.layer] = reach or Reach()
        self.is_plain &= is_plain
