"""Real MMLU through HELM: our runner beside HELM's own Hugging Face client, same model, same machine, same call.

    python benchmarks/helm_mmlu.py --data DIR --model DIR [--subjects …] [--instances 100]

DIR of the data holds `mmlu/{dev,test}/SUBJECT_SPLIT.csv` (Hendrycks et al. 2021). Every contender is a process of its
own that runs HELM's `helm-run`. What is timed is the execution of requests, model loading included, and the whole
process beside it. Prints the ratio against the faster of the reference's `-n 1` and `-n 4`, and whether predictions
agree.
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
from pathlib import Path
from typing import Any

import report
import yaml

CONTENDERS = {
    "flexgen": ("flexgen-bench/model", ["--runner-class-name", "flexgen_helm.runner.FlexGenRunner"]),
    "huggingface -n 1": ("reference1/model", ["-n", "1"]),
    "huggingface -n 4": ("reference4/model", ["-n", "4"]),
}
SUBJECTS = ["abstract_algebra", "anatomy", "us_foreign_policy"]


def run_child(arguments: list[str]) -> None:
    """Inside a contender's process: run HELM, timing the execution of requests, and print the seconds last."""
    from helm.benchmark.executor import Executor
    from helm.benchmark.run import main as helm_run

    import flexgen_helm.runner as ours

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
    """HELM's description of the model and of its three deployments."""
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


def predictions(suite: Path) -> list[tuple[str, str, list[str]]]:
    """(run, prompt, completion texts) of every request under a suite."""
    found = []
    for state in sorted(suite.glob("*/scenario_state.json")):
        for entry in json.loads(state.read_text())["request_states"]:
            texts = [completion["text"] for completion in entry["result"]["completions"]]
            found.append((state.parent.name.split(",model")[0], entry["request"]["prompt"], texts))
    return found


def main() -> None:
    """Run the contenders one after the other and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="directory with mmlu/{dev,test}/*.csv")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--instances", type=int, default=100, help="questions of each subject")
    parser.add_argument("--policy", default="auto")
    parser.add_argument("--out", type=Path, help="directory of the results (default: benchmarks/results)")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        output, local_path = Path(folder) / "output", Path(folder) / "local"
        write_entries(local_path, options.model, options.policy)
        for split in ("dev", "test"):
            target = output / "scenarios" / "mmlu" / "data" / split
            target.mkdir(parents=True)
            for subject in options.subjects:
                shutil.copy(options.data / "mmlu" / split / f"{subject}_{split}.csv", target)
        for contender, (deployment, flags) in CONTENDERS.items():
            suite = contender.replace(" ", "")
            entries = [
                f"mmlu:subject={subject},model=local/model,model_deployment={deployment}"
                for subject in options.subjects
            ]
            command = [
                sys.executable,
                __file__,
                "--child",
                "-r",
                *entries,
                "-m",
                str(options.instances),
                "-o",
                str(output),
                "--local-path",
                str(local_path),
                "--suite",
                suite,
                *flags,
            ]
            start = time.perf_counter()
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
            )
            whole = time.perf_counter() - start
            if done.returncode:
                raise SystemExit(f"{contender} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
            found[contender] = predictions(output / "runs" / suite)
            execute = float(done.stdout.rsplit("execute_s", 1)[1])
            num = len(found[contender])
            results[contender] = {
                "execute_s": execute,
                "process_s": whole,
                "requests": num,
                "seconds_per_request": execute / num,
            }
            print(
                f"{contender:18s} {execute:7.1f} s for {num} requests ({execute / num:.3f} s each); "
                f"whole process {whole:.1f} s",
                flush=True,
            )
    reference = min((name for name in results if name != "flexgen"), key=lambda name: results[name]["execute_s"])
    differing = [
        (ours, theirs) for ours, theirs in zip(found["flexgen"], found[reference], strict=True) if ours != theirs
    ]
    ratio = results[reference]["execute_s"] / results["flexgen"]["execute_s"]
    print(f"{ratio:.2f} times faster than {reference}; {len(differing)} predictions differ")
    summary = {
        "model": options.model.name,
        "subjects": options.subjects,
        "instances": options.instances,
        "policy": options.policy,
        "dtype": "float32",
        "contenders": results,
        "faster_reference": reference,
        "ratio": ratio,
        "differing_predictions": len(differing),
    }
    print(report.write("helm-mmlu", summary, options.out))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        run_child(sys.argv[2:])
    else:
        main()
