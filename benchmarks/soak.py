"""Random jobs under random policies, compared with transformers, while memory, threads and open files are watched.

    python -m benchmarks.soak [--minutes 120] [--seed 0] [--name soak] [--out DIR]

Each round has a tiny random model of some family, a policy drawn from all tiers, sizes and settings, an engine in this
process or in one of its own, and some suites of jobs with prompts of many lengths that may share a prefix. In one pass
of transformers over each text, every chosen token must be the likeliest one, and every log-probability must be equal,
up to rounding. The exit code is 1 if a token is wrong, or if memory, threads or open files grew since the first
quarter.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
CLOSE = 5e-4
"""Tolerance of logits and log-probabilities, because sums are added in another order."""
MAY_GROW = {"bytes": 0.1, "threads": 0.0, "files": 0.0}
"""Allowed growth from the first quarter to the end, as a fraction; allocators of libraries keep freed memory."""
FAMILIES = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 64},
    "gpt_neox": {"intermediate_size": 64},
    "mixtral": {"num_key_value_heads": 2, "intermediate_size": 64, "num_local_experts": 4},
}
WINDOW = 256


def make_models(work: Path) -> list[Path]:
    """Write a model directory for each family, with a tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.sweep_overhead import make_model

    made = []
    make_model(work / "tokenizer")
    for name, settings in FAMILIES.items():
        torch.manual_seed(len(made))
        config = AutoConfig.for_model(
            name, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=2100,
            max_position_embeddings=WINDOW, initializer_range=0.3, eos_token_id=0, bos_token_id=0, pad_token_id=0,
            **settings,
        )  # fmt: skip
        path = work / name
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        for file in (work / "tokenizer").glob("tokenizer*"):
            (path / file.name).write_bytes(file.read_bytes())
        made.append(path)
    return made


def drawn_policy(dice: random.Random, work: Path) -> dict[str, Any]:
    """Draw any placement and settings that change no result."""

    def share() -> list[int]:
        device = dice.choice([0, 0, 30, 50, 100])
        return [device, dice.choice([0, 100 - device, (100 - device) // 2])]

    return {
        "device": "cpu",
        "percent": [*share(), *share(), *share()],
        "offload-dir": str(work / "offload"),
        "gpu-batch-size": dice.choice([1, 3, 16]),
        "num-gpu-batches": dice.choice([1, 2, 4]),
        "pad-to-seq-len": dice.choice([None, None, None, "bucket"]),
        "cpu-cache-compute": dice.random() < 0.3,
        "overlap": dice.random() < 0.7,
        "share-prefix": dice.random() < 0.7,
    }


def drawn_jobs(dice: random.Random) -> list[Any]:
    """Draw the jobs of one suite."""
    from engine import Job

    shared = [dice.randrange(1, 2000) for _ in range(dice.randrange(0, 90))]
    jobs = []
    for _ in range(dice.randrange(1, 30)):
        own = [dice.randrange(1, 2000) for _ in range(dice.randrange(1, 100))]
        prompt = [*shared, *own] if dice.random() < 0.6 else own
        jobs.append(Job(prompt=prompt, max_new_tokens=dice.randrange(0, 40) or 1, prompt_logprobs=dice.random() < 0.3))
    return jobs


def check(model: Any, jobs: list[Any], done: list[Any]) -> int:
    """Compare with transformers; returns the number of tokens checked, raises `AssertionError` for a difference."""
    import torch

    count = 0
    for job, found in zip(jobs, done, strict=True):
        assert found.error is None, found.error
        tokens = list(found.tokens)
        text = [*job.prompt, *tokens]
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0].double()
        logprobs = logits.log_softmax(-1)
        for place, (token, given) in enumerate(zip(tokens, found.logprobs, strict=True), len(job.prompt) - 1):
            assert logits[place].max() - logits[place, token] < CLOSE, f"token {token} at {place + 1} of {text}"
            assert abs(logprobs[place, token] - given) < CLOSE, f"log-probability at {place + 1} of {text}"
        if job.prompt_logprobs:
            for place, given in enumerate(found.prompt_logprobs[1:]):
                assert abs(logprobs[place, text[place + 1]] - given) < CLOSE, f"prompt's at {place + 1} of {text}"
        if found.finish_reason == "endoftext":
            assert logits[-1].max() - logits[-1, 0] < CLOSE, f"the end of {text}"
        else:
            assert len(tokens) == job.max_new_tokens, found
        count += len(tokens)
    return count


def standing() -> dict[str, int]:
    """Bytes, threads and open files of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "threads": threading.active_count(),
        "files": len(os.listdir("/proc/self/fd")),
    }


def soak(work: Path, minutes: float, seed: int) -> dict[str, Any]:
    """Run rounds for so many minutes; returns the content of the record."""
    import torch
    from transformers import AutoModelForCausalLM

    from engine import Engine, Policy
    from engine.errors import EngineError
    from flexgen_helm.workers.engine_processes import engine_processes

    dice = random.Random(seed)
    paths = make_models(work)
    references = {path: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths}
    seen: list[tuple[float, dict[str, int]]] = []
    rounds = jobs_done = tokens = refused = 0
    begun = told = time.monotonic()
    while time.monotonic() - begun < 60 * minutes:
        path, policy = dice.choice(paths), drawn_policy(dice, work)
        is_apart = dice.random() < 0.05  # starting a process takes seconds
        suites = [drawn_jobs(dice) for _ in range(dice.randrange(1, 5))]
        try:
            load = engine_processes.load if is_apart else Engine.from_pretrained
            with load(str(path), Policy.load(policy)) as engine:
                for jobs in suites:
                    tokens += check(references[path], jobs, engine.run(jobs))
                    jobs_done += len(jobs)
        except EngineError as error:  # a policy that does not go with the model is refused; nothing else may be
            if rounds == refused == 0 or "\n" in str(error):
                raise
            refused += 1
            print(f"refused: {policy}: {error}", flush=True)
        except AssertionError as error:
            raise SystemExit(f"seed {seed}, round {rounds}: {path.name} under {policy}: {error}") from None
        rounds += 1
        seen.append((time.monotonic() - begun, standing()))
        if time.monotonic() - told > 60:
            told = time.monotonic()
            print(
                f"{seen[-1][0] / 60:.0f} min: {rounds} rounds, {jobs_done} jobs, {tokens} tokens, {seen[-1][1]}",
                flush=True,
            )
    quarter = len(seen) // 4
    early = {name: max(each[name] for _, each in seen[: quarter + 1]) for name in MAY_GROW}
    late = {name: min(each[name] for _, each in seen[-max(1, quarter // 4) :]) for name in MAY_GROW}
    grown = {name: late[name] / early[name] - 1 for name in MAY_GROW}
    return {
        "seed": seed,
        "minutes": (time.monotonic() - begun) / 60,
        "rounds": rounds,
        "refused": refused,
        "jobs": jobs_done,
        "tokens": tokens,
        "wrong_tokens": 0,
        "early": early,
        "late": late,
        "grown": grown,
    }


def main() -> int:
    """Run the rounds and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="soak", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        found = soak(Path(folder), options.minutes, options.seed)
    print(found)
    print(write_record(options.name, found, options.out))
    too_much = [name for name, most in MAY_GROW.items() if found["grown"][name] > most]
    if too_much:
        print(f"{', '.join(too_much)} grew", file=sys.stderr)
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
