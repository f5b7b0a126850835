"""Protects: whether several cards gather weights from each other, by hand-computed cases."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine import Policy
from engine.planning.gathering import chooses_gather, sharing_of
from engine.planning.hardware import Memory
from engine.planning.hardware_profile import HardwareProfile
from engine.planning.model_shape import ModelShape
from engine.planning.sharing import ALONE, Resources, Sharing
from engine.policy import Share

GB = 10**9
SHAPE = ModelShape(
    unit_bytes=(GB,) * 60,
    embedding_bytes=1,
    outer_bytes=0,
    cache_row_bytes=60 * 28672,
    cache_layer_row_bytes=28672,
    hidden_row_bytes=14336,
    work_row_bytes=300_000,
)
CARD = Memory(device=24 * GB, host=200 * GB, disk=0)
NONE_RESIDENT = Policy(weights=Share(gpu=0, cpu=100))


def profile(link: float | None, gather: float | None) -> HardwareProfile:
    return replace(HardwareProfile.load("t4"), links_together_bytes_s=link, gather_bytes_s=gather)


@pytest.mark.parametrize(
    ("link", "gather", "expected"),
    [
        (50e9, 400e9, True),  # 60 GB alone take 1.2 s; half of them 0.6 s, and the others' half 0.075 s
        (50e9, 26e9, True),  # 1.15 s
        (50e9, 24e9, False),  # 1.25 s
        (12e9, 6.1e9, True),
        (12e9, 5.9e9, False),
        (None, None, True),  # not measured together
    ],
)
def test_the_sooner_way_is_chosen(link: float | None, gather: float | None, expected: bool) -> None:
    assert chooses_gather(profile(link, gather), SHAPE, NONE_RESIDENT, CARD, 2) is expected


def test_what_every_card_holds_whole_is_not_gathered() -> None:
    assert not chooses_gather(profile(50e9, 400e9), SHAPE, Policy(), replace(CARD, device=100 * GB), 2)
    assert not chooses_gather(None, SHAPE, Policy(), replace(CARD, device=100 * GB), 2)


def test_where_one_way_alone_fits_it_is_taken() -> None:
    """All of 60 GB on the cards fits two of 40 GB in parts; two layers in transit fit a small card, and not three."""
    whole, card = Policy(weights=Share(gpu=100, cpu=0)), replace(CARD, device=40 * GB)
    assert chooses_gather(profile(50e9, 1e9), SHAPE, whole, card, 2)
    assert not chooses_gather(profile(50e9, 400e9), SHAPE, NONE_RESIDENT, replace(CARD, device=int(2.9 * GB)), 2)


def test_what_is_said_or_ruled_out_is_not_chosen_anew() -> None:
    """Rates under which gathering takes longer decide only what the policy leaves open, of cards that could gather."""
    slow, two = profile(50e9, 24e9), Sharing(count=2, gather=True)
    found = Resources(memory=CARD, sharing=two)
    assert sharing_of(NONE_RESIDENT, found, SHAPE, slow) == Sharing(count=2)
    assert sharing_of(replace(NONE_RESIDENT, gather_weights=True), found, SHAPE, slow) == two
    assert sharing_of(NONE_RESIDENT, found, SHAPE, None) == two
    fast, unlike = profile(50e9, 400e9), Resources(memory=CARD, sharing=Sharing(count=2))
    assert sharing_of(NONE_RESIDENT, unlike, SHAPE, fast) == Sharing(count=2)
    assert sharing_of(NONE_RESIDENT, Resources(memory=CARD), SHAPE, fast) == ALONE
