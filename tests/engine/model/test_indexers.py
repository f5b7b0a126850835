"""Protects: each token attends to the keys that its layer's indexer chooses for it, whatever is computed beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import models
import outcomes
import parity
import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaIndexer
from watch import Watch

from engine import Engine
from engine.errors import UnsupportedError
from engine.model.attention.sparse import Sparse
from engine.model.causal_model import CausalModel
from engine.weights.stored_form import shape_of
from flexgen_helm.checking.random_model import save_small

Build = Callable[[str], Path]
CPU = torch.device("cpu")
FAMILY = "glm-moe-dsa"


def test_an_index_key_is_kept_beside_keys_and_values_where_a_layer_chooses(build: Build) -> None:
    """By hand: 4 heads of 8 + 8 and of 12, and 16 numbers in every second layer, in float32."""
    with Engine.from_pretrained(str(build(FAMILY)), policy={"device": "cpu"}) as engine:
        model = engine.parts.model
        assert {index: each.top_k for index, each in model.indexers.items()} == {0: 8, 2: 8}
        assert engine.parts.lanes[0].cache.room.row_bytes["host"] == 4 * (4 * 4 * (16 + 12) + 2 * 16)
        assert shape_of(model).cache_row_bytes == engine.parts.lanes[0].cache.room.row_bytes["host"]
        assert model.sweeping.handed_row_bytes == 4 * 8


def test_rows_may_be_taken_one_at_a_time(
    build: Build, reference: Callable[[str], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of long prompts take more memory than there is for them."""
    taken: list[int] = []
    stock = GlmMoeDsaIndexer.forward

    @wraps(stock)
    def counted(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = stock(self, hidden_states, *args, **kwargs)
        taken.append(hidden_states.shape[1])
        return found

    monkeypatch.setattr(GlmMoeDsaIndexer, "forward", counted)
    with Engine.from_pretrained(str(build(FAMILY)), policy={"device": "cpu"}) as engine:
        executor = engine.parts.lanes[0].executor
        executor.limits = replace(executor.limits, logits_bytes=1)
        taken.clear()
        done = engine.run(outcomes.JOBS)
    assert set(taken) == {1}
    assert outcomes.differences(reference(FAMILY), outcomes.JOBS, done) == []


def test_contexts_of_which_all_is_chosen_are_attended_to_as_any(
    build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is scored for them; the engine's other ways to attend, and shared prefixes, are as ever."""
    directory = models.save_model(tmp_path / "model", FAMILY, index_topk=models.WINDOW)
    jobs = outcomes.JOBS
    asked = list[Any]()
    for way in ("prefill", "decode"):
        monkeypatch.setattr(Sparse, way, lambda *given: asked.append(given))
    with Engine.from_pretrained(str(directory), policy={"device": "cpu"}) as engine:
        watch = Watch(engine)
        done = engine.run(jobs)
    assert asked == []
    assert outcomes.differences(models.load_reference(directory), jobs, done) == []
    assert watch.tokens[0] == sum(len(job.prompt) for job in jobs) - 24 - 1  # a prefix of two, a token that is not fed


@pytest.mark.parametrize(
    ("changes", "policy"),
    [
        ({"v_head_dim": 16, "index_head_dim": 64}, {"compress-cache": 4}),
        ({}, {"dtype": "bfloat16"}),
    ],
)
def test_index_keys_are_the_same_wherever_they_lie(
    changes: dict[str, Any], policy: dict[str, Any], tmp_path: Path
) -> None:
    """Encoded as keys and values are; of a model in 16 bits, as wide as it computes them (dots3: 32 bits)."""
    if changes:
        directory = models.save_model(tmp_path / "model", FAMILY, **changes)
    else:
        directory = save_small(
            tmp_path / "model", models.small_config_of("dots3_note_text", per_layer_config={}, head_dim=16)
        )
    found = []
    for place in ("device", "host", "disk"):
        given = {"device": "cpu", "offload-dir": str(tmp_path), **parity.POLICIES[place], **policy}
        with Engine.from_pretrained(str(directory), policy=given) as engine:
            widths = {shape.index_width for shape in engine.parts.model.kv_shapes}
            found.append([(done.tokens, done.logprobs) for done in engine.run(outcomes.JOBS)])
    assert widths == ({64, 0} if changes else {32, 0})
    assert found[0] == found[1] == found[2]


def test_codes_do_not_hold_wider_index_keys(tmp_path: Path) -> None:
    config = models.small_config_of("dots3_note_text", per_layer_config={}, head_dim=16)
    directory = save_small(tmp_path / "model", config)
    with pytest.raises(UnsupportedError, match=r"compress-cache: index keys of layer 0 are torch\.float32"):
        Engine.from_pretrained(str(directory), policy={"device": "cpu", "dtype": "bfloat16", "compress-cache": 4})


def test_a_comparison_with_stock_layers_finds_nothing(build: Build) -> None:
    with Engine.from_pretrained(str(build(FAMILY)), policy={"device": "cpu"}) as engine:
        found = engine.compare_with_stock(outcomes.JOBS, engine.run(outcomes.JOBS))
    assert [stage.name for stage in found.stages if not stage.is_within] == []


def test_stock_code_that_chooses_in_another_way_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = GlmMoeDsaIndexer.forward

    @wraps(stock)
    def mixing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return stock(self, hidden_states + hidden_states.mean(1, keepdim=True), *args, **kwargs)

    @wraps(stock)
    def by_the_last(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock(self, *args, **kwargs)
        return found[:, -1:].expand_as(found)

    @wraps(stock)
    def one_twice(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock(self, *args, **kwargs)
        return torch.cat((found[..., :-1], found[..., :1]), dim=-1)

    @wraps(stock)
    def in_part(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = stock(self, *args, **kwargs)
        return found * (found.shape[-1] == 8)

    @wraps(stock)
    def as_a_mask(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(self, *args, **kwargs).bool()

    for forward, words in (
        (mixing, "chooses other keys for a row in another batch"),
        (by_the_last, "chooses keys of later tokens|chooses other keys for a row in another batch"),
        (one_twice, "does not choose 8 different keys"),
        (in_part, "leaves out keys where there are no more"),
        (as_a_mask, "another way than by their positions"),
    ):
        monkeypatch.setattr(GlmMoeDsaIndexer, "forward", forward)
        with pytest.raises(UnsupportedError, match=words):
            CausalModel(build(FAMILY), torch.float32, CPU)


def test_batch_invariance_is_refused(build: Build) -> None:
    with pytest.raises(UnsupportedError, match="batch-invariant: it chooses keys by an index"):
        CausalModel(build(FAMILY), torch.float32, CPU, batch_invariant=True)
