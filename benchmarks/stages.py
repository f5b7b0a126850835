"""A model in pipeline stages of several processes, compared with its slowest stage alone: tokens per second and ratio.

    python -m benchmarks.stages [--shape DIR] [--devices cpu:0 cpu:1] [--policy JSON] [--work 1x64x0+64:32 …]
                                [--rounds 3] [--sleep SECONDS] [--out DIR]

*Alone* is a model of one stage's layers, with the head, on one device, under the same policy, so with as many sequences
in a sweep: the speed of the leading stage if it never waits for another. A pipeline that is always full has that speed;
the ratio is the part of it that is reached. On the CPU each process has its part of the cores, and so has the one
alone; with --sleep, each layer of a small model also sleeps for so long per micro-batch, so that other work on the
machine's cores matters less. All engines are open at the same time and take turns; the best round of each counts.
Weights are random.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.controlled import Process
from engine.member import Member
from engine.memory.tiers import Memory
from engine.policy import Policy
from flexgen_helm.planning.record import write_record
from flexgen_helm.planning.roofline import Workload

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
"""A shape that two cores compute in seconds."""
SLEEPING = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
"""A shape that hardly uses cores, for `--sleep`."""
POLICY = {"gpu-memory": "3GB", "cpu-memory": "6GB", "gpu-batch-size": 16, "num-gpu-batches": 1}
WORK = ["1x64x0+64:32", "1x256x0+128:1"]
ENOUGH = 0.9


def serve(shape: str, policy: dict[str, Any], count: int, sleep: float) -> None:
    """Open an engine as the parent says, on a `count`-th of the cores, and run what it sends.

    sleep: seconds that each layer sleeps per micro-batch.
    """
    from engine.errors import EngineError
    from engine.kernels.threads import limit_threads
    from engine.planning.hardware import available_memory, resolve_device
    from flexgen_helm.planning.dummy import open_dummy

    limit_threads(count)
    wanted = Policy.from_mapping(policy)
    memory = available_memory(resolve_device(wanted.device), wanted.gpu_memory, wanted.cpu_memory, None)
    print(json.dumps(asdict(memory)), flush=True)
    told = json.loads(input())
    member = Member(**{**told, "memory": Memory(**told["memory"])}) if told else None
    try:
        with open_dummy(shape, wanted, member) as engine:
            layers = [name for name in engine.parts.weights.placed if name.startswith("layer.")]
            model = engine.parts.model
            compute = model.layer

            def layer(*asked: Any) -> Any:
                time.sleep(sleep)
                return compute(*asked)

            model.layer = layer  # type: ignore[method-assign]
            print(json.dumps({"layers": len(layers), "plan": asdict(engine.plan)}), flush=True)
            if member is not None and not member.leads:
                engine.follow()
                return
            while asked := json.loads(input()):
                jobs = Workload.parse(asked["work"]).jobs(engine.vocab_size, asked["seed"])
                before, start = engine.num_sweeps, time.perf_counter()
                done = engine.run(jobs)
                failed = next((str(each.error) for each in done if each.error is not None), None)
                answer = {"seconds": time.perf_counter() - start, "sweeps": engine.num_sweeps - before}
                print(json.dumps({"error": failed} if failed else answer), flush=True)
    except EngineError as error:
        print(json.dumps({"error": str(error)}), flush=True)


@contextlib.contextmanager
def opened(
    shape: dict[str, Any], policy: dict[str, Any], devices: Sequence[str], sleep: float
) -> Iterator[tuple[Process, Process]]:
    """An engine whose model is in stages on `devices`, and one with the layers of a stage, on the first device."""
    count = len(devices)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, layers in (("whole", shape["num_hidden_layers"]), ("part", shape["num_hidden_layers"] // count)):
            (Path(folder) / name).mkdir()
            config = {**shape, "num_hidden_layers": layers}
            (Path(folder) / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        wanted = [("whole", device) for device in devices] + [("part", devices[0])]
        processes = []
        for name, device in wanted:
            served = [f"{folder}/{name}", json.dumps({**policy, "device": device}), str(count), str(sleep)]
            processes.append(Process("benchmarks.stages", served))
            stack.callback(processes[-1].end)
        memories = [process.hear() for process in processes]
        least = {**memories[0], **{key: min(each[key] for each in memories) for key in ("device", "host", "disk")}}
        for index, process in enumerate(processes[:-1]):
            meeting = f"{folder}/meeting"
            member = Member(
                index=index,
                count=count,
                gather=False,
                stages=True,
                memory=Memory(**least),
                weights=None,
                meeting=meeting,
            )
            process.tell(asdict(member))
        processes[-1].tell(None)
        layers = [process.hear()["layers"] for process in processes]
        if len({*layers}) > 1:
            raise SystemExit(
                f"stages of {layers[:-1]} layers, and {layers[-1]} alone: take a shape with a smaller head"
            )
        stack.callback(processes[0].end)  # first, because the others end with it
        yield processes[0], processes[-1]


def timed(process: Process, work: Workload, seed: int) -> tuple[float, int]:
    """Tokens per second of a workload, and its sweeps."""
    process.tell({"work": str(work), "seed": seed})
    answer = process.hear()
    tokens = work.prefill_tokens + work.num_requests * (work.new - 1)
    return tokens / answer["seconds"], answer["sweeps"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="a directory with a config.json, or a shipped shape")
    parser.add_argument("--devices", nargs="+", default=["cpu:0", "cpu:1"])
    parser.add_argument("--policy", type=json.loads, default=POLICY, help="a policy as a JSON object")
    parser.add_argument("--work", nargs="+", default=WORK)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--sleep", type=float, default=0.0, help="seconds, for each layer and micro-batch")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.serve:
        serve(args.serve[0], json.loads(args.serve[1]), int(args.serve[2]), float(args.serve[3]))
        return
    from flexgen_helm.planning.dummy import shape_config

    shape = shape_config(args.shape) if args.shape else SMALL | (SLEEPING if args.sleep else {})
    rows = []
    with opened(shape, args.policy, args.devices, args.sleep) as (staged, alone):
        for text in args.work:
            work, found = Workload.parse(text), []
            for number in range(args.rounds + 1):  # the first round allocates memory
                rates = [timed(process, work, number) for process in (staged, alone)]
                found.append({"staged": rates[0], "alone": rates[1]})
                print(f"{text}: {rates[0][0]:.0f} tokens/s in stages, {rates[1][0]:.0f} alone", flush=True)
            best = {name: max(each[name][0] for each in found[1:]) for name in ("staged", "alone")}
            quotient = best["staged"] / best["alone"]
            print(f"{text}: {quotient:.3f} of the slowest stage alone (enough: {ENOUGH})", flush=True)
            rows.append({"work": text, "rounds": found[1:], **best, "quotient": quotient})
    content = {
        "devices": args.devices,
        "shape": shape,
        "policy": args.policy,
        "sleep_s": args.sleep,
        "load": os.getloadavg(),
        "rows": rows,
    }
    write_record("stages", content, args.out)


if __name__ == "__main__":
    main()
