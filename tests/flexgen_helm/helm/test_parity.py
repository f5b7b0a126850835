"""HELM's scores are what HELM's own HuggingFaceClient gives for the same model, whichever way a run comes to us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stats import NEVER_COMPARED, ZERO_IN_THE_REFERENCE, assert_alike, read, stats_of, texts_of
from tiny_models import ours, write_entries

Run = Callable[..., Path]

ENTRIES = {
    "generation": "synthetic_reasoning_natural:difficulty=easy",
    "multiple_choice_joint": "mmlu:subject=anatomy",
    "multiple_choice_separate": "commonsense:dataset=hellaswag,method=multiple_choice_separate_original",
    "language_modeling": "wikitext_103",
}
WAYS = {
    "stock": ["-n", "1"],
    "stock with threads": ["-n", "8"],
    "whole runs": ["--runner-class-name", "flexgen_helm.runner.FlexGenRunner"],
    "our command line": ["flexgen-helm"],
}


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, str], Path]:
    return {}


@pytest.fixture
def run(tmp_path: Path, helm_run: Run, helm_data: Path) -> Iterator[Callable[..., Path]]:
    """Run an entry on a model by our client, or by HELM's; returns the run's directory."""
    from flexgen_helm.helm.engines import engines
    from flexgen_helm.run import main

    def run(model: Path, kind: str, way: list[str], host: str = "ours") -> Path:
        name = f"parity-{model.name}"
        reference = {
            "class_name": "helm.clients.huggingface_client.HuggingFaceClient",
            "args": {"pretrained_model_name_or_path": str(model), "device": "cpu", "torch_dtype": "torch.float32"},
        }
        write_entries(tmp_path / "prod_env", f"local/{name}", model, ours=ours(model), reference=reference)
        separator = "," if ":" in ENTRIES[kind] else ":"
        entry = f"{ENTRIES[kind]}{separator}model=local/{name},model_deployment={host}/{name}"
        num_instances = "12" if kind == "generation" else "6"
        arguments, suite = ["-r", entry, "-m", num_instances], f"{name}-{kind}-{host}-{'-'.join(way)}"
        if way == WAYS["our command line"]:
            runs = helm_data / "runs" / suite
            local_path = str(tmp_path / "prod_env")
            assert main(["run", *arguments, "--suite", suite, "--local-path", local_path, "-o", str(helm_data)]) == 0
        else:
            runs = helm_run(*arguments, *way, suite=suite)
        (directory,) = [path for path in runs.iterdir() if f"model_deployment={host}_" in path.name]
        return directory

    yield run
    engines.close()


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize(
    ("model_fixture", "way"),
    [*(("tiny_llama", way) for way in WAYS), ("tiny_gpt2", "whole runs"), ("tiny_opt", "whole runs")],
)
def test_stats_equal_the_references(
    request: pytest.FixtureRequest,
    run: Callable[..., Path],
    references: dict[tuple[str, str], Path],
    model_fixture: str,
    way: str,
    kind: str,
) -> None:
    if (model_fixture, kind) == ("tiny_opt", "language_modeling"):
        pytest.skip("the reference doubles OPT's BOS, and overflows its positions")
    model = request.getfixturevalue(model_fixture)
    mine = run(model, kind, WAYS[way])
    if (model.name, kind) not in references:
        references[model.name, kind] = run(model, kind, ["-n", "1"], "reference")
    reference = references[model.name, kind]
    greedy = kind in ("generation", "multiple_choice_joint")
    left_out = NEVER_COMPARED + (ZERO_IN_THE_REFERENCE if greedy else [])
    expected = stats_of(reference, left_out=left_out)
    told = stats_of(mine, left_out=left_out)
    assert_alike(told, expected)
    assert len(told) > 10
    assert texts_of(mine) == texts_of(reference)
    assert len(set(texts_of(mine))) > 1


@pytest.mark.parametrize("model_fixture", ["tiny_llama", "tiny_opt"])
def test_log_probabilities_are_those_of_a_plain_forward(
    request: pytest.FixtureRequest, run: Callable[..., Path], model_fixture: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = request.getfixturevalue(model_fixture)
    tokenizer = AutoTokenizer.from_pretrained(model)
    # In float64: the models' attention is so sharp that float32 itself is up to 1e-4 off, whoever computes it. How far
    # transformers' own float32 is off in a sequence says how far ours may be.
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    num_tokens = 0
    for kind in ENTRIES:
        mine = run(model, kind, WAYS["whole runs"])
        for state in read(mine, "scenario_state.json")["request_states"]:
            (completion,) = state["result"]["completions"]
            ids = tokenizer(state["request"]["prompt"])["input_ids"]
            if ids[:2] == [tokenizer.bos_token_id] * 2:
                ids = ids[1:]
            ids = ids[len(ids) - 512 :] if len(ids) == 513 else ids  # HELM fills the window without counting the BOS
            with torch.no_grad():
                tokens, greedy = list(ids), not state["request"]["echo_prompt"]
                for _ in completion["tokens"] if greedy else ():
                    tokens.append(int(plain(torch.tensor([tokens])).logits[0, -1].argmax()))
                exact, near = (by(torch.tensor([tokens])).logits[0].log_softmax(-1) for by in (plain, rounded))
            expected, off = [0.0], 0.0
            for i, token in enumerate(tokens[1:]):
                expected.append(float(exact[i, token]))
                off = max(off, abs(float(near[i, token]) - expected[-1]))
            expected = expected[len(ids) :] if greedy else expected
            told = [token["logprob"] for token in completion["tokens"]]
            assert told == pytest.approx(expected, abs=2 * off + 1e-5)
            assert completion["logprob"] == pytest.approx(sum(expected), abs=1e-3)
            num_tokens += len(told)
    assert num_tokens > 1000


@pytest.mark.usefixtures("warm_processes")
def test_helm_summarize_works_on_our_runs(run: Callable[..., Path], tiny_llama: Path, tmp_path: Path) -> None:
    mine = run(tiny_llama, "multiple_choice_joint", WAYS["whole runs"])
    output = mine.parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "helm.benchmark.presentation.summarize", "--suite", mine.parent.name,
         "-o", str(output), "--local-path", str(tmp_path / "prod_env")],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    tables = json.loads((mine.parent / "groups.json").read_text())
    assert tables
    told = (mine.parent / "groups" / "latex").exists() or list((mine.parent / "groups").iterdir())
    assert told
