"""Protects: comparing with stock layers finds nothing where there is nothing, and names the layer that is at fault."""

from __future__ import annotations

import gc
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import quantized
import torch
from parity import JOBS, LATER, OUTER, POLICIES
from transformers import PreTrainedModel

from engine import Completion, Engine, Job, Sampling
from engine.batch.reach import Reach
from engine.cache.key_value import KVCache
from engine.errors import EngineError, JobError, NumericsError
from engine.kernels.codec import GROUP, Codec
from engine.logit_rules import LogitRules
from engine.model.attention.backend import Attending, AttentionBackend
from engine.model.attention.interface import BACKENDS
from engine.model.causal_model import CausalModel
from engine.model.stock import StockForward
from engine.schedule.sequence import Prefix
from engine.verification.layerwise import Findings
from engine.verification.scored import Scored
from engine.verification.weight_check import _is_beyond
from engine.weights.portion import Portion
from engine.weights.slots import Slots
from engine.weights.store import WeightStore

Build = Callable[[str], Path]
TOLERANCE = 1e-4
DECODING = [JOBS[0], JOBS[2], JOBS[3], JOBS[7], JOBS[9], JOBS[-3], JOBS[-1]]
"""Shared and nested prefixes, a lone prompt, scoring, one token."""


def compared(path: Path, jobs: list[Job], **policy: Any) -> tuple[list[Completion], Findings]:
    """What an engine answers, and what comparing it finds."""
    with Engine.from_pretrained(str(path), policy={"device": "cpu", **policy}) as engine:
        done = engine.run(jobs)
        assert all(each.error is None for each in done)
        return done, engine.compare_with_stock(jobs, done)


def at_fault(found: Findings) -> list[str]:
    return [stage.name for stage in found.stages if not stage.is_within]


def apart(jobs: list[Job], done: list[Completion], scored: list[Scored], model: PreTrainedModel) -> float:
    """How far what is scored lies from one plain forward of `model`, at most."""
    largest = 0.0
    for job, completion, each in zip(jobs, done, scored, strict=True):
        oracle = models.reference_logprobs(model, [*job.prompt, *completion.tokens])
        values = [*(each.prompt_logprobs or [None])[1:], *each.logprobs]
        oracle = oracle[len(oracle) - len(values) :]
        largest = max([largest, *(abs(a - b) for a, b in zip(values, oracle, strict=True))])  # type: ignore[operator]
    return largest


@pytest.mark.parametrize(
    ("family", "policy"),
    [
        *(("llama", policy) for policy in POLICIES),
        *(pytest.param("bloom", policy, marks=[] if policy == "thirds" else [pytest.mark.slow]) for policy in POLICIES),
    ],
)
def test_an_exact_engine_has_no_difference_wherever_things_lie(
    family: str, policy: str, build: Build, reference: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    done, found = compared(build(family), JOBS, **{"offload-dir": str(tmp_path)}, **POLICIES[policy])
    assert at_fault(found) == []
    assert [stage.name for stage in found.stages] == ["embedding", "layer 0", "layer 1", "layer 2", "head"]
    assert all(stage.weights is not None and stage.weights.largest == 0 for stage in found.stages)
    assert max(stage.relative for stage in found.stages) < 2e-6
    assert found.unencoded is None
    assert found.num_passes == 1
    assert apart(JOBS, done, found.scored, reference(family)) < TOLERANCE
    rows = {stage.num_rows for stage in found.stages[:-1]}
    assert len(rows) == 1
    fed = sum(len(job.prompt) - 1 + max(1, len(each.tokens)) for job, each in zip(JOBS, done, strict=True))
    if policy != "small":  # a prefix is computed once while sequences that share it run together
        assert rows.pop() < fed


@pytest.mark.parametrize(
    "family",
    [
        *("opt", "opt-post-norm", "gemma2", "gemma3", "gpt2", "gpt-oss", "deepseek-v3", "mixtral", "mpt", "falcon-new"),
        *LATER,
    ],
)
def test_families_have_no_difference(
    family: str, build: Build, reference: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    done, found = compared(build(family), DECODING, **{"offload-dir": str(tmp_path), "percent": [34, 33] * 3})
    assert at_fault(found) == []
    assert apart(DECODING, done, found.scored, reference(family)) < TOLERANCE
    assert found.attention == reference(family).config._attn_implementation


@pytest.mark.parametrize(
    ("family", "policy", "is_whole"),
    [
        ("opt", {}, False),
        ("llama", {"percent": [34, 33] * 3}, False),
        ("llama", {"compress-cache": 8, "percent": [0, 100] * 3}, False),
        ("mistral", {}, False),  # windows smaller than the prefixes
        ("gemma2", {}, False),
        ("gpt-oss", {}, False),
        ("bloom", {}, False),
        ("mpt", {}, False),
        ("falcon-alibi", {}, False),
        ("deepseek-v3", {}, True),  # its cache holds something else than keys and values
    ],
)
def test_stock_layers_compute_a_shared_prefix_once(
    family: str,
    policy: dict[str, Any],
    is_whole: bool,
    build: Build,
    reference: Callable[[str], PreTrainedModel],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """And find what they find where nothing is shared, and every text is computed whole."""
    rows = [0]
    call = StockForward.layer

    def counting(self: StockForward, index: int, hidden: torch.Tensor, *others: Any) -> Any:
        rows[0] += len(hidden) if index == 1 else 0
        return call(self, index, hidden, *others)

    monkeypatch.setattr(StockForward, "layer", counting)
    given = {"offload-dir": str(tmp_path), **policy}
    fed = {}
    found = {}
    for shares in (True, False):
        rows[0] = 0
        done, found[shares] = compared(build(family), DECODING, **given, **{"share-prefix": shares})
        assert at_fault(found[shares]) == []
        assert max(stage.relative for stage in found[shares].stages) < 2e-6
        fed[shares] = rows[0] // (2 if "compress-cache" in policy else 1)
    saved = found[False].stages[2].num_rows - found[True].stages[2].num_rows
    assert saved >= OUTER
    assert fed[False] - fed[True] == (0 if is_whole else saved)
    for one, other in zip(found[True].scored, found[False].scored, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
        assert one.prompt_logprobs == pytest.approx(other.prompt_logprobs, abs=TOLERANCE)
        assert one.greedy == other.greedy
    plain = found[True].scored if found[True].unencoded is None else found[True].unencoded
    assert apart(DECODING, done, plain, reference(family)) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "bfloat16") for family in ("llama", "gemma2", "mixtral")),
        ("llama", "float16"),
        *(pytest.param(family, "float16", marks=pytest.mark.slow) for family in ("gemma2", "mixtral")),
    ],
)
def test_sixteen_bits_are_within_their_tolerance(family: str, dtype: str, build: Build) -> None:
    _, found = compared(build(family), JOBS, dtype=dtype)
    assert at_fault(found) == []
    assert max(stage.relative for stage in found.stages) > 1e-4  # it rounds


@pytest.mark.parametrize(
    ("codes", "policy"),
    [
        *(({"compress-weight": 8, "compress-cache": 4}, policy) for policy in ("device", "20-80", "disk")),
        ({"compress-weight": 4}, "20-80"),
        ({"compress-cache": 8}, "20-80"),
        *(
            pytest.param(codes, policy, marks=pytest.mark.slow)
            for codes in ({"compress-weight": 4}, {"compress-cache": 8})
            for policy in ("device", "disk")
        ),
    ],
)
def test_with_codes_errors_and_what_the_codes_cost_are_told_apart(
    codes: dict[str, int], policy: str, build: Build, reference: Callable[[str], PreTrainedModel], tmp_path: Path
) -> None:
    done, found = compared(build("llama"), DECODING, **{"offload-dir": str(tmp_path)}, **POLICIES[policy], **codes)
    assert at_fault(found) == []
    assert max(stage.relative for stage in found.stages) < 2e-6  # the same codes on either side
    for completion, each in zip(done, found.scored, strict=True):
        assert completion.logprobs == pytest.approx(each.logprobs, abs=TOLERANCE)
    assert found.unencoded is not None
    assert apart(DECODING, done, found.unencoded, reference("llama")) < TOLERANCE
    assert apart(DECODING, done, found.scored, reference("llama")) > 10 * TOLERANCE
    assert all(stage.compression is not None and stage.compression > 1e-3 for stage in found.stages[1:-1])
    largest = [stage.weights.largest for stage in found.stages[1:-1] if stage.weights is not None]
    assert (min(largest) > 0) == ("compress-weight" in codes)


def test_codes_that_were_kept_are_compared_with_the_checkpoint(build: Build, tmp_path: Path) -> None:
    path, policy = build("opt"), {"compress-weight": 4, "percent": [0, 100, 100, 0, 100, 0]}
    first = compared(path, DECODING, **policy)
    assert compared(path, DECODING, **policy)[1] == first[1]


@pytest.mark.parametrize("method", ["gptq", "awq", "int8"])
def test_quantized_checkpoints_have_no_difference(method: str, tmp_path: Path) -> None:
    if method == "int8":
        weights = {"num_bits": 8, "strategy": "channel", "symmetric": True}
        path = quantized.save_compressed(tmp_path, "llama", weights, "int-quantized", inputs=quantized.TOKEN)
    else:
        path = quantized.save_grouped(tmp_path, method)
    done, found = compared(path, DECODING, dtype="float32")
    assert at_fault(found) == []
    assert all(stage.weights is not None and stage.weights.largest == 0 for stage in found.stages)
    assert found.unencoded is None
    if method != "int8":  # whose inputs are rounded, too
        from safetensors.torch import load_file

        model = quantized.from_state(path, load_file(path / "expected.st"))
        assert apart(DECODING, done, found.scored, model) < TOLERANCE


def faulty(monkeypatch: pytest.MonkeyPatch, method: str, change: Callable[[Attending], Attending]) -> None:
    """Let every implementation of attention compute something else in layer 1."""

    def wrap(compute: Callable[[AttentionBackend, Attending], torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda self, asked: compute(self, change(asked) if asked.layer == 1 else asked)

    for kind in {type(backend) for backend in BACKENDS}:
        monkeypatch.setattr(kind, method, wrap(getattr(kind, method)))


@pytest.mark.parametrize("method", ["prefill", "decode"])
@pytest.mark.parametrize("policy", ["device", "disk"])
def test_scores_that_are_scaled_wrongly(
    method: str, policy: str, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    faulty(
        monkeypatch, method, lambda asked: replace(asked, rule=replace(asked.rule, scaling=1.1 * asked.rule.scaling))
    )
    _, found = compared(build("llama"), DECODING, **{"offload-dir": str(tmp_path)}, **POLICIES[policy])
    assert at_fault(found) == ["layer 1"]  # those behind it get the right input
    stage = found.stages[2]
    assert 0 < stage.num_beyond < stage.num_rows


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("kind", ["prefix", "prompt", "decode"])
def test_rows_of_one_kind_that_are_wrong(kind: str, family: str, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(asked: Attending) -> Attending:
        query = asked.query.clone()
        for segment in asked.batch.segments:
            is_prefix = isinstance(segment.span, Prefix)
            if kind == ("decode" if segment.is_decode else "prefix" if is_prefix else "prompt"):
                query[segment.first : segment.first + segment.num_rows] *= 1.1
        return replace(asked, query=query)

    for method in ("prefill", "decode"):
        faulty(monkeypatch, method, spoiled)
    _, found = compared(build(family), DECODING)
    assert at_fault(found) == ["layer 1"]
    assert [each.name for each in found.stages[2].kinds if each.num_beyond] == [kind]


@pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 1.3), ("float16", 1.1)])
def test_wrong_scores_are_found_in_sixteen_bits(
    dtype: str, share: float, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(
        monkeypatch,
        "prefill",
        lambda asked: replace(asked, rule=replace(asked.rule, scaling=share * asked.rule.scaling)),
    )
    assert at_fault(compared(build("llama"), DECODING, dtype=dtype)[1]) == ["layer 1"]


@pytest.mark.parametrize("window", [None, 7])
def test_a_mask_that_is_wrong(window: int | None, build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 3's layer 1 sees everything, its neighbours eight tokens; Mistral's layers see eight."""
    family = "mistral" if window is None else "gemma3"
    faulty(monkeypatch, "prefill", lambda asked: replace(asked, rule=replace(asked.rule, reach=Reach(window))))
    faulty(monkeypatch, "decode", lambda asked: replace(asked, rule=replace(asked.rule, reach=Reach(window))))
    assert at_fault(compared(build(family), DECODING)[1]) == ["layer 1"]


@pytest.mark.parametrize("family", ["llama", "bloom"])
@pytest.mark.parametrize("part", ["prefix", "own"])
def test_a_cache_that_loses_what_it_was_given(
    part: str, family: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what comes later is computed wrongly: rows behind a prefix, or decode steps."""
    write = KVCache.write

    def forgetting(self: KVCache, layer: int, batch: Any, *new: torch.Tensor) -> Any:
        kept = write(self, layer, batch, *new)
        if layer == 1:
            table = self.room.by_tier["device"][layer]
            for segment in batch.segments:
                is_prefix = not hasattr(segment.span, "job")
                if segment.span.block is not None and is_prefix == (part == "prefix"):
                    table[segment.span.block.first] = 0
            if part == "prefix":
                for span in [*self._fresh]:
                    self._fresh[span] = torch.zeros_like(self._fresh[span])
        return kept

    monkeypatch.setattr(KVCache, "write", forgetting)
    assert at_fault(compared(build(family), DECODING, percent=[100, 0] * 3)[1]) == ["layer 1"]


def test_positions_that_are_wrong_are_found_in_the_first_layer(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.batch.micro_batch import MicroBatch

    inputs = MicroBatch.inputs

    def shifted(self: MicroBatch) -> dict[str, Any]:
        given = inputs(self)
        return {
            **given,
            "position_ids": torch.where(given["position_ids"] > 20, given["position_ids"] - 1, given["position_ids"]),
        }

    monkeypatch.setattr(MicroBatch, "inputs", shifted)
    assert at_fault(compared(build("llama"), DECODING)[1]) == ["layer 0", "layer 1", "layer 2"]
    assert at_fault(compared(build("gpt2"), DECODING)[1])[0] == "embedding"  # it adds them there


@pytest.mark.parametrize("policy", ["host", "disk"])
def test_a_slot_that_is_filled_wrongly(
    policy: str, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Stock layers compute with the same slot: only the checkpoint tells."""
    copy = Slots._copy

    def spoiling(self: Slots, portion: Portion, target: torch.Tensor) -> None:
        copy(self, portion, target)
        if portion.placed.unit.name == "layer.1":
            extent = next(each for each in portion.placed.extents if each.name.endswith("v_proj.weight"))
            portion.of(target, extent.first, extent.end)[6] ^= 1  # the highest bit of a mantissa

    monkeypatch.setattr(Slots, "_copy", spoiling)
    _, found = compared(build("llama"), DECODING, **{"offload-dir": str(tmp_path)}, **POLICIES[policy])
    assert at_fault(found) == ["layer 1"]
    stage = found.stages[2]
    assert stage.num_beyond == 0
    assert stage.weights is not None
    assert stage.weights.parameter == "model.layers.1.self_attn.v_proj.weight"
    assert stage.weights.largest > 0


@pytest.mark.parametrize("kind", ["plain", "coded", "packed"])
@pytest.mark.parametrize(
    ("spoiled", "stage"),
    [
        ("model.layers.2.mlp.up_proj.weight", "layer 2"),
        ("model.norm.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("model.embed_tokens.weight", "embedding"),
    ],
)
def test_weights_that_were_loaded_wrongly(
    kind: str, spoiled: str, stage: str, build: Build, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def change(numbers: torch.Tensor) -> torch.Tensor:
        changed = numbers.clone().reshape(-1)
        changed[5] += 1 if kind == "packed" and not numbers.is_floating_point() else changed.abs().max() / 2
        return changed.view(numbers.shape)

    put, put_packed = WeightStore.put, WeightStore.put_packed
    monkeypatch.setattr(
        WeightStore,
        "put",
        lambda self, name, tensor, first_element=0: put(
            self, name, change(tensor) if name == spoiled else tensor, first_element
        ),
    )
    monkeypatch.setattr(
        WeightStore,
        "put_packed",
        lambda self, name, source, tensor: put_packed(
            self, name, source, change(tensor) if name == spoiled and source.endswith(".qweight") else tensor
        ),
    )
    path = quantized.save_grouped(tmp_path, "gptq") if kind == "packed" else build("llama")
    policy = {"compress-weight": 8} if kind == "coded" else {}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, found = compared(path, DECODING, dtype="float32", **policy)
    assert at_fault(found) == [stage]
    weights = next(each for each in found.stages if each.name == stage).weights
    assert weights is not None
    assert weights.parameter == spoiled


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("spoiled", [0.0, float("nan"), float("inf")])
def test_groups_without_a_bound_are_compared_too(bits: int, spoiled: float) -> None:
    """What the codes of a number that is not finite stand for is not; anything finite in its place is wrong."""
    codec = Codec(bits)
    values = torch.linspace(-1, 1, 4 * GROUP)
    values[5] += spoiled
    ours = codec.decode_rows(codec.encode_rows(values[None]), len(values), torch.float32)[0]
    for changed in (False, True):
        if changed:
            ours[:GROUP] = 3.0
        apart = torch.where(ours.isnan() & values.isnan(), 0, ours - values).abs().nan_to_num(nan=torch.inf)
        assert _is_beyond(apart, values, codec) == changed


def test_a_tied_head_is_compared_in_its_slot(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = Slots._copy

    def spoiling(self: Slots, portion: Portion, target: torch.Tensor) -> None:
        copy(self, portion, target)
        if portion.placed.unit.name == "embedding":
            target[7] ^= 1

    monkeypatch.setattr(Slots, "_copy", spoiling)
    assert at_fault(compared(build("opt"), DECODING, percent=[0, 100] * 3)[1]) == ["head"]


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A model of twelve layers, whose files hold bfloat16."""
    path = models.save_model(tmp_path / "deep", "mixtral", num_hidden_layers=12)
    model = models.load_reference(path).bfloat16()
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("codes", [{}, {"compress-weight": 4}])
def test_a_few_layers_are_in_memory(
    codes: dict[str, int], deep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever holds float32 numbers: slots, what a layer is compared with, hidden states."""
    held: list[int] = []
    call = CausalModel.layer

    def watched(self: CausalModel, index: int, *args: Any) -> torch.Tensor:
        if index in (5, 9) and len(held) < 8:  # looking at all objects takes its time
            storages = {}
            for each in gc.get_objects():
                is_tensor = type(each) in (torch.Tensor, torch.nn.Parameter)
                if is_tensor and each.device.type == "cpu" and each.dtype in (torch.float32, torch.uint8):
                    storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
            held.append(sum(storages.values()))
        return call(self, index, *args)

    monkeypatch.setattr(CausalModel, "layer", watched)
    gc.collect()
    jobs = DECODING[:3]
    policy = {"percent": [0, 0, 100, 0, 100, 0], "offload-dir": str(tmp_path), "gpu-memory": "64MB", **codes}
    with Engine.from_pretrained(str(deep), policy={"device": "cpu", "dtype": "float32", **policy}) as engine:
        state = engine.parts.model.state
        one = sum(each.numel() for name, each in state.items() if ".layers.3." in name) * 4
        done = engine.run(jobs)
        in_sweeps = max(held)
        held.clear()
        engine.compare_with_stock(jobs, done)
    assert one * 12 > 2e6
    assert max(held) - in_sweeps < 2.5 * one


def test_more_than_memory_holds_takes_several_passes(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.verification import layerwise
    from engine.verification.passes import PassLimits

    done, found = compared(build("llama"), JOBS, **{"compress-cache": 8})
    for limits in (PassLimits(60, 1 << 30, True), PassLimits(1 << 20, 20_000, False)):
        with monkeypatch.context() as patch:
            patch.setattr(layerwise, "pass_limits", lambda *_, limits=limits: limits)
            again, several = compared(build("llama"), JOBS, **{"compress-cache": 8})
        assert again == done
        assert several.num_passes > 4
        assert at_fault(several) == []
        for one, other in zip(several.scored, found.scored, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=TOLERANCE)
            assert one.greedy == other.greedy


def test_prompts_that_memory_forced_into_pieces_are_compared_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has room for a hundred rows at once, and no plan knew it."""
    path = models.save_model(tmp_path, "llama", max_position_embeddings=1024)
    rng = random.Random(1)
    jobs = [Job(prompt=[rng.randrange(3, 500) for _ in range(400)], max_new_tokens=2) for _ in range(2)]
    with Engine.from_pretrained(str(path), policy={"device": "cpu", "dtype": "float32"}) as engine:
        executor, rows = engine.parts.lanes[0].executor, list[int]()
        sweep = executor.sweep

        def short_of_memory(batches: Any) -> Any:
            if max(sum(segment.num_rows for segment in batch) for batch in batches) > 100:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return sweep(batches)

        monkeypatch.setattr(executor, "sweep", short_of_memory)
        done = engine.run(jobs)
        assert all(each.error is None for each in done)

        def watched(asked: Attending) -> Attending:
            rows.append(len(asked.query))
            return asked

        faulty(monkeypatch, "prefill", watched)  # called for our own micro-batches only
        found = engine.compare_with_stock(jobs, done)
    assert max(rows) <= 100
    assert at_fault(found) == []
    assert found.stages[1].num_rows == sum(len(job.prompt) + 1 for job in jobs)


def test_the_engine_goes_on_afterwards_and_gives_all_room_back(build: Build) -> None:
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as engine:
        done = engine.run(JOBS)
        engine.compare_with_stock(JOBS, done)
        assert engine.run(JOBS) == done
        assert engine.compare_with_stock(JOBS, done).scored == engine.compare_with_stock(JOBS, done).scored


def test_greedy_choices_are_those_of_plain_transformers(
    build: Build, reference: Callable[[str], PreTrainedModel]
) -> None:
    rules = LogitRules(
        suppress_tokens=(7, 8, 9), no_repeat_ngram_size=1, prompt=tuple(JOBS[0].prompt), max_new_tokens=8
    )
    jobs = [*DECODING, replace(JOBS[0], sampling=Sampling(rules=rules))]
    jobs.append(replace(JOBS[1], sampling=Sampling(temperature=1.0, seed=3)))
    done, found = compared(build("llama"), jobs)
    model = reference("llama")
    for job, completion, scored in zip(jobs, done, found.scored, strict=True):
        if not job.max_new_tokens:
            continue
        ids = [*job.prompt, *completion.tokens]
        logits = model(torch.tensor([ids])).logits[0, len(job.prompt) - 1 :].detach()
        two = logits.log_softmax(-1).topk(2).values
        assert scored.margins == pytest.approx((two[:, 0] - two[:, 1]).tolist(), abs=TOLERANCE)
        if job.sampling.rules is None:
            assert list(scored.greedy) == logits.argmax(-1).tolist()
        if not job.sampling.temperature:
            assert scored.greedy[: len(completion.tokens)] == completion.tokens


def test_what_cannot_be_compared_is_refused_in_one_line(build: Build, tmp_path: Path) -> None:
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as engine:
        for job, completion, message in (
            (
                JOBS[0],
                Completion(error=JobError("it was too long")),
                "a job that failed has nothing to compare: it was",
            ),
            (Job(prompt=[3, 9999]), Completion(tokens=(4,), logprobs=(0.0,)), "token 9999 is outside"),
        ):
            with pytest.raises(JobError, match=message):
                engine.compare_with_stock([job], [completion])
        assert [stage.num_rows for stage in engine.compare_with_stock([], []).stages] == [0] * 5
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.compare_with_stock([], [])


def test_stock_layers_that_are_not_finite_are_no_oracle(build: Build, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(build("llama"), tmp_path / "model"))
    state = load_file(path / "model.safetensors")
    state["lm_head.weight"][5] = float("nan")
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    with Engine.from_pretrained(str(path), policy={"device": "cpu"}) as engine:
        with pytest.raises(NumericsError, match="not finite") as told:
            engine.compare_with_stock([JOBS[-1]], [Completion(tokens=(4,), logprobs=(0.0,))])
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_in_the_checkpoint_either_are_no_fault(
    number: float, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the embedding of a token that no prompt has; beside one that is not a number, others are compared."""
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(build("llama"), tmp_path / "model"))
    state = load_file(path / "model.safetensors")
    state["model.embed_tokens.weight"][499, :2] = torch.tensor([number, float("nan")])
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    job = Job(prompt=[5, 6, 7], max_new_tokens=0, prompt_logprobs=True)
    _, found = compared(path, [job])
    assert at_fault(found) == []
    assert found.stages[0].weights is not None
    assert found.stages[0].weights.largest == 0

    put = WeightStore.put

    def put_wrong(self: WeightStore, name: str, tensor: torch.Tensor, first_element: int = 0) -> None:
        if "embed" in name:
            tensor = tensor.clone()
            tensor[499, 2] += 1e-3
        put(self, name, tensor, first_element)

    monkeypatch.setattr(WeightStore, "put", put_wrong)
    assert at_fault(compared(path, [job])[1]) == ["embedding"]


@pytest.fixture(autouse=True)
def _no_layers_left_behind() -> Iterator[None]:
    yield
    gc.collect()
