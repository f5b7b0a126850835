"""Protects: a checkpoint's own MTP layer drafts what it drafts in transformers, and changes no answer."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from drafted import NUM_NEW, PREFIX, assert_nothing_held, assert_same, drafting, jobs
from heads import chained_drafts, know_layers, save_with_head, stock_drafts
from safetensors.torch import load_file, save_file
from transformers import modeling_layers

from engine import Completion, Engine, Job, Policy
from engine.errors import CapacityError, CheckpointError, UnsupportedError
from engine.schedule.segment import Segment
from engine.schedule.sequence import Sequence
from flexgen_helm.planning.drafts import draft_shape

pytestmark = pytest.mark.skipif(not hasattr(modeling_layers, "MtpModel"), reason="transformers has no MTP layers")
PROMPTS = ((*PREFIX, 7), (*PREFIX, 9, 11), (300,))
COUNT, LIKENESS = 12, 0.85
TIGHT = {"gpu-memory": "6MB", "percent": [0, 100, 0, 100, 0, 100]}
Saved = Callable[[str, float], Path]


@pytest.fixture(autouse=True, scope="module")
def _known() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        know_layers(patch)
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    @cache
    def of(family: str, likeness: float) -> Path:
        return save_with_head(tmp_path_factory.mktemp(family), family, likeness)

    return of


@pytest.fixture(scope="module")
def plain(saved: Saved) -> Callable[[str, float], list[Completion]]:
    @cache
    def of(family: str, likeness: float) -> list[Completion]:
        with Engine.from_pretrained(str(saved(family, likeness)), policy={"device": "cpu"}) as engine:
            return engine.run(jobs())

    return of


def noted(engine: Engine) -> dict[tuple[tuple[int, ...], int], list[int]]:
    """The drafts of an engine's sequences from now on, by the prompt and the number of tokens before them."""
    assert engine.parts.draft is not None
    drafts, found = engine.parts.draft.drafts, dict[tuple[tuple[int, ...], int], list[int]]()
    rounds = drafts._rounds

    def kept(targets: list[Sequence], size: int) -> Any:
        drafted = rounds(targets, size)
        for shadow, draft in drafted:
            target = shadow.target
            found[tuple(target.job.prompt), target.start + len(target.tokens)] = list(draft)
        return drafted

    drafts.__dict__["_rounds"] = kept
    return found


@pytest.mark.parametrize("family", ["glm4_moe", "mellum", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_it_drafts_what_it_drafts_in_transformers(family: str, saved: Saved) -> None:
    """With a prefix, in pieces, behind one token, and beside others."""
    directory = saved(family, LIKENESS)
    with drafting(directory, Path("own"), 1, percent=[0, 100, 0, 100, 0, 100]) as engine:
        draft = engine.parts.draft
        assert draft is not None
        draft.drafts._shadows._limits = replace(draft.drafts._shadows._limits, rows_per_piece=8)
        found = noted(engine)
        answers = engine.run([Job(prompt=list(prompt), max_new_tokens=COUNT) for prompt in PROMPTS])
        assert 2 < draft.drafts.num_came < draft.drafts.num_tried
    stock = stock_drafts(directory, PROMPTS, COUNT)
    for prompt, done, (tokens, expected) in zip(PROMPTS, answers, stock, strict=True):
        assert list(done.tokens) == tokens
        own = {number: drafted for (of, number), drafted in found.items() if of == prompt}
        assert len(own) > 2
        assert own == {number: expected[number] for number in own}


def test_further_tokens_continue_the_output_of_the_layer(saved: Saved) -> None:
    """Also where rows of a draft that did not come were computed before."""
    directory = saved("glm4_moe", LIKENESS)
    with drafting(directory, Path("own"), 3) as engine:
        found = noted(engine)
        (done,) = engine.run([Job(prompt=list(PROMPTS[0]), max_new_tokens=COUNT)])
    text = [*PROMPTS[0], *done.tokens]
    places = [(number, drafted) for (_, number), drafted in found.items() if len(drafted) == 3]
    assert len(places) > 2
    for number, drafted in places:
        assert drafted == chained_drafts(directory, text[:number], 3)


CASES: dict[str, tuple[str, float, int, dict[str, Any], int | None]] = {
    "always right, on three tiers": ("glm4_moe", 1.0, 3, {"percent": [34, 33, 34, 33, 34, 33]}, None),
    "often right": ("mellum", 0.85, 2, {"percent": [0, 100, 0, 100, 0, 100]}, 8),
    "never right, nothing shared": ("glm4_moe", 0.0, 5, {"share-prefix": False, "pad-to-seq-len": 48}, None),
}
"""Family, likeness, length of drafts, policy, and rows of the pieces in which the layer takes prompts."""


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case == "often right" else pytest.mark.slow) for case in CASES]
)
def test_answers_are_the_same(
    case: str, saved: Saved, plain: Callable[[str, float], list[Completion]], tmp_path: Path
) -> None:
    family, likeness, size, policy, pieces = CASES[case]
    directory, expected = saved(family, likeness), plain(family, likeness)
    with drafting(directory, Path("own"), size, **policy, **{"offload-dir": str(tmp_path)}) as engine:
        assert engine.parts.draft is not None
        drafts = engine.parts.draft.drafts
        drafts._shadows._limits = replace(drafts._shadows._limits, rows_per_piece=pieces)
        assert_same(engine.run(jobs()), expected)
        assert_nothing_held(engine)
        assert drafts.num_tried > 50
        if likeness == 1:
            assert drafts.num_came == drafts.num_tried
            before = engine.num_sweeps
            engine.run(jobs()[:1])  # a token of the prompt's sweep, then four of each
            assert engine.num_sweeps - before == 1 + -(-(NUM_NEW - 1) // 4)
        else:
            assert (drafts.num_came > 20) == (likeness > 0)


@pytest.mark.parametrize("sweep", [1, 4])
def test_a_sweep_that_is_computed_again_is_followed_again(
    sweep: int, saved: Saved, plain: Callable[[str, float], list[Completion]]
) -> None:
    """Memory runs out when all is computed, once: of prompts, or of decode steps beside prompts."""
    with drafting(saved("glm4_moe", 1.0), Path("own"), 3, **{"gpu-batch-size": 3, "num-gpu-batches": 1}) as engine:
        executor, sweeps = engine.parts.lanes[0].executor, count(1)
        compute = executor.sweep

        def failing(batches: list[list[Segment]]) -> Any:
            answers = compute(batches)
            if next(sweeps) == sweep:
                raise torch.OutOfMemoryError
            return answers

        executor.__dict__["sweep"] = failing
        assert_same(engine.run(jobs()[:8]), plain("glm4_moe", 1.0)[:8])
        assert_nothing_held(engine)
        assert engine.parts.draft is not None
        drafts = engine.parts.draft.drafts
        assert drafts.num_came == drafts.num_tried > 30


def test_what_it_has_no_room_or_time_for_goes_on_without(
    saved: Saved, plain: Callable[[str, float], list[Completion]]
) -> None:
    """The layer runs out of memory in its third pass, and pauses; its cache has no room for long prompts."""
    with drafting(saved("glm4_moe", 1.0), Path("own"), 3) as engine:
        assert engine.parts.draft is not None
        drafts = engine.parts.draft.drafts
        passes, choices = count(1), drafts._executor.choices

        def failing(batches: list[list[Segment]]) -> dict[int, int]:
            if next(passes) == 3:
                raise torch.OutOfMemoryError
            return choices(batches)

        drafts._executor.__dict__["choices"] = failing
        assert_same(engine.run(jobs()), plain("glm4_moe", 1.0))
        assert_nothing_held(engine)
        drafts.pace._left = 0
        room = drafts._shadows._room
        allocate = room.allocate
        room.__dict__["allocate"] = lambda num_rows: None if num_rows > 40 else allocate(num_rows)
        drafts.num_tried = 0
        assert_same(engine.run(jobs()), plain("glm4_moe", 1.0))
        assert 0 < drafts.num_came == drafts.num_tried
        assert_nothing_held(engine)


def refused(directory: Path, **policy: Any) -> str:
    with pytest.raises((CapacityError, CheckpointError, UnsupportedError)) as caught:
        drafting(directory, Path("own"), 1, **policy)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_has_no_layer_that_drafts_is_refused(build: Callable[[str], Path], saved: Saved, tmp_path: Path) -> None:
    assert "LlamaForCausalLM" in (message := refused(build("llama")))
    assert "has no num_mtp_layers" in message
    assert "a state" in refused(build("qwen3-next"))
    directory = Path(shutil.copytree(saved("glm4_moe", 1.0), tmp_path / "other"))
    config = directory / "config.json"
    told = json.loads(config.read_text())
    for number, what in ((0, "says num_mtp_layers 0"), (2, "has 2 MTP layers in a chain")):
        config.write_text(json.dumps({**told, "num_nextn_predict_layers": number}))
        assert what in refused(directory)
    config.write_text(json.dumps(told))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    bare = {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}
    save_file({**bare, "model.layers.3.enorm.weight": tensors["model.layers.3.enorm.weight"]}, file)
    assert re.search(r"lack \d+ of \d+ parameters, e.g. .*eh_proj", refused(directory))
    save_file(bare, file)
    assert "lack the MTP layer" in refused(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(modeling_layers.MtpModel, "forward_layer")
        assert "has no MTP layers as those of 5.24" in refused(saved("glm4_moe", 1.0))
    assert re.search(r"draft-model: its weights [\d.]+ MB, .* exceed", refused(saved("glm4_moe", 1.0), **TIGHT))


def test_its_room_is_that_of_its_tensors(saved: Saved) -> None:
    directory = saved("glm4_moe", 1.0)
    tensors = load_file(directory / "model.safetensors")
    shared = ("model.embed_tokens.weight", "lm_head.weight")
    own = [tensor for name, tensor in tensors.items() if ".layers.3." in name or name in shared]
    own = [tensor for tensor in own if not torch.equal(tensor, 2 * tensors["lm_head.weight"])]
    shape = draft_shape(Policy.load({"draft-model": "own"}), "float32", directory)
    assert shape is not None
    buffers = tensors["model.layers.3.mlp.gate.e_score_correction_bias"].nbytes
    assert shape.weight_bytes == sum(tensor.nbytes for tensor in own) - buffers
