"""Long answers of many lengths, with a model that fits on the GPU and one that does not.

    python -m benchmarks.long_answers [--parts resident offloaded] [--out DIR]

resident: Llama-3-8B's shape wholly on the GPU, 250 requests of 300 tokens, answers from a long-tailed distribution up
to 2,048 tokens: this engine; the continuous batching of `transformers` (the loop of `generate_batch`, with a length for
each request); and its `generate`, one batch at a time, each until its longest answer is complete.

offloaded: OPT-30B's shape in 16 GB, weights and keys and values in 4 bits, 512 requests of 300 tokens, answers of 16 to
64, 256 at a time, compared with the least time that the link, measured in the same call, needs for the bytes that must
cross it.

All choose greedily, without drafts, because random weights repeat themselves, which drafts profit from. Answers have
given lengths. The record is written again whenever a result is there.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.rivals.contender import device, release
from benchmarks.rivals.lengths import batches, continuous
from engine.errors import EngineError
from engine.job import Job
from engine.policy import Policy
from flexgen_helm.commands.bench import rates_of
from flexgen_helm.planning.dummy import open_dummy, random_model, shape_config
from flexgen_helm.planning.model_sizes import sizes_of
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

if TYPE_CHECKING:
    from engine.engine import Engine
    from engine.planning.planner import Plan
    from engine.schedule.timing import SweepTiming
    from flexgen_helm.planning.sizes import Sizes

ROOT = Path(__file__).resolve().parent.parent
ASKED = {"of generate_batch": 0.9, "of generate": 4.0, "of the link's limit": 0.8}
RIVALS = ["generate_batch", "generate"]
Told = Callable[[str, dict[str, Any]], None]
"""Records what is known about a contender."""


def long_tailed(count: int, most: int, seed: int = 0) -> list[int]:
    """Lengths of answers: log-normal with a median of a tenth of `most`, which a few reach."""
    dice = random.Random(seed)
    return [max(1, min(most, round(most / 10 * dice.lognormvariate(0.0, 1.1)))) for _ in range(count)]


def even(count: int, least: int, most: int, seed: int = 0) -> list[int]:
    """Lengths of answers, uniformly distributed."""
    dice = random.Random(seed)
    return [dice.randint(least, most) for _ in range(count)]


def prompts_of(shape: str, count: int, own: int) -> list[list[int]]:
    """Random prompts that share no prefix."""
    return Workload(1, count, 0, own, 1).prompts(shape_config(shape)["vocab_size"])


def ask(engine: Engine, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
    """Generate answers of these lengths to all prompts; returns seconds, tokens, and figures of the sweeps."""
    timings: list[SweepTiming] = []
    engine.observer = timings.append
    jobs = [Job(prompt=prompt, max_new_tokens=most) for prompt, most in zip(prompts, lengths, strict=True)]
    start = time.perf_counter()
    done = engine.run(jobs)
    seconds = time.perf_counter() - start
    engine.observer = None
    for completion, most in zip(done, lengths, strict=True):
        if completion.error is not None:
            raise completion.error
        if len(completion.tokens) != most:
            raise EngineError(f"an answer ended after {len(completion.tokens)} of {most} tokens")
    steps = [timing for timing in timings if not timing.prefill_rows]
    return {
        "seconds": seconds,
        "tokens_s": sum(lengths) / seconds,
        "sweeps": len(timings),
        "most_sequences": max(timing.num_sequences for timing in timings),
        "scheduling_s": sum(timing.host_s for timing in timings),
        "link_s": sum(timing.link_s for timing in timings),
        "step_ms": {
            str(sequences): 1e3 * sum(times) / len(times) for sequences, times in sorted(_by_size(steps).items())
        },
    }


def _by_size(steps: list[SweepTiming]) -> dict[int, list[float]]:
    """Seconds of sweeps that only decode, by the number of sequences rounded up to a power of two."""
    found: dict[int, list[float]] = {}
    for step in steps:
        found.setdefault(1 << (step.num_sequences - 1).bit_length(), []).append(step.sweep_s + step.host_s)
    return found


def without_drafts(engine: Engine) -> None:
    """Turn an engine's drafts off."""
    scheduler = engine.parts.lanes[0].scheduler
    scheduler.limits = replace(scheduler.limits, free_rows=0)


def ours(shape: str, policy: Policy, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
    """Time the engine, after a rehearsal with as many answers of two tokens."""
    with open_dummy(shape, policy) as engine:
        without_drafts(engine)
        ask(engine, prompts, [2] * len(prompts))
        found = ask(engine, prompts, lengths)
    release()
    return found


def resident(options: argparse.Namespace, told: Told) -> None:
    """Compare the engine with `transformers`, on the same GPU and in the same call."""
    lengths = long_tailed(options.requests, options.most)
    prompts = prompts_of(options.shape, options.requests, options.own)
    told("resident", {"shape": options.shape, "requests": len(prompts), "own": options.own, "lengths": lengths})
    first = ours(options.shape, Policy.from_mapping(options.policy, where="the benchmark"), prompts, lengths)
    told("ours", first)
    model = random_model(options.shape).to(device())
    contenders: dict[str, Callable[[], dict[str, Any]]] = {
        "generate_batch": lambda: continuous(model, prompts, lengths, options.limit),
        "generate": lambda: batches(model, prompts, lengths, options.batch_size, options.limit, options.cut),
    }
    for name in options.rivals:
        try:
            found = contenders[name]()
        except Exception as error:  # a contender that fails has its error in the record
            found = {"failed": f"{type(error).__name__}: {error}"[:500]}
        if "tokens_s" in found:
            ratio, asked = first["tokens_s"] / found["tokens_s"], ASKED[f"of {name}"]
            found |= {"ratio": ratio, "asked": asked, "held": ratio >= asked}
        told(name, found)
        release()


def least_link_s(
    prompts: list[list[int]], lengths: list[int], sizes: Sizes, plan: Plan, link: float, sweeps: int | None = None
) -> float:
    """Least seconds of a link of so many bytes per second for the weights and for keys and values.

    Weights cross the link once per sweep. The number of sweeps is that seen, or, without one, that of a schedule which
    keeps every sequence slot occupied. Keys and values of decode steps cross it, except those that fit on the device.
    """
    at_once = min(len(prompts), plan.limits.seats)
    kept = [len(prompt) + most - 1 for prompt, most in zip(prompts, lengths, strict=True)]
    read = sum(
        (most - 1) * len(prompt) + (most - 1) * (most - 2) // 2 for prompt, most in zip(prompts, lengths, strict=True)
    )
    on_device = plan.cache_budgets["device"] // sizes.device_cache_row_bytes
    off = max(0.0, 1 - on_device / (at_once * sum(kept) / len(kept)))
    if plan.kv_cache is not None:
        off = 1 - plan.kv_cache.gpu / 100
    least = max(max(lengths), -(-sum(lengths) // at_once))
    return ((sweeps or least) * sizes.streamed_bytes + off * read * sizes.cache_row_bytes) / link


def offloaded(options: argparse.Namespace, told: Told) -> None:
    """Compare the engine with the link's limit."""
    lengths = even(options.offloaded_requests, 16, 64)
    prompts = prompts_of(options.offloaded_shape, len(lengths), options.own)
    policy = Policy.from_mapping(options.offloaded_policy, where="the benchmark")
    rates = rates_of(policy, options.offloaded_shape)
    link = rates.to_device_bytes_s
    described = {"shape": options.offloaded_shape, "requests": len(prompts), "own": options.own, "lengths": lengths}
    told("offloaded", described | {"policy": policy.as_mapping(), "rates": asdict(rates)})
    with open_dummy(options.offloaded_shape, policy) as engine:
        without_drafts(engine)
        seats = engine.plan.limits.seats
        ask(engine, prompts[:seats], [2] * len(prompts[:seats]))
        found = ask(engine, prompts, lengths)
        sizes, plan = sizes_of(engine), engine.plan
    least = least_link_s(prompts, lengths, sizes, plan, link)
    seen = least_link_s(prompts, lengths, sizes, plan, link, found["sweeps"])
    asked, fraction = ASKED["of the link's limit"], least / found["seconds"]
    told(
        "ours in 16 GB",
        found
        | {
            "link_bytes_s": link,
            "limit_s": least,
            "fraction": fraction,
            "asked": asked,
            "held": fraction >= asked,
            "fraction_by_sweeps_seen": seen / found["seconds"],
        },
    )
    release()


PARTS = {"resident": resident, "offloaded": offloaded}
_OFFLOADED: dict[str, Any] = {
    "gpu-memory": "16GB",
    "compress-weight": 4,
    "compress-cache": 4,
    "weights": {"gpu": 50, "cpu": 50},
    "gpu-batch-size": 256,
    "num-gpu-batches": 1,
}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(each)}" for key, each in value.items()) + "}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the parts, and record each contender's result as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--requests", type=int, default=250)
    parser.add_argument("--own", type=int, default=300, help="tokens of a prompt")
    parser.add_argument("--most", type=int, default=2048, help="tokens of the longest answer")
    parser.add_argument("--batch-size", type=int, default=32, help="of `generate`")
    parser.add_argument("--limit", type=float, default=40, help="seconds after which a rival begins no more")
    parser.add_argument("--cut", type=int, default=256, help="steps of a batch of `generate` that are measured")
    parser.add_argument("--offloaded-shape", default="opt-30b")
    parser.add_argument("--offloaded-requests", type=int, default=512)
    parser.add_argument("--name", default="long-answers", help="of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    parser.set_defaults(policy={}, offloaded_policy=_OFFLOADED)
    options = parser.parse_args()
    record: dict[str, Any] = {}

    def told(name: str, found: dict[str, Any]) -> None:
        record[name] = found
        print(name, *(f"{key} {_shown(value)}" for key, value in found.items() if key != "lengths"), flush=True)
        write_record(options.name, record, options.out)

    for part in options.parts:
        PARTS[part](options, told)


if __name__ == "__main__":
    main()
