"""Protects: encoded weights come back within their bound, and the engine computes with exactly what comes back."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import models
import parity
import pytest
import torch
from codes import join
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import JOBS, POLICIES
from scipy.linalg import hadamard
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine import Engine, Policy
from engine.errors import CapacityError
from engine.kernels.codec import GROUP, Codec
from engine.kernels.weight_codes.groups import GroupCodes
from engine.kernels.weight_codes.named import weight_codec_of
from engine.planning.hardware import Memory
from engine.planning.planner import make_plan
from engine.policy import Share
from engine.weights.stored_form import coded_names, shape_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def there_and_back(values: torch.Tensor, bits: int) -> torch.Tensor:
    """`values` of any shape as they come back."""
    codec, flat = Codec(bits), values.reshape(-1)
    back = torch.full_like(flat, math.nan)
    codec.decode(join(codec, codec.encode(flat), flat.numel()), back)
    return back.view(values.shape)


def decoded_by_hand(codec: Codec, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The groups `[groups, GROUP]` that bytes stand for, in double precision, as the docstring of the codec says."""
    codes, scales, multiples = parts
    codes = codes.view(-1, codec.code_bytes(GROUP))
    if codec.bits == 4:
        codes = torch.cat((codes & 15, codes >> 4), dim=1)
    odd = 2 * codes.double() - codec.levels
    levels = odd * (28 + odd.abs()) if codec.bits == 4 else odd
    shifted = multiples.view(torch.int16).int()[:, None] >> torch.tensor([0, 4, 8, 12])
    levels = levels.view(-1, 4, 16) * ((shifted & 15) + 1)[..., None]
    matrix = torch.from_numpy(hadamard(GROUP)).double() / 8
    return levels.view(-1, GROUP) @ matrix * scales.view(torch.bfloat16).double()[:, None]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([4, 8]),
    dtype=st.sampled_from(DTYPES),
    spread=st.floats(-4, 2),
    offset=st.floats(-10, 10),
    outlier=st.sampled_from([0, 100]),
)
def test_groups_come_back_within_their_bound(
    seed: int, bits: int, dtype: torch.dtype, spread: float, offset: float, outlier: int
) -> None:
    """And as the layout says; the bound follows from the widest gap, which is a quarter's largest number's part."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(4 * GROUP, generator=random) + offset
    values[7] += outlier
    values = (values * 10**spread).to(dtype)
    codec, eps = Codec(bits), torch.finfo(dtype).eps
    parts = codec.encode(values)
    assert [part.dtype for part in parts] == [torch.uint8] * 3
    groups, back = values.double().view(-1, GROUP), there_and_back(values, bits).double().view(-1, GROUP)
    torch.testing.assert_close(back, decoded_by_hand(codec, parts), rtol=eps, atol=6e-8 if eps > 1e-4 else 0)
    length = groups.square().sum(dim=1).sqrt()
    apart = (back - groups).square().sum(dim=1).sqrt()
    bound = codec.bound(groups).double()
    assert (apart <= bound + eps * length + 1e-6).all()
    assert (bound <= length * (0.8 if bits == 4 else 0.03)).all()


def test_numbers_of_a_normal_distribution_come_back_nearer_than_a_step_for_64_would_bring_them() -> None:
    """0.090 and 0.0053 of their length, where 64 numbers share a least number and an even step in as many bytes."""
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0))
    for bits, most in ((4, 0.073), (8, 0.0050)):
        assert (there_and_back(values, bits) - values).norm() < most * values.norm()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_and_strange_numbers(bits: int, dtype: torch.dtype) -> None:
    values = torch.zeros(4, GROUP, dtype=dtype)
    values[1], values[2, 3], values[3, 5] = -0.125, torch.nan, torch.inf
    back = there_and_back(values, bits)
    assert back[0].equal(values[0])
    assert (back[1] + 0.125).norm() < 0.2  # of 1: equal numbers are one outlier behind the rotation
    assert not back[2:].isfinite().any()


def test_sizes() -> None:
    """4.5 and 8.5 bits a number, as of FlexGen's groups in 16 bits."""
    count = 1 << 16
    assert Codec(4).num_bytes(count) == count * 4.5 / 8
    assert Codec(8).num_bytes(count) == count * 8.5 / 8
    assert Codec(4).row_bytes(128) == 128 * 4.5 / 8


def compressed(model: PreTrainedModel, names: set[str], bits: int) -> PreTrainedModel:
    """The reference with the named parameters as they come back."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(there_and_back(parameter, bits))
    return model


CODEC = GroupCodes(Codec(4))
CASES = [
    *(("opt", 4, policy) for policy in POLICIES),
    *(("llama", 8, policy) for policy in ("device", "thirds")),
    *((family, 4, "thirds") for family in ("qwen3-moe", "gpt2", "gemma2", "bloom", "mixtral")),
    ("opt-post-norm", 8, "20-80"),
]
QUICK = {
    *(("opt", 4, policy) for policy in ("device", "disk", "small")),
    ("llama", 8, "thirds"),
    *((family, 4, "thirds") for family in ("qwen3-moe", "bloom")),
    ("opt-post-norm", 8, "20-80"),
}


def cases(every: list[tuple[str, int, str]], quick: set[tuple[str, int, str]]) -> list[Any]:
    """All cases; those that combine again what `quick` has already are left to `make slow`."""
    return [pytest.param(*case, marks=[] if case in quick else [pytest.mark.slow]) for case in every]


@pytest.mark.parametrize(("family", "bits", "policy"), cases(CASES, QUICK))
def test_equals_transformers_with_the_same_weights(
    family: str, bits: int, policy: str, build: Callable[[str], Path], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {**POLICIES[policy], "device": "cpu", "offload-dir": str(tmp_path)}
    with Engine.from_pretrained(str(build(family)), policy={**settings, "compress-weight": bits}) as engine:
        done = engine.run(JOBS)
        again = engine.run(JOBS)
        names = {name for unit in engine.parts.model.units for name in coded_names(engine.parts.model, unit, CODEC)}
        stored = sum(sum(tiers.values()) for tiers in engine.parts.weights.placed_bytes().values())
        whole = sum(tensor.numel() * tensor.element_size() for tensor in engine.parts.model.state.values())
    assert names
    assert not any("norm" in name or "embed" in name or name.endswith("bias") for name in names)
    assert stored < whole
    reference = compressed(models.load_reference(build(family)), names, bits)
    assert parity.differences(parity.expect(reference), done)[0] == []
    assert [each.tokens for each in again] == [each.tokens for each in done]


def attend_to_codes(bits: int) -> Callable[..., Any]:
    """Attention of transformers over keys and values as they come back, each token's by itself."""
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attend(module: torch.nn.Module, query: torch.Tensor, *rest: torch.Tensor, **others: Any) -> Any:
        key, value, *mask = rest
        rows = [x.transpose(1, 2) for x in (key, value)]
        flat = [x.flatten(2) for x in rows]
        back = there_and_back(torch.cat(flat, dim=2), bits).split([x.shape[2] for x in flat], dim=2)
        key, value = (new.view(old.shape).transpose(1, 2) for new, old in zip(back, rows, strict=True))
        return sdpa(module, query, key, value, *mask, **others)

    return attend


@pytest.fixture(scope="module")
def attending(build: Callable[[str], Path]) -> Callable[[str, int], list[parity.Expected]]:
    """What transformers makes of the jobs with such an attention."""

    @cache
    def of(family: str, bits: int) -> list[parity.Expected]:
        name = f"codes_{bits}"
        AttentionInterface.register(name, attend_to_codes(bits))
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model = AutoModelForCausalLM.from_pretrained(build(family), dtype=torch.float32, attn_implementation=name)
        return parity.expect(model.eval())

    return of


CACHE_CASES = [
    *(("opt", bits, policy) for bits in (4, 8) for policy in POLICIES),
    *(("llama", 8, policy) for policy in ("device", "thirds", "cpu-attention", "padded")),
    *((family, 8, "thirds") for family in ("gpt2", "qwen3-moe", "opt-post-norm")),
]
QUICK_CACHE = {
    *(("opt", 4, policy) for policy in ("device", "disk", "small")),
    *(("opt", 8, policy) for policy in ("host", "thirds")),
    *(("llama", 8, policy) for policy in ("device", "cpu-attention", "padded")),
    ("qwen3-moe", 8, "thirds"),
}
FURTHER = {
    "cpu-attention": {"percent": [100, 0, 0, 100, 100, 0], "cpu-cache-compute": True},
    "padded": {"percent": [100, 0, 34, 33, 100, 0], "pad-to-seq-len": 80},
}


@pytest.mark.parametrize(("family", "bits", "policy"), cases(CACHE_CASES, QUICK_CACHE))
def test_attends_to_what_codes_stand_for(
    family: str,
    bits: int,
    policy: str,
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    attending: Callable[[str, int], list[parity.Expected]],
    tmp_path: Path,
) -> None:
    """On every tier, in every company, also in the sweep that computes a row: so results do not depend on placement.

    Sums in another order may take a number over the middle between two codes, which moves a log-probability by about
    1e-3 (4 bits) or 3e-4 (8 bits): one job may differ so, and by 8 bits one in six a little.
    """
    settings = {**(POLICIES | FURTHER)[policy], "device": "cpu", "offload-dir": str(tmp_path), "compress-cache": bits}
    with Engine.from_pretrained(str(build(family)), policy=settings) as engine:
        done = engine.run(JOBS)
        again = engine.run(JOBS[::-1])[::-1]
    found, largest = parity.differences(attending(family, bits), done)
    assert len(found) <= (1 if bits == 4 else len(JOBS) // 6), found
    assert largest < 0.02
    assert sum(a.tokens != b.tokens for a, b in zip(done, again, strict=True)) <= 1
    plain, _ = parity.differences(parity.expect(reference(family)), done)
    assert len(plain) > 3  # the codes are coarse enough to be seen


def test_padded_families_attend_to_codes_too(build: Callable[[str], Path], tmp_path: Path) -> None:
    """Their attention is their own: placements give the same, and another than without a codec."""
    tokens = {}
    for name, bits in (("device", 8), ("thirds", 8), ("small", 8), ("device", None)):
        settings = {**POLICIES[name], "device": "cpu", "offload-dir": str(tmp_path), "compress-cache": bits}
        with Engine.from_pretrained(str(build("bloom")), policy=settings) as engine:
            tokens[name, bits] = [(each.tokens, each.logprobs) for each in engine.run(JOBS)]
    for name in ("thirds", "small"):
        apart = sum(a[0] != b[0] for a, b in zip(tokens[name, 8], tokens["device", 8], strict=True))
        assert apart <= 1
    assert tokens["device", None] != tokens["device", 8]


def test_codes_take_less_room_off_the_device(build: Callable[[str], Path], tmp_path: Path) -> None:
    """8.5 bits a number of 32, in host memory and on disk."""
    settings = {"device": "cpu", "percent": [100, 0, 34, 33, 100, 0], "offload-dir": str(tmp_path)}
    held = {}
    for bits in (None, 8):
        with Engine.from_pretrained(str(build("opt")), policy={**settings, "compress-cache": bits}) as engine:
            engine.run(JOBS)
            held[bits] = engine.placed_bytes()
    assert held[8]["device"] == held[None]["device"]
    for tier in ("host", "disk"):
        assert held[8][tier] == pytest.approx(held[None][tier] * 8.5 / 32, rel=0.01)


def test_what_is_encoded(build: Callable[[str], Path]) -> None:
    """All of a layer's matrices, experts among them; neither routers nor embeddings nor the head."""
    with Engine.from_pretrained(str(build("qwen3-moe")), policy={"device": "cpu", "compress-weight": 4}) as engine:
        names = {name for unit in engine.parts.model.units for name in coded_names(engine.parts.model, unit, CODEC)}
    kinds = {name.split("layers.0.")[1] for name in names if "layers.0." in name}
    attention = {f"self_attn.{part}_proj.weight" for part in "qkvo"}
    assert kinds == attention | {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}


def test_the_whole_is_a_third_in_16_bits(tmp_path: Path) -> None:
    """4.5 bits of 16, but for what stays as it is."""
    path = models.save_model(tmp_path, "llama", hidden_size=256, intermediate_size=1024, num_attention_heads=4)
    sizes = {}
    for bits in (None, 8, 4):
        policy = {"device": "cpu", "dtype": "bfloat16", "compress-weight": bits}
        with Engine.from_pretrained(str(path), policy=policy) as engine:
            placed = engine.parts.weights.placed_bytes()
            sizes[bits] = sum(sum(tiers.values()) for name, tiers in placed.items() if name.startswith("layer."))
    assert sizes[4] == pytest.approx(4.5 / 16 * sizes[None], rel=0.02)
    assert sizes[8] == pytest.approx(8.5 / 16 * sizes[None], rel=0.02)


def test_encoded_layers_hide_less_arithmetic(build: Callable[[str], Path]) -> None:
    """Fewer rows are free of cost behind their transfer, in proportion to what is moved."""
    shapes = {}
    for bits in (None, 4):
        with Engine.from_pretrained(str(build("opt")), policy={"device": "cpu"}) as engine:
            shapes[bits] = shape_of(engine.parts.model, weight_codec_of(bits))
    assert shapes[None].stored_part == 1.0
    assert 4.5 / 32 < shapes[4].stored_part < 0.2  # 4.5 bits of 32, and biases
    memory = Memory(device=10**9, host=10**9, disk=0)
    free = {
        bits: make_plan(shape, Policy(weights=Share(gpu=0, cpu=100)), memory, on_cpu=False).limits.free_rows
        for bits, shape in shapes.items()
    }
    assert free[4] == int(free[None] * shapes[4].stored_part)


def test_memory_to_expand_layers_is_planned_for(tmp_path: Path) -> None:
    """A device that holds the encoded weights but no expanded layer is refused with numbers."""
    path = models.save_model(tmp_path, "opt", hidden_size=512, ffn_dim=8192, num_attention_heads=4)
    policy = {"device": "cpu", "compress-weight": 4, "percent": [100, 0, 100, 0, 100, 0]}
    with Engine.from_pretrained(str(path), policy=policy) as engine:
        placed = engine.placed_bytes()["device"]
        expanded = engine.parts.stream._expansion.num_bytes
        stored = sum(tiers["device"] for tiers in engine.parts.weights.placed_bytes().values())
    assert placed >= stored + expanded
    with pytest.raises(CapacityError, match="two layers and one expanded"):
        Engine.from_pretrained(str(path), policy={**policy, "gpu-memory": f"{(stored + expanded // 2) // 1000}kB"})
