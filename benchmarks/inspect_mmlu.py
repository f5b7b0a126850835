"""A few-shot MMLU task in Inspect: our provider and Inspect's own `hf`, with the same model, machine and call.

    python -m benchmarks.inspect_mmlu --data DIR --model DIR [--subjects …] [--instances 50] [--shots 5] [--output DIR]

The data directory holds `mmlu/{dev,test}/SUBJECT_SPLIT.csv` (Hendrycks et al. 2021). Runs in an environment with
inspect_ai (tests/README.md). Every contender is a process of its own; `eval()` is timed, after the model is loaded and
one sample has been evaluated. `hf` is run with each of `--batch-sizes`, and the fastest run counts. Prints the ratio of
speeds, and how many answers agree.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
SUBJECTS = ["abstract_algebra", "anatomy", "us_foreign_policy", "college_medicine"]
LETTERS = "ABCD"
MOST_TOKENS = 2


def rows_of(data: Path, split: str, subject: str) -> list[list[str]]:
    """Read the questions of a subject: question, four choices and the letter of the right one."""
    with (data / "mmlu" / split / f"{subject}_{split}.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def asked(row: list[str], *, answered: bool) -> str:
    """Format a question as Hendrycks et al. do."""
    question, *choices, letter = row
    listed = "\n".join(f"{name}. {choice}" for name, choice in zip(LETTERS, choices, strict=True))
    return f"{question}\n{listed}\nAnswer:{f' {letter}' if answered else ''}"


def prompts_of(data: Path, subjects: list[str], instances: int, shots: int) -> list[tuple[str, str]]:
    """(prompt, right letter) of the first `instances` questions of each subject, after the same examples."""
    found = []
    for subject in subjects:
        told = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}."
        examples = [asked(row, answered=True) for row in rows_of(data, "dev", subject)[:shots]]
        for row in rows_of(data, "test", subject)[:instances]:
            found.append(("\n\n".join([told, *examples, asked(row, answered=False)]), row[-1]))
    return found


def run_child(contender: str, model: str, questions: Path, batch_size: int) -> None:
    """Evaluate inside a contender's process; prints seconds and answers as JSON, last."""
    from inspect_ai import Task, eval
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import match
    from inspect_ai.solver import generate

    import flexgen_helm.inspect_adapter  # noqa: F401 - the entry point of an installed package

    greedy: dict[str, Any] = {"temperature": 0.0, "max_tokens": MOST_TOKENS}
    if contender == "flexgen":
        made = get_model(f"flexgen/{model}", config=GenerateConfig(**greedy), policy={"device": "cpu"})
    else:
        config = GenerateConfig(**greedy, max_connections=batch_size)
        made = get_model(f"hf/{model}", config=config, device="cpu", do_sample=False, torch_dtype="float32")
    samples = [Sample(input=text, target=letter) for text, letter in json.loads(questions.read_text())]
    task = Task(MemoryDataset(samples), solver=generate(), scorer=match(location="begin"), name="mmlu")
    with tempfile.TemporaryDirectory() as logs:
        eval(task, model=made, display="none", log_dir=logs, limit=1)  # loads everything that is loaded once
        start = time.perf_counter()
        [log] = eval(task, model=made, display="none", log_dir=logs)
        seconds = time.perf_counter() - start
        if log.status != "success" or log.samples is None:
            raise SystemExit(f"{contender} failed: {log.error}")
        texts = {str(sample.id): sample.output.completion for sample in log.samples}  # read from the log on demand
    print("\n" + json.dumps({"seconds": seconds, "texts": texts}))


def measured(contender: str, arguments: argparse.Namespace, questions: Path, batch_size: int = 0) -> dict[str, Any]:
    """Seconds and answers of one contender."""
    command = [sys.executable, "-m", "benchmarks.inspect_mmlu", "--child", contender, "--model", str(arguments.model)]
    command += ["--questions", str(questions), "--batch-sizes", str(batch_size)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{contender} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.rstrip().rsplit("\n", 1)[1])
    return found


def agreement(texts: dict[str, str], others: dict[str, str]) -> float:
    """The part of samples with the same answer."""
    if texts.keys() != others.keys():
        raise SystemExit("the contenders have answered other samples")
    return sum(texts[name] == others[name] for name in texts) / len(texts)


def main(argv: list[str] | None = None) -> None:
    """Measure both, print a table, write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--instances", type=int, default=50)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", choices=["flexgen", "hf"], help=argparse.SUPPRESS)
    parser.add_argument("--questions", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        run_child(arguments.child, arguments.model, arguments.questions, arguments.batch_sizes[0])
        return
    if arguments.data is None:
        parser.error("--data is needed")
    prompts = prompts_of(arguments.data, arguments.subjects, arguments.instances, arguments.shots)
    with tempfile.TemporaryDirectory() as scratch:
        questions = Path(scratch) / "questions.json"
        questions.write_text(json.dumps(prompts))
        ours = measured("flexgen", arguments, questions)
        theirs = {size: measured("hf", arguments, questions, size) for size in arguments.batch_sizes}
    fastest = min(theirs, key=lambda size: theirs[size]["seconds"])
    seconds = {"flexgen": ours["seconds"], **{f"hf, {size} at once": each["seconds"] for size, each in theirs.items()}}
    ratio = theirs[fastest]["seconds"] / ours["seconds"]
    same = agreement(ours["texts"], theirs[fastest]["texts"])
    for name, value in seconds.items():
        print(f"{name:16} {value:8.2f} s  {len(prompts) / value:8.2f} samples/s")
    print(f"{ratio:.2f} times the fastest of hf; {same:.1%} of {len(prompts)} answers agree")
    content = {
        "model": Path(arguments.model).name,
        "subjects": arguments.subjects,
        "samples": len(prompts),
        "shots": arguments.shots,
        "seconds": seconds,
        "ratio": ratio,
        "agreement": same,
    }
    print(write_record(f"inspect-mmlu-{Path(arguments.model).name}", content, arguments.output))


if __name__ == "__main__":
    main()
