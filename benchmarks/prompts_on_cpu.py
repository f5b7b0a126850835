"""Prompts on the CPU, engine alone: with our C functions and without, in turn, beside the products they are made of.

    python -m benchmarks.prompts_on_cpu [--shape DIR] [--rows 4x40x420+75 1x40x1400+300] [--rounds 2]

Random weights of the model's shape in float32. Rows are RUNSxREQUESTSxSHARED+OWN tokens; the defaults are about what
five subjects of MMLU have, one of them with long passages. Each prompt is answered with one token. The seconds of each
contender are the least of its rounds; the rate of products is taken before each round and after the last one, and the
best counts.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from benchmarks.helm_client import gemm_seconds
from engine import Engine, Job, Policy
from engine.kernels.host import functions
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
    """Jobs with random tokens, and how many of those must be computed where what is shared is computed once."""
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


def timed(engine: Engine, jobs: list[Job]) -> dict[str, float]:
    """Seconds on the clock and of all cores, in one call of the engine."""
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
        has_kernels = functions.loaded() is not None
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
        "has_kernels": has_kernels,
        "rounds": rounds,
        "products_s": products,
        "fraction_of_products": {name: min(products) / seconds for name, seconds in least.items()},
        "times_faster": least["torch"] / least["kernels"],
    }
    print(write_record(options.name, content, options.out))


if __name__ == "__main__":
    main()
