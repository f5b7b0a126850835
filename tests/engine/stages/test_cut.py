"""Protects: how layers are cut into stages, and which stages a policy may ask for."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from typing import Any

import pytest

from engine import Policy
from engine.errors import ConfigError, InstallationError
from engine.planning.devices import devices_of_stages
from engine.stages.cut import cut_layers


def largest(parts: list[range], layers: list[int], head: int) -> int:
    return max(sum(layers[at] for at in part) + (head if part.stop == len(layers) else 0) for part in parts)


def test_layers_are_cut_where_the_largest_stage_is_smallest() -> None:
    dice = random.Random(0)
    for _ in range(60):
        layers = [dice.randrange(1, 9) for _ in range(dice.randrange(4, 9))]
        head, count = dice.randrange(12), dice.randrange(1, 5)
        parts = cut_layers(layers, head, count)
        assert [at for part in parts for at in part] == list(range(len(layers)))
        assert len(parts) == count
        assert all(parts)
        ways = (
            [range(*each) for each in pairwise((0, *cuts, len(layers)))]
            for cuts in combinations(range(1, len(layers)), count - 1)
        )
        assert largest(parts, layers, head) == min(largest(way, layers, head) for way in ways)


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"stages: 4 are more than the model's 3 layers"):
        cut_layers([1, 1, 1], 0, 4)


@pytest.mark.parametrize(
    ("policy", "told"),
    [
        ({"stages": 0}, "stages 0 is not a whole number of at least 1"),
        ({"stages": True}, "stages True is not a whole number"),
        ({"stages": 2, "device": "cuda:0"}, "device cuda:0 is one, and each stage has its own"),
        ({"stages": 2, "device": ["cuda:0", "cuda:1", "cuda:2"]}, "device lists 3"),
        ({"stages": 2, "gather-weights": True}, "leave out gather-weights"),
        ({"stages": 2, "draft-model": "gpt2"}, "leave out draft-model"),
        ({"stage": 2}, "did you mean 'stages'"),
    ],
)
def test_a_policy_that_cannot_be_meant_is_refused(policy: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Policy.load(policy)


def test_a_policy_comes_back_from_its_mapping() -> None:
    policy = Policy.load({"stages": 2, "device": ["cuda:0", "cuda:1"]})
    assert Policy.load(policy.as_mapping()) == policy
    assert Policy().stages == 1
    assert "stages" not in Policy().as_mapping()


def test_each_stage_has_a_device() -> None:
    assert devices_of_stages(["cuda:0", "cuda:1", "cuda:2"], 2) == ("cuda:0", "cuda:1")
    for names in ([], ["cuda:0"], ["cuda:0", "cuda:1"]):
        with pytest.raises(InstallationError, match="stages 3: each has a device of its own"):
            devices_of_stages(names, 3)
