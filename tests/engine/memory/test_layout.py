"""Protects: a unit of parameters is cut over the tiers by the percents, to 1 % of a layer, and nothing is lost."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.memory.layout import ALIGNMENT, align, lay_out, split_bytes, streamed_from
from engine.memory.tiers import TIERS
from engine.policy import Share

parts = st.integers(0, 100).flatmap(lambda gpu: st.tuples(st.just(gpu), st.integers(0, 100 - gpu)))
shares = parts.map(lambda two: Share(gpu=two[0], cpu=two[1], disk=100 - two[0] - two[1]))


@given(num_bytes=st.integers(0, 10**10), share=shares, row_bytes=st.sampled_from([ALIGNMENT, 128, 1536, 14336]))
def test_parts_are_the_whole_and_follow_the_percents(num_bytes: int, share: Share, row_bytes: int) -> None:
    num_bytes -= num_bytes % row_bytes
    split = split_bytes(num_bytes, share, row_bytes)
    assert split.device + split.host + split.disk == split.num_bytes == num_bytes
    for held, percent in ((split.device, share.gpu), (split.host, share.cpu), (split.disk, share.disk)):
        assert held >= 0
        assert abs(held - num_bytes * percent / 100) <= row_bytes
        assert held % row_bytes == 0
        if percent == 0:
            assert held == 0
    named = split.parts()
    assert [tier for tier, _, _ in named] == list(TIERS)
    assert named[0][1] == 0
    assert named[-1][2] == num_bytes
    assert all(left[2] == right[1] for left, right in pairwise(named))


@given(num_bytes=st.integers(1, 10**6), share=shares)
def test_a_size_that_is_no_multiple_of_a_row_is_covered_too(num_bytes: int, share: Share) -> None:
    split = split_bytes(num_bytes, share)
    assert min(split.device, split.host, split.disk) >= 0
    assert split.num_bytes == num_bytes
    for held, percent in ((split.device, share.gpu), (split.host, share.cpu), (split.disk, share.disk)):
        assert percent > 0 or held == 0


@given(
    layer_bytes=st.integers(10**6, 3 * 10**9),
    share=st.tuples(st.floats(0, 100), st.floats(0, 1)).map(
        lambda two: Share(gpu=two[0], cpu=(100 - two[0]) * two[1], disk=(100 - two[0]) * (1 - two[1]))
    ),
)
def test_a_realistic_layer_follows_to_one_percent(layer_bytes: int, share: Share) -> None:
    split = split_bytes(layer_bytes, share)
    for held, percent in ((split.device, share.gpu), (split.host, share.cpu), (split.disk, share.disk)):
        assert abs(held - layer_bytes * percent / 100) <= layer_bytes / 100


@given(sizes=st.dictionaries(st.text(min_size=1), st.integers(1, 5000), max_size=12), share=shares)
def test_parameters_lie_aligned_one_behind_the_other(sizes: dict[str, int], share: Share) -> None:
    extents, num_bytes = lay_out(sizes)
    assert [extent.name for extent in extents] == list(sizes)
    end = 0
    for extent in extents:
        assert extent.first % ALIGNMENT == 0
        assert extent.first == align(end)
        assert extent.end - extent.first == sizes[extent.name]
        end = extent.end
    assert num_bytes == align(end)
    split = split_bytes(num_bytes, share)
    start = streamed_from(extents, split)
    for extent in extents:  # a parameter is either wholly on the device, or brought there wholly
        assert extent.end <= split.device or extent.first >= start
    assert start <= split.device or split.device == start == num_bytes or not extents
