"""The experts of one layer of a mixture: the engine's function, transformers' own, and what the hardware allows.

    python -m benchmarks.experts [--device cuda] [--dtype bfloat16] [--tokens 128 … 16384] [--out DIR]

Random tokens choose random experts. The limit of a row is the larger of two times: its products at the rate of one
large product, and one reading of the chosen experts' matrices at the rate of the device's memory; both rates are
measured in the same call. The engine's results must agree with each of the others, and must be bit-equal for a token
alone and among all tokens.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from engine.measuring.rates import median_seconds
from engine.memory import accelerator
from engine.model.experts.interface import experts, is_understood, prepare
from engine.model.sweep_context import SweepContext
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Rates, measure_rates

ROOT = Path(__file__).resolve().parent.parent
TOKENS = (128, 512, 2048, 8192, 16384)
THEIRS = ("eager", "grouped_mm", "batched_mm")
_MOST_COPIED = 16 << 30
"""Bytes of matrices that `batched_mm` may copy: it copies one pair of matrices for each expert chosen by a token."""
_SECONDS = 2.0
"""Approximate seconds for the runs of one measurement."""
_FEW = 7
"""Number of tokens that are also computed alone."""


@dataclass(frozen=True)
class Shape:
    """One layer's experts."""

    kind: type[nn.Module]
    model_type: str
    config: dict[str, int]
    choices: int


SHAPES = {
    "qwen3-30b-a3b": Shape(
        Qwen3MoeExperts, "qwen3_moe", {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}, 8
    ),
    "gpt-oss-120b": Shape(
        GptOssExperts, "gpt_oss", {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 128}, 4
    ),
}


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """Build the module of a layer's experts with random numbers."""
    config = CONFIG_MAPPING[shape.model_type](**shape.config)
    with torch.device("meta"):
        module = shape.kind(config)
    for name, parameter in list(module.named_parameters()):
        numbers = torch.empty(parameter.shape, device=device, dtype=dtype).normal_(std=0.02)
        setattr(module, name, nn.Parameter(numbers, requires_grad=False))
    module.__dict__["sweeping"] = SweepContext()
    if not is_understood(module):
        raise SystemExit(f"{shape.kind.__name__} is not computed by our function")
    prepare(module)
    return module


def measure(shape: Shape, module: Any, tokens: int, rates: Rates) -> dict[str, Any]:
    """Time each implementation for so many tokens; returns seconds, differences from the engine's, and the limit."""
    like = module.down_proj
    hidden = torch.randn(tokens, module.config.hidden_size, device=like.device).to(like.dtype)
    scores = torch.randn(tokens, module.num_experts, device=like.device)
    weights, index = scores.softmax(-1).topk(shape.choices)
    given = hidden, index, weights.to(like.dtype)
    elements = sum(parameter[0].numel() for parameter in module.parameters() if parameter.ndim == 3)
    num_chosen = len(index.unique())
    limits = {
        "products_s": 2 * tokens * shape.choices * elements / rates.flop_s,
        "matrices_s": num_chosen * elements * like.itemsize / rates.device_bytes_s,
    }
    limit = max(limits.values())
    ours = experts(module, *given)
    few = slice(tokens // 2, tokens // 2 + _FEW)
    row: dict[str, Any] = {
        "tokens": tokens,
        **limits,
        "same_bits_alone": torch.equal(experts(module, *(x[few] for x in given)), ours[few]),
    }
    row["ours"] = {"seconds": seconds_of(lambda: experts(module, *given), like.device)}
    row["ours"]["kernels"] = kernels_of(lambda: experts(module, *given), like.device)
    for name in THEIRS:
        if name == "batched_mm" and tokens * shape.choices * elements * like.itemsize > _MOST_COPIED:
            continue
        module.config._experts_implementation = name
        theirs = module(*given)
        distance = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
        row[name] = {"seconds": seconds_of(lambda: module(*given), like.device), "relative_distance": distance}
    for name in ("ours", *THEIRS):
        if name in row:
            row[name]["fraction_of_limit"] = limit / row[name]["seconds"]
    return row


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of repeated calls."""
    return median_seconds(call, device, seconds=_SECONDS)


def kernels_of(call: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Seconds of each kernel of one call, longest first; empty on the CPU."""
    if not accelerator.has_streams(device):
        return {}
    with torch.profiler.profile() as profile:
        call()
        accelerator.synchronize(device)
    spent = {event.key[:60]: event.device_time_total / 1e6 for event in profile.key_averages()}
    return dict(sorted(((name, time) for name, time in spent.items() if time), key=lambda item: -item[1])[:12])


def line(row: dict[str, Any]) -> str:
    """Format a row for printing."""
    limit = 1e3 * max(row["products_s"], row["matrices_s"])
    told = [f"{row['tokens']:6} tokens  limit {limit:8.3f} ms"]
    for name in ("ours", *THEIRS):
        if name in row:
            found = row[name]
            told.append(f"{name} {1e3 * found['seconds']:8.3f} ms ({found['fraction_of_limit']:.2f})")
    return "  ".join(told)


def main() -> None:
    """Measure every shape; print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="in a micro-batch")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    device, dtype = accelerator.indexed(torch.device(options.device)), getattr(torch, options.dtype)
    rates = measure_rates(device, dtype)
    told: dict[str, list[dict[str, Any]]] = {}
    most = 1e-4 if dtype is torch.float32 else 0.02
    differing = []
    with torch.no_grad():
        for name, shape in SHAPES.items():
            module = build(shape, device, dtype)
            print(f"{name}, {options.dtype}, fractions of the limit in brackets", flush=True)
            told[name] = []
            for tokens in options.tokens:
                row = measure(shape, module, tokens, rates)
                told[name].append(row)
                print(line(row), flush=True)
                distances = {other: row[other]["relative_distance"] for other in THEIRS if other in row}
                if not row["same_bits_alone"] and device.type != "cpu":  # on the CPU only batch-invariant does
                    differing.append(f"{name}, {tokens} tokens: bits depend on what is computed beside a token")
                differing += [
                    f"{name}, {tokens} tokens: {distance:.2g} from {other}"
                    for other, distance in distances.items()
                    if not distance <= most
                ]
            del module
            accelerator.release_memory(device)
    content = {"dtype": options.dtype, "rates": vars(rates), "differing": differing, "shapes": told}
    print(write_record("experts", content, options.out))
    if differing:
        raise SystemExit("\n".join(differing))


if __name__ == "__main__":
    main()
