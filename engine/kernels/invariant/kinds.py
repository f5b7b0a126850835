"""How batch-invariant mode treats each of torch's functions."""

from __future__ import annotations

from typing import Any

import torch

_MOVES = frozenset(
    [
        "aminmax",
        "_local_scalar_dense",
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
        "all",
        "amax",
        "amin",
        "any",
        "arange",
        "argmax",
        "argmin",
        "argsort",
        "cat",
        "clone",
        "constant_pad_nd",
        "copy_",
        "copy",
        "count_nonzero",
        "embedding",
        "empty",
        "empty_like",
        "empty_strided",
        "equal",
        "fill_",
        "flip",
        "full",
        "full_like",
        "gather",
        "index",
        "index_copy",
        "index_copy_",
        "index_fill",
        "index_fill_",
        "index_select",
        "is_nonzero",
        "isin",
        "lift_fresh",
        "masked_scatter",
        "max",
        "min",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "nonzero",
        "one_hot",
        "ones",
        "ones_like",
        "record_stream",
        "repeat",
        "repeat_interleave",
        "resize_",
        "roll",
        "scalar_tensor",
        "scatter",
        "scatter_",
        "searchsorted",
        "select_scatter",
        "slice_scatter",
        "sort",
        "split_with_sizes",
        "stack",
        "topk",
        "tril",
        "triu",
        "unique_dim",
        "_unique2",
        "unsafe_split",
        "zero_",
        "zeros",
        "zeros_like",
    ]
)
"""Functions that move, compare or count numbers: nothing is rounded."""
PRODUCTS = frozenset({"mm", "addmm", "bmm"})
"""Functions of products, whose arguments are tensors; on `meta` nothing is computed."""
ROUNDING = PRODUCTS | {"sum", "mean", "cumsum", "norm", "softmax", "log_softmax", "layer_norm", "rms_norm"}
"""Kinds of functions whose result sizes follow from the sizes of their arguments."""
_ELEMENTWISE = frozenset({"hardswish", "hardswish_", "polar"})
"""Elementwise functions that torch does not mark as such."""
_KINDS = {
    "mm": "mm",
    "addmm": "addmm",
    "bmm": "bmm",
    "sum": "sum",
    "mean": "mean",
    "cumsum": "cumsum",
    "linalg_vector_norm": "norm",
    "_softmax": "softmax",
    "_log_softmax": "log_softmax",
    "native_layer_norm": "layer_norm",
    "_fused_rms_norm": "rms_norm",
    "index_add": "index_add",
    "index_add_": "index_add",
    "index_put": "index_put",
    "index_put_": "index_put",
    "bincount": "bincount",
}


def kind_of(func: Any) -> str:
    """The kind of a function: a move, elementwise, unknown, or the name of the mode's replacement."""
    namespace, _, name = func._schema.name.partition("::")
    if namespace != "aten":
        return "unknown"
    if name in _KINDS:
        return _KINDS[name]
    if func.is_view or (name in _MOVES and "reduce" not in func._overloadname):
        return "move"
    return "elementwise" if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE else "unknown"
