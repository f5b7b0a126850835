"""Finds the module of a layer that asks its cache for a state, or for index keys, without numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from engine.errors import UnsupportedError
from engine.model.indexers.choice import Choice
from engine.model.indexers.indexer import Indexer
from engine.model.mixers.call import Call, cache_name, is_of_rows
from engine.model.mixers.mixer import Mixer, without_states
from engine.model.mixers.states import States, StatesCache
from engine.model.probing.lengths import settings_of
from engine.model.sweep_context import SweepContext


class Asking:
    """Finds the innermost modules of a layer that ask for states or index keys, while it is called on `meta`."""

    def __init__(self, context: SweepContext, num_states: int) -> None:
        """num_states: the most states of a kind that a module may keep."""
        self._context, self._num_states = context, num_states
        self.found: list[Mixer] = []
        """The mixers in the layer that was called last."""
        self.indexers: list[Indexer] = []
        """The indexers in that layer."""
        self._known: dict[Any, Indexer] = {}
        """One of each kind, from any layer."""

    @contextmanager
    def within(self, layer: nn.Module) -> Iterator[None]:
        """Inside, every module of `layer` that takes a cache is tried with one that notes what is asked of it."""
        self.found, self.indexers = [], []
        modules = [module for module in layer.modules() if module is not layer and cache_name(module.forward)]
        forwards = {module: module.forward for module in modules}
        for module, forward in forwards.items():
            module.__dict__["forward"] = self._trying(module, forward)
        try:
            yield
        finally:
            for module in modules:
                del module.__dict__["forward"]

    def _trying(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        call = Call(forward)

        def trying(*args: Any, **kwargs: Any) -> Any:
            states = _NotingStates(self._num_states)
            cache = _NotingCache(states)
            given = call.named(args, kwargs)
            found, indexers, context = list(self.found), list(self.indexers), self._context
            shown = context.probed, context.is_plain
            try:
                output = call.on(given, cache)
            except _ChoosesError:
                return self._choice(module, call, given)
            except Exception:
                if cache.is_given and not cache.is_attended:
                    raise
            else:
                if cache.is_given:
                    self.found.append(self._mixer(module, call, given, states, output))
                    return output
            if cache.is_given:
                raise UnsupportedError(f"its {type(module).__name__} keeps a state and attends at once")
            # It asks for keys alone, if for anything: it is called as the layer calls it.
            self.found, self.indexers = found, indexers
            context.probed, context.is_plain = shown
            return forward(*args, **kwargs)

        return trying

    def _choice(self, module: nn.Module, call: Call, given: dict[str, Any]) -> Choice:
        """The module, as an indexer, returns a placeholder for the keys that it chooses."""
        masks = frozenset(name for name, value in given.items() if self._context.masks.knows_base(value))
        given = {name: value for name, value in given.items() if name not in masks}
        settings = settings_of(module)
        indexer = Indexer(module, call, self._context, given, masks, self._known.get(settings))
        self._known.setdefault(settings, indexer)
        self.indexers.append(indexer)
        return indexer.begin(given)

    def _mixer(self, module: nn.Module, call: Call, given: dict[str, Any], states: States, output: Any) -> Mixer:
        """The module as a mixer with the states that it left; refuses one that cannot be called for single groups."""
        kind, lead = type(module).__name__, call.lead(given)
        for name, value in given.items():
            if not is_of_rows(value, lead):
                raise UnsupportedError(f"its {kind}, which keeps a state, takes {name}, which is not of its rows alone")
        held, output = states.held(), without_states(output, states)
        if not held or any(len(tensor) != lead[0] for tensor in held.values()) or not is_of_rows(output, lead):
            raise UnsupportedError(f"its {kind} keeps a state that is not of each sequence by itself")
        return Mixer(module, call, self._context, states.shape(), self._num_states, given, output)


class _AttendsError(Exception):
    """Raised when the module wants keys and values: it does not keep a state instead."""


class _ChoosesError(Exception):
    """Raised when the module stores index keys, to choose keys by them."""


class _NotingStates(States):
    """A layer of such a cache, which may be of a family's own class."""

    def update_index(self, *_: Any, **__: Any) -> Any:
        """Refuse index keys."""
        raise _ChoosesError


class _NotingCache(StatesCache):
    """A cache of one layer's states, which notes whether states are stored in it."""

    def __init__(self, states: States) -> None:
        super().__init__(states)
        self.is_given = self.is_attended = False

    def update(self, *_: Any, **__: Any) -> Any:
        """Refuse keys and values."""
        self.is_attended = True
        raise _AttendsError

    def update_indexer(self, *_: Any, **__: Any) -> Any:
        """Refuse index keys."""
        raise _ChoosesError

    def update_conv_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same method as in transformers' caches."""
        self.is_given = True
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The same method as in transformers' caches."""
        self.is_given = True
        return super().update_recurrent_state(*args, **kwargs)

    def _set(self, what: str, layer_idx: int, state: torch.Tensor) -> None:
        self.is_given = True
        super()._set(what, layer_idx, state)
