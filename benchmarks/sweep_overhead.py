"""The cost of a request apart from the model: ours and stock HELM's, with a model so small that it hardly counts.

    python -m benchmarks.sweep_overhead [--requests 10000] [--runs 10]

Requests are generated multiple-choice questions with five examples. Each contender is a program of its own: stock HELM
at `-n 1` with its SimpleClient, which answers without a model; and `flexgen-helm sweep` with a model of one layer and
hidden size 16, once as it is, with HELM's side in as many processes as the cores allow, and once with it in the
program's own process, where its cost can be counted: that process's time of translating requests, looking them up,
handing them to the engine's process and storing answers, without HELM's adapters and metrics.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexgen_helm.planning.record import write_record

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
ENTRY = "custom_mcqa:path={path},num_train_instances=5,model=local/trivial,model_deployment={deployment}"


def timed(spans: dict[str, float], name: str, do: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `do` to add up its wall-clock and processor seconds."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        wall, own = time.perf_counter(), time.thread_time()
        try:
            return do(*args, **kwargs)
        finally:
            spans[f"{name} cpu"] = spans.get(f"{name} cpu", 0.0) + time.thread_time() - own
            spans[name] = spans.get(name, 0.0) + time.perf_counter() - wall

    return wrapper


def of_all_threads(spans: dict[str, float], do: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `do` to add up the processor seconds of the whole process during its calls."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        own = time.process_time()
        try:
            return do(*args, **kwargs)
        finally:
            spans["runs cpu of all threads"] = time.process_time() - own

    return wrapper


def run_stock(arguments: list[str], spans: dict[str, float]) -> None:
    """Run `helm-run`, with its run specs timed."""
    from helm.benchmark import run
    from helm.benchmark.runner import Runner

    Runner.run_all = timed(spans, "runs", of_all_threads(spans, Runner.run_all))
    sys.argv = ["helm-run", *arguments]
    run.main()


def run_ours(arguments: list[str], spans: dict[str, float]) -> None:
    """Run `flexgen-helm sweep`, with its stages timed."""
    from flexgen_helm import run
    from flexgen_helm.helm.client import FlexGenClient
    from flexgen_helm.sweeps.runner import SweepRunner

    for name, owner, method in (
        ("adapt", SweepRunner, "adapt"),
        ("finish", SweepRunner, "finish"),
        ("translate", FlexGenClient, "pack"),
        ("look up", FlexGenClient, "find"),
        ("runs", SweepRunner, "run_all"),
    ):
        do = getattr(owner, method)
        setattr(owner, method, timed(spans, name, of_all_threads(spans, do) if name == "runs" else do))
    code = run.main(["sweep", *arguments])
    if code:
        raise SystemExit(code)


def run_ours_in_one_process(arguments: list[str], spans: dict[str, float]) -> None:
    """Do the same with HELM's side in the process that runs the suite; the engine has its own."""
    from flexgen_helm.workers import helper_processes

    helper_processes.usable_cores = lambda: 1
    run_ours(arguments, spans)


def child(kind: str, arguments: list[str]) -> None:
    """Run inside a contender's process; prints the seconds last."""
    spans: dict[str, float] = {}
    RUN[kind](arguments, spans)
    spans["peak memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("\n" + json.dumps(spans))


RUN = {"stock": run_stock, "ours": run_ours, "counted": run_ours_in_one_process}


def make_model(path: Path) -> None:
    """Write a very small model, and a byte-level tokenizer trained on the questions' words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["</s>"], initial_alphabet=alphabet)
    texts = [json.dumps(question(number)) for number in range(200)] + [(ROOT / "README.md").read_text()]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="</s>")
    fast.save_pretrained(path)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer.get_vocab()), eos_token_id=0, **CONFIG)).save_pretrained(path)


def question(number: int, split: str = "test") -> dict[str, Any]:
    """Make a question with four choices, in the form of HELM's instances."""
    texts = [f"the answer number {number * 7 + choice} of this question" for choice in range(4)]
    references = [
        {"output": {"text": text}, "tags": ["correct"] if number % 4 == choice else []}
        for choice, text in enumerate(texts)
    ]
    asked = f"Which of these four answers belongs to question number {number}, and to no other question of the list?"
    return {"input": {"text": asked}, "references": references, "split": split}


def write_entries(local_path: Path, model: Path) -> None:
    """Write HELM's entries for the model, with a deployment for each contender."""
    import yaml

    args = {"pretrained_model_name_or_path": str(model), "policy": "auto", "apply_chat_template": False}
    clients = {
        "simple/trivial": {"class_name": "helm.clients.simple_client.SimpleClient", "args": {}},
        "flexgen/trivial": {"class_name": "flexgen_helm.client.FlexGenClient", "args": args},
    }
    described = {"display_name": "trivial", "description": "benchmark", "creator_organization_name": "local"}
    tokenizer = {
        "class_name": "helm.tokenizers.huggingface_tokenizer.HuggingFaceTokenizer",
        "args": {"pretrained_model_name_or_path": str(model)},
    }
    common = {"model_name": "local/trivial", "tokenizer_name": "local/trivial", "max_sequence_length": 2048}
    files = {
        "model_metadata": {
            "models": [{"name": "local/trivial", "access": "open", "tags": ["TEXT_MODEL_TAG"], **described}]
        },
        "tokenizer_configs": {
            "tokenizer_configs": [
                {
                    "name": "local/trivial",
                    "tokenizer_spec": tokenizer,
                    "end_of_text_token": "</s>",
                    "prefix_token": "</s>",
                }
            ]
        },
        "model_deployments": {
            "model_deployments": [{"name": name, "client_spec": spec, **common} for name, spec in clients.items()]
        },
    }
    local_path.mkdir(parents=True)
    for name, content in files.items():
        (local_path / f"{name}.yaml").write_text(yaml.safe_dump(content))


def contend(kind: str, deployment: str, files: list[Path], work: Path, num_requests: int) -> dict[str, float]:
    """Run one contender; returns its seconds."""
    entries = [ENTRY.format(path=file, deployment=deployment) for file in files]
    arguments = ["-r", *entries, "-m", str(num_requests), "-n", "1", "--suite", kind, "-o", str(work / "output")]
    arguments += ["--local-path", str(work / f"env-{kind}")]
    command = [sys.executable, "-m", "benchmarks.sweep_overhead", "--child", kind, *arguments]
    start = time.perf_counter()
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    spans: dict[str, float] = json.loads(done.stdout.rsplit("\n", 2)[-2])
    return {**spans, "process": time.perf_counter() - start}


def own_cost(spans: dict[str, float]) -> float:
    """Our processor seconds that belong neither to HELM nor to the model."""
    return spans["runs cpu of all threads"] - sum(spans[f"{stage} cpu"] for stage in ("adapt", "finish"))


def figures(found: dict[str, dict[str, float]], count: int) -> dict[str, float]:
    """Figures for `count` requests from the contenders that have run so far."""
    counted, ours, stock = (found.get(kind) for kind in ("counted", "ours", "stock"))
    told: dict[str, float] = {}
    if counted:
        told["own_ms_per_request"] = 1e3 * own_cost(counted) / count
        told["translate_ms_per_request"] = 1e3 * counted["translate cpu"] / count
        told["look_up_ms_per_request"] = 1e3 * counted["look up cpu"] / count
        told["helms_ms_per_request"] = 1e3 * (counted["adapt cpu"] + counted["finish cpu"]) / count
    if ours:
        told["whole_ms_per_request"] = 1e3 * ours["runs"] / count
    if stock:
        told["stock_ms_per_request"] = 1e3 * stock["runs"] / count
    if stock and ours:
        told["ratio"] = stock["runs"] / ours["runs"]
    if stock and counted:
        told["processor_time_ratio"] = stock["runs cpu of all threads"] / counted["runs cpu of all threads"]
    return told


def main() -> None:
    """Run all contenders and write the record, after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=10, help="that share the requests evenly")
    parser.add_argument("--name", default="sweep-overhead", help="name of the record")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="directory of the record")
    options = parser.parse_args()
    each = options.requests // options.runs
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        for kind in RUN:
            write_entries(work / f"env-{kind}", work / "model")
        files = []
        for run in range(options.runs):
            files.append(work / f"questions{run}.jsonl")
            lines = [json.dumps(question(number, "train")) for number in range(5)]
            lines += [json.dumps(question(run * each + number + 5)) for number in range(each)]
            files[-1].write_text("\n".join(lines) + "\n")
        count = each * options.runs
        content: dict[str, Any] = {
            "requests": count,
            "runs": options.runs,
            "cores": len(os.sched_getaffinity(0)),
            "seconds": {},
        }
        for kind, deployment in (
            ("counted", "flexgen/trivial"), ("ours", "flexgen/trivial"), ("stock", "simple/trivial")
        ):  # fmt: skip
            content["seconds"][kind] = contend(kind, deployment, files, work, each)
            told = figures(content["seconds"], count)
            for name, value in told.items():
                if name not in content:
                    print(f"{name}: {value}", flush=True)
            content.update(told)
            record = write_record(options.name, content, options.out)  # after each contender, as the slowest comes last
    print(record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3:])
    else:
        main()
