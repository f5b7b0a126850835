"""Protects: plans count for a row in a mixture of experts what computing it holds, by our kernels and by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import models
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine.kernels.grouped import by_torch
from engine.model.causal_model import CausalModel
from engine.model.experts import interface
from engine.weights.stored_form import shape_of

SIZES = {
    "qwen3-moe": {"hidden_size": 256, "moe_intermediate_size": 96, "num_experts": 4},
    "gpt-oss": {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 4},
}
CHOICES = 4


class Held(TorchDispatchMode):
    """The most bytes that tensors hold at once which are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._made: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {StorageWeakRef(storage) for storage in _storages((args, kwargs))}
        for storage in _storages(made):
            if StorageWeakRef(storage) not in given:
                self._made[StorageWeakRef(storage)] = storage.nbytes()
        self._made = {ref: size for ref, size in self._made.items() if not ref.expired()}
        self.most = max(self.most, sum(self._made.values()))
        return made


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [each.untyped_storage() for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize(
    ("family", "dtype", "way"),
    [
        ("qwen3-moe", torch.float16, "kernel"),
        ("qwen3-moe", torch.float16, "torch"),
        ("gpt-oss", torch.bfloat16, "kernel"),
        ("gpt-oss", torch.bfloat16, "torch"),
        ("gpt-oss", torch.float32, "torch"),
    ],
)
@torch.no_grad()
def test_rows_take_what_plans_count(
    family: str, dtype: torch.dtype, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = pytest.importorskip("engine.kernels.grouped.kernel") if way == "kernel" else None
    for program in ("find_tiles", "multiply_tile", "sum_choices") if kernel else ():
        monkeypatch.setattr(kernel, program, MagicMock())  # they make no tensors
    counted = {}
    for choices in (1, CHOICES):
        models.config_of(family, **SIZES[family], num_experts_per_tok=choices).save_pretrained(tmp_path)
        model = CausalModel(tmp_path, dtype, torch.device("cpu"), has_weights=False)
        shape = shape_of(model)
        counted[choices] = shape.work_row_bytes if kernel else shape.cpu_work_row_bytes
    of_choices = (counted[CHOICES] - counted[1]) / (CHOICES - 1) * CHOICES
    module = next(each for each in model.layers[0].modules() if "gating" in vars(each))
    for name, like in list(module.named_parameters()):
        setattr(module, name, torch.nn.Parameter(torch.randn(like.shape).to(dtype), requires_grad=False))
    tokens, width = 24, SIZES[family]["hidden_size"]
    hidden, weights = torch.randn(tokens, width).to(dtype), torch.rand(tokens, CHOICES)
    index = torch.stack([torch.randperm(4) for _ in range(tokens)])
    with Held() as held:
        (kernel or by_torch).mixture(interface._matrices(module), hidden, index, weights)
    # What is held of the choices themselves, and the result, also in 32 bits.
    beside = 64 * CHOICES + width * (dtype.itemsize + 4)
    assert 0.9 * of_choices <= held.most / tokens <= of_choices + beside
