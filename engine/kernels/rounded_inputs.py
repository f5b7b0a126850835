"""Rounding of linear layers' inputs to 8 bits, as compressed-tensors' W8A8 checkpoints require it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

_FLOAT_MAX = 448.0
"""The largest number of float8_e4m3fn."""


@dataclass(frozen=True)
class InputRounding:
    """Rounds rows to a grid whose scale is that of the row, of a group in it, or of the layer; rows are independent."""

    is_float: bool
    """Whether the grid is float8_e4m3fn instead of integers."""
    is_static: bool
    """Whether the checkpoint has a scale for each layer; else the scale comes from the largest number of a token or
    group."""
    group: int | None = None
    """The numbers of a row that share a scale; None: all."""

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> InputRounding | None:
        """The rounding that a config's input_activations describe; None where it is not supported."""
        asked, group = (arguments.get("dynamic"), arguments.get("strategy")), arguments.get("group_size")
        kinds = {"int": False, "float": True}
        kind = arguments.get("type", "int")
        if arguments.get("num_bits") != 8 or not arguments.get("symmetric") or kind not in kinds:
            return None
        if asked == (True, "group") and type(group) is int and group > 0 and arguments.get("scale_dtype") is None:
            return cls(is_float=kinds[kind], is_static=False, group=group)
        if asked not in ((True, "token"), (False, "tensor")):
            return None
        return cls(is_float=kinds[kind], is_static=not asked[0])

    def attach(self, module: nn.Module, scale: torch.Tensor | None) -> None:
        """Make `module` round its inputs; `scale` is the checkpoint's, if there is one."""
        own = None if scale is None else scale.item()
        module.__dict__["rounds_inputs"] = True
        module.register_forward_pre_hook(lambda _, args: (self.rounded(args[0], own), *args[1:]))

    def rounded(self, rows: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        """`[..., width]` -> the same shape and dtype, like compressed-tensors' `fake_quantize`."""
        if self.group is not None:
            return replace(self, group=None).rounded(rows.unflatten(-1, (-1, self.group))).flatten(-2)
        least, greatest = (-_FLOAT_MAX, _FLOAT_MAX) if self.is_float else (-128.0, 127.0)
        if scale is None:
            scales = rows.abs().amax(-1, keepdim=True) / ((greatest - least) / 2)
            scales = scales.where(scales != 0, torch.finfo(rows.dtype).eps)
        else:
            scales = torch.full((1,), scale, dtype=rows.dtype, device=rows.device)
        grid = (rows / scales).clamp(least, greatest)
        return (grid.to(torch.float8_e4m3fn).to(rows.dtype) if self.is_float else grid.round()) * scales
