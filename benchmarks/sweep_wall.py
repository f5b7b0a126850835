"""A suite through HELM compared with the engine alone: what HELM's side adds to the wall-clock time.

    python -m benchmarks.sweep_wall --data DIR --model DIR --work DIR [--shape llama-3-8b] [--subjects …] [-- FLAGS]

The data directory holds `mmlu/{dev,test}/SUBJECT_SPLIT.csv`; FLAGS are those of `sweep`. With `--shape`, the model has
random weights of that shape, and of `--model` only the tokenizer is used. Three programs run one after the other: a
sweep of one question, whose time is start-up; the sweep of all subjects, from the command to its end; and, without
HELM, the engine alone with the very jobs that the sweep gave it. `--work` must be empty or absent, so that HELM's cache
answers nothing.

The engine alone computes all jobs at once, twice, because a process's first sweeps take longer; then as they arrived in
the sweep. With `--parts`, an engine in a worker process does all that, too. This separates the causes of the sweep's
extra time: first calls of kernels, smaller sweeps, the other process, and HELM's processes. For each pass it prints
where its time went (`benchmarks/pass_parts.py`), and for the sweeps what their threads did
(`benchmarks/stack_samples.py`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.helm_client import place_data
from benchmarks.pass_parts import Part, PassParts, table
from benchmarks.stack_samples import Samples, Span, timeline, watch_engines
from flexgen_helm.planning.dummy import shape_config
from flexgen_helm.planning.environment import hardware
from flexgen_helm.planning.record import write_record
from flexgen_helm.sweeps.record import read_record

if TYPE_CHECKING:
    from engine import Engine
    from engine.job import Job
    from engine.schedule.timing import SweepTiming
    from engine.workers.remote_engine import RemoteEngine

ROOT = Path(__file__).resolve().parent.parent
_MARK = "the sweep has ended"


def make_model(source: Path, shape: str, folder: Path) -> None:
    """Write random weights of a shape, with the tokenizer of `source`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    content = shape_config(shape)
    tokenizer = AutoTokenizer.from_pretrained(source)
    content.update(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    config = AutoConfig.for_model(content.pop("model_type"), **content)
    if len(tokenizer) > config.vocab_size:
        raise SystemExit(f"the tokenizer of {source} has {len(tokenizer)} tokens, {shape} only {config.vocab_size}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, content["dtype"]))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What a sweep submitted to its engine; pickled."""

    jobs: Any
    """`PackedJobs`."""
    portions: list[tuple[float, int]]
    """When jobs were submitted, in seconds after the first ones, and how many."""
    parts: list[Part]
    spans: list[Span]
    """Samples of the command's threads."""


def sweep_child(jobs_file: Path, arguments: list[str]) -> int:
    """Run the sweep inside its program, print when it has ended, and only then write what it gave the engine."""
    samples = Samples()
    watch_engines(jobs_file.with_suffix(".engine"))
    from engine.workers.packing import PackedJobs
    from engine.workers.remote_engine import RemoteEngine
    from flexgen_helm import run

    given: list[Job] = []
    portions: list[tuple[float, int]] = []
    engines: list[RemoteEngine] = []
    parts = PassParts(lambda: worker_of(engines[0]))
    ask, observe = RemoteEngine.sweeps, RemoteEngine._observe

    def asked(self: RemoteEngine, jobs: Sequence[Job]) -> Any:
        if not engines:
            engines.append(self)
            parts.begin()
        given.extend(jobs)
        portions.append((time.perf_counter(), len(jobs)))
        return ask(self, jobs)

    def observed(self: RemoteEngine, timing: SweepTiming, device: str) -> None:
        parts.observe(timing)
        observe(self, timing, device)

    RemoteEngine.sweeps = asked  # type: ignore[method-assign, assignment]
    RemoteEngine._observe = observed  # type: ignore[method-assign]
    code = run.main(["sweep", *arguments])
    print(_MARK, flush=True)
    found = Given(
        jobs=PackedJobs.of(list(enumerate(given))),
        portions=[(at - portions[0][0], count) for at, count in portions],
        parts=parts.parts,
        spans=samples.spans,
    )
    jobs_file.write_bytes(pickle.dumps(found))
    return code


def timelines(jobs_file: Path, begun: float) -> str:
    """Timelines of the command's and its engine's threads; seconds since `begun`."""
    given: Given = pickle.loads(jobs_file.read_bytes())
    samples = jobs_file.with_suffix(".engine")
    engine = json.loads(samples.read_text()) if samples.is_file() else []  # none is written in the first second
    return f"command:\n{timeline(given.spans, begun)}\nengine:\n{timeline(map(tuple, engine), begun)}"


def worker_of(engine: RemoteEngine) -> int:
    """The process of the engine's first device."""
    process = engine._place._crew.places[0].process
    assert process is not None
    return process.pid


def engine_child(jobs_file: Path, model: Path, policy: str, kind: str) -> int:
    """Run the same jobs without HELM, in this process or in a worker; prints the times as JSON."""
    begun = time.perf_counter()
    from engine import Engine
    from engine.workers.remote_engine import RemoteEngine

    given: Given = pickle.loads(jobs_file.read_bytes())
    jobs = [job for _, job in given.jobs.unpack()]
    told: dict[str, Any] = {"jobs": len(jobs)}
    engine: Engine | RemoteEngine
    with (
        Engine.from_pretrained(str(model), policy)
        if kind == "here"
        else RemoteEngine.from_pretrained(str(model), policy) as engine
    ):
        engine.weights_digest()  # available once the weights are loaded
        told["start_s"] = time.perf_counter() - begun
        passes = PassParts(os.getpid if isinstance(engine, Engine) else lambda: worker_of(engine))
        engine.observer = passes.observe
        for name, portions in (("", [(0.0, len(jobs))]), ("again_", [(0.0, len(jobs))]), ("arriving_", given.portions)):
            passes.begin()
            told[f"{name}run_s"] = asked(engine, jobs, portions)
            told[f"{name}passes_s"] = sum(part.pass_s for part in passes.parts)
            told[f"{name}passes"] = len(passes.parts)
            told[f"{name}parts"] = [dataclasses.asdict(part) for part in passes.parts]
    print(json.dumps(told))
    return 0


def asked(engine: Engine | RemoteEngine, jobs: Sequence[Job], portions: Sequence[tuple[float, int]]) -> float:
    """Seconds until all `jobs` are answered; portions: (seconds after the first, number of jobs) of each submission."""
    begun, first, calls = time.perf_counter(), 0, []
    for at, count in portions:
        time.sleep(max(0.0, at - (time.perf_counter() - begun)))
        calls.append(engine.sweeps(jobs[first : first + count]))
        first += count
    for call in calls:
        for _ in call:
            pass
    return time.perf_counter() - begun


def started(arguments: list[str], work: Path) -> tuple[float, str]:
    """Run a program; returns its seconds, up to its mark if it prints one, and its output."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env["HF_HUB_OFFLINE"] = "1"
    begun, seconds, lines = time.perf_counter(), 0.0, []
    command = [sys.executable, "-m", "benchmarks.sweep_wall", *arguments]
    with subprocess.Popen(command, cwd=work, stdout=subprocess.PIPE, text=True, env=env) as program:
        assert program.stdout is not None
        for line in program.stdout:
            if line.strip() == _MARK:
                seconds = time.perf_counter() - begun
            lines.append(line)
    if program.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{''.join(lines)[-3000:]}")
    return seconds or time.perf_counter() - begun, "".join(lines)


def main() -> None:
    """Run all three and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with mmlu/{dev,test}/*.csv")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--work", type=Path, required=True, help="directory of output and cache; empty or absent")
    parser.add_argument("--shape", help="take random weights of this shape, and only the tokenizer of the model")
    parser.add_argument("--subjects", nargs="+", help="default: all there are")
    parser.add_argument("--instances", type=int, help="questions of each subject; default: all")
    parser.add_argument("--policy", default="auto", help="of sweep and engine")
    parser.add_argument("--parts", action="store_true", help="also an engine in a worker, without HELM")
    parser.add_argument("--name", default="sweep-wall", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options, flags = parser.parse_known_args()
    subjects = options.subjects or sorted(
        file.name.removesuffix("_test.csv") for file in (options.data / "mmlu/test").glob("*.csv")
    )
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise SystemExit(f"{work} is not empty")
    place_data(options.data, subjects, work / "benchmark_output", gsm=False)
    jobs_file, model = work / "jobs", options.model.resolve()
    if options.shape:
        model = work / options.shape
        make_model(options.model.resolve(), options.shape, model)
    common = ["--model", str(model), "--policy", options.policy, *(flag for flag in flags if flag != "--")]
    entries = [f"mmlu:subject={subject}" for subject in subjects]
    few = ["-r", entries[0], "-m", "1", "--suite", "few", "--disable-cache"]
    begun = time.time()
    start_up_s, _ = started(["--sweep-child", str(work / "few"), *few, *common], work)
    print(f"start-up, one question: {start_up_s:.1f} s", flush=True)
    print(timelines(work / "few", begun), flush=True)
    whole = ["-r", *entries, *(["-m", str(options.instances)] if options.instances else []), "--suite", "whole"]
    whole += ["--json-log", "events.jsonl"]
    begun = time.time()
    wall_s, _ = started(["--sweep-child", str(jobs_file), *whole, *common], work)
    found = read_record(work / "benchmark_output" / "runs" / "whole")
    assert found is not None
    (record,) = found.models
    passes_s = record.time_split.prefill + record.time_split.decode
    print(f"sweep: {wall_s:.1f} s, of which {record.sweeps} passes took {passes_s:.1f} s", flush=True)
    print(timelines(jobs_file, begun), flush=True)
    parts = {"sweep": pickle.loads(jobs_file.read_bytes()).parts}
    print(f"sweep, pass by pass:\n{table(parts['sweep'])}", flush=True)
    engines = {}
    for kind in ("here", "worker") if options.parts else ("here",):
        _, told = started(["--engine-child", str(jobs_file), str(model), options.policy, kind], work)
        engines[kind] = json.loads(told.splitlines()[-1])
        for name, heading in (("", "all at once"), ("again_", "again"), ("arriving_", "as they arrived")):
            found_parts = [Part(**part) for part in engines[kind].pop(f"{name}parts")]
            parts[f"{kind}, {heading}"] = found_parts
            print(f"engine {kind}, {heading}, pass by pass:\n{table(found_parts)}", flush=True)
    alone = engines["here"]
    content = {
        "model": model.name,
        "subjects": len(subjects),
        "requests": record.requests,
        "computed": record.computed,
        "prompt_tokens": record.prompt_tokens,
        "cores": len(os.sched_getaffinity(0)),
        "device": hardware().device,
        "start_up_s": start_up_s,
        "sweep_s": wall_s,
        "model_s": record.seconds,
        "sweep_passes": record.sweeps,
        "sweep_passes_s": passes_s,
        "engine_alone": alone,
        "engine_in_a_worker": engines.get("worker"),
        "passes_ratio": passes_s / alone["passes_s"],
        "wall_ratio": wall_s / (start_up_s + alone["run_s"]),
        "processor_s": sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]),
    }
    for name, value in content.items():
        print(f"{name}: {value}")
    content["parts"] = {name: [dataclasses.asdict(part) for part in each] for name, each in parts.items()}
    print(write_record(options.name, content, options.out))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--sweep-child"]:
        sys.exit(sweep_child(Path(sys.argv[2]), sys.argv[3:]))
    elif sys.argv[1:2] == ["--engine-child"]:
        sys.exit(engine_child(Path(sys.argv[2]), Path(sys.argv[3]), *sys.argv[4:]))
    else:
        main()
