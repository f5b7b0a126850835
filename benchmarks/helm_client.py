"""Real HELM runs: our runner and HELM's own Hugging Face client, with the same model, machine and call.

    python -m benchmarks.helm_client --data DIR --model DIR [--subjects …] [--gsm 100] [--instances 100]

The data directory holds `mmlu/{dev,test}/SUBJECT_SPLIT.csv` (Hendrycks et al. 2021: one token after a long prompt) and,
for `--gsm TOKENS`, `gsm8k/gsm_data_{train,test}` (Cobbe et al. 2021: 5-shot generation, cut after TOKENS tokens). Every
contender is a process of its own that runs HELM's `helm-run`. The execution of requests is timed, model loading
included, and the whole process too. Prints the speed relative to the faster of the reference's `-n 1` and `-n 4`,
whether predictions agree, how many tokens remain to be computed with shared prefixes, and which part of the time matrix
products of the model's own sizes would take for those tokens.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = {
    "flexgen": ("flexgen-bench/model", ["--runner-class-name", "flexgen_helm.runner.FlexGenRunner"]),
    "huggingface -n 1": ("reference1/model", ["-n", "1"]),
    "huggingface -n 4": ("reference4/model", ["-n", "4"]),
}
SUBJECTS = ["abstract_algebra", "anatomy", "us_foreign_policy", "college_medicine", "high_school_world_history"]
_GEMM_ROWS = 1024
"""Rows of the matrix products whose rate is measured: a micro-batch's size on the CPU."""


def run_child(arguments: list[str]) -> None:
    """Run HELM inside a contender's process; prints the seconds of executing requests last."""
    from helm.benchmark.executor import Executor
    from helm.benchmark.run import main as helm_run

    import flexgen_helm.helm.runner as ours

    seconds = 0.0
    depth = 0

    def timed(execute: Any) -> Any:
        def wrapper(self: Any, state: Any) -> Any:
            nonlocal seconds, depth
            depth += 1
            start = time.perf_counter()
            try:
                return execute(self, state)
            finally:
                depth -= 1
                if depth == 0:
                    seconds += time.perf_counter() - start

        return wrapper

    Executor.execute = timed(Executor.execute)
    ours.WholeRunExecutor.execute = timed(ours.WholeRunExecutor.execute)
    sys.argv = ["helm-run", *arguments]
    helm_run()
    print(f"\nexecute_s {seconds}")


def write_entries(local_path: Path, model: Path, policy: str) -> None:
    """Write HELM's entries for the model and its three deployments."""
    local_path.mkdir(parents=True)
    path = str(model.resolve())
    hugging = {
        "class_name": "helm.clients.huggingface_client.HuggingFaceClient",
        "args": {
            "pretrained_model_name_or_path": path,
            "device": "cpu",
            "torch_dtype": "torch.float32",
            "apply_chat_template": False,
        },
    }
    flexgen = {
        "class_name": "flexgen_helm.client.FlexGenClient",
        "args": {"pretrained_model_name_or_path": path, "policy": policy, "apply_chat_template": False},
    }
    window = json.loads((model / "config.json").read_text())["max_position_embeddings"]
    content = {
        "model_metadata.yaml": {
            "models": [
                {
                    "name": "local/model",
                    "display_name": "model",
                    "description": "benchmark",
                    "access": "open",
                    "creator_organization_name": "local",
                    "release_date": datetime.date(2026, 1, 1),
                    "tags": ["TEXT_MODEL_TAG", "PARTIAL_FUNCTIONALITY_TEXT_MODEL_TAG"],
                }
            ]
        },
        "tokenizer_configs.yaml": {
            "tokenizer_configs": [
                {
                    "name": "local/model",
                    "end_of_text_token": "",
                    "prefix_token": "",
                    "tokenizer_spec": {
                        "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
                        "args": {"pretrained_model_name_or_path": path},
                    },
                }
            ]
        },
        "model_deployments.yaml": {
            "model_deployments": [
                {
                    "name": name,
                    "model_name": "local/model",
                    "tokenizer_name": "local/model",
                    "max_sequence_length": window,
                    "client_spec": flexgen if contender == "flexgen" else hugging,
                }
                for contender, (name, _) in CONTENDERS.items()
            ]
        },
    }
    for name, entry in content.items():
        (local_path / name).write_text(yaml.safe_dump(entry))


def place_data(data: Path, subjects: list[str], output: Path, *, gsm: bool) -> None:
    """Copy the data to where HELM's scenarios look for their downloads, replacing what is there."""
    for split in ("dev", "test"):
        target = output / "scenarios" / "mmlu" / "data" / split
        target.mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            shutil.copy(data / "mmlu" / split / f"{subject}_{split}.csv", target)
    if gsm:
        (output / "scenarios" / "gsm").mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            shutil.copy(data / "gsm8k" / f"gsm_data_{split}", output / "scenarios" / "gsm")


def predictions(suite: Path) -> list[tuple[str, str, list[str]]]:
    """Read (run, prompt, completion texts) of every request of a suite."""
    found = []
    for state in sorted(suite.glob("*/scenario_state.json")):
        for entry in json.loads(state.read_text())["request_states"]:
            texts = [completion["text"] for completion in entry["result"]["completions"]]
            found.append((state.parent.name.split(",model")[0], entry["request"]["prompt"], texts))
    return found


def run_helm(command: list[str]) -> tuple[float, float]:
    """Run HELM; returns (seconds of executing requests, seconds of the process)."""
    start = time.perf_counter()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:5])} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return float(done.stdout.rsplit("execute_s", 1)[1]), time.perf_counter() - start


def spans_to_compute(prompts: list[list[int]]) -> list[tuple[int, int]]:
    """Return the (first, end) positions of each prompt that must be computed if every shared prefix is computed once.

    The last token of a prompt is always computed.
    """
    ordered = sorted(prompts)
    spans = [(0, len(ordered[0]))] if ordered else []
    for before, prompt in pairwise(ordered):
        shared = next((i for i, pair in enumerate(zip(before, prompt, strict=False)) if pair[0] != pair[1]), None)
        shared = min(len(before), len(prompt)) if shared is None else shared
        spans.append((min(shared, len(prompt) - 1), len(prompt)))
    return spans


def tokens_in(spans: list[tuple[int, int]]) -> int:
    """Count the positions in spans."""
    return sum(end - first for first, end in spans)


def linear_layers(model: Path) -> tuple[Any, list[Any], Any]:
    """Config, linear modules without the head, and the head of a model that is built without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        stock = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head = stock.get_output_embeddings()
    layers = [module for module in stock.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    return stock.config, layers, head


def flop_of(model: Path, spans: list[tuple[int, int]]) -> float:
    """Floating-point operations of the layers for these positions: matrix products, and attention to earlier tokens."""
    config, layers, _ = linear_layers(model)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_hidden_layers * config.num_attention_heads * head_dim
    pairs = sum(end * (end + 1) // 2 - first * (first + 1) // 2 for first, end in spans)
    return 2.0 * sum(module.weight.numel() for module in layers) * tokens_in(spans) + 4.0 * width * pairs


def gemm_seconds(model: Path, tokens: int, answers: int) -> float:
    """Seconds of this machine's float32 matrix products for `tokens` in the layers and `answers` in the head."""
    import torch

    from engine.measuring.rates import gemm_rate

    _, layers, head = linear_layers(model)
    rates: dict[tuple[int, int], float] = {}
    seconds = 0.0
    for module in [*layers, head]:
        shape = (module.in_features, module.out_features)
        if shape not in rates:
            rates[shape] = gemm_rate(torch.device("cpu"), torch.float32, _GEMM_ROWS, *shape)
        rows = answers if module is head else tokens
        seconds += 2 * rows * shape[0] * shape[1] / rates[shape]
    return seconds


def count_tokens(model: Path, found: list[tuple[str, str, list[str]]]) -> dict[str, float]:
    """Count tokens of the prompts, of those that must be computed, and of the answers, by the model's own tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    prompts = [tokenizer(prompt)["input_ids"] for _, prompt, _ in found]
    answers = [max(1, len(tokenizer(text)["input_ids"])) for _, _, texts in found for text in texts]
    spans = spans_to_compute(prompts)
    return {
        "prompt_tokens": sum(map(len, prompts)),
        "answer_tokens": sum(answers),
        "computed_tokens": tokens_in(spans) + sum(count - 1 for count in answers),
        "tokens_of_one_by_one": sum(map(len, prompts)) + sum(count - 1 for count in answers),
        "prefill_flop": flop_of(model, spans),
        "prefill_flop_of_one_by_one": flop_of(model, [(0, len(prompt)) for prompt in prompts]),
    }


def add_entry_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name data, model and HELM runs."""
    parser.add_argument("--data", type=Path, required=True, help="directory with mmlu/{dev,test}/*.csv and gsm8k/")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--subjects", nargs="*", default=SUBJECTS, help="of MMLU; none: leave MMLU out")
    parser.add_argument("--gsm", type=int, metavar="TOKENS", help="also GSM8K, so many tokens out")
    parser.add_argument("--instances", type=int, default=100, help="questions of each run")


def named_entries(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    """Return the run entries that the flags name; ends the program if there are none."""
    entries = [f"mmlu:subject={subject}" for subject in options.subjects]
    if options.gsm:
        entries.append(f"gsm:num_output_tokens={options.gsm}")
    if not entries:
        parser.error("nothing to run: name --subjects or --gsm")
    return entries


def main() -> None:
    """Run the contenders one after the other and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_entry_flags(parser)
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--name", default="helm-client", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    entries = named_entries(parser, options)
    results: dict[str, Any] = {}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        output, local_path = Path(folder) / "output", Path(folder) / "local"
        write_entries(local_path, options.model, options.policy)
        place_data(options.data, options.subjects, output, gsm=bool(options.gsm))
        for contender, (deployment, flags) in CONTENDERS.items():
            suite = contender.replace(" ", "")
            named = [
                f"{entry}{',' if '=' in entry else ':'}model=local/model,model_deployment={deployment}"
                for entry in entries
            ]
            arguments = ["-r", *named, "-m", str(options.instances), "-o", str(output)]
            arguments += ["--local-path", str(local_path), "--suite", suite, *flags]
            command = [sys.executable, "-m", "benchmarks.helm_client", "--child", *arguments]
            execute_s, process_s = run_helm(command)
            found[contender] = predictions(output / "runs" / suite)
            num = len(found[contender])
            results[contender] = {
                "execute_s": execute_s,
                "process_s": process_s,
                "requests": num,
                "seconds_per_request": execute_s / num,
            }
            print(
                f"{contender:18s} {execute_s:7.1f} s for {num} requests ({execute_s / num:.3f} s each); "
                f"whole process {process_s:.1f} s",
                flush=True,
            )
    reference = min((name for name in results if name != "flexgen"), key=lambda name: results[name]["execute_s"])
    pairs = list(zip(found["flexgen"], found[reference], strict=True))
    differing = [(ours, theirs) for ours, theirs in pairs if ours != theirs]
    execute_s = results["flexgen"]["execute_s"]
    tokens = count_tokens(options.model, found["flexgen"])
    limit_s = gemm_seconds(options.model, int(tokens["computed_tokens"]), int(tokens["answer_tokens"]))
    summary = {
        "model": options.model.name,
        "entries": entries,
        "instances": options.instances,
        "policy": options.policy,
        "dtype": "float32",
        "contenders": results,
        "faster_reference": reference,
        "ratio": results[reference]["execute_s"] / execute_s,
        "differing_predictions": len(differing),
        "tokens": tokens,
        "sharing_saves": tokens["tokens_of_one_by_one"] / tokens["computed_tokens"],
        "sharing_saves_flop": tokens["prefill_flop_of_one_by_one"] / tokens["prefill_flop"],
        "gemm_s": limit_s,
        "fraction_of_gemm": limit_s / execute_s,
    }
    print(f"{summary['ratio']:.2f} times faster than {reference}; {len(differing)} of {len(pairs)} predictions differ")
    print(
        f"sharing leaves {tokens['computed_tokens']} of {tokens['tokens_of_one_by_one']} tokens "
        f"({summary['sharing_saves']:.2f} x fewer; {summary['sharing_saves_flop']:.2f} x fewer operations); "
        f"their matrix products alone take {limit_s:.1f} s, "
        f"{summary['fraction_of_gemm']:.0%} of ours"
    )
    print(write_record(options.name, summary, options.out))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
    else:
        main()
