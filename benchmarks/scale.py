"""Hours, bytes and money that whole leaderboards take for many models on many GPUs, and what limits the speed-up.

    python -m benchmarks.scale --classes '{"8B": 60, "30B": 30, "175B": 10}' --dollars 3

This calculates and runs nothing. Requests are counted from HELM's own run specs of our entries; rates and times are
those of records in benchmarks/results, each of one or two GPUs. Prints the tables of docs/scale.md.
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
"""Priority and trials of the published numbers, all with at most `INSTANCES` instances."""
INSTANCES = 1000
PER_INSTANCE = {
    "multiple_choice_separate_original": 4,
    "multiple_choice_separate_calibrated": 8,
    "ranking_binary": 30,
    "language_modeling": 2,
}
"""Approximate requests per instance: options, each also alone for calibration; candidates; windows of a document."""
GPUS_A_HOST = 8


@dataclass(frozen=True, kw_only=True)
class Requests:
    """The most requests of one leaderboard for one model."""

    number: int
    new_tokens: int
    """Tokens to generate if every answer had its largest length, without answers of one token."""
    runs: int
    not_counted: tuple[str, ...] = ()
    """Entries that HELM cannot build here, because a package or a download is missing."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Measured rates of one GPU with a model."""

    weight_bytes: float
    """Bytes of the weights on disk."""
    start_s: float
    """From the process's start until all weights are in place."""
    requests_s: float
    """Requests per second with a prompt of five examples, shared by others, and an answer of one token."""
    new_tokens_s: float
    """New tokens per second of long answers, with the time of their prompts."""

    def seconds(self, asked: Requests) -> float:
        """Seconds of one GPU, without its start."""
        return asked.number / self.requests_s + asked.new_tokens / self.new_tokens_s


@dataclass(frozen=True, kw_only=True)
class Beside:
    """The driver's work, which does not shrink with more GPUs; per driver."""

    start_s: float
    """Start of a command, mostly imports."""
    share: float
    """Fraction of two GPUs' time spent computing when they share a suite."""
    made_s: float
    """Requests per second that HELM's own code makes and scores, on the driver's cores."""
    kept_s: float
    """Answers per processor second through driver, ledger and cache file; Python uses one core at a time."""
    bytes_an_answer: float
    """Bytes of an answer in HELM's cache."""


def record(name: str) -> Any:
    """Read the record of that name."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def row(name: str, workload: str) -> Mapping[str, float]:
    """What a record of `bench` says about a workload."""
    found: Mapping[str, float] = next(each for each in record(name)["rows"] if each["row"] == workload)
    return found


def measured() -> dict[str, Measured]:
    """Rates from records, by class of model: wholly on the GPU; in 16 GB; in 16 GB with 4 bits."""
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
    """The driver's figures from records, for a driver of so many cores."""
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
    """Count a leaderboard's requests in HELM's run specs, with at most `INSTANCES` questions each.

    MMLU's subjects have fewer questions, which were counted by a record.
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
        except Exception:  # run spec functions raise all kinds of exceptions for missing packages and downloads
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
    """The cost of all models on so many GPUs."""

    hours: float
    bound: str
    """What limits the speed for most of the time."""
    read_bytes: float
    """Bytes of weights read by all hosts together."""


def one_after_the_other(
    models: Mapping[str, int], gpus: int, asked: Requests, rates: Mapping[str, Measured], driver: Beside
) -> Taken:
    """One command with all GPUs for each model, one after the other."""
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
    """One command per model at a time, with GPUs in proportion to its work; models that need one GPU take turns."""
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
    """Seconds of the parts that work in parallel on one model."""
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
