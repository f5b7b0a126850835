"""The time and memory of many requests, and of long ones, with a model so small that it hardly counts.

    python -m benchmarks.load [--parts complete suite prompt answer] [--requests 1000000] [--suite-requests 100000]
        [--prompt-tokens 131072] [--answer-tokens 100000] [--name load] [--out DIR]

complete: so many lines of JSON through `flexgen-helm complete`, and the same command again, which finds all answered.
Memory is that of the largest process; the memory per request is what exceeds a command with a tenth of the lines.
suite: so many requests in one suite of `flexgen-helm sweep`. prompt: one prompt as long as the model's window, with
keys and values on disk, compared with transformers. answer: one answer of so many tokens; each must be the likeliest
one in one pass of transformers over the whole text, within 1e-3 of a logit.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.sweep_overhead import CONFIG, ENTRY, contend, make_model, question, write_entries
from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
CLOSE = 1e-3
"""How much larger another token's logit may be than that of the chosen one, because sums are added in another order."""


def write_lines(file: Path, number: int) -> int:
    """Write so many prompts; returns their bytes."""
    with file.open("w") as stream:
        for each in range(number):
            stream.write(json.dumps({"id": each, "prompt": f"question {each} of a list"}) + "\n")
    return file.stat().st_size


def run_command(*arguments: str, folder: Path) -> dict[str, float]:
    """Run `flexgen-helm`; returns its seconds and the bytes of its largest process. Ends the program if it fails."""
    program = (
        "import resource, sys; from flexgen_helm.run import main; code = main(sys.argv[1:]); "
        "peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]; "
        "print(max(peaks)); sys.exit(code)"
    )
    begun = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=folder, capture_output=True, text=True, check=False,
        env=environment,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"flexgen-helm {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return {"seconds": time.perf_counter() - begun, "bytes": float(done.stdout.split()[-1]) * 1024}


def check_lines(file: Path, number: int) -> None:
    """Check that all answers are there, once and in order."""
    with file.open() as stream:
        for place in range(number):
            entry = json.loads(stream.readline())
            if entry["index"] != place or entry["id"] != place or "completion" not in entry:
                raise SystemExit(f"{file}, line {place + 1}: {entry}")
        if rest := stream.read(100):
            raise SystemExit(f"{file} goes on behind {number} answers: {rest}")


def measure_complete(work: Path, number: int) -> dict[str, float]:
    """Measure `complete` with all lines and with a tenth of them, which shows what does not depend on their number."""
    found = []
    for count in (number // 10, number):
        name = f"lines{count}.jsonl"
        text_bytes = write_lines(work / name, count)
        command = ("complete", "-i", name, "-o", f"answers{count}.jsonl", "--model", str(work / "model"),
                   "--max-new-tokens", "1")  # fmt: skip
        found.append(run_command(*command, folder=work))
        check_lines(work / f"answers{count}.jsonl", count)
    again = run_command(*command, folder=work)
    check_lines(work / f"answers{number}.jsonl", number)
    tenth, whole = found
    more = number - number // 10
    return {
        "requests": number,
        "text_bytes_per_request": text_bytes / number,
        "seconds": whole["seconds"],
        "ms_per_request": 1e3 * (whole["seconds"] - tenth["seconds"]) / more,
        "largest_process_bytes": whole["bytes"],
        "bytes_per_request": (whole["bytes"] - tenth["bytes"]) / more,
        "again_seconds": again["seconds"],
    }


def measure_suite(work: Path, number: int, runs: int = 10) -> dict[str, float]:
    """Requests of one suite."""
    each = number // runs
    files = []
    for run in range(runs):
        files.append(work / f"questions{run}.jsonl")
        lines = [json.dumps(question(at, "train")) for at in range(5)]
        lines += [json.dumps(question(run * each + at + 5)) for at in range(each)]
        files[-1].write_text("\n".join(lines) + "\n")
    write_entries(work / "env-ours", work / "model")
    found = contend("ours", "flexgen/trivial", files, work, each)
    record = json.loads((work / "output/runs/ours/flexgen_sweep.json").read_text())
    asked = sum(run["requests"] for run in record["runs"])
    lost = sum(run["failed_requests"] for run in record["runs"]) + each * runs - asked
    if lost or {run["status"] for run in record["runs"]} != {"done"}:
        raise SystemExit(f"{lost} requests are lost; {ENTRY.format(path=files[0], deployment='flexgen/trivial')}")
    return {
        "requests": asked,
        "seconds": found["process"],
        "ms_per_request": 1e3 * found["runs"] / asked,
        "command_bytes": found["peak memory"],
    }


def long_model(path: Path, window: int) -> Path:
    """Write the model with a window of so many tokens, and without end-of-text tokens."""
    make_model(path)
    config = json.loads((path / "config.json").read_text())
    config.update(max_position_embeddings=window, eos_token_id=None)
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").unlink(missing_ok=True)
    return path


def largest_behind(path: Path, text: Sequence[int], first: int) -> tuple[Any, Any]:
    """Return transformers' logits of the tokens of `text` from `first` on, and the largest logits there."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        hidden = model.model(torch.tensor([text])).last_hidden_state[0, first - 1 : -1]
        own, largest = [], []
        for part, tokens in zip(hidden.split(4096), torch.tensor(text[first:]).split(4096), strict=True):
            logits = model.lm_head(part)
            own.append(logits.gather(1, tokens[:, None])[:, 0])
            largest.append(logits.max(1).values)
    return torch.cat(own), torch.cat(largest)


def measure_long(work: Path, name: str, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    """Time one job and the growth of memory; its tokens must be those of transformers."""
    from engine import Engine, Job

    path = long_model(work / name, prompt_tokens + new_tokens)
    policy = {
        "device": "cpu",
        "percent": [100, 0, 0, 0, 100, 0] if new_tokens == 1 else [100, 0, 100, 0, 100, 0],
        "offload-dir": str(work / "offload"),
    }
    prompt = [(7919 * each) % 1900 + 1 for each in range(prompt_tokens)]
    with Engine.from_pretrained(str(path), policy=policy) as engine:
        engine.run([Job(prompt=prompt[:8], max_new_tokens=2)])
        before, begun = peak_bytes(), time.perf_counter()
        (done,) = engine.run([Job(prompt=prompt, max_new_tokens=new_tokens)])
        seconds, grown = time.perf_counter() - begun, peak_bytes() - before
    if done.error is not None or len(done.tokens) != new_tokens:
        raise SystemExit(f"{name}: {len(done.tokens)} tokens, {done.error}")
    own, largest = largest_behind(path, [*prompt, *done.tokens], prompt_tokens)
    wrong = int((own < largest - CLOSE).sum())
    if wrong:
        raise SystemExit(f"{name}: {wrong} of {new_tokens} tokens are not the likeliest ones of transformers")
    return {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "seconds": seconds, "memory_grew_bytes": grown}


def peak_bytes() -> float:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def main() -> None:
    """Measure the parts asked for; the record is written again after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("complete", "suite", "prompt", "answer")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--suite-requests", type=int, default=100_000)
    parser.add_argument("--prompt-tokens", type=int, default=131_072)
    parser.add_argument("--answer-tokens", type=int, default=100_000)
    parser.add_argument("--name", default="load", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    content: dict[str, Any] = {"model": CONFIG}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        for part in options.parts:
            if part == "complete":
                content[part] = measure_complete(work, options.requests)
            elif part == "suite":
                content[part] = measure_suite(work, options.suite_requests)
            elif part == "prompt":
                content[part] = measure_long(work, part, options.prompt_tokens, 1)
            else:
                content[part] = measure_long(work, part, 16, options.answer_tokens)
            print(f"{part}: {json.dumps(content[part])}", flush=True)
            record = write_record(options.name, content, options.out)
    print(record)


if __name__ == "__main__":
    main()
