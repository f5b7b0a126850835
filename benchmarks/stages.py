"""A model in stages of several processes, beside its slowest stage alone: tokens a second, and their quotients.

    python -m benchmarks.stages [--shape DIR] [--devices cpu:0 cpu:1] [--policy JSON] [--work 1x48x0+64:24 …]
                                [--rounds 2] [--sleep SECONDS] [--out DIR]

*Alone* is a model of one stage's layers, with the head, on one device by itself, under the same policy, so with as many
sequences in a sweep: what the stage which leads takes if it never waits for another. A pipeline that is always full has
as many tokens a second; the quotient is what of that is reached. *Beside* is the same with such a model at work on
every device at once, the slowest of them: processes of one machine share its memory's bandwidth, which is no cost of
stages.
On the CPU each process has its part of the cores; with --sleep, layers of a small model sleep for so long with each
micro-batch besides, so that other work on the machine's cores shows less. All are open at the same time and take turns;
of the rounds, the best of each counts. Weights are random.
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
    "num_hidden_layers": 8,
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
"""What in place of that takes cores next to nothing."""
POLICY = {"gpu-memory": "3GB", "cpu-memory": "6GB", "gpu-batch-size": 8, "num-gpu-batches": 1}
WORK = ["1x48x0+64:24", "1x192x0+40:1"]
WARMING = "1x16x0+40:2"
"""Before anything is timed: the first sweeps claim memory."""
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
) -> Iterator[tuple[Process, list[Process]]]:
    """The engine whose model is in stages on `devices`, and on each of those one that has the layers of a stage."""
    count = len(devices)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, layers in (("whole", shape["num_hidden_layers"]), ("part", shape["num_hidden_layers"] // count)):
            (Path(folder) / name).mkdir()
            config = {**shape, "num_hidden_layers": layers}
            (Path(folder) / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
        wanted = [("whole", device) for device in devices] + [("part", device) for device in devices]
        processes = []
        for name, device in wanted:
            served = [f"{folder}/{name}", json.dumps({**policy, "device": device}), str(count), str(sleep)]
            processes.append(Process("benchmarks.stages", served))
            stack.callback(processes[-1].end)
        memories = [process.hear() for process in processes]
        least = {**memories[0], **{key: min(each[key] for each in memories) for key in ("device", "host", "disk")}}
        for index, process in enumerate(processes[:count]):
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
        for process in processes[count:]:
            process.tell(None)
        layers = [process.hear()["layers"] for process in processes]
        if len({*layers}) > 1:
            raise SystemExit(
                f"stages of {layers[:count]} layers, and {layers[-1]} alone: take a shape with a smaller head"
            )
        stack.callback(processes[0].end)  # first: the others end with it
        yield processes[0], processes[count:]


def timed(processes: Sequence[Process], work: Workload, seed: int) -> float:
    """Tokens a second of a workload that each of these computes at the same time; of the slowest."""
    for process in processes:
        process.tell({"work": str(work), "seed": seed})
    seconds: float = max(process.hear()["seconds"] for process in processes)
    return (work.prefill_tokens + work.num_requests * (work.new - 1)) / seconds


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", help="a directory with a config.json, or a shipped shape")
    parser.add_argument("--devices", nargs="+", default=["cpu:0", "cpu:1"])
    parser.add_argument("--policy", type=json.loads, default=POLICY, help="a policy as a JSON object")
    parser.add_argument("--work", nargs="+", default=WORK)
    parser.add_argument("--rounds", type=int, default=2)
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
        asked = {"staged": [staged], "alone": alone[:1], "beside": alone}
        for processes in asked.values():
            timed(processes, Workload.parse(WARMING), 0)
        for text in args.work:
            found = []
            for number in range(args.rounds):
                rates = {name: timed(each, Workload.parse(text), number) for name, each in asked.items()}
                found.append(rates)
                print(f"{text}: {', '.join(f'{name} {rate:.0f}' for name, rate in rates.items())} tokens/s", flush=True)
            best = {name: max(each[name] for each in found) for name in asked}
            quotients = {name: best["staged"] / best[name] for name in ("alone", "beside")}
            print(
                f"{text}: the slowest stage alone {best['alone']:.0f} tokens/s, beside others {best['beside']:.0f}; "
                f"in stages {best['staged']:.0f}: {quotients['alone']:.3f} of it alone, "
                f"{quotients['beside']:.3f} beside others (enough: {ENOUGH})",
                flush=True,
            )
            rows.append({"work": text, "rounds": found, **best, "quotients": quotients})
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
