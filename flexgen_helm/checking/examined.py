"""A model examined as a run would open it, up to its weights' values: what it is, what it needs, why it is refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.checkpoint.adapters.declared import ADAPTER_CONFIG, adapter_folder, read_lora_config
from engine.checkpoint.adapters.located import locate
from engine.checkpoint.config import num_layers, read_config, read_config_file
from engine.checkpoint.description import ModelDescription, describe
from engine.checkpoint.gguf.opened import gguf_file
from engine.checkpoint.model_class import check_causal
from engine.checkpoint.window import window_of
from engine.errors import EngineError, UnsupportedError
from flexgen_helm.checking.memory_needs import MemoryNeeds, memory_needs, plan_here
from flexgen_helm.checking.model_facts import ModelFacts, model_facts
from flexgen_helm.checking.tokenizer_facts import TokenizerFacts, tokenizer_facts

if TYPE_CHECKING:
    import torch

    from engine.model.causal_model import CausalModel


@dataclass(frozen=True, kw_only=True)
class Examined:
    """What a model's files say."""

    model: str
    config: Mapping[str, Any]
    """The contents of its config.json."""
    window: int | None
    """The maximum number of positions of a sequence."""
    quantization: Mapping[str, Any] | None
    """What its files say of how it is quantized."""
    facts: ModelFacts | None
    """The facts about it; None, like the following, where it is refused before they are known."""
    needs: MemoryNeeds | None
    here: str | None
    """Whether the policy `auto` fits it into this machine."""
    tokenizer: TokenizerFacts | None
    notes: tuple[str, ...]
    """What was not looked at, and what may surprise."""
    refusals: tuple[str, ...]
    """Why the model does not run; empty if it does."""

    def mapping(self) -> dict[str, Any]:
        """Everything except config.json, as JSON."""
        return {name: value for name, value in asdict(self).items() if name != "config"}


def examine(model: str) -> Examined:
    """Examine a directory, a GGUF file, a hub id (whose weights are not fetched) or a config.json.

    Raises `EngineError` where there is no such model, or no config.json that can be read.
    """
    file = Path(model).expanduser()
    if os.path.isfile(file) and gguf_file(model) is None:
        config = read_config_file(file)
        with tempfile.TemporaryDirectory(prefix="flexgen-check-") as folder:
            path = Path(folder)
            (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
            try:
                check_causal(path, config)
                described = _described(path, config)
            except EngineError as error:
                return _refused(model, config, str(error).replace(str(path), str(file)))
            found = _examined(model, config, described, has_weights=False, has_tokenizer=False)
            return replace(found, refusals=tuple(each.replace(folder, str(file)) for each in found.refusals))
    try:
        located = locate(model, download_weights=False)
    except UnsupportedError as error:  # an adapter or a GGUF file that cannot be run
        return _refused(model, {}, str(error))
    config = read_config(located.path)
    try:
        described = describe(model, download_weights=False)
    except EngineError as error:
        return _refused(model, config, str(error))
    return _examined(model, config, described, has_weights=located.is_local, has_tokenizer=True)


def _described(path: Path, config: Mapping[str, Any]) -> ModelDescription:
    return ModelDescription(
        path=str(path),
        model_type=str(config["model_type"]),
        window=window_of(config),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        weight_bytes=0,
        num_layers=num_layers(config),
    )


def _refused(model: str, config: Mapping[str, Any], reason: str) -> Examined:
    return Examined(
        model=model,
        config=config,
        window=None,
        quantization=None,
        facts=None,
        needs=None,
        here=None,
        tokenizer=None,
        notes=(),
        refusals=(reason,),
    )


def _examined(
    model: str, config: Mapping[str, Any], described: ModelDescription, *, has_weights: bool, has_tokenizer: bool
) -> Examined:
    import torch

    from engine.checkpoint.tokenizer import load_tokenizer
    from engine.model.causal_model import CausalModel
    from engine.planning.hardware import available_memory, resolve_device, resolve_dtype
    from engine.weights.loading import check_checkpoint
    from engine.weights.stored_form import shape_of

    path, cpu = Path(described.path), torch.device("cpu")
    notes, refusals = [], []
    if described.window is None:
        notes.append("no file names a window: give --max-sequence-length to run, sweep or register")
    if (adapter := adapter_folder(path)) is not None:
        rank = read_lora_config(adapter / ADAPTER_CONFIG).rank
        notes.append(f"an adapter (LoRA of rank {rank}) is merged into the weights while loading; the copy has none")
    if not has_weights:
        notes.append("the weight files were not looked at")
    facts = needs = here = words = quantization = None
    try:
        dtype = resolve_dtype(described.dtype, described.dtype, "cpu")
        built = CausalModel(path, getattr(torch, dtype), cpu, has_weights=has_weights)
        facts, quantization = model_facts(built), built.quantization
        if has_weights:
            check_checkpoint(path, built)
        elif facts.packed:
            notes.append("without the weight files the sizes are those of unpacked matrices")
        needs = memory_needs(shape_of(built), dtype)
        device_name = resolve_device("auto")
        runs_in = resolve_dtype("auto", described.dtype, device_name)
        _size_as(built, getattr(torch, runs_in))
        memory = available_memory(device_name, None, None, None)
        here = plan_here(shape_of(built), memory, on_cpu=device_name == "cpu")
    except EngineError as error:
        refusals.append(str(error))
    if has_tokenizer:
        try:
            tokenizer = load_tokenizer(path)
            if facts is not None:
                words = tokenizer_facts(path, tokenizer, built.config, built.vocab_size)
                notes += words.notes
        except EngineError as error:
            refusals.append(str(error))
    else:
        notes.append("the tokenizer was not looked at")
    return Examined(
        model=model,
        config=config,
        window=described.window,
        quantization=quantization,
        facts=facts,
        needs=needs,
        here=here,
        tokenizer=words,
        notes=tuple(notes),
        refusals=tuple(refusals),
    )


def _size_as(model: CausalModel, dtype: torch.dtype) -> None:
    """Give a model on `meta` the sizes of another dtype: building it again takes seconds, and address space."""
    model.dtype = dtype
    model.state = {name: like.to(dtype) if like.is_floating_point() else like for name, like in model.state.items()}
