"""Tiny LoRA adapters in peft's format, and what they make of their base models, computed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LORA: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": 4, "lora_alpha": 6}
QUERIES = tuple(f"model.layers.{index}.self_attn.q_proj" for index in range(3))
RANK = 4


def save_adapter(directory: Path, base: str | Path, modules: tuple[str, ...] = QUERIES, **changes: Any) -> Path:
    """An adapter of some matrices of the tiny model in `base`, told of by the last part of their names."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = {name: values.shape for name, values in load_file(Path(base) / "model.safetensors").items()}
    random, state = torch.Generator().manual_seed(3), {}
    for module in modules:
        rows, columns = shapes[f"{module}.weight"]
        state[f"base_model.model.{module}.lora_A.weight"] = 0.3 * torch.randn(RANK, columns, generator=random)
        state[f"base_model.model.{module}.lora_B.weight"] = 0.3 * torch.randn(rows, RANK, generator=random)
    save_file(state, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in modules})
    told = {**LORA, "target_modules": targets, "base_model_name_or_path": str(base), **changes}
    (directory / "adapter_config.json").write_text(json.dumps(told))
    return directory


def edit(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def merge(base: Path, adapter: Path, scale: float) -> None:
    """Add what `adapter` says to the weights in `base`: scale times B A."""
    state, parts = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in parts if name.endswith(".lora_A.weight")]:
        up = parts[name.replace("lora_A", "lora_B")].double()
        target = name.removeprefix("base_model.model.").replace(".lora_A", "")
        state[target] = (state[target].double() + scale * up @ parts[name].double()).float()
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
