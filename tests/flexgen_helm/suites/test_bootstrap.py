"""Protects: what counts as a change of a score, against scipy, hand-computed values and chance itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.suites.bootstrap import (
    Mean,
    compare_scores,
    holm,
    is_rounding,
    num_samples,
    whole_score_p_value,
)

scipy_stats = pytest.importorskip("scipy.stats")  # HELM brings it

Sums = dict[str, tuple[float, float]]


def sums(values: object) -> Sums:
    return {f"id{at}": (float(value), 1.0) for at, value in enumerate(np.asarray(values))}


def compared(before: object, after: object, confidence: float = 0.95, samples: int = 20_000, name: str = "run"):  # type: ignore[no-untyped-def]
    return compare_scores(sums(before), sums(after), name=name, confidence=confidence, samples=samples)


@pytest.fixture
def answers() -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers of 200 questions, twice: 20 questions differ, 15 of them for the worse."""
    before = np.array([1.0] * 120 + [0.0] * 80)
    after = before.copy()
    after[:15] = 0
    after[120:125] = 1
    return before, after


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_paired_interval_is_scipys(answers: tuple[np.ndarray, np.ndarray], confidence: float) -> None:
    before, after = answers
    found = compared(before, after, confidence)
    oracle = scipy_stats.bootstrap(
        (after - before,), np.mean, n_resamples=20_000, confidence_level=confidence, method="percentile", rng=1
    ).confidence_interval
    assert found.is_paired
    assert found.num_changed == 20
    assert found.difference == pytest.approx(-0.05)
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.0051)  # one answer of 200


def test_the_unpaired_interval_is_scipys() -> None:
    generator = np.random.default_rng(5)
    before, after = generator.normal(3, 1, 80), generator.normal(3.4, 2, 50)
    found = compared(before, after)
    oracle = scipy_stats.bootstrap(
        (before, after), lambda x, y, axis: np.mean(y, axis) - np.mean(x, axis), n_resamples=20_000,
        method="percentile", rng=1,
    ).confidence_interval  # fmt: skip
    assert not found.is_paired
    assert found.difference == pytest.approx(after.mean() - before.mean())
    assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=0.02)


def test_the_p_value_is_the_share_of_resamples_on_the_other_side(answers: tuple[np.ndarray, np.ndarray]) -> None:
    before, after = answers
    generator = np.random.default_rng(0)
    drawn = generator.choice(after - before, size=(20_000, 200)).mean(axis=1)
    assert compared(before, after).p_value == pytest.approx(2 * np.mean(drawn >= -1e-12), rel=0.15)


def test_a_ratio_of_sums_is_resampled_as_one() -> None:
    """Bits per byte: documents of different length, one of which became worse."""
    generator = np.random.default_rng(2)
    size = generator.integers(50, 500, 40).astype(float)
    before = size * generator.normal(1.0, 0.1, 40)
    after = before + size * 0.02 * generator.normal(1.0, 0.5, 40)
    found = compare_scores(
        {str(n): (before[n], size[n]) for n in range(40)},
        {str(n): (after[n], size[n]) for n in range(40)},
        name="run",
        confidence=0.95,
        samples=10_000,
    )
    rows = generator.integers(0, 40, (10_000, 40))
    drawn = after[rows].sum(1) / size[rows].sum(1) - before[rows].sum(1) / size[rows].sum(1)
    assert found.difference == pytest.approx(after.sum() / size.sum() - before.sum() / size.sum())
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=5e-4)
    exponential = compare_scores(
        {"a": (2.0, 1.0)}, {"a": (3.0, 1.0)}, name="run", confidence=0.95, samples=10, is_exponential=True
    )
    assert exponential.difference == pytest.approx(math.e**3 - math.e**2)
    assert (exponential.low, exponential.high) == pytest.approx((exponential.difference,) * 2)


def test_equal_scores_have_not_changed() -> None:
    found = compared([0.3, 0.4, 0.9], [0.3, 0.4, 0.9])
    assert (found.difference, found.low, found.high, found.p_value, found.num_changed) == (0.0, 0.0, 0.0, 1.0, 0)


@pytest.mark.parametrize("changed", [1, 2, 5, 9])
def test_few_instances_prove_no_more_than_a_sign_test(changed: int) -> None:
    """All that changed became worse; the bootstrap alone would be sure after three."""
    after = [0.0] * changed + [1.0] * (20 - changed)
    oracle = scipy_stats.binomtest(changed, changed).pvalue
    assert compared([1.0] * 20, after).p_value >= oracle
    assert compared([1.0] * changed, [0.0] * changed).p_value == pytest.approx(oracle)


def test_few_unpaired_instances_prove_no_more_than_a_permutation_test() -> None:
    oracle = scipy_stats.permutation_test(
        ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]), lambda x, y: np.mean(x) - np.mean(y), n_resamples=np.inf
    ).pvalue
    assert compared([1.0] * 3, [0.0] * 4).p_value == pytest.approx(oracle)


def test_a_result_depends_on_its_run_alone(answers: tuple[np.ndarray, np.ndarray]) -> None:
    before, after = answers
    one = compare_scores(sums(before), sums(after), name="run", confidence=0.95, samples=10_000)
    shuffled = dict(sorted(sums(after).items(), key=lambda each: each[0][::-1]))
    again = compare_scores(sums(before), shuffled, name="run", confidence=0.95, samples=10_000)
    assert (one.p_value, one.low, one.high) == (again.p_value, again.low, again.high)


def test_holms_correction_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.randoms())
def test_holms_correction_lies_between_none_and_bonferronis(p_values: list[float], random: object) -> None:
    adjusted = holm(p_values)
    for p_value, one in zip(p_values, adjusted, strict=True):
        assert p_value <= one <= min(1.0, len(p_values) * p_value)
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    assert [adjusted[at] for at in order] == sorted(adjusted)
    assert min(adjusted) == min(1.0, len(p_values) * min(p_values))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=40))
def test_the_other_way_round_it_is_the_opposite(pairs: list[tuple[float, float]]) -> None:
    before, after = zip(*pairs, strict=True)
    there, back = (compared(*each, samples=4000) for each in ((before, after), (after, before)))
    assert there.difference == pytest.approx(-back.difference)
    assert there.p_value == pytest.approx(back.p_value, abs=0.12)  # drawn anew
    assert 0 < there.p_value <= 1
    assert there.low <= there.high


def test_chance_alone_seldom_fails_a_suite() -> None:
    """57 runs whose answers flip by chance, ten nights: at 95 % one night in twenty may be wrong."""
    generator = np.random.default_rng(7)
    alarms = 0
    for night in range(10):
        p_values = []
        for run in range(57):
            before = (generator.uniform(size=120) < 0.4).astype(float)
            flipped = generator.uniform(size=120) < 0.1
            after = np.where(flipped, generator.permutation(before), before)
            noise = compared(before, after, samples=num_samples(57, 0.95), name=f"{night} {run}")
            p_values.append(noise.p_value)
        alarms += min(holm(p_values)) < 0.05
    assert alarms <= 1


def test_a_real_loss_is_found_among_57_runs() -> None:
    before = np.array([1.0] * 60 + [0.0] * 60)
    after = before.copy()
    after[:25] = 0.0
    noise = compared(before, after, samples=num_samples(57, 0.95))
    assert holm([noise.p_value, *[1.0] * 56])[0] < 0.05


def test_small_losses_everywhere_show_in_the_mean() -> None:
    mean, alone = Mean(), []
    for run in range(20):
        before = np.array([1.0] * 50 + [0.0] * 50)
        after = before.copy()
        after[:2] = 0.0
        noise = compared(before, after, name=str(run), samples=10_000)
        alone.append(noise.p_value)
        mean.add(noise)
    together = mean.noise(0.95)
    assert min(holm(alone)) == 1.0
    assert together.p_value < 0.001
    assert together.difference == pytest.approx(-0.02)
    assert together.num_changed == 40
    # 20 scores, each the mean of 100 independent answers of which 2 % are lost
    assert together.high - together.low == pytest.approx(2 * 1.96 * math.sqrt(0.02 * 0.98 / 100 / 20), rel=0.1)


def test_a_score_without_instances_is_compared_as_shares_are() -> None:
    deviation = math.sqrt(0.25 / 100 + 0.25 / 50)
    assert whole_score_p_value(-0.1, 100, 50) == pytest.approx(2 * scipy_stats.norm.sf(0.1 / deviation))
    assert whole_score_p_value(0.0, 100, 50) == 1.0
    assert whole_score_p_value(0.1, 0, 0) == 0.0
    assert whole_score_p_value(0.0, 0, 0) == 1.0


def test_rounding_is_no_change() -> None:
    assert is_rounding(0.5, 0.5001 - 1e-12)
    assert not is_rounding(0.5, 0.5002)
    assert is_rounding(500.0, 500.04)
    assert not is_rounding(0.0, -0.001)


def test_more_scores_take_more_samples() -> None:
    assert num_samples(1, 0.95) == 10_000
    assert num_samples(57, 0.95) > 57 / 0.05 * 2  # so that the smallest p-value can be below alpha / 57
    assert num_samples(10**6, 0.95) == 50_000
