"""Computes known texts twice while the weights pass once: as the engine's sweeps do, and by stock layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from engine.batch.micro_batch import MicroBatch
from engine.cache.key_value import KVCache
from engine.errors import NumericsError
from engine.model.causal_model import CausalModel
from engine.model.padded import PaddedBatch
from engine.model.stock import StockForward
from engine.model.stub import LayerCall
from engine.planning.limits import Limits
from engine.planning.planner import Plan
from engine.verification.chain import Chain, Layout, Table, lay_out_rows
from engine.verification.difference import TOLERANCES, Meter, RootMeanSquare, StageDifference, tolerance_of
from engine.verification.passes import pass_limits, passes
from engine.verification.replay import KINDS, BatchRows, Step, replay, rows_of
from engine.verification.router import has_router
from engine.verification.scored import Scored, Scoring
from engine.verification.text import Text
from engine.verification.weight_check import WeightCheck
from engine.weights.binding import parameter_of
from engine.weights.store import WeightStore
from engine.weights.stream import WeightStream
from engine.weights.unit_values import UnitValues


@dataclass(frozen=True, kw_only=True)
class Driven:
    """An opened model whose sweeps are compared; nobody else may run sweeps meanwhile."""

    model: CausalModel
    weights: WeightStore
    stream: WeightStream
    cache: KVCache
    plan: Plan
    limits: Limits
    share_prefix: bool
    window: int | None
    checkpoint: Path | None
    """The directory whose weight files the weights come from; None where they come from elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a comparison with stock layers found."""

    stages: list[StageDifference]
    """The embedding, every layer, and final norm and head, in their order."""
    scored: list[Scored]
    """Of each text, by stock layers from end to end, with the weights and the rounding of the cache that the engine
    computes with."""
    unencoded: list[Scored] | None
    """The same with the checkpoint's own weights and no rounding; None where nothing is encoded, or where the
    checkpoint has no other numbers."""
    attention: str
    """The stock attention: "sdpa" or "eager"."""
    tolerance: float
    """Of a row's relative difference."""
    has_compared_weights: bool
    num_passes: int
    """How often the weights have passed."""


class LayerwiseComparison:
    """Compares an opened model with stock layers that compute with the same weights, from the same input.

    Each layer's weights arrive once. Stock layers make of every text's hidden states the next ones; the engine's own
    micro-batches, cut by its scheduler, compute the layer from the same states, sweep by sweep: prefixes, prompts and
    decode steps with the cache. Device and host hold the layer in hand, as in a sweep, and hidden states.
    """

    def __init__(self, driven: Driven) -> None:
        self._driven = driven
        model, device = driven.model, driven.model.device
        self._dtype: torch.dtype = model.dtype
        self._stock = StockForward(model, driven.cache.codec)
        encodes = driven.weights.has_codes or driven.cache.codec is not None
        self._plain = StockForward(model) if encodes and driven.checkpoint is not None else None
        self._check = WeightCheck(driven.weights)
        self._names = ["embedding", *(f"layer {index}" for index in range(len(model.layers))), "head"]
        self._tolerance = tolerance_of(self._dtype, driven.cache.codec, rounds_inputs=model.rounds_inputs)
        self._meters = {name: Meter(self._tolerance, device, KINDS) for name in self._names[:-1]}
        self._meters["head"] = Meter(self._tolerance, device)
        self._losses = {name: RootMeanSquare(device) for name in self._names[1:-1]}
        self._scored: dict[int, Scored] = {}
        self._unencoded: dict[int, Scored] = {}

    @torch.no_grad()
    def run(self, texts: Sequence[Text], progress: Callable[[int, int], None] = lambda done, total: None) -> Findings:
        """Compare what the engine computes of `texts`; `progress` is told of stages that are done, and of how many.

        Raises `NumericsError` where stock layers make no finite logits, `UnsupportedError` where they cannot round as
        the cache does, and `CheckpointError` where weight files have changed.
        """
        driven, num_tables = self._driven, 2 if self._plain is None else 4
        limits = pass_limits(driven.plan, driven.limits, num_tables)
        parts = list(passes(texts, limits, self._dtype.itemsize, driven.window))
        for number, part in enumerate(parts):
            done = number * len(self._names)

            def tell(stage: int, done: int = done) -> None:
                progress(done + stage, len(parts) * len(self._names))

            try:
                self._pass({index: texts[index] for index in part}, on_device=limits.on_device, tell=tell)
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

    def _pass(self, texts: Mapping[int, Text], *, on_device: bool, tell: Callable[[int], None]) -> None:
        driven, model = self._driven, self._driven.model
        listed = list(texts.values())
        limits, room = driven.limits, driven.cache.room
        replayed = replay(listed, model, driven.plan.limits, limits, room, share_prefix=driven.share_prefix)
        fed = [text.fed(driven.window) for text in listed]
        layout = lay_out_rows(replayed.sequences, fed, limits.rows_per_batch)
        chains = [
            Chain(layout, stock, (self._table(layout, on_device), self._table(layout, on_device)))
            for stock in (self._stock, self._plain)
            if stock is not None
        ]
        stock, plain = chains[0], chains[1] if len(chains) > 1 else None
        values = None if driven.checkpoint is None else UnitValues(driven.checkpoint, model)
        try:
            driven.stream.acquire(0)
            if values is not None:
                self._check.embedding(values)
            ours = self._embed(replayed.steps, chains, layout)
            tell(1)
            for layer in range(len(model.layers)):
                if layer > 0:
                    driven.stream.acquire(layer)
                self._compare_layer(layer, stock, plain, ours, values)
                driven.stream.release(layer)
                for chain in chains:
                    chain.step()
                tell(layer + 2)
            driven.stream.acquire(len(model.layers))
            if values is not None:
                self._check.head(values)
            scored = self._head(listed, layout, stock, self._meters["head"])
            self._scored.update(zip(texts, scored, strict=True))
            if plain is not None:
                self._unencoded.update(zip(texts, self._head(listed, layout, plain, None), strict=True))
            driven.stream.release(len(model.layers))
            tell(len(self._names))
        finally:
            if values is not None:
                values.close()

    def _table(self, layout: Layout, on_device: bool) -> Table:
        model = self._driven.model
        return Table(layout.num_rows, model.hidden_size, self._dtype, model.device, on_device=on_device)

    def _embed(self, steps: Sequence[Step], chains: Sequence[Chain], layout: Layout) -> list[_Sweep]:
        """Embed everything both ways."""
        driven, model = self._driven, self._driven.model
        for chain in chains:
            for rectangle in layout.rectangles:
                driven.stream.look_up(rectangle.ids)
                chain.put_embedded(rectangle, *chain.stock.record(rectangle.ids.to(model.device)))
        ours = []
        for step in steps:
            batches = []
            with step.in_place():
                for batch in step.batches:
                    driven.stream.look_up(batch.ids)
                    with model.sweeping.arithmetic:
                        hidden, calls = model.record(batch.inputs())
                    rows = rows_of(batch, layout.first_row)
                    batches.append(_Batch(batch, calls, rows))
                    self._measure("embedding", rows, hidden, chains[0].before.take(rows.table), None)
            ours.append(_Sweep(step, batches))
        return ours

    def _compare_layer(
        self, layer: int, stock: Chain, plain: Chain | None, ours: Sequence[_Sweep], values: UnitValues | None
    ) -> None:
        driven, model, name = self._driven, self._driven.model, f"layer {layer}"
        unencoded = None if values is None else self._check.layer(layer, values)
        stock.compute(layer)
        if plain is not None and unencoded is not None:
            with self._bound(layer, unencoded):
                plain.compute(layer)
            for rectangle_rows in stock.all_rows():
                self._losses[name].add(stock.after.take(rectangle_rows), plain.after.take(rectangle_rows))
        model.sweeping.cache, model.sweeping.layer = driven.cache, layer
        for sweep in ours:
            driven.cache.stage_ahead(sweep.step.batches, [layer])
            with sweep.step.in_place():
                for each in sweep.batches:
                    model.sweeping.batch = each.batch
                    before = stock.before.take(each.rows.table)
                    with model.sweeping.around_layer():
                        after = model.layer(layer, before, each.calls[layer])
                    self._measure(name, each.rows, after, stock.after.take(each.rows.table), before)

    @contextmanager
    def _bound(self, layer: int, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Inside, a layer's parameters are the checkpoint's own."""
        model = self._driven.model
        unit = next(unit for unit in model.units if unit.name == f"layer.{layer}")
        if not self._driven.weights.has_codes:  # they are anyway
            yield
            return
        before = {name: module._parameters[attribute] for name, (module, attribute) in unit.owners.items()}
        try:
            for name, (module, attribute) in unit.owners.items():
                module._parameters[attribute] = parameter_of(values[name].to(model.device, model.state[name].dtype))
            yield
        finally:
            for name, (module, attribute) in unit.owners.items():
                module._parameters[attribute] = before[name]

    def _measure(
        self, name: str, rows: BatchRows, ours: torch.Tensor, theirs: torch.Tensor, before: torch.Tensor | None
    ) -> None:
        if rows.is_real is not None:
            real = rows.is_real.to(ours.device)
            ours, theirs, before = ours[real], theirs[real], None if before is None else before[real]
        self._meters[name].add(ours, theirs, before, rows.kinds)

    def _head(self, texts: Sequence[Text], layout: Layout, chain: Chain, meter: Meter | None) -> list[Scored]:
        """What the logits of each text say; with a meter, also compare with rows of several texts in one call."""
        model = self._driven.model
        most = max(1, self._driven.limits.logits_bytes // (8 * model.vocab_size))
        waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        scored = []

        def compare() -> None:
            if meter is not None and waiting:
                hidden, theirs = (torch.cat(parts) for parts in zip(*waiting, strict=True))
                with model.sweeping.arithmetic:
                    ours = model.head(hidden.flip(0)).flip(0)
                meter.add(ours, theirs)
            waiting.clear()

        for text, rows in zip(texts, layout.rows, strict=True):
            scoring = Scoring(text)
            for part in rows[text.first_asked :].split(most):
                hidden = chain.before.take(part)
                logits = model.head(hidden)
                scoring.add(logits)
                if sum(len(one) for one, _ in waiting) + len(part) > most:
                    compare()
                waiting.append((hidden, logits))
            scored.append(scoring.done())
            if not scored[-1].is_finite:
                raise NumericsError(
                    f"stock layers of transformers make logits in {str(self._dtype).removeprefix('torch.')} that are "
                    "not finite; verify with another dtype in the policy (float32 or bfloat16)"
                )
        compare()
        return scored


@dataclass(frozen=True)
class _Batch:
    """A micro-batch of the engine's, and which rows of the tables it has."""

    batch: MicroBatch | PaddedBatch
    calls: list[LayerCall]
    rows: BatchRows


@dataclass(frozen=True)
class _Sweep:
    step: Step
    batches: list[_Batch]
