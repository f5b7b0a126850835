"""Loads a checkpoint's tensors, under whatever names they have, directly to the places of a model's parameters."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, dot_natural_key

from engine.checkpoint.adapters.changes import Change, changes_of
from engine.checkpoint.adapters.declared import ADAPTER_CONFIG
from engine.checkpoint.identity.weight_digest import WeightDigest
from engine.checkpoint.opened_weights import OpenedWeights
from engine.checkpoint.quantized.declared import check_numbers
from engine.checkpoint.tensors import tensor_places, tensors
from engine.errors import CheckpointError, UnsupportedError, named, shown
from engine.model.causal_model import CausalModel
from engine.reading import find_file
from engine.weights.encoded.kept import KeptWeights
from engine.weights.members.dealing import bring
from engine.weights.read_ahead import FileSpan, Step
from engine.weights.receiver import Nowhere, Receiver
from engine.weights.rounds import Load, Source, rounds_of
from engine.weights.store import WeightStore

_log = logging.getLogger(__name__)


def load_checkpoint(
    path: Path, store: WeightStore, kept: KeptWeights | None = None, *, with_digest: bool = True
) -> Iterator[None]:
    """Fill `store` from the weight files of `path`: checks now, and reads parameter by parameter while it is iterated.

    Names and layouts are translated by `transformers`' own conversion mapping (core_model_loading.py), one parameter at
    a time, and merged experts one expert at a time: beyond the placed weights this takes about one tensor of memory.
    Layers come in order, since the first sweep may run meanwhile. Units in the cache `kept` are read from there, others
    are written to it. The digest, if wanted, follows the reads, and reads the rest. Raises `CheckpointError` when
    parameters are missing or have another shape.
    """
    store.source = source = OpenedWeights(path)
    is_first = store.member is None or store.member.index == 0  # of several, one reads all files, once
    store.digest = digest = WeightDigest(path, source) if with_digest and is_first else None
    plan, unexpected = _planned(path, store)

    def follow(span: FileSpan) -> None:
        if digest is not None:
            digest.follow(span.file, span.first, span.end)

    steps = bring(plan.by_unit(), store, kept if plan.is_by_unit else None, follow)
    source.check_names()
    _tell_unread(path, store.model.module, unexpected)
    return _watched(steps, store, source, digest)


def check_checkpoint(path: Path, model: CausalModel) -> None:
    """Raise what `load_checkpoint` raises for weight files that do not fit `model`; reads no weights."""
    _planned(path, Nowhere(model))[0].check_missing()


def steps_by_unit(path: Path, receiver: Receiver) -> dict[str, list[tuple[set[str], Step]]]:
    """The steps that load each unit from the weight files of `path` to `receiver`, and their parameters, by unit name.

    Units come in the order of the sweep. Raises `CheckpointError` as `load_checkpoint` does.
    """
    return _planned(path, receiver)[0].by_unit()


def _planned(path: Path, receiver: Receiver) -> tuple[_Plan, set[str]]:
    """The plan of all reads, and the names of tensors that the model has no place for."""
    model, names = receiver.model, receiver.model.names
    plan = _Plan(path, receiver, _changes(path, model))
    packed = {source: target for target, whole in model.all_packed.items() for source in whole.parts}
    unread = {name for whole in model.packed.values() for name in whole.unread}
    parts: dict[str, list[tuple[str, Load]]] = {}
    merged: dict[str, tuple[WeightConverter, list[Source]]] = {}
    unexpected: set[str] = set()
    twins: list[tuple[str, Load, str]] = []
    for name, load in sorted(tensors(path), key=lambda entry: dot_natural_key(entry[0])):
        if name in packed:
            parts.setdefault(packed[name], []).append((name, load))
            continue
        if name in unread or name in model.elsewhere:
            continue
        target, pattern = names.target(name)
        if pattern is None:  # another stage may have it, and this one its twin
            twins += [(twin, load, name) for twin in model.twins.get(target, ())]
        if target not in model.state:
            if not names.has(target):
                unexpected.add(target)
        elif pattern is None:
            plan.add(target, load, name)
        else:
            merged.setdefault(target, (names.converter_of[pattern], []))[1].append((pattern, name, load))
    for target, (converter, sources) in merged.items():
        plan.add_converted(target, converter, sources)
    for target, found in parts.items():
        plan.add_packed(target, found)
    for twin, load, name in twins:
        if plan.lacks(twin):
            plan.add(twin, load, name)
    return plan, unexpected


def _changes(path: Path, model: CausalModel) -> dict[str, Change]:
    owners = {name: module for unit in model.units for name, (module, _) in unit.owners.items()}
    tied = (model.embedding_name, model.head_name) if model.is_tied else ()
    return changes_of(path, model.names, model.state, owners, tied=tied, packed=model.packed)


def _watched(
    steps: Iterator[None], store: WeightStore, source: OpenedWeights, digest: WeightDigest | None
) -> Iterator[None]:
    """Iterate `steps`; then check that the weight files are unchanged, and close them if the store is done."""
    try:
        yield from steps
        source.check()
        if digest is not None:
            digest.finish()
    except BaseException:
        if digest is not None:
            digest.close()  # who waits for it need not wait for the engine to be closed
        raise
    if not store.adopted_bytes:
        source.close()


def _tell_unread(path: Path, module: PreTrainedModel, names: set[str]) -> None:
    """Log what is not read: an adapter, and tensors without a parameter that the family does not expect to ignore."""
    if find_file(path / ADAPTER_CONFIG, CheckpointError):
        text = "flexgen-helm: the adapter that %s describes is not applied; put it into a separate directory to run it"
        _log.warning(text, path / ADAPTER_CONFIG)
    told: Any = SimpleNamespace(missing_keys=set(), unexpected_keys=names)
    module._adjust_missing_and_unexpected_keys(told)
    if left := sorted(told.unexpected_keys):
        text = "flexgen-helm: the weight files in %s hold %d tensors that %s does not know; they are not read, e.g. %s"
        _log.warning(text, path, len(left), type(module).__name__, ", ".join(map(shown, left[:3])))


class _Plan:
    """The reads for each parameter, which are checked before anything is read."""

    def __init__(self, path: Path, store: Receiver, changes: Mapping[str, Change]) -> None:
        """changes: the changes that an adapter makes, by parameter."""
        self._store = store
        self._changes = changes
        self._path = path
        self._places = tensor_places(path)
        self._steps: dict[str, Step] = {}
        """The steps by the (first) parameter that each loads."""
        self._brought: dict[str, set[str]] = {}
        """All parameters that a step loads, if several, by the first one."""
        self._unit_of = {name: unit.name for unit in store.model.units for name in unit.owners}
        self._missing = set(self._unit_of)
        self.is_by_unit = True
        """Whether no step loads parameters of several units."""

    def add(self, name: str, load: Load, source: str) -> None:
        """Plan to load a whole parameter, `source` in the checkpoint; a buffer is filled at once."""
        model = self._store.model
        tensor = load()  # mapped, not read
        check_numbers(self._path, source, tensor.dtype, model.state[name].dtype)
        self._check_shape(name, tensor.shape)
        if name in self._unit_of:
            self._steps[name] = self._step(name, tensor, source)
            self._missing.discard(name)
        elif name == model.head_name:
            pair = model.embedding_name
            if pair in self._missing:  # some checkpoints hold the pair under this name only
                self._steps.setdefault(pair, self._step(pair, tensor, source))
                self._missing.discard(pair)
        else:
            self._store.put_buffer(name, tensor)

    def lacks(self, name: str) -> bool:
        """Whether a parameter of the model has not been found so far."""
        return name in self._missing

    def _step(self, name: str, tensor: torch.Tensor, source: str) -> Step:
        """The step that loads a whole parameter, with an adapter's change, or without the part that stays on disk."""
        if (change := self._changes.get(name)) is not None:
            dtype = self._store.model.state[name].dtype
            read = [tensor, *change.tensors]
            return Step(lambda: self._put(name, change.apply(tensor, dtype)), read, self._spans([(source, tensor)]))
        if source in self._places:
            count = self._store.adopt(name, tensor.dtype, *self._places[source])
            tensor = tensor if count == tensor.numel() else tensor.reshape(-1)[:count]
        return Step(lambda: self._put(name, tensor), [tensor], self._spans([(source, tensor)]))

    def _spans(self, sources: Iterable[tuple[str, torch.Tensor]]) -> tuple[FileSpan, ...]:
        """The file ranges of tensors that are read from their first byte on, by their names in the checkpoint."""
        placed = [(*self._places[name], tensor.nbytes) for name, tensor in sources if name in self._places]
        return tuple(FileSpan(file, first, first + num_bytes) for file, first, num_bytes in placed)

    def add_packed(self, name: str, sources: list[tuple[str, Load]]) -> None:
        """Plan to load all parts of a packed parameter, which are `sources` in the checkpoint."""
        model, tensors = self._store.model, {source: load() for source, load in sources}  # mapped, not read

        def step() -> None:
            if name in model.packed:
                for source, tensor in tensors.items():
                    self._store.put_packed(name, source, tensor)
            else:
                self._store.put(name, model.all_packed[name].numbers(tensors, model.state[name]))
            self._store.arrive(name)

        self._steps[name] = Step(step, [*tensors.values()], self._spans(tensors.items()))
        self._missing.discard(name)

    def add_converted(self, target: str, converter: WeightConverter, sources: list[Source]) -> None:
        """Plan to load the result of `converter` for `sources`; shapes are found by converting tensors on `meta`."""
        for _, source, load in sources:
            check_numbers(self._path, source, load().dtype, self._store.model.state[target].dtype)
        rounds = rounds_of(self._path, target, converter, sources)
        for name, tensor in self._shapes(target, converter, rounds[0]):
            self.is_by_unit &= self._unit_of.get(name) == self._unit_of[target]
            if name in self._changes:
                raise UnsupportedError(
                    f"{self._path}: its adapter changes {name}, which transformers makes of other matrices of the base "
                    "model; merge the adapter by peft (merge_and_unload, save_pretrained), and name that directory"
                )
            shape = torch.Size([len(rounds) * tensor.shape[0], *tensor.shape[1:]]) if len(rounds) > 1 else tensor.shape
            self._check_shape(name, shape)
            self._missing.discard(name)
            self._brought.setdefault(target, set()).add(name)

        def step() -> None:
            names: set[str] = set()
            for index, members in enumerate(rounds):
                for name, tensor in self._convert(target, converter, members):
                    self._store.put(name, tensor, first_element=index * tensor.numel())
                    names.add(name)
            for name in names:
                self._store.arrive(name)

        tensors = [load() for _, _, load in sources]
        spans = self._spans((name, tensor) for (_, name, _), tensor in zip(sources, tensors, strict=True))
        self._steps[target] = Step(step, tensors, spans)

    def _shapes(self, target: str, converter: WeightConverter, sources: list[Source]) -> list[tuple[str, torch.Tensor]]:
        """The result of `converter` for `sources`, on `meta`; `CheckpointError` where their shapes do not fit."""
        try:
            return list(self._convert(target, converter, sources, meta=True))
        except Exception as error:  # whatever its operations meet
            told = ", ".join(f"{name} {list(load().shape)}" for _, name, load in sources[:4])
            raise CheckpointError(
                f"{self._path}: {target} cannot be made of {told}{', ...' if len(sources) > 4 else ''} by "
                f"transformers: {named(error)}"
            ) from None

    def _convert(
        self, target: str, converter: WeightConverter, sources: list[Source], *, meta: bool = False
    ) -> Iterator[tuple[str, torch.Tensor]]:
        one, model = deepcopy(converter), self._store.model
        for pattern, name, load in sources:
            given: Any = (lambda load=load: load().to("meta")) if meta else load
            one.add_tensor(target, name, pattern, given)
        for name, value in one.convert(target, model=model.module, config=model.config).items():
            yield name, value[0] if isinstance(value, list) else value

    def check_missing(self) -> None:
        """Raise `CheckpointError` when the weight files lack a parameter."""
        if self._missing:
            some = f"{len(self._missing)} of {len(self._unit_of)} parameters"
            lacking = some if self._missing < {*self._unit_of} else f"all {len(self._unit_of)} of the language model"
            raise CheckpointError(
                f"{self._path}: the weight files lack {lacking}, e.g. {min(self._missing)}; the download is incomplete "
                "or belongs to another model"
            )

    def by_unit(self) -> dict[str, list[tuple[set[str], Step]]]:
        """The steps of each unit, in the order of the sweep, and the parameters that each of them loads.

        Raises `CheckpointError` when a parameter is missing.
        """
        self.check_missing()
        by_unit: dict[str, list[tuple[set[str], Step]]] = {
            unit.name: [] for unit in self._store.model.units if unit.owners
        }
        for name, step in self._steps.items():
            by_unit[self._unit_of[name]].append((self._brought.get(name, {name}), step))
        self._steps.clear()
        return by_unit

    def _put(self, name: str, tensor: torch.Tensor) -> None:
        self._store.put(name, tensor)
        self._store.arrive(name)

    def _check_shape(self, name: str, shape: torch.Size) -> None:
        expected = self._store.model.state[name].shape
        if shape != expected:
            raise CheckpointError(
                f"{self._path}: {name} is {list(shape)} in the weight files but {list(expected)} by "
                "config.json; they do not belong together"
            )
