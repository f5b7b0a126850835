"""Finds out, without weights, how a family is driven: its layers' outputs, attention, keys and values."""

from __future__ import annotations

from collections.abc import MutableMapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from engine.cache.shape import KVShape
from engine.errors import UnsupportedError, named
from engine.model.attention.mask import noting_masks
from engine.model.attention.probe import call_on_meta, probe_kv_shape
from engine.model.drivable import Drivable
from engine.model.indexers.choice import Choice
from engine.model.mixers.reference_code import reference_code
from engine.model.padded import CacheView, ProbingView
from engine.model.probing.asking import Asking
from engine.model.probing.attaching import attach_indexers, attach_mixers
from engine.model.probing.counted import check_padded_positions, positions_of
from engine.model.probing.forward import inputs_of, outer_zeros
from engine.model.probing.lengths import asks_lengths
from engine.model.probing.positions import Positions
from engine.model.rows_apart import check_rows_apart
from engine.model.stub import HandedOn, LayerCall
from engine.model.undrivable import UndrivableError

_ROWS = 3
"""The number of rows for the check that rows interact in attention alone."""

_KEYS = 4
"""The number of keys of a step whose padding is checked: one is padding, the last one is new."""


_WAYS = ((1, False), (3, False), (2, False), (2, True))
"""The numbers of values that a model may expect from its layers, and whether it may pass on the second one."""


@dataclass(frozen=True)
class _Failure:
    """Why one way to drive the family failed."""

    stage: int
    """How far it came: 0 in the model's forward, 1 in a layer, 2 through all layers, 3 for a reason with a name."""
    reason: str


def probe(model: Drivable) -> list[KVShape]:
    """The shapes of the keys and values of each layer, found by calling the layers on `meta`.

    It tries the family as one that uses the attention interface, then as one with its own attention
    (`model.is_padded`). Raises `UnsupportedError` with the reason of the attempt that came farthest.
    """
    name = f"{type(model.module).__name__} ({model.config.model_type})"
    failure: _Failure | None = None
    keeps_states = False
    is_batch_invariant = model.sweeping.is_batch_invariant
    for model.is_padded in (False, True):
        model.outer.asks_lengths, model.outer.positions = False, Positions()
        model.outer.passes_positions = not model.is_padded
        if model.is_padded:
            model.sweeping.arithmetic = nullcontext()  # only to tell why it is refused
            # What `from_pretrained` takes; the setter refuses families without the interface.
            model.config._attn_implementation = "sdpa" if model.module._supports_sdpa else "eager"
        for num_values, hands_on in _WAYS[:-1] if model.is_padded else _WAYS:
            model.recorder.num_values, model.recorder.hands_on = num_values, hands_on
            model.sweeping.hands_masks = False
            model.sweeping.handed_row_bytes = 0
            try:
                found = _attempt(model)
                if not isinstance(found, _Failure):
                    if model.is_padded:
                        check_padded_positions(model)
                    else:
                        model.outer.positions = positions_of(model)
                        model.outer.asks_lengths = not model.mixers and asks_lengths(model)
                    attach_mixers(model)
                    attach_indexers(model, is_batch_invariant)
                    _check_rows(model, found)
                    if model.is_padded:
                        _check_padding(model)
                        if is_batch_invariant:
                            raise UndrivableError(_known_to_vary(failure))
                    return found
            except UndrivableError as error:
                raise UnsupportedError(f"{name} cannot be run here: {error}") from None
            except UnsupportedError as error:
                found = _Failure(3, str(error))
            keeps_states |= bool(model.mixers)
            if failure is None or found.stage > failure.stage:
                failure = found
    assert failure is not None
    reason = failure.reason
    if model.module._is_stateful and not keeps_states and failure.stage < 3:
        reason = f"its layers keep a state that no cache of transformers' holds ({reason})"
    raise UnsupportedError(f"{name} cannot be run here: {reason}")


def _known_to_vary(before: _Failure | None) -> str:
    """Why a family that runs in padded micro-batches is not batch-invariant."""
    if before is not None and before.reason.startswith("batch-invariant"):
        return before.reason
    return (
        "batch-invariant: it carries its own attention, whose sums depend on the longest sequence of a batch; leave "
        "batch-invariant out"
    )


def _attempt(model: Drivable) -> list[KVShape] | _Failure:
    # Two rows, since some families make no mask for one.
    given = inputs_of(model, torch.zeros(1, 1 if model.is_padded else 2, dtype=torch.long))
    try:
        with outer_zeros(model), noting_masks() as model.sweeping.masks, model.sweeping.arithmetic:
            hidden, calls = model.record(given)
    except UnsupportedError:
        raise
    except Exception as error:
        return _Failure(0, _words(model, error))
    shapes: list[KVShape | None] = []
    stopped: _Failure | None = None
    model.mixers, model.indexers = {}, {}
    asking = Asking(model.sweeping, int(getattr(model.config.get_text_config(), "number_of_conv_states", 1)))
    for index, (layer, call) in enumerate(zip(model.layers, calls, strict=True)):
        try:
            with reference_code():
                shapes.append(_probe_layer(model, index, hidden, call, asking))
        except UnsupportedError:
            raise
        except Exception as error:
            shapes.append(None)
            what = "chooses by numbers before it attends, and " if isinstance(error, NotImplementedError) else ""
            reason = f"layer {index} ({type(layer).__name__}) {what}does not run without weights: {named(error)}"
            stopped = stopped or _Failure(1, reason)
    known = [shape for shape in shapes if shape is not None]
    if stopped is None and (known or model.mixers):  # the others keep nothing, if rows are seen to be apart
        return [KVShape.none() if shape is None else shape for shape in shapes]
    if stopped is not None:
        return replace(stopped, stage=2) if known else stopped
    return _Failure(2 if known or model.is_padded else 0, _without_keys(model, shapes))


def _probe_layer(model: Drivable, index: int, hidden: torch.Tensor, call: LayerCall, asking: Asking) -> KVShape | None:
    """What a layer keeps of a token, and its mixer if it keeps a state; None where it shows neither.

    Raises what keeps it from running before it has shown anything.
    """
    context, shape = model.sweeping, None
    context.layer = index
    try:
        with asking.within(model.layers[index]):
            shape = probe_kv_shape(model.layers[index], hidden, call)
    except Exception as error:  # what comes behind its state may need numbers
        if isinstance(error, UnsupportedError) or not asking.found:
            raise
    if len(asking.found) > 1:
        raise UnsupportedError(f"layer {index} keeps more than one state")
    if len(asking.indexers) > 1:
        raise UnsupportedError(f"layer {index} chooses its keys more than once")
    if model.recorder.num_values == 2 and context.handed_on != 0:  # the model may give it to the next layer
        row_bytes = None if call.handed is None else handed_row_bytes(call.handed.value, call.shape)
        if row_bytes is None:
            raise UnsupportedError("its layers hand on more than hidden states")
        context.handed_row_bytes = max(context.handed_row_bytes, row_bytes)
    if asking.indexers:
        model.indexers[index] = asking.indexers[0]
    if asking.found:
        model.mixers[index] = asking.found[0]
    return KVShape.none() if shape is None and asking.found else shape


def handed_row_bytes(value: Any, rows: tuple[int, int]) -> int | None:
    """The bytes per row that a layer passes on; None unless they are numbers of each row or chosen keys."""
    if isinstance(value, Choice):
        return value.kept_row_bytes
    is_of_rows = isinstance(value, torch.Tensor) and value.shape[:2] == rows
    return value.nbytes // (rows[0] * rows[1]) if is_of_rows else None


def one_of_each_kind(model: Drivable) -> list[int]:
    """The first layer of each kind, by its modules and by its entry in the config."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    first: dict[Any, int] = {}
    for index, layer in enumerate(model.layers):
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        first.setdefault((type(layer), kinds[index] if index < len(kinds) else None, modules), index)
    return list(first.values())


def _check_rows(model: Drivable, shapes: list[KVShape]) -> None:
    """Raise `UnsupportedError` where rows of a kind of layer interact outside its attention and its state.

    A layer that shows neither must be seen not to mix rows.
    """
    model.sweeping.is_checking, model.sweeping.attended = True, 0
    try:
        with outer_zeros(model):
            rows = torch.zeros(_ROWS, 1, dtype=torch.long) if model.is_padded else torch.zeros(1, _ROWS).long()
            hidden, together = model.record(inputs_of(model, rows))
            alone = [
                model.record(inputs_of(model, torch.full((1, 1), 0 if model.is_padded else at)))[1]
                for at in range(_ROWS)
            ]
        values = [value for call in together for value in (*call.args, *call.kwargs.values())]
        model.sweeping.puts_down = any(isinstance(value, MutableMapping) for value in values)
        for index in one_of_each_kind(model):
            model.sweeping.layer = index
            first = 0 if _hands_on(together[index]) else index
            calls = [(together[at], [each[at] for each in alone]) for at in range(first, index + 1)]
            layers = model.layers[first : index + 1]
            is_seen = check_rows_apart(layers, model.sweeping, hidden.shape[-1], calls)
            if not (is_seen or shapes[index].width or index in model.mixers):
                raise UnsupportedError(_without_keys(model, [shape if shape.width else None for shape in shapes]))
    finally:
        model.sweeping.is_checking = False


def _hands_on(call: LayerCall) -> bool:
    """Whether a layer's call has values that earlier layers stored for it, or pass on to it."""
    return any(isinstance(value, MutableMapping | HandedOn) for value in (*call.args, *call.kwargs.values()))


def _check_padding(model: Drivable) -> None:
    """Raise `UnsupportedError` where the mask of a step after a past does not hide left padding."""
    view = CacheView(ProbingView(model.sweeping, _KEYS))
    mask = torch.ones(1, _KEYS, dtype=torch.long)
    mask[0, 0] = 0
    given = inputs_of(model, torch.full((1, 1), _KEYS - 2)) | {"cache": view, "attention_mask": mask}
    with outer_zeros(model):
        _, calls = model.record(given)
    for call in calls:
        values = [*call.args, *call.kwargs.values()]
        masks = [x for x in values if isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[-2:] == (1, _KEYS)]
        # True means seen to some families and hidden to others; the new row itself is always seen.
        hides = [bool((x[..., 0].float() - x[..., -1].float()).abs().min() > 0.5) for x in masks]
        if masks and not any(hides):
            raise UnsupportedError("its mask does not hide the padding of a sequence that has keys in the cache")


def _without_keys(model: Drivable, shapes: list[KVShape | None]) -> str:
    """The message for layers that show no keys."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    silent = [index for index, shape in enumerate(shapes) if shape is None]
    named = sorted({str(kinds[index]) for index in silent if index < len(kinds)})
    told = f" ({', '.join(named)})" if named else ""
    which = "its layers" if len(silent) == len(shapes) else f"of its layers, {', '.join(map(str, silent))}"
    show = "shows" if len(silent) == 1 < len(shapes) else "show"
    return (
        f"{which}{told} {show} no keys and values, neither to transformers' attention interface nor to a cache, "
        "nor ask a cache of transformers' for a state; what they keep of a sequence is not known"
    )


def _words(model: Drivable, error: Exception) -> str:
    """Why the model's forward cannot be called with stubs for its layers, in words."""
    extra = _handed_on(model, model.recorder.calls)
    if extra:
        return extra
    if not model.outer.takes("input_ids"):
        return (
            f"its {type(model.module.base_model).__name__} takes no token ids by name: it wraps a part of another model"
        )
    if "unpack" in str(error):
        return f"its layers hand on more than hidden states ({named(error)})"
    if "meta" in str(error):
        return f"its forward reads weights of its embedding or layers in addition to calling them ({named(error)})"
    return f"its forward does not run with token ids, positions and stand-ins for its layers: {named(error)}"


def _handed_on(model: Drivable, calls: list[LayerCall]) -> str | None:
    """What the first layer returns in addition to hidden states, if that is why stubs fail."""
    if not calls or model.recorder.hidden is None:
        return None
    try:
        output = call_on_meta(model.layers[0], model.recorder.hidden, calls[0].args, calls[0].kwargs)
    except Exception:
        return None
    if not isinstance(output, tuple | list):
        return None
    count = sum(value is not None for value in output)
    return f"its layers hand on {count} values, not hidden states alone" if count > 1 else None
