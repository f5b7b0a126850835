"""The acceptance rate of drafted tokens: a real small model, with its own 4-bit copy as the draft model.

    python -m benchmarks.draft_acceptance --data DIR [--model DIR] [--requests 8] [--new 64] [--out DIR]

Prompts are GSM8K's test questions after five worked examples, and MMLU's test questions; answers are greedy, then
sampled at temperature 1. The draft's matrices are the decoded values of `compress-weight: 4`, in full width: it is as
slow as the model and would not be used, so the length of drafts is fixed (`SIZE`). Only the acceptance is reported.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import Engine, Job, Sampling
from engine.drafting.pace import Pace
from engine.kernels.codec import codec_of
from engine.model.causal_model import CausalModel
from engine.weights.stored_form import coded_names
from flexgen_helm.planning.record import write_record
from flexgen_helm.runs.assets import demo_model

ROOT = Path(__file__).resolve().parent.parent
SIZE = 4
SUBJECTS = ("anatomy", "college_chemistry", "philosophy")


class Fixed(Pace):
    """Drafts a fixed number of tokens in every sweep."""

    def size(self, count: int, rows: int) -> int:
        return SIZE

    def pays_to_begin(self, tokens: int, left: int, count: int, size: int) -> bool:
        return True


def write_rounded(model: Path, folder: Path, bits: int) -> None:
    """Write a copy of `model` whose layers' matrices are encoded with so many bits and decoded again."""
    codec = codec_of(bits)
    assert codec is not None
    built = CausalModel(model, torch.float32, torch.device("cpu"))
    names = {name for unit in built.units for name in coded_names(built, unit)}
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name in names:
                codec.decode_parts(codec.encode(parameter.flatten(), parameter.dtype), parameter.view(-1))
    stock.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def prompts_of(data: Path, count: int) -> dict[str, list[str]]:
    """Return `count` prompts of each data set."""
    train, test = (
        [json.loads(line) for line in (data / "gsm8k" / f"gsm_data_{part}").read_text().splitlines() if line]
        for part in ("train", "test")
    )
    shots = "".join(f"Q: {each['question']}\nA: {each['answer']}\n\n" for each in train[:5])
    gsm = [f"{shots}Q: {each['question']}\nA:" for each in test[:count]]
    mmlu = []
    for subject in SUBJECTS:
        with (data / "mmlu" / "test" / f"{subject}_test.csv").open(newline="") as file:
            rows = list(csv.reader(file))[: -(-count // len(SUBJECTS))]
        for question, *choices, _ in rows:
            listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip("ABCD", choices, strict=True))
            mmlu.append(f"Question: {question}\n{listed}Let us think step by step. ")
    return {"gsm8k": gsm, "mmlu": mmlu[:count]}


def run(model: Path, draft: Path | None, jobs: Sequence[Job]) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """Run jobs with or without a draft; returns the measured figures and their tokens."""
    policy = {"device": "cpu", "dtype": "float32"} | ({} if draft is None else {"draft-model": str(draft)})
    with Engine.from_pretrained(str(model), policy=policy) as engine:
        engine.wait_until_loaded()
        drafts = None if engine.parts.draft is None else engine.parts.draft.drafts
        if drafts is not None:
            drafts.pace = Fixed()
        begun, before = time.perf_counter(), engine.num_sweeps
        done = engine.run(jobs)
        seconds = time.perf_counter() - begun
        failed = [each.error for each in done if each.error is not None]
        if failed:
            raise failed[0]
        found: dict[str, Any] = {"seconds": seconds, "sweeps": engine.num_sweeps - before}
        if drafts is not None:
            part = drafts.num_came / drafts.num_tried
            found |= {"came": drafts.num_came, "tried": drafts.num_tried, "acceptance": part}
    return found, [each.tokens for each in done]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args(arguments)
    model = options.model or demo_model()
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        draft = Path(name) / "4-bit"
        write_rounded(model, draft, 4)
        for data, prompts in prompts_of(options.data, options.requests).items():
            for temperature in (0.0, 1.0):
                jobs = [
                    Job(
                        prompt=tokenizer(prompt)["input_ids"],
                        max_new_tokens=options.new,
                        sampling=Sampling(temperature=temperature, seed=index),
                    )
                    for index, prompt in enumerate(prompts)
                ]
                plain, tokens = run(model, None, jobs)
                drafted, same = run(model, draft, jobs)
                row = {"data": data, "temperature": temperature, "same": tokens == same}
                rows.append({**row, "plain": plain, "drafted": drafted})
                print(json.dumps(rows[-1]), flush=True)
    content = {"model": model.name, "requests": options.requests, "new": options.new, "rows": rows}
    print(write_record("draft-acceptance", content, options.out))


if __name__ == "__main__":
    main()
