"""A torch mode in which a model's own code computes every row with the same bits, whatever the rest of the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine.errors import UnsupportedError
from engine.kernels.invariant import sums
from engine.kernels.invariant.kinds import PRODUCTS, ROUNDING, kind_of
from engine.kernels.invariant.known_calls import KnownCalls, Seen, State, case_of, seen_in
from engine.kernels.invariant.pointwise import in_vectors
from engine.kernels.invariant.products import Products

_ALIGNMENT = 16
"""The address alignment, in bytes, at which CUDA's norm kernels read several numbers at once."""


class BatchInvariant(TorchDispatchMode):
    """Inside this mode, products, sums, norms and softmax are computed in an order that does not depend on other rows.

    Elementwise functions and functions that only move numbers are torch's own. All others raise `UnsupportedError`,
    since the order of their operations is not known.

    Attached modules compute in one step what the mode would intercept function by function.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._products = Products()
        self._is_on = False
        self._is_watching = False
        """Whether functions are intercepted; not so in calls of attached modules that are known."""
        self._seen = Seen.TOLD
        """The effect of the current call of an attached module so far."""
        self._calls = KnownCalls()
        self._known: dict[Any, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        kind = self._known.get(func)
        if kind is None:
            kind = self._known[func] = kind_of(func)
        if kind in ("move", "elementwise"):
            is_alike = kind == "move" or (isinstance(args[0], torch.Tensor) and args[0].is_cuda)
            passed = func(*args, **given) if is_alike else in_vectors(func, args, given)
            if self._seen is not Seen.TOLD:
                self._seen = max(self._seen, seen_in(func, args, given, passed))
            return passed
        if self._seen is not Seen.TOLD:
            self._seen = seen_in(func, args, given, rounds=True) if kind in ROUNDING else Seen.TOLD
        if kind in PRODUCTS and any(isinstance(x, torch.Tensor) and x.is_meta for x in args):
            return func(*args, **given)
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
        """Inside, attached modules compute as in the mode; functions outside of them are not intercepted."""
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

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Inside, the mode is off and nothing is intercepted: for calls that concern a single sequence."""
        was_on, self._is_on = self._is_on, False
        try:
            with plain_arithmetic():
                yield
        finally:
            self._is_on = was_on

    def attach(self, module: nn.Module) -> None:
        """Let a module compute in one step: linear layers, layer norms, and known calls of other modules.

        The functions of any other module are intercepted, until it is called in a way in which it was seen to move
        numbers and change them elementwise, aside from attached modules inside it.
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

    def _linear(self, module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
        if self._is_watching:
            with plain_arithmetic():
                return _multiplied(self._products, module, input)
        return _multiplied(self._products, module, input)

    def _norm_rows(self, module: nn.LayerNorm, input: torch.Tensor) -> torch.Tensor:
        with plain_arithmetic():
            sizes, by = module.normalized_shape, (module.weight, module.bias, module.eps)
            normed: torch.Tensor = self._layer_norm(torch.native_layer_norm, input, sizes, *by)[0]
            return normed

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        case = case_of(module, args, kwargs)
        seen = self._calls.get(case)
        if seen is Seen.QUIET:
            return self._call_unseen(forward, args, kwargs)
        if case is None or seen is not None:
            with self.apart():
                result = forward(*args, **kwargs)
        else:
            state = State(module)
            with self.apart(Seen.QUIET):
                result = forward(*args, **kwargs)
                seen = self._seen if state.is_still(module) else Seen.TOLD
            self._calls.put(case, seen)
        if seen is not Seen.ROUNDED and seen is not Seen.QUIET:  # what calls this module may know it, too
            self._seen = Seen.TOLD
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
    def apart(self, seen: Seen = Seen.TOLD) -> Iterator[None]:
        """Inside, functions are intercepted even in a known call, and do not count as a part of it.

        It is for code that is called from within an attached module and whose result sizes follow from other sizes.
        """
        was_watching, before = self._is_watching, self._seen
        self._seen = seen
        if not was_watching:
            self._watch()
        try:
            yield
        finally:
            self._seen = before
            if not was_watching:
                self._look_away()

    def _mm(self, func: Any, rows: torch.Tensor, matrix: torch.Tensor, *, out: torch.Tensor | None = None) -> Any:
        product = self._products.mm(rows, matrix)
        return product if out is None else out.copy_(product)

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


def _multiplied(products: Products, module: nn.Linear, rows: torch.Tensor) -> torch.Tensor:
    matrix, bias = module.weight.mT, module.bias
    if rows.ndim == 2:
        return products.mm(rows, matrix, bias)
    return products.mm(rows.flatten(0, -2), matrix, bias).view(*rows.shape[:-1], -1)


def plain_arithmetic() -> AbstractContextManager[Any]:
    """Inside, torch's functions are its own again, at full speed: for code that only moves or rounds numbers."""
    if not torch._C._len_torch_dispatch_stack():
        return nullcontext()  # nothing to keep away; where a mode is, `torch.compile` compiles nothing
    disabled: AbstractContextManager[Any] = torch._C._DisableTorchDispatch()
    return disabled


def _dims(terms: torch.Tensor, dim: Any = None) -> tuple[int, ...]:
    if dim is None or (not isinstance(dim, int) and not len(dim)):
        return tuple(range(terms.ndim))
    return (dim,) if isinstance(dim, int) else tuple(dim)
