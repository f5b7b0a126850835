"""Protects: a result depends neither on company, nor on order, nor on placement, sizes, overlap, sharing or padding."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import parity
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from watch import Watch

from engine import Completion, Engine, Job, Sampling

POLICIES: dict[str, dict[str, Any]] = {
    "one at a time": {"gpu-batch-size": 1, "num-gpu-batches": 1},
    "small micro-batches": {"gpu-batch-size": 2, "num-gpu-batches": 2, "percent": [20, 80, 0, 100, 0, 100]},
    "thirds": {"percent": [34, 33, 34, 33, 34, 33], "gpu-batch-size": 3},
    "disk": {"percent": [0, 0, 0, 0, 0, 0]},
    "serial": {"percent": [50, 50, 50, 50, 50, 50], "overlap": False, "pin-weight": False},
    "unshared": {"share-prefix": False},
    "attention on the host": {"percent": [0, 100, 0, 100, 0, 100], "cpu-cache-compute": True},
    "bucket": {"pad-to-seq-len": "bucket", "gpu-batch-size": 4},
    "fixed": {"pad-to-seq-len": 96, "percent": [50, 0, 50, 0, 50, 0]},
}
Open = Callable[..., Engine]


@pytest.fixture(scope="module")
def open_engine(build: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Engines by policy, each opened once."""
    opened: dict[tuple[str, str], Engine] = {}
    offload = tmp_path_factory.mktemp("offload")

    def of(policy: str, family: str = "llama") -> Engine:
        if (policy, family) not in opened:
            mapping = {"device": "cpu", "offload-dir": str(offload), **POLICIES[policy]}
            opened[policy, family] = Engine.from_pretrained(str(build(family)), policy=mapping)
        return opened[policy, family]

    yield of
    for engine in opened.values():
        engine.close()


def assert_same(found: Completion, expected: Completion, family: str = "llama") -> None:
    """Equal but for rounding."""
    near = parity.near(family)
    assert found.error is None
    assert expected.error is None
    assert found.tokens == expected.tokens
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason
    assert found.logprobs == pytest.approx(expected.logprobs, abs=near, rel=0)
    assert (found.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    if found.prompt_logprobs and expected.prompt_logprobs:
        assert found.prompt_logprobs[0] is expected.prompt_logprobs[0] is None
        assert found.prompt_logprobs[1:] == pytest.approx(expected.prompt_logprobs[1:], abs=near, rel=0)
    assert found.prompt_greedy == expected.prompt_greedy


def words(seed: int, count: int) -> list[int]:
    """Random token ids, the same for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(3, models.VOCABULARY) for _ in range(count)]


PREFIXES = [[], words(100, 18), words(100, 18) + words(101, 17), words(102, 40), words(102, 25)]

samplings = st.one_of(
    st.just(Sampling()),
    st.builds(
        Sampling,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        top_k=st.sampled_from([None, 1, 5, 1000]),
        top_p=st.sampled_from([1.0, 0.9, 0.3]),
        seed=st.integers(0, 5),
        presence_penalty=st.sampled_from([0.0, 1.5]),
        frequency_penalty=st.sampled_from([0.0, -0.5, 2.0]),
    ),
)


@st.composite
def random_jobs(draw: st.DrawFn) -> Job:
    prompt = draw(st.sampled_from(PREFIXES)) + words(draw(st.integers(0, 9)), draw(st.integers(1, 12)))
    count = draw(st.sampled_from([0, 1, 2, 5, 9]))
    stops: st.SearchStrategy[str | list[int]] = st.sampled_from(["1", "re", " 3", [draw(st.integers(3, 499))], "\n"])
    return Job(
        prompt=prompt,
        max_new_tokens=count,
        prompt_logprobs=count == 0 or draw(st.booleans()),
        sampling=draw(samplings),
        stop=draw(st.lists(stops, max_size=2)),
    )


LATER = [*parity.LATER, pytest.param("mamba2", marks=pytest.mark.slow)]


@pytest.mark.parametrize("family", ["llama", "gemma2", *LATER])
@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_company_and_order_and_policy_do_not_matter(family: str, data: st.DataObject, open_engine: Open) -> None:
    jobs = data.draw(st.lists(random_jobs(), min_size=1, max_size=8))
    alone = [open_engine("one at a time", family).run([job])[0] for job in jobs]
    policies = data.draw(st.lists(st.sampled_from(sorted(POLICIES)), min_size=2, max_size=2, unique=True))
    order = data.draw(st.permutations(range(len(jobs))))
    for policy in policies:
        together = open_engine(policy, family).run([jobs[index] for index in order])
        for index, completion in zip(order, together, strict=True):
            assert_same(completion, alone[index], family)


@pytest.mark.parametrize("family", ["llama", "bloom", *LATER])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_gives_what_running_alone_gives(policy: str, family: str, open_engine: Open) -> None:
    rng = random.Random(7)
    jobs = [
        Job(
            prompt=rng.choice(PREFIXES) + words(index, rng.randrange(1, 12)),
            max_new_tokens=rng.choice([1, 4, 12]),
            prompt_logprobs=index % 3 == 0,
            sampling=Sampling(temperature=index % 2, seed=index),
        )
        for index in range(12)
    ]
    alone = [open_engine("one at a time", family).run([job])[0] for job in jobs]
    for found, expected in zip(open_engine(policy, family).run(jobs), alone, strict=True):
        assert_same(found, expected, family)


@pytest.mark.parametrize("family", ["llama", *LATER])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("policy", ["thirds", "unshared", "bucket"])
def test_joining_a_running_sweep_does_not_matter(policy: str, scored: bool, family: str, open_engine: Open) -> None:
    """A call that arrives while another runs continues its prefixes, and both get what they get alone."""
    early = [Job(prompt=PREFIXES[2] + words(i, 5), max_new_tokens=30, prompt_logprobs=scored) for i in range(3)]
    late = [Job(prompt=PREFIXES[2] + words(i, 7), max_new_tokens=6, prompt_logprobs=i == 9) for i in range(7, 10)]
    alone = [open_engine("one at a time", family).run([job])[0] for job in (*early, *late)]
    engine = open_engine(policy, family)
    for _ in range(2):
        first = engine.stream([*early, Job(prompt=[5], max_new_tokens=1)])
        done = dict([next(first)])
        assert done.keys() <= {0, 3}  # what ends with the first sweep; so the others run now
        joined = engine.run(late)
        done |= first
        for one, expected in zip([*(done[at] for at in range(3)), *joined], alone, strict=True):
            assert_same(one, expected, family)


def test_one_seed_gives_one_sample_and_none_gives_many(open_engine: Open) -> None:
    engine = open_engine("thirds")

    def jobs(seed: int | None) -> list[Job]:
        sampling = Sampling(temperature=1.0, seed=seed)
        return [Job(prompt=words(0, 10), max_new_tokens=12, sampling=sampling) for _ in range(6)]

    seeded = engine.run(jobs(3))
    assert len({completion.tokens for completion in seeded}) == 1
    assert seeded[0].tokens == engine.run(jobs(3)[:1])[0].tokens
    assert seeded[0].tokens != engine.run(jobs(4)[:1])[0].tokens
    assert len({completion.tokens for completion in engine.run(jobs(None))}) == 6


def test_threads_are_served_together(open_engine: Open) -> None:
    engine = open_engine("small micro-batches")
    sets = [
        [
            Job(prompt=PREFIXES[1] + words(10 * number + i, 4), max_new_tokens=1 + i, prompt_logprobs=True)
            for i in range(4)
        ]
        for number in range(6)
    ]
    alone = [[open_engine("one at a time").run([job])[0] for job in jobs] for jobs in sets]
    found: dict[int, list[Completion]] = {}
    gate = threading.Barrier(len(sets))

    def call(number: int) -> None:
        gate.wait()
        found[number] = engine.run(sets[number])

    threads = [threading.Thread(target=call, args=(number,)) for number in range(len(sets))]
    watch, before = Watch(engine), engine.num_sweeps
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    for number, completions in enumerate(alone):
        for one, expected in zip(found[number], completions, strict=True):
            assert_same(one, expected)
    # 24 jobs of 60 steps in all, four at a time: far fewer sweeps than one call after the other would need.
    assert engine.num_sweeps - before < 6 * 4
    assert max(len(sizes) for sizes in watch.batches.values()) >= 2
