"""A suite through `flexgen-helm sweep` beside the same jobs given to the engine alone: what HELM's side costs.

    python -m benchmarks.suite_beside_engine --data DIR --model DIR --work DIR [--shape llama-3-8b] [--subjects …]

DIR of the data holds `mmlu/{dev,test}/SUBJECT_SPLIT.csv` (Hendrycks et al. 2021). With `--shape`, the model has random
weights of that shape, and of `--model` only the tokenizer. Three processes follow each other: the sweep; the same
command again, which finds everything completed and so takes no more than its start-up; and a process without HELM that
opens the engine and runs the jobs of the sweep. The bound of the whole is 1.15 x (start-up + the engine alone), of the
engine's passes 1.3 x those alone.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.helm_client import place_data
from benchmarks.sweep_mmlu import ROOT, SUITE, scores
from flexgen_helm.planning.dummy import shape_config
from flexgen_helm.planning.record import write_record
from flexgen_helm.sweeps.record import read_record

SLACK, SLACK_OF_PASSES = 1.15, 1.3
_JOBS = "jobs.pickle"


def make_model(source: Path, shape: str, folder: Path) -> None:
    """Random weights of a shape, with the tokenizer of `source`."""
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


def write_jobs(suite: Path, model: str, policy: dict[str, Any], target: Path) -> None:
    """Inside a process with HELM: the distinct jobs of a suite's requests, as the client makes them."""
    from helm.common.cache import BlackHoleCacheConfig
    from helm.common.hierarchical_logger import setup_default_logging
    from helm.common.request import Request
    from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer

    from flexgen_helm.client import FlexGenClient

    setup_default_logging()
    requests: list[Request] = []
    for state in sorted(suite.glob("*/scenario_state.json")):
        requests += [Request(**entry["request"]) for entry in json.loads(state.read_text())["request_states"]]
    cache = BlackHoleCacheConfig()
    tokenizer = HuggingFaceTokenizer(cache, tokenizer_name=model, pretrained_model_name_or_path=model)
    client = FlexGenClient(cache, tokenizer, model, pretrained_model_name_or_path=model, policy=policy)
    asked = client.look_up(requests)
    jobs = [job for work in asked.todo.values() for job in work.jobs]
    target.write_bytes(pickle.dumps((policy, jobs)))


def run_jobs(path: str, source: Path) -> None:
    """Inside a process without HELM: open the engine and run the jobs, timed; prints seconds."""
    begun = time.perf_counter()
    from engine import Engine
    from engine.schedule.timing import SweepTiming

    policy, jobs = pickle.loads(source.read_bytes())
    timings: list[SweepTiming] = []
    with Engine.from_pretrained(path, policy) as engine:
        engine.wait_until_loaded()
        loaded = time.perf_counter()
        engine.observer = timings.append
        completions = engine.run(jobs)
        ended = time.perf_counter()
        plan = engine.plan
    assert all(completion.error is None for completion in completions)
    found = {
        "open_s": loaded - begun,
        "run_s": ended - loaded,
        "passes": len(timings),
        "passes_s": sum(timing.sweep_s - timing.load_s for timing in timings),
        "rows": sum(timing.prefill_rows + timing.decode_rows for timing in timings),
        "jobs": len(jobs),
        "weights": plan.weights.as_mapping(),
    }
    print("\n" + json.dumps(found))


def run_sweep(command: list[str], work: Path) -> float:
    """Seconds of a sweep; ends the benchmark if it fails."""
    start = time.perf_counter()
    with (work / "sweep.out").open("a") as out:
        code = subprocess.run(command, cwd=work, stdout=out, stderr=out, env=_environment(), check=False).returncode
    seconds = time.perf_counter() - start
    if code:
        raise SystemExit(f"the sweep ended with exit code {code}:\n{(work / 'sweep.out').read_text()[-3000:]}")
    return seconds


def child(work: Path, *arguments: str) -> str:
    """The output of this program, run once more for a part."""
    command = [sys.executable, "-m", "benchmarks.suite_beside_engine", *arguments]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False, env=_environment())
    if done.returncode:
        raise SystemExit(f"{arguments[0]} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def main() -> None:
    """Run the sweep, its start-up and the engine alone, and record them."""
    if sys.argv[1:2] == ["--write-jobs"]:
        return write_jobs(Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]), Path(sys.argv[5]))
    if sys.argv[1:2] == ["--run-jobs"]:
        return run_jobs(sys.argv[2], Path(sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="directory with mmlu/{dev,test}/*.csv")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--work", type=Path, required=True, help="directory of output and cache; what is there goes")
    parser.add_argument("--shape", help="take random weights of this shape, and only the tokenizer of the model")
    parser.add_argument("--subjects", nargs="+", help="default: all there are")
    parser.add_argument("--instances", type=int, help="questions of each subject; default: all")
    parser.add_argument("--policy", default="auto", help="as of flexgen-helm sweep")
    parser.add_argument("--name", default="suite-beside-engine", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    files = sorted((options.data / "mmlu/test").glob("*.csv"))
    subjects = options.subjects or [file.name.removesuffix("_test.csv") for file in files]
    work: Path = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    output = work / "benchmark_output"
    place_data(options.data, subjects, output, gsm=False)
    model = options.model.resolve()
    if options.shape:
        model = work / options.shape
        make_model(options.model.resolve(), options.shape, model)
    entries = [f"mmlu:subject={subject}" for subject in subjects]
    command = [sys.executable, "-m", "flexgen_helm", "sweep", "-r", *entries, "--model", str(model), "--suite", SUITE]
    command += ["--policy", options.policy, "--json-log", "events.jsonl"]
    if options.instances:
        command += ["-m", str(options.instances)]
    seconds = run_sweep(command, work)
    print(f"the sweep took {seconds:.1f} s", flush=True)
    suite, jobs = output / "runs" / SUITE, work / _JOBS
    record = read_record(suite)
    assert record is not None
    (model_record,) = record.models
    start_up = run_sweep([*command, "--skip-completed-runs"], work)
    child(work, "--write-jobs", str(suite), str(model), json.dumps(dict(model_record.policy)), str(jobs))
    alone: dict[str, Any] = json.loads(child(work, "--run-jobs", str(model), str(jobs)).rsplit("\n", 2)[-2])
    passes = model_record.time_split.prefill + model_record.time_split.decode
    bound = SLACK * (start_up + alone["open_s"] + alone["run_s"])
    right = scores(suite)
    content = {
        "model": options.shape or model.name,
        "weights": "random" if options.shape else "of the model",
        "subjects": len(subjects),
        "requests": model_record.requests,
        "cores": os.cpu_count(),
        "seconds": seconds,
        "start_up_s": start_up,
        "alone": alone,
        "bound_s": bound,
        "seconds_by_bound": seconds / bound,
        "passes_s": passes,
        "passes_by_alone": passes / alone["passes_s"],
        "time_split": vars(model_record.time_split),
        "mean_exact_match": sum(right.values()) / len(right) if right else None,
    }
    print(f"start-up {start_up:.1f} s, engine alone {alone['open_s']:.1f} + {alone['run_s']:.1f} s")
    print(f"whole: {seconds:.1f} s of at most {bound:.1f}; passes: {passes:.1f} s, alone {alone['passes_s']:.1f} s")
    print(write_record(options.name, content, options.out))


if __name__ == "__main__":
    main()
