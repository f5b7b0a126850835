"""A stock indexer of a layer, which chooses the keys that a token attends to by their index keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Cache

from engine.model.indexers.choice import Choice
from engine.model.mixers.call import Call, is_of_rows
from engine.model.mixers.work import Live
from engine.model.rows_apart import mapped
from engine.model.sweep_context import SweepContext
from engine.model.undrivable import UndrivableError

_MANY = 1 << 20
"""Keys that an indexer is called with, without numbers, to see how many of them it chooses."""


class Indexer:
    """Stands before a stock module that gives index keys to a cache of transformers' and chooses keys by them.

    The index keys of all rows of a micro-batch are computed in one call, which ends there. Keys are chosen for rows of
    one sequence at a time, with nothing padded, and only where there are more than it chooses. Where stock layers are
    called, so is the module, with no cache.
    """

    def __init__(
        self, module: nn.Module, call: Call, context: SweepContext, given: dict[str, Any], masks: frozenset[str]
    ) -> None:
        """call: of the module's own forward; given: its arguments, without numbers, but for the `masks` among them.

        Raises `UndrivableError` for a module that is not called for rows, or does not choose positions of keys.
        """
        self.module, self.given = module, given
        self._call, self._context, self._masks = call, context, masks
        lead = call.lead(given)
        for name, value in given.items():
            if not is_of_rows(value, lead):
                raise UndrivableError(f"its {self.kind}, which chooses keys, takes {name}, which is not of its rows")
        keys = self.keys_of(given)
        if keys.ndim != 3 or keys.shape[:2] != lead or not keys.is_floating_point():
            raise UndrivableError(f"its {self.kind} keeps index keys that are not [sequences, rows, numbers]")
        self.dim, self.dtype = keys.shape[2], keys.dtype
        """Of index keys."""
        (few, one_row), (more, three_rows) = self._tried(1, _MANY), self._tried(3, 2 * _MANY)
        if few != more:
            raise UndrivableError(f"its {self.kind} chooses a number of keys that depends on how many there are")
        self.top_k = few
        """Keys that are chosen for each row, where there are as many."""
        self.score_bytes = max(1, int(three_rows - one_row) // 2)
        """What a row's scores of a key take, about, while keys are chosen."""

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    def attach(self) -> None:
        """Let the module be called through this from now on."""
        self.module.__dict__["forward"] = self._forward

    def begin(self, given: dict[str, Any]) -> Choice:
        """What will be chosen for the rows of a call, once keys are asked for; its index keys are there."""
        return Choice(self, self._context.layer, given, self.keys_of(given)[0])

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._call.named(args, kwargs)
        if self._context.is_stock:
            return self._call.on(given, None)
        return self.begin({name: value for name, value in given.items() if name not in self._masks})

    def keys_of(self, given: dict[str, Any]) -> torch.Tensor:
        """The index keys `[sequences, rows, dim]` of rows."""
        cache = _TakingCache()
        try:
            self._call.on(given | dict.fromkeys(self._masks), cache)
        except _TakenError:
            assert cache.taken is not None
            return cache.taken
        raise UndrivableError(f"its {self.kind} does not give its index keys to its cache each time")

    def choose(self, given: dict[str, Any], keys: torch.Tensor) -> torch.Tensor:
        """Positions `[rows, top_k]`, or of all keys if there are fewer, that rows of one sequence attend to.

        given: of the rows alone, `[1, rows, …]`; keys: index keys `[1, tokens, dim]` of the sequence up to the last of
        these rows. Positions that come later than a row's are chosen only where too few come before.
        """
        num_rows, length = next(iter(given.values())).shape[1], keys.shape[1]
        positions = torch.arange(length, device=keys.device)
        seen = (positions <= positions[length - num_rows :, None])[None]
        masks = dict.fromkeys(self._masks, seen)
        chosen: torch.Tensor = self._call.on(given | masks, _GivingCache(keys))
        return chosen[0]

    def _tried(self, num_rows: int, length: int) -> tuple[int, float]:
        """How many of `length` keys are chosen for each row, and the most bytes that this takes for each key."""
        like = next(iter(self.given.values()))
        given = mapped(lambda rows: rows.new_empty(1, num_rows, *rows.shape[2:], device="meta"), self.given)
        keys = like.new_empty(1, length, self.dim, dtype=self.dtype, device="meta")
        masks = {name: torch.ones(1, num_rows, length, dtype=torch.bool, device="meta") for name in self._masks}
        with Live() as live:
            chosen = self._call.on(given | masks, _GivingCache(keys))
        if (
            not isinstance(chosen, torch.Tensor)
            or chosen.is_floating_point()
            or chosen.dtype == torch.bool
            or chosen.shape[:-1] != (1, num_rows)
            or not chosen.shape[-1] < length
        ):
            raise UndrivableError(f"its {self.kind} chooses keys in another way than by their positions")
        return chosen.shape[-1], live.most / length


class _TakenError(Exception):
    """There are index keys; nothing is to be chosen yet."""


class _TakingCache(Cache):
    """A cache that takes index keys, and ends the call."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.taken: torch.Tensor | None = None

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Take them."""
        self.taken = indexer_key_states
        raise _TakenError


class _GivingCache(Cache):
    """A cache that gives back index keys of the rows of a call and of those before them."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__(layers=[])
        self._keys = keys

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """All of them: those of the rows are among them, as the engine's cache keeps them."""
        return self._keys
