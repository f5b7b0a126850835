"""Protects: `generate` takes and gives what `transformers`' does, and a coroutine gets what `stream` gives."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from engine import Engine, EngineError, Generation, Job, Sampling
from engine.errors import JobError

PAD = 7
ROW = st.lists(st.integers(3, models.VOCABULARY - 1), min_size=1, max_size=12)


@pytest.fixture(scope="module", params=["opt", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(build: Callable[[str], Path], family: str) -> Iterator[Engine]:
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu"}) as engine:
        yield engine


@pytest.fixture(scope="module")
def model(reference: Callable[[str], PreTrainedModel], family: str) -> PreTrainedModel:
    return reference(family)


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[PAD] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=1, max_size=4), new=st.integers(1, 8), end=st.integers(0, 30))
def test_greedy_rows_equal_transformers(
    engine: Engine, model: PreTrainedModel, rows: list[list[int]], new: int, end: int
) -> None:
    """Left-padded batches, a token that comes as end-of-text: the same tensor, end-of-text and padding included."""
    ids, mask = left_padded(rows)
    plain: Any = model
    alike = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False, "pad_token_id": PAD}
    free = plain.generate(ids, **alike, eos_token_id=-1)
    eos = int(free.flatten()[-1 - end % free.numel()])
    kept = engine.parts
    try:
        engine._loop._parts = replace(kept, text=replace(kept.text, end_of_text=frozenset([eos])))
        ours = engine.generate(ids, mask, max_new_tokens=new, pad_token_id=PAD)
    finally:
        engine._loop._parts = kept
    theirs = plain.generate(ids, **alike, eos_token_id=eos)
    assert ours.dtype == theirs.dtype
    assert ours.tolist() == theirs.tolist()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(ROW, min_size=1, max_size=4), new=st.integers(1, 4))
def test_every_form_of_the_same_prompts_gives_the_same(engine: Engine, rows: list[list[int]], new: int) -> None:
    """Ragged lists, arrays, tuples of arrays, padding on either side."""
    ragged = engine.generate(rows, max_new_tokens=new, return_dict=True)
    ids, mask = left_padded(rows)
    right = torch.tensor([row + [PAD] * (ids.shape[1] - len(row)) for row in rows])
    for given_ids, given_mask in (
        (ids, mask),
        (ids.numpy().astype(np.int32), mask.numpy().astype(bool)),
        (ids, mask.bool()),
        (ids, mask.float()),
        (ids.tolist(), mask.tolist()),
        (right, mask.flip(1)),
        (tuple(np.array(row) for row in rows), None),
    ):
        done = engine.generate(given_ids, given_mask, max_new_tokens=new, return_dict=True)
        assert [c.tokens for c in done.completions] == [c.tokens for c in ragged.completions]
        assert [c.end_token for c in done.completions] == [c.end_token for c in ragged.completions]
    for row, sequence, done_row in zip(rows, ragged.sequences.tolist(), ragged.completions, strict=True):
        assert sequence[: len(row) + len(done_row.tokens)] == [*row, *done_row.tokens]


def test_defaults_and_padding_are_the_model_s(engine: Engine, model: PreTrainedModel) -> None:
    """Twenty tokens at most; rows that end early are filled with the model's own padding."""
    plain: Any = model
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    ours = engine.generate(ids)
    eos = int(plain.generate(ids, do_sample=False, max_new_tokens=3, eos_token_id=-1)[0, -1])
    kept = engine.parts
    try:
        engine._loop._parts = replace(kept, text=replace(kept.text, end_of_text=frozenset([eos])))
        ours = engine.generate(ids)
    finally:
        engine._loop._parts = kept
    pad = plain.generation_config.pad_token_id
    theirs = plain.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=eos, pad_token_id=pad)
    assert ours.tolist() == theirs.tolist()


def test_one_prompt_and_none(engine: Engine) -> None:
    one = engine.generate([5, 6, 7], max_new_tokens=3)
    assert one.tolist() == engine.generate([[5, 6, 7]], max_new_tokens=3).tolist()
    assert engine.generate([], max_new_tokens=3).shape == (0, 0)


def test_samples_have_their_own_seeds_and_stay_among_the_likely(engine: Engine, model: PreTrainedModel) -> None:
    many = engine.generate(
        [[5, 6, 7], [8, 9]], do_sample=True, top_k=3, num_return_sequences=40, max_new_tokens=1, seed=11
    )
    assert many.shape[0] == 80
    again = engine.generate(
        [[5, 6, 7], [8, 9]], do_sample=True, top_k=3, num_return_sequences=40, max_new_tokens=1, seed=11
    )
    assert many.tolist() == again.tolist()
    for prompt, rows in (([5, 6, 7], many[:40]), ([8, 9], many[40:])):
        with torch.no_grad():
            likely = set(model(torch.tensor([prompt])).logits[0, -1].topk(3).indices.tolist())
        chosen = [row[len(prompt)] for row in rows.tolist()]
        assert set(chosen) <= likely
        assert len(set(chosen)) > 1
    assert engine.generate([[5, 6]], do_sample=True, top_k=1).tolist() == engine.generate([[5, 6]]).tolist()
    assert engine.generate([[5, 6]], do_sample=True, top_p=1e-9).tolist() == engine.generate([[5, 6]]).tolist()


def test_stops_fire(engine: Engine) -> None:
    """A row ends before its stop, a string or ids; the completion says so."""
    free = engine.generate([[5, 6, 7]], max_new_tokens=12, return_dict=True)
    tokens, text = free.completions[0].tokens, free.completions[0].text
    stop = text[len(text) // 2 :][:2]
    by_text = engine.generate([[5, 6, 7]], max_new_tokens=12, stop=stop, return_dict=True)
    assert isinstance(by_text, Generation)
    assert by_text.completions[0].text == text[: text.index(stop)]
    assert by_text.completions[0].finish_reason == "stop"
    ids = list(tokens[4:6])
    first = next(i for i in range(len(tokens)) if list(tokens[i : i + 2]) == ids)
    assert engine.generate([[5, 6, 7]], max_new_tokens=12, stop=[ids]).tolist() == [[5, 6, 7, *tokens[:first]]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": "a text"}, "input_ids is a str; give token ids"),
        ({"input_ids": [[1, 2], "b"]}, "row 1 of input_ids is no list of token ids"),
        ({"input_ids": [[1, 2.5]]}, "row 0 of input_ids is no list of token ids"),
        ({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1]]}, "attention_mask has rows of 2 tokens and input_ids"),
        ({"input_ids": [[5, 6], [7]], "attention_mask": [[1, 1], [0]]}, "row 1 of input_ids: the prompt is empty"),
        ({"input_ids": [[5] * 200]}, "row 0 of input_ids: prompt of 200 tokens"),
        ({"input_ids": [[5]], "num_return_sequences": 0}, "num_return_sequences 0 is below 1"),
        ({"input_ids": [[5]], "do_sample": True, "temperature": 0.0}, "temperature 0.0 with do_sample"),
        ({"input_ids": [[5]], "do_sample": True, "top_p": 2.0}, "top_p 2.0 is outside"),
        ({"input_ids": [[5]], "num_return_sequences": 2.5}, "num_return_sequences 2.5"),
        ({"input_ids": [[5]], "max_new_tokens": 2.5}, "max_new_tokens 2.5 is no whole number"),
        ({"input_ids": [[5]], "max_new_tokens": None}, "max_new_tokens None is no whole number"),
        ({"input_ids": [[5]], "do_sample": True, "temperature": 10**400}, "temperature of more than 20 digits"),
        ({"input_ids": [[5]], "do_sample": True, "seed": "a"}, "seed a is no whole number"),
        ({"input_ids": [[5]], "stop": [5, 6]}, "stop 5 is neither a text nor a list of token ids"),
        ({"input_ids": [[5]], "pad_token_id": 10**30}, "is no token id"),
    ],
)
def test_bad_input_is_one_line(engine: Engine, arguments: dict[str, Any], message: str) -> None:
    before = engine.num_sweeps
    with pytest.raises(JobError) as caught:
        engine.generate(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.num_sweeps == before


@pytest.mark.parametrize(
    "job",
    [
        Job(prompt=[5.5, 6]),  # type: ignore[list-item]
        Job(prompt=[5], max_new_tokens=2.5),  # type: ignore[arg-type]
        Job(prompt=[5], sampling=Sampling(temperature=10**400)),
        Job(prompt=[5], sampling=Sampling(seed=1.5)),  # type: ignore[arg-type]
        Job(prompt=[5], stop=[5]),  # type: ignore[list-item]
    ],
)
def test_a_strange_job_fails_alone(engine: Engine, job: Job) -> None:
    done = engine.run([job, Job(prompt=[5, 6], max_new_tokens=2)])
    assert isinstance(done[0].error, JobError)
    assert done[1].error is None
    assert (
        engine.run([Job(prompt=[np.int64(5)], max_new_tokens=1, sampling=Sampling(seed=np.int64(3)))])[0].error is None
    )


def test_calls_of_bad_jobs_leave_nothing(engine: Engine) -> None:
    for _ in range(20):
        assert list(engine.stream([])) == []
        list(engine.stream([Job(prompt=[])]))
    assert engine._loop._abandoned == []


JOBS = [Job(prompt=list(range(5, 9 + i)), max_new_tokens=1 + i, sampling=Sampling(seed=i)) for i in range(6)]


def test_coroutines_get_what_stream_gives(engine: Engine) -> None:
    """Several at once in one loop, a bad job among the jobs."""

    async def collect(jobs: list[Job]) -> dict[int, Any]:
        return {index: done async for index, done in engine.astream(jobs)}

    async def both() -> list[dict[int, Any]]:
        return await asyncio.gather(collect([*JOBS, Job(prompt=[])]), collect(JOBS[::-1]))

    first, second = asyncio.run(both())
    expected = engine.run(JOBS)
    assert [first[i].tokens for i in range(6)] == [done.tokens for done in expected]
    assert isinstance(first[6].error, JobError)
    assert [second[i].tokens for i in range(6)] == [done.tokens for done in expected[::-1]]


def test_the_loop_runs_on_while_the_engine_computes(engine: Engine) -> None:
    async def main() -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        ticking = asyncio.create_task(tick())
        async for _ in engine.astream(JOBS):
            pass
        ticking.cancel()
        return ticks

    assert asyncio.run(main()) > 10


def test_a_cancelled_coroutine_drops_its_jobs(engine: Engine) -> None:
    """What was not awaited to the end is no longer computed, also when its loop is gone."""

    async def main() -> None:
        stream = engine.astream([*JOBS, Job(prompt=[5, 6], max_new_tokens=100)])
        async for _ in stream:
            break
        await stream.aclose()

    async def leave() -> None:
        async def endless() -> None:
            async for _ in engine.astream([Job(prompt=[5, 6], max_new_tokens=100)]):
                pass

        task = asyncio.create_task(endless())
        await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())
    asyncio.run(leave())
    assert engine.run(JOBS[:1])[0].error is None
    assert engine._loop.num_jobs == 0


def test_a_closed_engine_tells_the_coroutine(build: Callable[[str], Path]) -> None:
    engine = Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"})
    engine.close()

    async def main() -> None:
        async for _ in engine.astream(JOBS):
            pass

    with pytest.raises(EngineError, match="closed"):
        asyncio.run(main())
