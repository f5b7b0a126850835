"""Computes known texts twice in one pass over the weights: as the engine's sweeps do, and by stock layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from engine.cache.key_value import KVCache
from engine.cache.state import StateCache
from engine.model.causal_model import CausalModel
from engine.model.continuation import can_continue
from engine.model.replayed.steps import Steps
from engine.model.stock import StockForward
from engine.planning.limits import Limits
from engine.planning.planner import Plan
from engine.schedule.cache_room import CacheRoom
from engine.verification.chain import Chain, Table
from engine.verification.difference import TOLERANCES, Meter, RootMeanSquare, StageDifference, tolerance_of
from engine.verification.embedded import EmbeddedBatch, EmbeddedSweep
from engine.verification.head import score
from engine.verification.layout import Layout, lay_out_rows
from engine.verification.passes import pass_limits, passes
from engine.verification.replay import KINDS, BatchRows, Replay, Step, replay, rows_of
from engine.verification.router import has_router
from engine.verification.scored import Scored
from engine.verification.text import Text
from engine.verification.weight_check import WeightCheck
from engine.weights.store import WeightStore
from engine.weights.stream import WeightStream
from engine.weights.unit_values import UnitValues


@dataclass(frozen=True, kw_only=True)
class Driven:
    """An opened model whose sweeps are compared; no other sweeps may run meanwhile."""

    model: CausalModel
    weights: WeightStore
    stream: WeightStream
    cache: KVCache
    states: StateCache
    room: CacheRoom
    plan: Plan
    limits: Limits
    steps: Steps
    share_prefix: bool
    window: int | None
    checkpoint: Path | None
    """The directory whose weight files hold the weights; None where they come from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """The result of a comparison with stock layers."""

    stages: list[StageDifference]
    """The embedding, every layer, and final norm and head, in order."""
    scored: list[Scored]
    """The scores of each text by stock layers from end to end, with the weights and the cache rounding that the
    engine uses."""
    unencoded: list[Scored] | None
    """The scores with the checkpoint's own weights and no rounding; None where nothing is compressed, or where the
    checkpoint has no other numbers."""
    attention: str
    """The stock attention: "sdpa" or "eager"."""
    tolerance: float
    """The tolerance of a row's relative difference."""
    has_compared_weights: bool
    num_passes: int
    """The number of passes over the weights."""


class LayerwiseComparison:
    """Compares an opened model with stock layers that compute with the same weights, from the same input.

    Each layer's weights arrive once. Stock layers compute every text's next hidden states; the engine's own
    micro-batches, cut by its scheduler, compute the layer from the same states, sweep by sweep: prefixes, prompts and
    decode steps with the cache. Steps that the engine replays are replays of a recording of that layer here. Device and
    host hold the current layer, as in a sweep, and hidden states.
    """

    def __init__(self, driven: Driven) -> None:
        self._driven = driven
        model, device = driven.model, driven.model.device
        self._dtype: torch.dtype = model.dtype
        self._stock = StockForward(model, driven.cache.codec)
        encodes = driven.weights.has_rounded or driven.cache.codec is not None
        self._plain = StockForward(model) if encodes and driven.checkpoint is not None else None
        self._check = WeightCheck(driven.weights)
        self._names = ["embedding", *(f"layer {index}" for index in range(len(model.layers))), "head"]
        self._tolerance = tolerance_of(self._dtype, driven.cache.codec, rounds_inputs=model.rounds_inputs)
        self._meters = {name: Meter(self._tolerance, device, KINDS) for name in self._names[:-1]}
        self._meters["head"] = Meter(self._tolerance, device)
        self._losses = {name: RootMeanSquare(device) for name in self._names[1:-1]}
        self._most_continued = 0
        """The most tokens of a text that stock layers are known to compute after a prefix as they do in one piece."""
        self._scored: dict[int, Scored] = {}
        self._unencoded: dict[int, Scored] = {}

    @torch.no_grad()
    def run(self, texts: Sequence[Text], progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
        """Compare the engine's computation of `texts`; `progress` gets the number of finished stages, and of all.

        Raises `NumericsError` where the logits of stock layers are not finite, `UnsupportedError` where they cannot
        round as the cache does, and `CheckpointError` where weight files have changed.
        """
        driven, model, num_tables = self._driven, self._driven.model, 2 if self._plain is None else 4
        kept_width = max(shape.width for shape in driven.model.kv_shapes) / driven.model.hidden_size
        limits = pass_limits(driven.plan, driven.limits, num_tables, kept_width)
        home = driven.model.device if limits.on_device else torch.device("cpu")
        parts = list(passes(texts, limits, model.hidden_dtype.itemsize, driven.window))
        for number, part in enumerate(parts):
            done = number * len(self._names)

            def tell(stage: int, done: int = done) -> None:
                progress(done + stage, len(parts) * len(self._names))

            try:
                self._pass({index: texts[index] for index in part}, home, tell)
            finally:
                driven.stream.release_all()
        driven.weights.check_source()
        is_rounded = self._tolerance > TOLERANCES[torch.float32]
        routes = [False, *(is_rounded and has_router(layer) for layer in driven.model.layers), False]
        stages = [
            self._meters[name].stage(name, may_reroute=may) for name, may in zip(self._names, routes, strict=True)
        ]
        return Findings(
            stages=[
                replace(
                    stage,
                    weights=self._check.found.get(stage.name),
                    compression=self._losses[stage.name].relative()
                    if self._plain is not None and stage.name in self._losses
                    else None,
                )
                for stage in stages
            ],
            scored=[self._scored[index] for index in range(len(texts))],
            unencoded=None if self._plain is None else [self._unencoded[index] for index in range(len(texts))],
            attention=self._stock.attention,
            tolerance=self._tolerance,
            has_compared_weights=bool(self._check.found),
            num_passes=len(parts),
        )

    def _pass(self, texts: Mapping[int, Text], home: torch.device, tell: Callable[[int], None]) -> None:
        """home: the device that stores hidden states."""
        driven, model = self._driven, self._driven.model
        listed = list(texts.values())
        limits, room = driven.limits, driven.room
        planned, share = driven.plan.limits, driven.share_prefix
        replayed = replay(listed, model, driven.steps, planned, limits, room, share_prefix=share)
        values = None if driven.checkpoint is None else UnitValues(driven.checkpoint, model)
        try:
            driven.stream.acquire(0)
            if values is not None:
                self._check.embedding(values)
            layout = self._lay_out(listed, replayed, home)
            chains = [
                Chain(layout, stock, (self._table(layout, home), self._table(layout, home)))
                for stock in (self._stock, self._plain)
                if stock is not None
            ]
            stock, plain = chains[0], chains[1] if len(chains) > 1 else None
            ours = self._embed(replayed.steps, chains, layout)
            tell(1)
            for layer in range(len(model.layers)):
                if layer > 0:
                    driven.stream.acquire(layer)
                with driven.steps.of_layers(range(layer, layer + 1)):
                    self._compare_layer(layer, stock, plain, ours, values)
                driven.stream.release(layer)
                for chain in chains:
                    chain.step()
                tell(layer + 2)
            driven.stream.acquire(len(model.layers))
            if values is not None:
                self._check.head(values)
            most = max(1, limits.logits_bytes // (8 * model.vocab_size))
            scored = score(listed, layout.rows, stock.before, model, most, self._meters["head"])
            self._scored.update(zip(texts, scored, strict=True))
            if plain is not None:
                unencoded = score(listed, layout.rows, plain.before, model, most, None)
                self._unencoded.update(zip(texts, unencoded, strict=True))
            driven.stream.release(len(model.layers))
            tell(len(self._names))
        finally:
            if values is not None:
                values.close()

    def _lay_out(self, texts: Sequence[Text], replayed: Replay, home: torch.device) -> Layout:
        """Assign rows to the texts' tokens; stock layers continue shared prefixes where they can."""
        driven, model = self._driven, self._driven.model
        fed = [text.fed(driven.window) for text in texts]
        places = {"device": model.device, "table_device": home}
        layout = lay_out_rows(replayed.sequences, fed, driven.limits.rows_per_batch, **places, continues=True)
        longest = layout.longest_continued
        if longest > self._most_continued:
            if not can_continue(model, self._stock, longest):
                return lay_out_rows(replayed.sequences, fed, driven.limits.rows_per_batch, **places, continues=False)
            self._most_continued = longest
        return layout

    def _table(self, layout: Layout, home: torch.device) -> Table:
        model = self._driven.model
        return Table(layout.num_rows, model.hidden_size, model.hidden_dtype, model.device, home)

    def _embed(self, steps: Sequence[Step], chains: Sequence[Chain], layout: Layout) -> list[EmbeddedSweep]:
        """Embed everything in both ways."""
        model = self._driven.model
        places = {"device": model.device, "table_device": chains[0].before.home}
        ids = [*(rectangle.ids for _ in chains for rectangle in layout.rectangles)]
        ids += [batch.ids for step in steps for batch in step.batches]
        looked_up = self._look_up(ids)
        for chain in chains:
            for rectangle in layout.rectangles:
                next(looked_up)
                chain.embed(rectangle)
        ours = []
        for step in steps:
            batches = []
            with step.in_place():
                for batch in step.batches:
                    next(looked_up)
                    with model.sweeping.arithmetic:
                        hidden, calls = model.record(batch.inputs())
                    rows = rows_of(batch, layout.first_row, **places)
                    batches.append(EmbeddedBatch(batch, calls, rows))
                    theirs = chains[0].before.take(rows.table)
                    self._measure("embedding", rows, rows.kinds, hidden, theirs, None)
            ours.append(EmbeddedSweep(step, batches))
        return ours

    def _look_up(self, ids: Sequence[torch.Tensor]) -> Iterator[None]:
        """Look up the token embeddings one batch after another, the next one while the device uses the last."""
        stream = self._driven.stream
        for each, following in zip_longest(ids, ids[1:]):
            stream.look_up(each)
            if following is not None:
                stream.look_up_ahead(following)
            yield

    def _compare_layer(
        self, layer: int, stock: Chain, plain: Chain | None, ours: Sequence[EmbeddedSweep], values: UnitValues | None
    ) -> None:
        driven, model, name = self._driven, self._driven.model, f"layer {layer}"
        with driven.stream.whole(layer):
            unencoded = None if values is None else self._check.layer(layer, values)
            stock.compute(layer)
            if plain is not None and unencoded is not None:
                with self._bound(layer, unencoded):
                    plain.compute(layer)
                for rectangle_rows in stock.all_rows():
                    self._losses[name].add(stock.after.take(rectangle_rows), plain.after.take(rectangle_rows))
        model.sweeping.cache, model.sweeping.states = driven.cache, driven.states
        for sweep in ours:
            driven.cache.stage_ahead(sweep.step.batches, [layer])
            driven.states.stage_ahead(sweep.step.batches, [layer])
            with sweep.step.in_place():
                for each in sweep.batches:
                    before = stock.before.take(each.rows.table)
                    after, kinds = each.through(layer, before, model, driven.steps)
                    self._measure(name, each.rows, kinds, after, stock.after.take(each.rows.table), before)

    def _bound(self, layer: int, values: Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
        """Inside, a layer's parameters are the checkpoint's own."""
        model = self._driven.model
        if not self._driven.weights.has_rounded:  # they are anyway
            return nullcontext()
        unit = next(unit for unit in model.units if unit.name == f"layer.{layer}")
        return unit.holding({name: values[name].to(model.device, model.state[name].dtype) for name in unit.owners})

    def _measure(
        self,
        name: str,
        rows: BatchRows,
        kinds: torch.Tensor,
        ours: torch.Tensor,
        theirs: torch.Tensor,
        before: torch.Tensor | None,
    ) -> None:
        if rows.real is not None:
            ours, theirs = ours.index_select(0, rows.real), theirs.index_select(0, rows.real)
            before = None if before is None else before.index_select(0, rows.real)
        self._meters[name].add(ours, theirs, before, kinds)
