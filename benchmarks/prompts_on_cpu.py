"""Prompts on the CPU, engine alone: with and without our C functions, alternately, compared with bare matrix products.

    python -m benchmarks.prompts_on_cpu [--shape DIR] [--rows 4x40x420+75 1x40x1400+300] [--rounds 2]

Random weights of the model's shape in float32. Rows are RUNSxREQUESTSxSHARED+OWN tokens; the defaults are about what
five subjects of MMLU have, one of them with long passages. Each prompt is answered with one token. A contender's time
is the least of its rounds; the rate of products is measured before each round and after the last one, and the best
counts. First it prints, part by part, what one thread computes for 1,000 rows of a layer, in milliseconds of processor
time, which other work on the machine hardly changes.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from benchmarks.helm_client import gemm_seconds
from engine import Engine, Job, Policy
from engine.kernels.elementwise.merges import merge
from engine.kernels.elementwise.norms import RMSNorm, Scaling
from engine.kernels.elementwise.rotations import rotated
from engine.kernels.host import functions, prompts
from engine.kernels.host import rows as rows_on_host
from engine.kernels.threads import one_thread
from flexgen_helm.planning.dummy import open_dummy
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
ROWS = ["4x40x420+75", "1x40x1400+300"]
SMOLLM2_135M = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "dtype": "float32",
}


def jobs_of(rows: list[str], vocabulary: int) -> tuple[list[Job], int]:
    """Make jobs with random tokens; returns them and how many tokens must be computed if prefixes are shared."""
    generator = torch.Generator().manual_seed(0)
    jobs, tokens = [], 0
    for row in rows:
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)\+(\d+)", row)
        if found is None:
            raise SystemExit(f"--rows {row}: write RUNSxREQUESTSxSHARED+OWN, such as 4x40x420+75")
        runs, requests, shared, own = map(int, found.groups())
        for _ in range(runs):
            before = torch.randint(vocabulary, (shared,), generator=generator).tolist()
            for _ in range(requests):
                behind = torch.randint(vocabulary, (own,), generator=generator).tolist()
                jobs.append(Job(prompt=before + behind, max_new_tokens=1))
        tokens += runs * (shared + requests * own)
    return jobs, tokens


def parts_of_a_layer() -> dict[str, dict[str, float]]:
    """Milliseconds of one thread for 1,000 rows of SmolLM2-135M's layer, by our functions and by torch's.

    Attention: ten spans that continue one prefix of 600 tokens.
    """
    rows, heads, kv_heads, dim = 1000, 9, 3, 64
    query, key, value = (torch.randn(1, rows, count, dim)[0] for count in (heads, kv_heads, kv_heads))
    prefix = torch.randn(600, kv_heads, 2 * dim).split(dim, dim=-1)
    runs = [prompts.Run(list(range(0, rows + 1, 100)), prefix)]
    turned = query.transpose(0, 1)[None], key.transpose(0, 1)[None], *torch.randn(2, 1, rows, dim).unbind()
    gate, up = torch.randn(2, 1, rows, 1536).unbind()
    numbers, weight, norm = torch.randn(1, rows, 576), torch.randn(576), RMSNorm(1e-5, Scaling.ROUNDED)
    matrix = torch.randn(1536, 576)
    pairs: dict[str, tuple[Callable[[], object] | None, Callable[[], object]]] = {
        "attention": (
            lambda: prompts.attend(query, key, value, runs, 0.125),
            lambda: prefix_and_own_by_torch(query, key, value, prefix),
        ),
        "gated product": (lambda: rows_on_host.gate_product(gate, up, 0), lambda: F.silu(gate) * up),
        "norm": (lambda: rows_on_host.norm(numbers, weight, 1e-5, 0), lambda: norm(numbers, weight)),
        "rotation": (lambda: rows_on_host.rotate(*turned, 2), lambda: rotated(*turned)),
        "product 576 x 1536": (None, lambda: F.linear(numbers, matrix)),
    }
    with one_thread(), torch.no_grad():
        return {
            name: {
                side: least_ms(call) for side, call in zip(("ours", "torch"), calls, strict=True) if call is not None
            }
            for name, calls in pairs.items()
        }


def prefix_and_own_by_torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, prefix: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What `HostFlash` does without our functions: own tokens span by span, the prefix for all spans, and the merge."""
    copies, parts, sums = query.shape[1] // key.shape[1], [], []
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for first in range(0, len(query), 100):
        own = [x[first : first + 100].transpose(0, 1)[None] for x in (query, key, value)]
        own[1:] = [x.repeat_interleave(copies, dim=1) for x in own[1:]]
        result, logsumexp = attend(*own, 0.0, True, scale=0.125)
        parts.append(result[0].transpose(0, 1))
        sums.append(logsumexp[0])
    folded = query.transpose(0, 1).unflatten(0, (-1, copies)).flatten(1, 2)[None]
    shared, logsumexp = attend(folded, *(x.transpose(0, 1)[None] for x in prefix), 0.0, False, scale=0.125)
    output = torch.cat(parts)
    shared = shared[0].unflatten(1, (copies, -1)).flatten(0, 1).transpose(0, 1)
    merge(output, torch.cat(sums, dim=1), shared, logsumexp[0].unflatten(1, (copies, -1)).flatten(0, 1))
    return output


def least_ms(call: Callable[[], object]) -> float:
    """Milliseconds of processor time of the calling thread: the least of twenty calls."""
    taken = []
    for _ in range(20):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return 1e3 * min(taken)


def timed(engine: Engine, jobs: list[Job]) -> dict[str, float]:
    """Wall-clock seconds, and processor seconds of all cores, of one call of the engine."""
    wall, cores = time.perf_counter(), time.process_time()
    engine.run(jobs)
    return {"seconds": time.perf_counter() - wall, "core_seconds": time.process_time() - cores}


def main() -> None:
    """Time both and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="model directory or config.json; default: SmolLM2-135M's")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--name", default="prompts-on-cpu", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    if functions.loaded() is None:
        raise SystemExit("our C functions are not to be had here; the line above says why")
    parts = parts_of_a_layer()
    for name, sides in parts.items():
        print(f"{name:20s} " + ", ".join(f"{side} {ms:6.2f} ms" for side, ms in sides.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        shape = Path(folder) / "smollm2-135m.json"
        shape.write_text(json.dumps(SMOLLM2_135M))
        model = Path(options.shape or shape)
        policy = Policy.load({"device": "cpu", "dtype": "float32"})
        engines = {"kernels": open_dummy(str(model), policy)}
        with mock.patch.object(functions, "loaded", return_value=None):
            engines["torch"] = open_dummy(str(model), policy)
        config_of = Path(folder) / "model"
        config_of.mkdir()
        (config_of / "config.json").write_text((model / "config.json" if model.is_dir() else model).read_text())
        jobs, tokens = jobs_of(options.rows, 1000)
        for engine in engines.values():
            engine.run(jobs[:2])
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
        products = [gemm_seconds(config_of, tokens, len(jobs))]
        for _ in range(options.rounds):
            for name, engine in engines.items():
                kernel = None if name == "torch" else functions.loaded()
                with mock.patch.object(functions, "loaded", return_value=kernel):
                    rounds[name].append(timed(engine, jobs))
                products.append(gemm_seconds(config_of, tokens, len(jobs)))
                took = rounds[name][-1]
                print(
                    f"{name:8s} {took['seconds']:6.1f} s, {took['core_seconds']:6.1f} s of cores; products "
                    f"{products[-1]:5.1f} s: {min(products) / took['seconds']:.0%}",
                    flush=True,
                )
        for engine in engines.values():
            engine.close()
    least = {name: min(each["seconds"] for each in of_name) for name, of_name in rounds.items()}
    content = {
        "shape": options.shape or "smollm2-135m",
        "rows": options.rows,
        "requests": len(jobs),
        "computed_tokens": tokens,
        "threads": torch.get_num_threads(),
        "parts_of_1000_rows_ms": parts,
        "rounds": rounds,
        "products_s": products,
        "fraction_of_products": {name: min(products) / seconds for name, seconds in least.items()},
        "times_faster": least["torch"] / least["kernels"],
    }
    print(write_record(options.name, content, options.out))


if __name__ == "__main__":
    main()
