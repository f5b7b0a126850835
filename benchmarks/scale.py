"""What whole leaderboards take for many models on many GPUs: hours, bytes and money, and what keeps more from helping.

    python -m benchmarks.scale --classes '{"8B": 60, "30B": 30, "175B": 10}' --dollars 3

Computes; runs nothing. Requests are counted from HELM's own run specs of our entries, rates and times are those of
records in benchmarks/results, each of one or two GPUs. Prints the tables of docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
LEADERBOARDS: Mapping[str, tuple[int | None, int]] = {"classic": (2, 3), "capabilities": (None, 1)}
"""Priority and trials of the published numbers, all with at most `INSTANCES`."""
INSTANCES = 1000
PER_INSTANCE = {
    "multiple_choice_separate_original": 4,
    "multiple_choice_separate_calibrated": 8,
    "ranking_binary": 30,
    "language_modeling": 2,
}
"""Requests of an instance, about: its options, each alone for calibration, too; candidates; windows of a document."""
GPUS_A_HOST = 8


@dataclass(frozen=True, kw_only=True)
class Requests:
    """Of one leaderboard, for one model, at most."""

    number: int
    new_tokens: int
    """If every answer were as long as it may be; those of one token aside."""
    runs: int
    not_counted: tuple[str, ...] = ()
    """Entries that HELM does not build here, for want of a package or a download."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one GPU was measured to do with a model."""

    weight_bytes: float
    """On disk."""
    start_s: float
    """From the process's start until its weights are in place."""
    requests_s: float
    """Of a prompt with five examples, which others share, and an answer of a token."""
    new_tokens_s: float
    """Of long answers, their prompts included."""

    def seconds(self, asked: Requests) -> float:
        """Of one GPU, without its start."""
        return asked.number / self.requests_s + asked.new_tokens / self.new_tokens_s


@dataclass(frozen=True, kw_only=True)
class Beside:
    """What does not become less with more GPUs, per driver."""

    start_s: float
    """Of a command, imports mostly."""
    share: float
    """Of two GPUs' time that is work, when they share a suite."""
    made_s: float
    """Requests a second that HELM's own code makes and scores, on the driver's cores."""
    kept_s: float
    """Answers a second of a processor, through driver, ledger and cache file: Python computes on one at a time."""
    bytes_an_answer: float
    """In HELM's cache."""


def record(name: str) -> Any:
    """The record of that name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(name: str, workload: str) -> Mapping[str, float]:
    """What a record of `bench` tells of a workload."""
    found: Mapping[str, float] = next(each for each in record(name)["rows"] if each["row"] == workload)
    return found


def measured() -> dict[str, Measured]:
    """What records tell, by class of model: on the card whole; in 16 GB; in 16 GB and 4 bits."""
    wall, one_8b = record("sweep-wall-llama-3-8b"), record("rivals-opt-6.7b")["contenders"]["flexgen-helm"]
    of_30b, of_175b = record("bench-opt-30b-16GB"), record("bench-opt-175b-16GB-4bit")
    prompts, answers = "1x100x400+100:1", "1x32x0+512:32"
    return {
        "8B": Measured(
            weight_bytes=record("bench-llama-3-8b-6GB")["sizes"]["sweep_bytes"],
            start_s=wall["engine_alone"]["start_s"],
            requests_s=wall["computed"] / wall["sweep_passes_s"],
            new_tokens_s=one_8b["new_tokens_s"],
        ),
        "30B": Measured(
            weight_bytes=of_30b["sizes"]["sweep_bytes"],
            start_s=of_30b["load_s"],
            requests_s=row("bench-opt-30b-16GB", "10x100x400+100:1")["requests_s"],
            new_tokens_s=row("bench-opt-30b-16GB-4bit", "1x256x0+512:32")["new_tokens_s"],
        ),
        "175B": Measured(
            weight_bytes=of_175b["sizes"]["expanded_bytes"],
            start_s=of_175b["load_s"],
            requests_s=row("bench-opt-175b-16GB-4bit", prompts)["requests_s"],
            new_tokens_s=row("bench-opt-175b-16GB-4bit", answers)["new_tokens_s"],
        ),
    }


def beside(cores: int) -> Beside:
    """What records tell of the driver's side, for a driver of so many cores."""
    wall, overhead, driver = record("sweep-wall-llama-3-8b"), record("sweep-overhead"), record("scale-driver")
    two = next(each for each in record("several-gpus-opt-30b-one-token")["runs"] if each["way"])
    seconds = overhead["seconds"]["ours"]
    helms = (seconds["adapt cpu"] + seconds["finish cpu"]) / overhead["requests"]
    return Beside(
        start_s=wall["start_up_s"],
        share=two["rows"][-1]["quotient"] / len(two["devices"]),
        made_s=max(1, cores - 1) / helms,
        kept_s=driver["answers_processor_s"],
        bytes_an_answer=driver["cache_bytes"] / driver["answers"],
    )


def requests_of(leaderboard: str) -> Requests:
    """Count a leaderboard's requests in HELM's run specs, at most `INSTANCES` questions each.

    MMLU's subjects have fewer questions, as many as a record counted.
    """
    from helm.benchmark import config_registry
    from helm.benchmark.presentation.run_entry import RunEntry
    from helm.benchmark.run import run_entries_to_run_specs

    import flexgen_helm.plugin  # noqa: F401 - registers our run entries
    from flexgen_helm.runs.entries import conf_path
    from flexgen_helm.runs.entry_files import read_entry_file

    config_registry.register_builtin_configs_from_helm_package()
    priority, trials = LEADERBOARDS[leaderboard]
    mmlu = record("sweep-wall-llama-3-8b")
    asked, not_counted = Counter[str](), []
    for entry in read_entry_file(conf_path(leaderboard)):
        if priority is not None and entry.priority > priority:
            continue
        sign = "," if ":" in entry.description else ":"
        named = RunEntry(f"{entry.description}{sign}model=openai/gpt2", entry.priority, entry.groups)
        try:
            run_specs = run_entries_to_run_specs([named], max_eval_instances=INSTANCES, num_train_trials=trials)
        except Exception:  # run spec functions raise whatever they meet: packages and downloads that are missing
            not_counted.append(entry.description)
            continue
        for run_spec in run_specs:
            adapter = run_spec.adapter_spec
            questions = INSTANCES
            if run_spec.name.startswith("mmlu:"):
                questions = min(questions, math.ceil(mmlu["requests"] / mmlu["subjects"]))
            changed = len(run_spec.data_augmenter_spec.perturbation_specs) if run_spec.data_augmenter_spec else 0
            # Without examples in the prompt, all trials are the same.
            draws = adapter.num_train_trials if adapter.max_train_instances else 1
            number = questions * (1 + changed) * PER_INSTANCE.get(adapter.method, 1) * draws
            asked["runs"] += 1
            asked["requests"] += number
            asked["new"] += number * adapter.num_outputs * adapter.max_tokens if adapter.max_tokens > 5 else 0
    return Requests(
        number=asked["requests"], new_tokens=asked["new"], runs=asked["runs"], not_counted=tuple(not_counted)
    )


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What all models take on so many GPUs."""

    hours: float
    bound: str
    """By what, for most of the time."""
    read_bytes: float
    """Weights, by all hosts together."""


def one_after_the_other(
    models: Mapping[str, int], gpus: int, asked: Requests, rates: Mapping[str, Measured], driver: Beside
) -> Taken:
    """One command and all GPUs for each model in turn."""
    hosts, time_by, read = math.ceil(gpus / GPUS_A_HOST), Counter[str](), 0.0
    for name, number in models.items():
        parts = _parts(rates[name].seconds(asked), gpus, asked.number, driver)
        bound = max(parts, key=lambda part: parts[part])
        time_by[bound] += number * parts[bound]  # type: ignore[assignment]
        time_by["start"] += number * (driver.start_s + rates[name].start_s)  # type: ignore[assignment]
        read += number * hosts * rates[name].weight_bytes
    return Taken(hours=time_by.total() / 3600, bound=time_by.most_common(1)[0][0], read_bytes=read)


def side_by_side(
    models: Mapping[str, int], gpus: int, asked: Requests, rates: Mapping[str, Measured], driver: Beside
) -> Taken:
    """A command for each model, with as many GPUs as its part of the work; those of one GPU one after the other."""
    work = {name: number * rates[name].seconds(asked) for name, number in models.items()}
    longest, time_by, read = 0.0, Counter[str](), 0.0
    for name, number in models.items():
        own = gpus * work[name] / sum(work.values())  # of all models of this class
        each, turns = max(1, int(own / number)), max(1.0, number / own)
        parts = _parts(rates[name].seconds(asked), each, asked.number, driver)
        bound = max(parts, key=lambda part: parts[part])
        start = driver.start_s + rates[name].start_s
        longest = max(longest, turns * (parts[bound] + start))
        time_by[bound] += number * parts[bound]  # type: ignore[assignment]
        time_by["start"] += number * start  # type: ignore[assignment]
        read += number * math.ceil(each / GPUS_A_HOST) * rates[name].weight_bytes
    return Taken(hours=longest / 3600, bound=time_by.most_common(1)[0][0], read_bytes=read)


def _parts(seconds: float, gpus: int, requests: int, driver: Beside) -> dict[str, float]:
    """What works side by side on one model, in seconds."""
    return {
        "GPUs": seconds / (gpus * (driver.share if gpus > 1 else 1.0)),
        "HELM": requests / driver.made_s,
        "driver": requests / driver.kept_s,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=json.loads, default={"8B": 60, "30B": 30, "175B": 10}, help="models of each")
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 1000])
    parser.add_argument("--cores", type=int, default=16, help="of each driver's machine")
    parser.add_argument("--dollars", type=float, default=3.0, help="for a GPU and hour")
    options = parser.parse_args(arguments)
    rates, driver = measured(), beside(options.cores)
    print("| model | requests/s | new tokens/s | weights on disk | start |\n|---|---|---|---|---|")
    for name, each in rates.items():
        print(
            f"| {name} | {each.requests_s:.0f} | {each.new_tokens_s:.0f} | {each.weight_bytes / 1e9:.0f} GB "
            f"| {each.start_s:.0f} s |"
        )
    print(f"\nper driver of {options.cores} cores: {driver}\n")
    for leaderboard in LEADERBOARDS:
        asked = requests_of(leaderboard)
        print(
            f"{leaderboard}: {asked.runs} runs, at most {asked.number:,} requests and {asked.new_tokens:,} new tokens "
            f"a model; not counted: {len(asked.not_counted)} entries {', '.join(asked.not_counted)}"
        )
        for name, each in rates.items():
            print(f"  {name}: {each.seconds(asked) / 3600:.1f} GPU hours")
        cache = sum(options.classes.values()) * asked.number * driver.bytes_an_answer
        print(f"  HELM's caches of all models: {cache / 1e9:,.0f} GB\n")
        print("| GPUs | | hours | bound by | GPU hours | dollars | weights read |\n|---|---|---|---|---|---|---|")
        for gpus in options.gpus:
            for way, take in (("one after the other", one_after_the_other), ("side by side", side_by_side)):
                taken = take(options.classes, gpus, asked, rates, driver)
                spent = gpus * taken.hours
                print(
                    f"| {gpus:,} | {way} | {taken.hours:,.1f} | {taken.bound} | {spent:,.0f} "
                    f"| {spent * options.dollars:,.0f} | {taken.read_bytes / 1e12:,.1f} TB |"
                )
        print()


if __name__ == "__main__":
    main()
