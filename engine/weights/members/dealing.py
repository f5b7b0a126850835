"""The order in which a process loads weights, alone or as one of several that divide the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext

from engine.weights.encoded.kept import KeptWeights
from engine.weights.read_ahead import FileSpan, Step, run_steps
from engine.weights.store import WeightStore


def bring(
    by_unit: Mapping[str, Iterable[tuple[Iterable[str], Step]]],
    store: WeightStore,
    kept: KeptWeights | None,
    follow: Callable[[FileSpan], None],
) -> Iterator[None]:
    """Run the loading steps of each unit that this process needs, one per iteration, until all units are complete.

    by_unit: the steps and their parameters by unit name, in the order of the sweep. At the end, this process also loads
    what other processes failed to load. `follow` is called for the parts of weight files that have been read.
    """

    def needed(unit: str) -> Iterator[Step]:
        return (step for names, step in by_unit[unit] if any(map(store.needs, names)))

    def dealt() -> Iterator[Step]:
        for unit in by_unit:
            store.arrivals.begin(store.placed[unit])
            yield from needed(unit) if kept is None else kept.steps(unit, list(needed(unit)))

    with kept or nullcontext():
        yield from run_steps(dealt(), follow)
        for left in store.arrivals.until_complete():
            for placed in left:
                if store.arrivals.take_over(placed):
                    yield from run_steps(needed(placed.unit.name), follow)
            yield
