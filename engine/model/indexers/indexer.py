"""A stock indexer of a layer, which chooses the keys that a token attends to by their index keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import Cache

from engine.model.indexers.choice import Choice
from engine.model.mixers.call import Call, is_of_rows
from engine.model.mixers.states import EveryLayer
from engine.model.mixers.work import Live
from engine.model.rows_apart import mapped
from engine.model.sweep_context import SweepContext
from engine.model.undrivable import UndrivableError

_MANY = 1 << 20
"""The number of keys, without values, with which an indexer is called to see how many of them it chooses."""


class Indexer:
    """Wraps a stock module that gives index keys to a cache of transformers' and chooses keys by them.

    The index keys of all rows of a micro-batch are computed in one call, which ends there. Keys are chosen for rows of
    one sequence at a time, with nothing padded, and only where there are more than it chooses. Calls of stock layers
    reach the module directly, with no cache.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        context: SweepContext,
        given: dict[str, Any],
        masks: frozenset[str],
        like: Indexer | None = None,
    ) -> None:
        """call: of the module's own forward; given: its arguments, without numbers, except the `masks` among them.

        like: an indexer of another layer with the same settings, whose choice is known. Raises `UndrivableError` for a
        module that is not called for rows, or does not choose positions of keys.
        """
        self.module, self._call, self._context, self._masks = module, call, context, masks
        lead = call.lead(given)
        self._positions = frozenset(
            name for name, value in given.items() if isinstance(value, torch.Tensor) and value.shape[1:] == lead
        )
        """Its arguments that are several kinds of positions: `[kinds, sequences, rows]`."""
        self.given = self._by_rows(given)
        """Its arguments, without numbers; all begin with `[sequences, rows]`."""
        for name, value in self.given.items():
            if not is_of_rows(value, lead):
                raise UndrivableError(f"its {self.kind}, which chooses keys, takes {name}, which is not of its rows")
        keys = self._kept_by(self.given)
        if keys.ndim not in (3, 4) or keys[..., 0].numel() != lead[1] or not keys.is_floating_point():
            raise UndrivableError(f"its {self.kind} keeps index keys that are not [sequences, rows, numbers]")
        self._has_heads = keys.ndim == 4
        """Whether index keys are `[sequences, 1, rows, numbers]`."""
        self.dim, self.dtype = keys.shape[-1], keys.dtype
        """The size and dtype of index keys."""
        found: tuple[int, int, int] = self._measured() if like is None else (like.top_k, like.block, like.score_bytes)
        self.top_k: int = found[0]
        """The number of keys chosen for each row, where there are as many."""
        self.block: int = found[1]
        """The number of adjacent keys that are chosen together; blocks begin at its multiples."""
        self.score_bytes: int = found[2]
        """The approximate bytes of a row's score of a key while keys are chosen."""

    @property
    def kind(self) -> str:
        """The name of the module's class."""
        return type(self.module).__name__

    def attach(self) -> None:
        """From now on, calls of the module go through this wrapper."""
        self.module.__dict__["forward"] = self._forward

    def begin(self, given: dict[str, Any]) -> Choice:
        """Compute the index keys of a call's rows, and return the placeholder of their choice."""
        given = self._by_rows(given)
        return Choice(self, self._context.layer, given, self.keys_of(given))

    def _by_rows(self, given: dict[str, Any]) -> dict[str, Any]:
        return {name: value.movedim(0, -1) if name in self._positions else value for name, value in given.items()}

    def _on(self, given: dict[str, Any], cache: IndexCache) -> Any:
        as_called = {name: value.movedim(-1, 0) if name in self._positions else value for name, value in given.items()}
        return self._call.on(as_called, cache)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._call.named(args, kwargs)
        if self._context.is_stock:
            return self._call.on(given, None)
        return self.begin({name: value for name, value in given.items() if name not in self._masks})

    @property
    def wants_masks(self) -> bool:
        """Whether it needs a mask that hides later tokens, instead of positions alone."""
        return bool(self._masks)

    def keys_of(self, given: dict[str, Any]) -> torch.Tensor:
        """The index keys `[rows, dim]` of the rows of a micro-batch."""
        return self._kept_by(given).flatten(0, -2)

    def _kept_by(self, given: dict[str, Any]) -> torch.Tensor:
        taken: list[torch.Tensor] = []

        def take(keys: torch.Tensor) -> torch.Tensor:
            taken.append(keys)
            raise _TakenError

        with suppress(_TakenError):
            self._on(given | dict.fromkeys(self._masks), IndexCache(take))
        if not taken:
            raise UndrivableError(f"its {self.kind} does not give its index keys to its cache each time")
        return taken[0]

    def choose(self, given: dict[str, Any], keys: torch.Tensor) -> torch.Tensor:
        """Choose blocks of keys `[groups of heads, rows, blocks]` for the rows of one sequence, -1 for none.

        As many as it chooses, or all if there are fewer. given: of the rows alone, `[1, rows, …]`; keys: index keys
        `[tokens, dim]` of the sequence up to the last of these rows. Tokens after a row are chosen only where too few
        come before.
        """
        num_rows, length = next(iter(given.values())).shape[1], len(keys)
        positions = torch.arange(length, device=keys.device)
        seen = (positions <= positions[length - num_rows :, None])[None]
        return self._chosen_by(given | dict.fromkeys(self._masks, seen), keys).flatten(0, -3)

    def mask_of(self, chosen: torch.Tensor, length: int) -> torch.Tensor:
        """The result of `choose` as a mask over so many tokens: bool `[groups of heads, rows, tokens]`."""
        blocks = -(-length // self.block)
        mask = torch.zeros(*chosen.shape[:-1], blocks + 1, dtype=torch.bool, device=chosen.device)
        mask.scatter_(-1, torch.where((chosen < 0) | (chosen > blocks), blocks, chosen).long(), True)
        return mask[..., :blocks].repeat_interleave(self.block, dim=-1)[..., :length]

    def _chosen_by(self, given: dict[str, Any], keys: torch.Tensor) -> torch.Tensor:
        all_keys = keys[None, None] if self._has_heads else keys[None]
        chosen: torch.Tensor = self._on(given, IndexCache(lambda _: all_keys))
        return chosen if not isinstance(chosen, torch.Tensor) or chosen.ndim == 4 else chosen[:, None]

    def _measured(self) -> tuple[int, int, int]:
        """The number of keys it chooses, its block size, and the bytes of scores, found without numbers."""
        (few, one_row), (more, three_rows) = self._tried(1, _MANY), self._tried(3, 2 * _MANY)
        if few != more:
            raise UndrivableError(f"its {self.kind} chooses a number of keys that depends on how many there are")
        block = self._block_size(few)
        return few * block, block, max(1, int(three_rows - one_row) // 2)

    def _tried(self, num_rows: int, length: int) -> tuple[int, float]:
        """The number of blocks of `length` keys chosen for each row, and the most bytes that this takes per key."""
        like = next(iter(self.given.values()))
        given = mapped(lambda rows: rows.new_empty(1, num_rows, *rows.shape[2:], device="meta"), self.given)
        keys = like.new_empty(length, self.dim, dtype=self.dtype, device="meta")
        masks = {name: torch.ones(1, num_rows, length, dtype=torch.bool, device="meta") for name in self._masks}
        with Live() as live:
            chosen = self._chosen_by(given | masks, keys)
        if (
            not isinstance(chosen, torch.Tensor)
            or chosen.is_floating_point()
            or chosen.dtype == torch.bool
            or chosen.ndim != 4
            or (chosen.shape[0], chosen.shape[2]) != (1, num_rows)
            or chosen.shape[-1] > length
        ):
            raise UndrivableError(f"its {self.kind} chooses keys in another way than by their positions")
        return chosen.shape[-1], live.most / length

    def _block_size(self, most: int) -> int:
        """The number of keys of which it chooses one block, where it chooses several of many."""
        if most < 2 or most == _MANY:
            raise UndrivableError(f"its {self.kind} chooses {most} of {_MANY} keys, or of their blocks")
        one, two = 1, 2 if self._tried(1, 2)[0] == 2 else _MANY
        while two - one > 1:
            middle = (one + two) // 2
            one, two = (middle, two) if self._tried(1, middle)[0] == 1 else (one, middle)
        return one


class _TakenError(Exception):
    """Raised when index keys are there and the call is to end."""


class IndexCache(Cache):
    """A cache that receives index keys, by any method of transformers' caches, and returns others."""

    def __init__(self, update: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """update: maps the index keys of new rows to those of all tokens."""
        super().__init__(layers=EveryLayer([_IndexLayer(update)]))
        self._update = update

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """The same method as in transformers' caches."""
        return self._update(indexer_key_states)


class _IndexLayer:
    """The part of a cache layer that families use which keep index keys in one of their own."""

    def __init__(self, update: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.update_index = update

    def __getattr__(self, name: str) -> Any:
        """Nothing else is known of the cache then."""
        if name.startswith("_"):
            raise AttributeError(name)
        raise UndrivableError(f"its layers choose keys by an index, for which they ask their cache for {name}, too")
