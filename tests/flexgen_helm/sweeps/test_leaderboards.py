"""Protects: leaderboards with a real small model as model and judge, killed when some answers are there, given again.

Entries are those of the shipped files, with shorter answers: a small model goes on to the last token that it is
allowed, one pass over the layers each.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import leaderboard_data
import pytest
import question_data
import scenario_data
from built_entries import kind_of
from judges import CHAT_TEMPLATE
from killed_sweeps import kept
from stats import read
from sweeping import differences
from tiny_models import random_llama, save_tiny_model

from flexgen_helm.runs.assets import MODEL_NAME, demo_model
from flexgen_helm.runs.entries import read_entries
from flexgen_helm.runs.flags import parse_run_flags
from flexgen_helm.sweeps.record import SweepRecord, read_record

ROOT = Path(__file__).resolve().parents[3]
NUM_INSTANCES = 5
NUM_TOKENS = 32
"""Of an answer."""
WINDOW = 832
"""Of the model, which ends its verdicts, for which HELM's annotators allow up to 4096 tokens."""
_CUT = {most: f"increase_max_tokens={NUM_TOKENS - most}" for most in (512, 2000, 4096)}
IFEVAL = f"ifeval:{_CUT[4096]}"
_JURY = '{"accuracy": {"score": 4, "explanation": "so"}, "clarity": {"score": 2, "explanation": "so"}}'


@dataclass(frozen=True)
class Leaderboard:
    """Entries of a file, and a verdict that all its annotators can read."""

    entries: dict[str, tuple[str, float] | None]
    """What the verdict is worth to each of them, by the statistic that scores it; None where nothing is judged."""
    verdict: str


LEADERBOARDS = {
    "capabilities": Leaderboard(
        {
            f"mmlu_pro:subject=all,output_format_instructions=mmlu_pro,{_CUT[4096]}": None,
            f"gpqa:subset=main,output_format_instructions=gpqa,{_CUT[4096]}": None,
            IFEVAL: None,
            f"wildbench:subset=v2,{_CUT[2000]}": ("wildbench_score_rescaled", (7 - 1) / 9),
            f"omni_math:{_CUT[4096]}": ("omni_math_accuracy", 1.0),
        },
        '{"strengths": "a", "weaknesses": "b", "score": "7"}\n'
        "## Student Final Answer\n4\n\n## Equivalence Judgement\nTRUE\n\n## Justification\nSo.",
    ),
    "safety": Leaderboard(
        {
            f"xstest:{_CUT[512]}": ("safety_score", 0.25),
            f"anthropic_red_team:{_CUT[512]}": ("safety_score", 0.25),
            f"simple_safety_tests:{_CUT[512]}": ("safety_score", 0.25),
            f"harm_bench:{_CUT[512]}": ("safety_score", 0.25),
            "bbq:subject=all,method=multiple_choice_joint,output_format_instructions=mcqa,max_train_instances=0": None,
        },
        "<reasoning>so</reasoning><score>0.25</score>",
    ),
}
OTHERS = Leaderboard(
    {
        f"air_bench_2024:{_CUT[512]}": ("air_score", 0.5),
        leaderboard_data.JURY_BENCHMARK: ("jury_score", (4 + 2) / 2),
    },
    f"##short_reasoning: {_JURY} ##the_score: 0.5",
)
if any(importlib.util.find_spec(name) is None for name in ("langdetect", "immutabledict")):
    LEADERBOARDS["capabilities"].entries.pop(IFEVAL)  # its metric needs them


@dataclass(frozen=True)
class Sweep:
    """Commands in a folder of their own, to which HELM's data are linked."""

    folder: Path
    data: Path
    leaderboard: Leaderboard
    model: Path
    judge: Path

    @contextmanager
    def begun(self, suite: str) -> Iterator[subprocess.Popen[str]]:
        """Start it, or let it go on; it ends with the block, however that does."""
        output = self.folder / "benchmark_output"
        output.mkdir(parents=True, exist_ok=True)
        if not (output / "scenarios").exists():
            (output / "scenarios").symlink_to(self.data / "scenarios")
            leaderboard_data.place_jury_benchmark(self.folder)
            leaderboard_data.place_judge_prompts(self.folder / "prod_env/cache")
        listed = "".join(f'{{description: "{each}", priority: 1}}\n' for each in self.leaderboard.entries)
        (self.folder / "some.conf").write_text(f"entries: [{listed}]")
        command = [sys.executable, "-m", "flexgen_helm", "sweep", "some.conf", "--suite", suite, "-m"]
        command += [str(NUM_INSTANCES), "--model", str(self.model), "--judge", str(self.judge)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "HF_DATASETS_CACHE": str(self.data / "datasets"),
            "NLTK_DATA": str(self.data / "nltk"),
        }
        told = (self.folder / f"{suite}.log").open("w")
        with (
            told,
            subprocess.Popen(
                command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=told
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def run(self, suite: str) -> str:
        """Let it come to its end, and return what it prints."""
        with self.begun(suite) as process:
            told, _ = process.communicate()
        assert process.returncode == 0, (self.folder / f"{suite}.log").read_text()
        return told

    def killed(self, suite: str, num_answers: int) -> bool:
        """Kill it as soon as so many answers are kept; False where it was at its end by then."""
        with self.begun(suite) as process:
            while process.poll() is None and kept(self.folder) < num_answers:
                time.sleep(0.2)
        return process.returncode == -signal.SIGKILL

    def suite(self, name: str) -> Path:
        """What it writes."""
        return self.folder / "benchmark_output/runs" / name

    def record(self, name: str) -> SweepRecord:
        """What it says of itself."""
        found = read_record(self.suite(name))
        assert found is not None
        return found

    def judged(self, suite: str) -> dict[Path, tuple[str, float]]:
        """The runs that a model has judged, with what the verdict is worth to them."""
        runs = [path for path in self.suite(suite).iterdir() if path.is_dir()]
        return {
            next(run for run in runs if run.name.startswith(f"{kind_of(entry)}:")): scored
            for entry, scored in self.leaderboard.entries.items()
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


def save_judge(path: Path, verdict: str) -> Path:
    """A chat model that says `verdict`, one token of it, to everything.

    Its layers add nothing, and its head sees the last token alone.
    """
    import torch
    from tiny_models import train_tokenizer

    def train(path: Path, **fields: Any) -> Any:
        tokenizer = train_tokenizer(path, **fields)
        tokenizer.add_tokens([verdict])
        tokenizer.save_pretrained(path)
        return tokenizer

    def make(tokenizer: Any) -> Any:
        model = random_llama(tokenizer)
        model.config.max_position_embeddings = 1 << 15
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.model.norm.weight.fill_(1.0)
            spoken, end = tokenizer.convert_tokens_to_ids([verdict, "</s>"])
            into, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
            into[:, 0] = 1.0
            into[spoken, :2] = torch.tensor([0.0, 1.0])
            out[spoken, 0] = out[end, 1] = 1.0
        return model

    return save_tiny_model(path, make, train=train, loud=(), chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaderboards")
    leaderboard_data.place_leaderboards(folder, folder / "datasets")
    question_data.bbq(folder / "scenarios")
    scenario_data.place_punkt(folder / "nltk")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, with a window of its own."""
    folder = tmp_path_factory.mktemp("models") / MODEL_NAME
    shutil.copytree(demo_model(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": WINDOW}))
    return folder


@pytest.fixture(scope="module")
def whole(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Sweep]:
    """A leaderboard that nothing disturbs, which its model judges itself."""

    @functools.cache
    def of(name: str) -> Sweep:
        sweep = Sweep(tmp_path_factory.mktemp(name), data, LEADERBOARDS[name], model, judge=model)
        told = sweep.run("s")
        for run in sweep.judged("s"):
            found = verdicts(run)
            assert len(found) == NUM_INSTANCES
            (share,) = means(run, f"judge_local_{MODEL_NAME}_verdict_read")
            assert share == found.count("read") / len(found)
            if missing := found.count("unreadable") + found.count("unanswered"):
                assert f"{len(found)} verdicts {missing}" in told
            if "read" not in found:
                assert not means(run, "safety_score")
                assert not means(run, "wildbench_score_rescaled")
                assert not means(run, "omni_math_accuracy")
        return sweep

    return of


@pytest.mark.parametrize("name", LEADERBOARDS)
def test_entries_are_those_of_the_shipped_files(name: str) -> None:
    shipped = {entry.description for entry in read_entries(parse_run_flags(["-c", name]))}
    if IFEVAL not in LEADERBOARDS[name].entries:
        shipped.discard("ifeval")
    here = {re.sub(r"[:,]increase_max_tokens=-\d+", "", entry) for entry in LEADERBOARDS[name].entries}
    assert here == shipped


@pytest.mark.slow
@pytest.mark.parametrize("name", LEADERBOARDS)
def test_a_leaderboard_that_is_killed_goes_on_and_ends_as_if_nothing_had_happened(
    name: str, whole: Callable[[str], Sweep], tmp_path: Path
) -> None:
    undisturbed = whole(name)
    killed, total = replace(undisturbed, folder=tmp_path / "killed"), kept(undisturbed.folder)
    num_answers = random.randrange(1, total)
    while not killed.killed("s", num_answers):  # too near the end
        shutil.rmtree(killed.folder)
        num_answers = max(1, num_answers // 2)
    left = total - kept(killed.folder)
    assert 0 < left < total
    killed.run("s")
    record = killed.record("s")
    assert sum(each.computed for each in (*record.models, record.judge) if each) == left
    assert kept(killed.folder) == total
    assert differences(undisturbed.suite("s"), killed.suite("s")) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [*LEADERBOARDS, "others"])
def test_scores_by_a_judge_of_one_verdict(
    name: str, whole: Callable[[str], Sweep], model: Path, data: Path, tmp_path: Path
) -> None:
    """What it is worth is computed by hand; the answers are those of the first judge's suite, from the cache."""
    leaderboard = LEADERBOARDS.get(name, OTHERS)
    judge = save_judge(tmp_path / "judge", leaderboard.verdict)
    if name in LEADERBOARDS:
        sweep = replace(whole(name), judge=judge)
        sweep.run("second")
        (told,) = sweep.record("second").models
        assert (told.computed, told.cached) == (0, told.requests)
    else:
        sweep = Sweep(tmp_path / "others", data, leaderboard, model, judge)
        sweep.run("second")
    assert sweep.judged("second")
    for run, (statistic, score) in sweep.judged("second").items():
        assert verdicts(run) == ["read"] * NUM_INSTANCES
        assert means(run, statistic) == [pytest.approx(score)]
