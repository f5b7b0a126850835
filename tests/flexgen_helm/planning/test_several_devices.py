"""Protects: what several devices take that share the weights is estimated right by hand, in both ways."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine import Policy
from engine.planning.hardware import Memory
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.planner import make_plan
from engine.planning.sharing import ALONE, Sharing
from engine.policy import Share
from flexgen_helm.planning.dummy import shape_model
from flexgen_helm.planning.estimate import Estimate, estimate
from flexgen_helm.planning.model_sizes import ModelSizes
from flexgen_helm.planning.policy_search import search
from flexgen_helm.planning.roofline import Workload

LINK, TOGETHER, GATHER = 53e9, 40e9, 300e9
LOAD = Workload.parse("2x100x400+100:1")
POLICY = Policy(weights=Share(gpu=20, cpu=80), activations=Share(gpu=0, cpu=100))
CARD = Memory(device=16 * 10**9, host=300 * 10**9, disk=0)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> ModelSizes:
    return ModelSizes.of(shape_model("opt-6.7b", "float16", tmp_path_factory.mktemp("shape")))


@pytest.fixture
def profile() -> HardwareProfile:
    shipped = replace(HardwareProfile.load("h100-16gb"), to_device_bytes_s=LINK)
    return replace(shipped, links_together_bytes_s=TOGETHER, gather_bytes_s=GATHER)


def found(sizes: ModelSizes, profile: HardwareProfile, load: Workload, sharing: Sharing) -> Estimate:
    shape = sizes.coded[None, None].shape
    plan = make_plan(shape, POLICY, CARD, on_cpu=False, sharing=sharing)
    return estimate(sizes, profile, load, POLICY, plan, sharing)


def test_each_brings_all_weights_for_its_part_of_the_requests(sizes: ModelSizes, profile: HardwareProfile) -> None:
    two = found(sizes, profile, LOAD, Sharing(count=2))
    one = found(sizes, replace(profile, to_device_bytes_s=TOGETHER), Workload.parse("1x100x400+100:1"), ALONE)
    assert two.prefill_s == pytest.approx(one.prefill_s)
    assert two.held == one.held


def test_gathering_brings_a_part_and_the_rest_from_card_to_card(sizes: ModelSizes, profile: HardwareProfile) -> None:
    """OPT-6.7B: 32 layers are split; the tied table is not. 80 % of it crosses the link in each of the sweeps."""
    four = found(sizes, profile, LOAD, Sharing(count=4, gather=True))
    one = found(sizes, profile, Workload.parse("1x50x400+100:1"), ALONE)
    stored = sizes.coded[None, None].stored
    layers = sum(size for name, size in stored.items() if name.startswith("layer."))
    hidden = one.prefill_s["to device"] * LINK - one.sweeps * 0.8 * (layers + stored["embedding"])
    link = four.sweeps * 0.8 * (layers / 4 + stored["embedding"]) + hidden
    assert four.prefill_s["to device"] == pytest.approx(link / TOGETHER, rel=0.01)
    gathered = four.sweeps * layers * 3 / 4
    assert four.prefill_s["card to card"] == pytest.approx(gathered / GATHER)
    assert four.weights["host"] == pytest.approx(0.8 * (layers / 4 + stored["embedding"] + stored["outer"]), rel=0.01)


def test_a_search_for_several_keeps_more_on_each_card(sizes: ModelSizes, profile: HardwareProfile) -> None:
    base = replace(POLICY, weights=None, gpu_memory=8 * 10**9)
    small = replace(CARD, device=8 * 10**9)
    one = search(sizes, profile, small, LOAD, base, compress=False)[0]
    two = search(sizes, profile, small, LOAD, base, compress=False, sharing=Sharing(count=2, gather=True))[0]
    assert two.plan.weights.gpu > 1.5 * one.plan.weights.gpu
    assert two.seconds < one.seconds / 1.5


@pytest.mark.parametrize(
    ("load", "count", "part"),
    [
        ("1x100x400+100:1", 2, "1x50x400+100:1"),
        ("10x100x400+100:1", 2, "5x100x400+100:1"),
        ("3x100x400+100:1", 2, "2x100x400+100:1"),
        ("3x100x400+100:1", 4, "1x75x400+100:1"),
        ("3x7x400+100:1", 1, "3x7x400+100:1"),
    ],
)
def test_requests_are_shared_out(load: str, count: int, part: str) -> None:
    assert str(Workload.parse(load).part_of(count)) == part
