"""Protects: tokens are drawn from the distribution that temperature, top-k, top-p and penalties define."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine import Sampling
from engine.sampling import choose

DRAWS = 2000
LOGITS = [math.log(weight) for weight in (0.05, 0.40, 0.15, 0.02, 0.25, 0.01, 0.12)]


def draw(sampling: Sampling, logits: Sequence[float] = LOGITS, generated: Sequence[int] = ()) -> Counter[int]:
    """How often each token is chosen, in one call of many rows."""
    rng = random.Random(7)
    rows = torch.tensor(logits).repeat(DRAWS, 1)
    draws = [rng.random() for _ in range(DRAWS)]
    return Counter(choose(rows, [sampling] * DRAWS, draws, [list(generated)] * DRAWS).tolist())


def assert_drawn_from(found: Counter[int], weights: dict[int, float]) -> None:
    """Chi-square test, p > 0.001, of counts against weights (which need not sum to one)."""
    assert set(found) == set(weights)
    if len(weights) == 1:
        return
    total, count = sum(weights.values()), sum(found.values())
    expected = {token: count * weight / total for token, weight in weights.items()}
    assert min(expected.values()) > 5
    statistic = sum((found[token] - mean) ** 2 / mean for token, mean in expected.items())
    halves = torch.tensor([(len(weights) - 1) / 2, statistic / 2], dtype=torch.float64)
    assert torch.special.gammaincc(*halves).item() > 0.001


def test_temperature_one_is_the_distribution_itself() -> None:
    assert_drawn_from(draw(Sampling(temperature=1.0)), dict(enumerate(math.exp(logit) for logit in LOGITS)))


@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_temperature(temperature: float) -> None:
    found = draw(Sampling(temperature=temperature))
    weights = dict(enumerate(math.exp(logit) ** (1 / temperature) for logit in LOGITS))
    if temperature < 1:
        weights.pop(5)  # fewer than five expected
        found.pop(5, None)
    assert_drawn_from(found, weights)


def test_top_k_keeps_the_most_likely() -> None:
    assert_drawn_from(draw(Sampling(temperature=1.0, top_k=3)), {1: 0.40, 4: 0.25, 2: 0.15})
    assert set(draw(Sampling(temperature=5.0, top_k=1))) == {1}
    assert len(draw(Sampling(temperature=5.0, top_k=1000))) == len(LOGITS)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (0.39, {1: 0.40}),
        (0.41, {1: 0.40, 4: 0.25}),  # the token that crosses the border is in
        (0.70, {1: 0.40, 4: 0.25, 2: 0.15}),
        (0.91, {1: 0.40, 4: 0.25, 2: 0.15, 6: 0.12}),
        (1e-9, {1: 0.40}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: dict[int, float]) -> None:
    assert_drawn_from(draw(Sampling(temperature=1.0, top_p=top_p)), kept)


def test_temperature_comes_before_top_p_and_top_k_before_both_sums() -> None:
    # At temperature 0.5 weights are squared: 0.16, 0.0625, 0.0225, 0.0144, …; of the first three, 0.66 is the first.
    assert_drawn_from(draw(Sampling(temperature=0.5, top_k=3, top_p=0.66)), {1: 0.16, 4: 0.0625})
    assert_drawn_from(draw(Sampling(temperature=0.5, top_k=3, top_p=0.65)), {1: 0.16})


def test_penalties_are_openais() -> None:
    sampling = Sampling(temperature=1.0, presence_penalty=0.5, frequency_penalty=0.25)
    weights = dict(enumerate(math.exp(logit) for logit in LOGITS))
    weights[1] *= math.exp(-0.5 - 3 * 0.25)
    weights[2] *= math.exp(-0.5 - 1 * 0.25)
    assert_drawn_from(draw(sampling, generated=[1, 2, 1, 1]), weights)
    assert_drawn_from(draw(sampling), dict(enumerate(math.exp(logit) for logit in LOGITS)))


def test_penalties_move_the_greedy_choice() -> None:
    rows = torch.tensor([[2.0, 1.9, 1.0]] * 4)
    before = rows.clone()
    samplings = [
        Sampling(presence_penalty=0.05),
        Sampling(presence_penalty=0.2),
        Sampling(frequency_penalty=0.06),
        Sampling(frequency_penalty=-1.0),
    ]
    chosen = choose(rows, samplings, [0.5] * 4, [[0], [0], [0, 0], [1]])
    assert chosen.tolist() == [0, 1, 1, 1]
    assert torch.equal(rows, before)  # log-probabilities come from the unmodified logits


def test_temperature_zero_is_greedy_whatever_else_is_set() -> None:
    assert draw(Sampling(temperature=0.0, top_k=3, top_p=0.5, seed=3)) == {1: DRAWS}


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 5e-324])
def test_the_lowest_temperatures_are_greedy(temperature: float) -> None:
    assert draw(Sampling(temperature=temperature), [-30.0, 80.0, 79.0, 0.0]) == {1: DRAWS}


@pytest.mark.parametrize("rows_at_once", [1, 3, 40])
def test_a_row_does_not_depend_on_the_rows_beside_it(rows_at_once: int) -> None:
    rng, generator = random.Random(3), torch.Generator().manual_seed(3)
    rows = torch.randn(40, 50, generator=generator) * 3
    samplings = [
        Sampling(temperature=rng.choice([0.0, 0.5, 1.5]), top_k=rng.choice([None, 4]), top_p=rng.choice([1.0, 0.8]))
        for _ in range(40)
    ]
    draws = [rng.random() for _ in range(40)]
    together = choose(rows, samplings, draws, [[]] * 40, most_bytes=rows_at_once * 50 * 64).tolist()
    alone = [choose(rows[i : i + 1], [samplings[i]], [draws[i]], [[]]).item() for i in range(40)]
    assert together == alone


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53])
def test_every_draw_falls_on_a_kept_token(point: float) -> None:
    rows = torch.tensor([[0.0, -1e4, 0.0, -1e4, 0.0]])
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_k=2),
        Sampling(temperature=1.0, top_p=0.5),
    ):
        assert choose(rows, [sampling], [point], [[]]).item() in (0, 2, 4)


def test_a_row_that_is_not_finite_leaves_the_others_alone() -> None:
    rows = torch.tensor([LOGITS, [math.nan] * 7, [math.inf] * 7, LOGITS])
    chosen = choose(rows, [Sampling(temperature=1.0)] * 4, [0.5] * 4, [[]] * 4).tolist()
    assert chosen[0] == chosen[3] == choose(rows[:1], [Sampling(temperature=1.0)], [0.5], [[]]).item()
    assert all(0 <= token < 7 for token in chosen)


def test_a_draw_is_a_quantile_in_the_order_of_ids() -> None:
    rows = torch.tensor(LOGITS).repeat(5, 1)
    chosen = choose(rows, [Sampling(temperature=1.0)] * 5, [0.0, 0.049, 0.051, 0.46, 0.999], [[]] * 5)
    assert chosen.tolist() == [0, 0, 1, 2, 6]
    cut = choose(rows, [Sampling(temperature=1.0, top_k=3)] * 5, [0.0, 0.49, 0.51, 0.68, 0.7], [[]] * 5)
    assert cut.tolist() == [1, 1, 2, 2, 4]  # 0.40, 0.15 and 0.25 of 0.80


@pytest.mark.parametrize("vocabulary", [511, 512, 5000])
def test_quantiles_of_large_vocabularies_are_numpys(vocabulary: int) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (40, vocabulary)).astype(np.float32)
    draws = np.random.default_rng(1).random(40)
    sums = np.exp(logits.astype(np.float64)).cumsum(axis=-1)
    expected = [int(np.searchsorted(row, draw * row[-1], "right")) for row, draw in zip(sums, draws, strict=True)]
    sampling = [Sampling(temperature=1.0)] * 40
    assert choose(torch.from_numpy(logits), sampling, draws.tolist(), [[]] * 40).tolist() == expected
