"""Protects: leaderboards with a real small model as model and as judge, killed at a random moment and given again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import leaderboard_data
import pytest
import question_data
from judges import CHAT_TEMPLATE
from stats import read
from sweeping import differences
from tiny_models import random_llama, save_tiny_model

from flexgen_helm.runs.assets import MODEL_NAME, demo_model

ROOT = Path(__file__).resolve().parents[3]
NUM_INSTANCES = 2
VERDICT = '<reasoning>so</reasoning><score>0.25</score>{"strengths": "a", "weaknesses": "b", "score": "7"}'
ENTRIES = {  # leaderboard: its entries with shorter answers, and what of those that are judged `VERDICT` is worth
    "capabilities": {
        "mmlu_pro:subject=all,output_format_instructions=mmlu_pro,increase_max_tokens=-4072": None,
        "wildbench:subset=v2,increase_max_tokens=-1976": ("wildbench_score_rescaled", (7 - 1) / 9),
    },
    "safety": {
        "simple_safety_tests:increase_max_tokens=-488": ("safety_score", 0.25),
        "xstest:increase_max_tokens=-488": ("safety_score", 0.25),
        "bbq:subject=all,method=multiple_choice_joint,output_format_instructions=mcqa,max_train_instances=0": None,
    },
}


@dataclass(frozen=True)
class Sweep:
    """Commands in a folder of their own, to which HELM's data are linked."""

    folder: Path
    data: Path
    leaderboard: str
    judge: Path

    @contextmanager
    def begun(self, suite: str) -> Iterator[subprocess.Popen[str]]:
        """Start it, or let it go on; it ends with the block, however that does."""
        output = self.folder / "benchmark_output"
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "scenarios").exists():
            (output / "scenarios").symlink_to(self.data / "scenarios")
        (self.folder / "some.conf").write_text(
            "".join(["entries: [", *(f'{{description: "{each}", priority: 1}}\n' for each in self.entries), "]"])
        )
        command = [sys.executable, "-m", "flexgen_helm", "sweep", "some.conf", "--suite", suite, "-m"]
        command += [str(NUM_INSTANCES), "--model", str(demo_model()), "--judge", str(self.judge)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_DATASETS_CACHE": str(self.data / "datasets")}
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    @property
    def entries(self) -> dict[str, tuple[str, float] | None]:
        """Entries of the leaderboard, and what they score under the judge of one verdict."""
        return ENTRIES[self.leaderboard]

    def run(self, suite: str) -> str:
        """Let it come to its end, and return what it prints."""
        with self.begun(suite) as process:
            told, said = process.communicate()
        assert process.returncode == 0, said
        return told

    def suite(self, name: str) -> Path:
        """What it writes."""
        return self.folder / "benchmark_output/runs" / name

    def judged(self, suite: str) -> dict[str, Path]:
        """The runs that a model has judged, by their entries."""
        runs = [path for path in self.suite(suite).iterdir() if path.is_dir()]
        return {
            entry: next(run for run in runs if run.name.startswith(f"{entry.split(':')[0]}:"))
            for entry, scored in self.entries.items()
            if scored
        }


def verdicts(run: Path) -> list[str]:
    """What became of each verdict of a run."""
    states = read(run, "scenario_state.json")["request_states"]
    return [next(iter(state["annotations"].values())).get("verdict", "none") for state in states]


def means(run: Path, name: str) -> list[float]:
    """Of a statistic over the test split, without perturbations."""
    stats = read(run, "stats.json")
    return [each["mean"] for each in stats if each["name"] == {"name": name, "split": "test"} and each["count"]]


def of_one_verdict(tokenizer: Any) -> Any:
    """A model that says `VERDICT` to everything: its layers add nothing, and its head sees the last token alone."""
    import torch

    model = random_llama(tokenizer)
    model.config.max_position_embeddings = 1 << 15
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        spoken, end = tokenizer.convert_tokens_to_ids([VERDICT, "</s>"])
        into, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        into[:, 0] = 1.0
        into[spoken, :2] = torch.tensor([0.0, 1.0])
        out[spoken, 0] = out[end, 1] = 1.0
    return model


def with_verdict(path: Path, **fields: Any) -> Any:
    """A tokenizer to which `VERDICT` is one token."""
    from tiny_models import train_tokenizer

    tokenizer = train_tokenizer(path, **fields)
    tokenizer.add_tokens([VERDICT])
    tokenizer.save_pretrained(path)
    return tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaderboards")
    leaderboard_data.place_leaderboards(folder, folder / "datasets")
    question_data.bbq(folder / "scenarios")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("leaderboard", ENTRIES)
def test_a_leaderboard_that_is_killed_goes_on_and_ends_as_if_nothing_had_happened(
    leaderboard: str, data: Path, tmp_path: Path
) -> None:
    whole, killed = (Sweep(tmp_path / name, data, leaderboard, demo_model()) for name in ("whole", "killed"))
    begun = time.monotonic()
    told = whole.run("s")
    whole_s = time.monotonic() - begun
    for run in whole.judged("s").values():
        found = verdicts(run)
        assert len(found) == NUM_INSTANCES
        (share,) = means(run, f"judge_local_{MODEL_NAME}_verdict_read")
        assert share == found.count("read") / len(found)
        if missing := found.count("unreadable") + found.count("unanswered"):
            assert f"{len(found)} verdicts {missing}" in told
        if "read" not in found:
            assert not means(run, "safety_score")
            assert not means(run, "wildbench_score_rescaled")

    after_s, is_killed = random.uniform(0.2, 0.9) * whole_s, False
    while not is_killed:
        shutil.rmtree(killed.folder, ignore_errors=True)
        with killed.begun("s") as process, suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=after_s)
        is_killed = process.returncode == -signal.SIGKILL
        after_s *= 0.7  # it was faster than the first one
    killed.run("s")
    assert differences(whole.suite("s"), killed.suite("s")) == []

    judge = save_tiny_model(
        tmp_path / "judge", of_one_verdict, train=with_verdict, loud=(), chat_template=CHAT_TEMPLATE
    )
    second = Sweep(whole.folder, data, leaderboard, judge)
    told = second.run("second")
    (answered,) = (line for line in told.splitlines() if line.startswith(f"flexgen/{MODEL_NAME}: ") and " from" in line)
    requests = answered.split(": ")[1].split()[0]
    assert f"({requests} from the cache)" in answered, "the answers are those of the first suite"
    for entry, run in second.judged("second").items():
        scored = second.entries[entry]
        assert scored is not None
        assert verdicts(run) == ["read"] * NUM_INSTANCES
        assert means(run, scored[0]) == [pytest.approx(scored[1])]
