"""Stubs that replace decoder layers while the model's own forward is called."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from engine.model.undrivable import UndrivableError


@dataclass(frozen=True)
class Streams:
    """The dimensions of a row's hidden states, if they are more than one vector."""

    before: tuple[int, ...] = ()
    """The dimensions before sequences and rows: `[*before, sequences, rows, *behind]`."""
    behind: tuple[int, ...] = ()

    @property
    def are_several(self) -> bool:
        """Whether there is more than one vector."""
        return len(self.before) + len(self.behind) > 1

    @property
    def width(self) -> int:
        """The number of elements of a row."""
        return prod((*self.before, *self.behind))

    def laid_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[sequences, rows, numbers]` in the shape that the layers take."""
        if not self.are_several:
            return hidden
        whole = hidden.unflatten(-1, (*self.before, *self.behind))
        laid: torch.Tensor = whole.movedim(tuple(range(2, 2 + len(self.before))), tuple(range(len(self.before))))
        return laid

    def flat(self, states: torch.Tensor) -> torch.Tensor:
        """The layers' output as `[sequences * rows, numbers]`."""
        moved = states.movedim(tuple(range(len(self.before))), tuple(range(2, 2 + len(self.before))))
        return moved.flatten(0, 1).flatten(1)


@dataclass(eq=False)
class HandedOn:
    """The placeholder of what a layer returns in addition to hidden states, where the model passes it on."""

    value: Any = None


@dataclass(frozen=True)
class LayerCall:
    """The arguments of the model's call of one of its layers, except the hidden states."""

    shape: tuple[int, int]
    """The sequences and rows of the hidden states: `[1, rows]` packed, `[segments, rows]` padded."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: Streams = Streams()
    handed: HandedOn | None = None
    """What the layers of one forward pass on to each other; None where they pass on hidden states alone."""

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The layer's arguments other than hidden states, once the layer before it has been called."""

        def actual(value: Any) -> Any:
            return value.value if isinstance(value, HandedOn) else value

        return tuple(map(actual, self.args)), {key: actual(value) for key, value in self.kwargs.items()}

    def states_of(self, output: Any) -> torch.Tensor:
        """The hidden states of a layer's output; everything else is kept for the next layer."""
        if not isinstance(output, tuple | list):
            states: torch.Tensor = output
            return states
        if self.handed is not None:
            self.handed.value = output[1]
        return output[0]  # type: ignore[no-any-return]

    def laid_out(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states `[rows, numbers]` in the shape that the layer takes."""
        return self.streams.laid_out(hidden.unflatten(0, self.shape))


@dataclass
class CallRecorder:
    """The state that the stubs of one model share: the recorded calls, or the hidden states to inject."""

    num_layers: int
    num_values: int = 1
    """The number of values that the model expects from its layers, hidden states first."""
    hands_on: bool = False
    """Whether the model may pass on the second of two values to the next layer."""
    handed: HandedOn | None = None
    """The placeholder of that value in the current forward."""
    rows: tuple[int, int] = (0, 0)
    """The sequences and rows of the input of the model's forward."""
    calls: list[LayerCall] = field(default_factory=list)
    hidden: torch.Tensor | None = None
    """The hidden states that the model gave to its first layer, and must give to all others."""
    streams: Streams = Streams()
    """The dimensions of a row's hidden states in the latest calls."""
    inject: torch.Tensor | None = None
    """Hidden states `[1, rows, width]` that every stub returns, instead of recording."""

    def begin(self, rows: tuple[int, int]) -> None:
        """Forget the calls of a forward, and expect one for `rows` tokens `(sequences, rows)`."""
        self.calls, self.hidden, self.rows = [], None, rows
        self.handed = HandedOn() if self.hands_on else None

    def note(self, index: int, hidden: torch.Tensor, call: LayerCall) -> None:
        """Record how layer `index` is called.

        Layers are driven one after the other, each with the output of the one before. Raises `UndrivableError` for a
        model that does anything else between them: it would be skipped silently.
        """
        if index != len(self.calls):
            raise UndrivableError(
                f"it calls layer {index} where layer {len(self.calls)} comes next: its layers do not run once each, in "
                "their order"
            )
        if call.shape != self.rows:
            asked, got = (" x ".join(map(str, shape)) for shape in (self.rows, call.shape))
            raise UndrivableError(f"its layers get {got} rows for {asked} tokens")
        if self.hidden is not None and not is_same(hidden, self.hidden):
            raise UndrivableError(f"it changes the hidden states between layers {index - 1} and {index}")
        self.hidden = hidden
        self.calls.append(call)

    def taken(self) -> tuple[torch.Tensor, list[LayerCall]]:
        """Return the hidden states before the first layer, and the call of every layer; forget them."""
        calls, hidden = self.calls, self.hidden
        self.begin(self.rows)
        if hidden is None or len(calls) != self.num_layers:
            raise UndrivableError(f"its forward calls {len(calls)} of its {self.num_layers} layers")
        return hidden, calls


def is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are one, or a whole view of it: the same memory in the same order."""
    if one is other:
        return True
    is_view = one._base is not None and one._base is (other if other._base is None else other._base)
    return is_view and (one.shape, one.stride(), one.storage_offset()) == (
        other.shape,
        other.stride(),
        other.storage_offset(),
    )


def _streams_of(hidden: Any, recorder: CallRecorder) -> Streams | None:
    """The dimensions of a layer's input per row; None if it is not hidden states."""
    if not isinstance(hidden, torch.Tensor) or hidden.ndim < 3:
        return None
    shape = tuple(hidden.shape)
    if hidden.ndim == 3:  # whatever rows it has: that is told when it is noted
        return Streams(behind=shape[2:])
    if recorder.inject is not None:
        return recorder.streams
    found = (at for at in range(hidden.ndim - 2) if shape[at : at + 2] == recorder.rows)
    place = next(found, None)
    return None if place is None else Streams(shape[:place], shape[place + 2 :])


class LayerStub(nn.Module):
    """Replaces a decoder layer: records how it is called, and returns its input, or the state to inject."""

    def __init__(self, index: int, layer: nn.Module, recorder: CallRecorder) -> None:
        super().__init__()
        self.__dict__.update(index=index, layer=layer, recorder=recorder)

    def __getattr__(self, name: str) -> Any:  # models read attributes of their layers (the kind of attention, …)
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return `hidden` `[sequences, rows, width]` in the form in which the model expects a layer's output."""
        recorder: CallRecorder = self.__dict__["recorder"]
        streams = _streams_of(hidden, recorder)
        if streams is None:
            if self.__dict__["index"] > 0:
                raise TypeError("a layer's output was not taken for what it is")
            shape = list(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            told = f"{shape}" if hidden is not None else f"nothing but {', '.join(kwargs)}"
            raise UndrivableError(f"its layers get {told} where [sequences, rows, width] of hidden states is expected")
        if recorder.inject is not None:
            hidden = recorder.streams.laid_out(recorder.inject)
        else:
            place = len(streams.before)
            rows = (hidden.shape[place], hidden.shape[place + 1])
            recorder.streams = streams
            recorder.note(self.__dict__["index"], hidden, LayerCall(rows, args, kwargs, streams, recorder.handed))
            if recorder.handed is not None:
                return hidden, recorder.handed
        return (hidden, *(None for _ in range(recorder.num_values - 1))) if recorder.num_values > 1 else hidden
