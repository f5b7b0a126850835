"""A mode of torch in which a model's own code computes every row with the same bits, whatever is beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import UnsupportedError
from engine.kernels.invariant import known_calls, sums
from engine.kernels.invariant.known_calls import KnownCalls, State, case_of, is_quiet
from engine.kernels.invariant.pointwise import in_vectors
from engine.kernels.invariant.products import Products

_ALIGNMENT = 16
"""Bytes at whose multiples a tensor begins for which CUDA's kernels of norms take several numbers at once."""
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
"""Functions that move numbers, compare them or count: nothing is rounded."""


class BatchInvariant(TorchDispatchMode):
    """Inside, products, sums, norms and softmax are computed in an order that no other row changes.

    Elementwise functions and those that only move numbers are torch's own. Any other raises `UnsupportedError`, since
    it is not known what its order depends on.

    Modules that are attached compute at once what the mode would see them compute function by function.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products = Products()
        self._is_on = False
        self._is_watching = False
        """Whether functions pass through here; not in calls of attached modules that are known."""
        self._is_quiet = False
        """Whether the call of an attached module in hand has only moved numbers and changed them one by one."""
        self._calls = KnownCalls()
        self._known: dict[Any, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        kind = self._known.get(func)
        if kind is None:
            kind = self._known[func] = _kind(func)
        if kind == "move" or (
            kind == "elementwise" and isinstance(args[0], torch.Tensor) and args[0].device.type in known_calls.DEVICES
        ):
            passed = func(*args, **given)
            self._is_quiet = self._is_quiet and is_quiet(func, args, given, passed)
            return passed
        self._is_quiet = False
        if kind in _PRODUCTS and any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
            return func(*args, **given)
        if kind == "elementwise":
            return in_vectors(func, args, given)
        found = getattr(self, f"_{kind}")(func, *args, **given)
        if found is NotImplemented:
            raise UnsupportedError(
                f"batch-invariant: this model computes {func}, of which it is not known whether a row's bits depend on "
                "the rows beside it; leave batch-invariant out"
            )
        return found

    def __enter__(self) -> BatchInvariant:
        self._is_on = True
        self._watch()
        return self

    def __exit__(self, *raised: object) -> None:
        self._is_on = False
        self._look_away()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, attached modules compute as they do in the mode; functions outside of them are not looked at."""
        self._is_on = True
        try:
            yield
        finally:
            self._is_on = False

    def _watch(self) -> None:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._is_watching = True

    def _look_away(self) -> None:
        self._is_watching = False
        super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def attach(self, module: nn.Module) -> None:
        """Let a module compute at once: linear layers, layer norms, and calls of others that are known.

        What any other module computes is looked at function by function, until it is called in a way in which it was
        seen to move numbers and change them one by one, aside from modules within it that are attached.
        """
        plain = module.forward
        at_once: Callable[..., Any] = partial(self._call, module, plain)
        if type(module) is nn.Linear:
            at_once = partial(self._linear, module)
        elif type(module) is nn.LayerNorm:
            at_once = partial(self._norm_rows, module)

        @wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return at_once(*args, **kwargs) if self._is_on else plain(*args, **kwargs)

        module.__dict__["forward"] = forward

    def _linear(self, module: nn.Linear, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        with plain_arithmetic():
            if input.ndim == 2:
                return self._products.mm(input, module.weight.mT, module.bias)
            rows = self._products.mm(input.flatten(0, -2), module.weight.mT, module.bias)
            return rows.view(*input.shape[:-1], -1)

    def _norm_rows(self, module: nn.LayerNorm, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
        with plain_arithmetic():
            sizes, by = module.normalized_shape, (module.weight, module.bias, module.eps)
            normed: torch.Tensor = self._layer_norm(torch.native_layer_norm, input, sizes, *by)[0]
            return normed

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        case = case_of(module, args, kwargs)
        was_quiet = self._calls.get(case)
        if was_quiet:
            return self._call_unseen(forward, args, kwargs)
        if case is None or was_quiet is False:
            with self.apart():
                return forward(*args, **kwargs)
        state = State(module)
        with self.apart(quiet=True):
            result = forward(*args, **kwargs)
            self._calls.put(case, self._is_quiet and state.is_still(module))
        return result

    def _call_unseen(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._is_watching:
            return forward(*args, **kwargs)
        self._look_away()
        try:
            return forward(*args, **kwargs)
        finally:
            self._watch()

    @contextmanager
    def apart(self, *, quiet: bool = False) -> Iterator[None]:
        """Inside, functions are looked at, whoever is known to call it; the call around it is as quiet as without.

        For code that is called from within an attached module.
        """
        was_watching, was_quiet = self._is_watching, self._is_quiet
        self._is_quiet = quiet
        if not was_watching:
            self._watch()
        try:
            yield
        finally:
            self._is_quiet = was_quiet
            if not was_watching:
                self._look_away()

    def _mm(self, func: Any, rows: torch.Tensor, matrix: torch.Tensor, **_: Any) -> Any:
        return self._products.mm(rows, matrix)

    def _addmm(self, func: Any, bias: Any, rows: Any, matrix: Any, *, beta: float = 1, alpha: float = 1) -> Any:
        return self._products.mm(rows, matrix, bias) if beta == alpha == 1 else NotImplemented

    def _bmm(self, func: Any, rows: Any, matrices: Any, out_dtype: torch.dtype | None = None) -> Any:
        return self._products.bmm(rows, matrices, out_dtype)

    def _sum(self, func: Any, terms: torch.Tensor, *args: Any, dtype: torch.dtype | None = None) -> Any:
        if not terms.is_floating_point() and not (dtype and dtype.is_floating_point):
            return func(terms, *args, **({} if dtype is None else {"dtype": dtype}))
        dims = _dims(terms, *args[:1])
        wide = sums.widened(terms if dtype is None else terms.to(dtype))
        return sums.total(wide, dims, keepdim=len(args) > 1 and args[1]).to(dtype or terms.dtype)

    def _mean(self, func: Any, terms: torch.Tensor, *args: Any, dtype: torch.dtype | None = None) -> Any:
        terms = terms if dtype is None else terms.to(dtype)
        return sums.mean(terms, _dims(terms, *args[:1]), keepdim=len(args) > 1 and args[1])

    def _cumsum(self, func: Any, terms: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
        wide = terms if dtype is None else terms.to(dtype)
        if wide.device.type == "cpu" or not wide.is_floating_point():
            return func(wide, dim)  # one row after the other
        return sums.cumulated(wide.movedim(dim, -1)).movedim(-1, dim)

    def _norm(self, func: Any, terms: torch.Tensor, order: Any = 2, dim: Any = None, keepdim: bool = False) -> Any:
        if order != 2:
            return NotImplemented
        wide = sums.widened(terms)
        return sums.total(wide * wide, _dims(terms, dim), keepdim=keepdim).sqrt().to(terms.dtype)

    def _softmax(self, func: Any, scores: torch.Tensor, dim: int, to_float: bool = False) -> Any:
        return sums.softmax(scores, dim).to(torch.float32 if to_float else scores.dtype)

    def _log_softmax(self, func: Any, scores: torch.Tensor, dim: int, to_float: bool = False) -> Any:
        return sums.log_softmax(scores, dim).to(torch.float32 if to_float else scores.dtype)

    def _layer_norm(self, func: Any, rows: torch.Tensor, sizes: Any, weight: Any, bias: Any, eps: float) -> Any:
        if rows.device.type not in ("cpu", "cuda"):
            return sums.layer_norm(rows, sizes, weight, bias, eps)
        rows = rows.contiguous()
        if rows.device.type == "cuda" and rows.data_ptr() % _ALIGNMENT:
            rows = rows.clone()
        return func(rows, sizes, weight, bias, eps)  # a thread or a block of threads for each row

    def _rms_norm(self, func: Any, rows: torch.Tensor, sizes: Any, weight: Any, eps: float | None) -> Any:
        return sums.rms_norm(rows, sizes, weight, eps)

    def _index_add(
        self, func: Any, target: torch.Tensor, dim: int, index: Any, source: Any, *, alpha: float = 1
    ) -> Any:
        if dim % target.ndim or alpha != 1:
            return NotImplemented
        if target.device.type == "cpu":
            return func(target, dim, index, source)  # in the order of the index
        put = torch.ops.aten.index_put_ if func._schema.is_mutable else torch.ops.aten.index_put
        return put.default(target, [index], source, True)  # sorted; what is added by atomics comes in any order

    def _index_put(self, func: Any, target: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
        return NotImplemented if accumulate else func(target, indices, values)

    def _bincount(self, func: Any, values: Any, weights: Any = None, minlength: int = 0) -> Any:
        return NotImplemented if weights is not None else func(values, None, minlength)

    def _unknown(self, func: Any, *_: Any, **__: Any) -> Any:
        return NotImplemented


def plain_arithmetic() -> AbstractContextManager[Any]:
    """Inside, torch's functions are its own again, at their own speed: for what only moves numbers or rounds them."""
    disabled: AbstractContextManager[Any] = torch._C._DisableTorchDispatch()
    return disabled


_PRODUCTS = frozenset({"mm", "addmm", "bmm"})
"""Whose arguments are tensors; on `meta` nothing is computed."""
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


def _kind(func: Any) -> str:
    namespace, _, name = func._schema.name.partition("::")
    if namespace != "aten":
        return "unknown"
    if name in _KINDS:
        return _KINDS[name]
    if func.is_view or (name in _MOVES and "reduce" not in func._overloadname):
        return "move"
    return "elementwise" if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE else "unknown"


def _dims(terms: torch.Tensor, dim: Any = None) -> tuple[int, ...]:
    if dim is None or (not isinstance(dim, int) and not len(dim)):
        return tuple(range(terms.ndim))
    return (dim,) if isinstance(dim, int) else tuple(dim)
