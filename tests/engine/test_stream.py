"""Protects: completions come as their sweeps end, a closed stream frees what it held, and a bad job fails alone."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from safetensors.torch import load_file, save_file
from watch import Watch, cache_of

from engine import Engine, EngineError, Job, Sampling
from engine.errors import CapacityError, JobError, NumericsError
from engine.schedule.timing import SweepTiming
from engine.weights.portion import Portion
from engine.weights.slots import Slot, Slots

PREFIX = list(range(10, 40))


@pytest.fixture
def engine(build: Callable[[str], Path]) -> Iterator[Engine]:
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as engine:
        yield engine


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for what another thread does soon."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def within_seconds(call: Callable[[], Any], seconds: float = 20.0) -> Any:
    """What `call` returns or raises; fails if it does neither in time."""
    told: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def listen() -> None:
        try:
            told.put((call(), None))
        except BaseException as error:
            told.put((None, error))

    threading.Thread(target=listen, daemon=True).start()
    result, error = told.get(timeout=seconds)
    if error is not None:
        raise error
    return result


def assert_nothing_held(engine: Engine) -> None:
    """No sequence, prefix or block is left, and the free rows of the cache are in one piece."""
    scheduler, cache = engine.parts.lanes[0].scheduler, cache_of(engine)
    wait_until(lambda: scheduler.is_idle)
    assert set(cache.room.num_blocks.values()) == {0}
    assert scheduler._prefixes == []
    assert engine._loop.num_jobs == 0
    for extents in cache.room._free_rows.values():
        assert extents.num_free == extents.tail_free() == extents.capacity


def long_jobs(count: int = 6) -> list[Job]:
    return [Job(prompt=[*PREFIX, 50 + i], max_new_tokens=90) for i in range(count)]


def test_early_finishers_come_first_in_the_order_of_their_sweeps(engine: Engine) -> None:
    counts = [90, 1, 12, 0, 5]
    jobs = [Job(prompt=[*PREFIX, 7], max_new_tokens=count, prompt_logprobs=True) for count in counts]
    sweeps, order = [], []
    for index, completion in engine.stream(jobs):
        assert completion.finish_reason == "length"
        sweeps.append(engine.num_sweeps)
        order.append(index)
    assert sorted(order[:2]) == [1, 3]
    assert order[2:] == [4, 2, 0]
    assert sweeps[0] < 90 == engine.num_sweeps  # it did not wait for the last one


@pytest.mark.parametrize("policy", [{}, {"gpu-batch-size": 1, "num-gpu-batches": 2}])
def test_closing_a_stream_drops_its_jobs(policy: dict[str, Any], build: Callable[[str], Path]) -> None:
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu", **policy}) as engine:
        stream = engine.stream([*long_jobs(), Job(prompt=[3], max_new_tokens=1)])
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert_nothing_held(engine)
        assert engine.num_sweeps < 90


def test_a_stream_closed_before_its_first_result_drops_its_jobs(engine: Engine) -> None:
    engine.stream(long_jobs()).close()  # type: ignore[attr-defined]
    assert_nothing_held(engine)
    assert engine.num_sweeps < 90


def test_a_forgotten_stream_drops_its_jobs(engine: Engine) -> None:
    stream = engine.stream([*long_jobs(), Job(prompt=[3], max_new_tokens=1)])
    next(stream)
    del stream
    gc.collect()
    assert_nothing_held(engine)
    assert engine.num_sweeps < 90


def test_closing_one_stream_leaves_the_others(engine: Engine) -> None:
    alone = engine.run(long_jobs(2))
    kept, dropped = engine.stream(long_jobs(2)), engine.stream(long_jobs())
    dropped.close()  # type: ignore[attr-defined]
    assert [completion.tokens for _, completion in sorted(kept)] == [completion.tokens for completion in alone]
    assert_nothing_held(engine)


def test_nothing_is_held_after_runs(engine: Engine) -> None:
    for _ in range(2):
        engine.run([Job(prompt=[*PREFIX, 50 + i], max_new_tokens=i % 4 + 1) for i in range(12)])
        assert_nothing_held(engine)
    rows = {tier: extents.capacity for tier, extents in cache_of(engine).room._free_rows.items()}
    engine.run([Job(prompt=[*PREFIX, 50 + i], max_new_tokens=i % 4 + 1) for i in range(12)])
    assert rows == {tier: extents.capacity for tier, extents in cache_of(engine).room._free_rows.items()}


def test_a_sweep_begins_without_rows_of_the_one_before(tmp_path: Path) -> None:
    """They are known by their spans' ids, which come again; in a model of one layer no other layer drops them."""
    models.save_model(tmp_path / "model", "llama", num_hidden_layers=1)
    policy = {"device": "cpu", "percent": [100, 0, 0, 100, 100, 0], "gpu-batch-size": 100}
    with Engine.from_pretrained(str(tmp_path / "model"), policy=policy) as engine:
        watch = Watch(engine, lambda: len(cache_of(engine)._fresh))
        for first in (50, 60):
            engine.run([Job(prompt=[first, *PREFIX, 50 + i], max_new_tokens=2) for i in range(3)])
        assert len(watch.batches) > 2
        assert set(watch.seen) == {0}


def test_the_next_sweep_is_being_brought_when_one_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link has two layers to bring while the host makes answers of a sweep and puts the next one together."""
    brought: list[str] = []
    fetch = Slots.fetch

    def noted(slots: Slots, portion: Portion, slot: Slot) -> None:
        brought.append(portion.placed.unit.name)
        fetch(slots, portion, slot)

    monkeypatch.setattr(Slots, "fetch", noted)
    models.save_model(tmp_path / "model", "llama", num_hidden_layers=4)
    with Engine.from_pretrained(str(tmp_path / "model"), policy={"device": "cpu", "percent": [0, 100] * 3}) as engine:
        engine.run([Job(prompt=PREFIX, max_new_tokens=1)])
        assert brought[-3:] == ["head", "layer.0", "layer.1"]


def test_a_prefix_keeps_one_row_of_logprobs_and_not_the_chunk_around_it(engine: Engine) -> None:
    def rows() -> list[int]:
        kept = [prefix.next_logprobs for prefix in engine.parts.lanes[0].scheduler._prefixes]
        return [row.untyped_storage().nbytes() // 4 for row in kept if row is not None]

    watch = Watch(engine, rows)
    engine.run([Job(prompt=[*PREFIX, 50 + i], max_new_tokens=3, prompt_logprobs=True) for i in range(4)])
    assert watch.seen == [[], [models.VOCABULARY], [models.VOCABULARY]]


def test_a_slow_caller_misses_nothing(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = engine._loop.submit

    def submit_and_linger(call: Any) -> None:
        submit(call)
        wait_until(lambda: engine.num_sweeps > 0 and engine.parts.lanes[0].scheduler.is_idle)

    monkeypatch.setattr(engine._loop, "submit", submit_and_linger)
    assert [len(done.tokens) for done in engine.run([Job(prompt=[3, i + 3], max_new_tokens=2) for i in range(3)])]


def test_no_jobs_give_no_completions(engine: Engine) -> None:
    assert engine.run([]) == []


GOOD = [Job(prompt=PREFIX, max_new_tokens=4, prompt_logprobs=True), Job(prompt=[*PREFIX, 3], max_new_tokens=6)]
BAD = {
    "empty": (Job(prompt=[]), "empty"),
    "text": (Job(prompt="text"), "prompt is text"),  # type: ignore[arg-type]
    "too long": (Job(prompt=[3] * 200), r"200 tokens.*128"),
    "too long with its new tokens": (Job(prompt=[3] * 100, max_new_tokens=30), r"100 tokens.*30 new.*128"),
    "outside the vocabulary": (Job(prompt=[3, models.VOCABULARY]), r"token 500 .*vocabulary of 500"),
    "negative id": (Job(prompt=[-1]), r"token -1 .*vocabulary of 500"),
    "asks for nothing": (Job(prompt=[3], max_new_tokens=0), "requests nothing"),
    "negative count": (Job(prompt=[3], max_new_tokens=-1), "max_new_tokens -1"),
    "empty stop": (Job(prompt=[3], stop=[""]), "stop sequence is empty"),
    "top_p": (Job(prompt=[3], sampling=Sampling(top_p=0.0)), "top_p 0.0"),
    "top_k": (Job(prompt=[3], sampling=Sampling(top_k=0)), "top_k 0"),
    "temperature": (Job(prompt=[3], sampling=Sampling(temperature=-1.0)), "temperature -1.0"),
    "presence": (Job(prompt=[3], sampling=Sampling(presence_penalty=float("nan"))), "presence_penalty nan"),
    "frequency": (Job(prompt=[3], sampling=Sampling(frequency_penalty=float("-inf"))), "frequency_penalty -inf"),
    "not a temperature": (Job(prompt=[3], sampling=Sampling(temperature=float("nan"))), "temperature nan"),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_job_fails_alone(kind: str, engine: Engine) -> None:
    job, message = BAD[kind]
    expected = engine.run(GOOD)
    first, failed, second = engine.run([GOOD[0], job, GOOD[1]])
    assert isinstance(failed.error, JobError)
    assert failed.error.args
    assert "\n" not in str(failed.error)
    with pytest.raises(JobError, match=message):
        raise failed.error
    assert (failed.tokens, failed.text, failed.logprobs, failed.finish_reason) == ((), "", (), None)
    assert [first.tokens, second.tokens] == [completion.tokens for completion in expected]


def lose_a_token(engine: Engine, monkeypatch: pytest.MonkeyPatch, lost: int) -> None:
    """Leave the tokenizer without a text for one of the model's tokens."""
    decode = engine.tokenizer.decode

    def decode_others(tokens: list[int]) -> Any:
        if lost in tokens:
            raise KeyError(lost)
        return decode(tokens)

    monkeypatch.setattr(engine.tokenizer, "decode", decode_others)


@pytest.mark.parametrize("stop", [[], ["no such text"]], ids=["at the end", "looking for a stop"])
def test_a_job_whose_tokens_cannot_be_decoded_fails_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, stop: list[str]
) -> None:
    chance = [Sampling(temperature=4.0, seed=i) for i in range(6)]
    jobs = [Job(prompt=[*PREFIX, 50 + i], max_new_tokens=6, stop=stop, sampling=chance[i]) for i in range(6)]
    expected = engine.run(jobs)
    lost = expected[2].tokens[3]
    fails = [lost in completion.tokens for completion in expected]
    assert not all(fails)
    lose_a_token(engine, monkeypatch, lost)
    for _ in range(2):  # and the engine stays usable
        found = within_seconds(lambda: engine.run(jobs))
        for completion, told, fails_now in zip(expected, found, fails, strict=True):
            if fails_now:
                assert isinstance(told.error, JobError)
                assert str(told.error).startswith(f"the tokenizer cannot decode generated token ids {lost} (KeyError: ")
                assert "\n" not in str(told.error)
                assert (told.tokens, told.text, told.logprobs, told.finish_reason) == ((), "", (), None)
            else:
                assert (told.tokens, told.text, told.error) == (completion.tokens, completion.text, None)
                assert told.logprobs == pytest.approx(completion.logprobs, abs=1e-5)
        assert_nothing_held(engine)


def test_a_tokenizer_that_cannot_put_readable_tokens_together_is_told_with_all_of_them(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(prompt=PREFIX, max_new_tokens=14, sampling=Sampling(temperature=4.0, seed=1))
    [expected] = engine.run([job])
    assert len(expected.tokens) > 10

    def decode(tokens: list[int]) -> str:
        if len(tokens) > 1:
            raise ValueError("no\nway")
        return "x"

    monkeypatch.setattr(engine.tokenizer, "decode", decode)
    [told] = within_seconds(lambda: engine.run([job]))
    named = ", ".join(map(str, expected.tokens[:10]))
    assert f"token ids {named} ... (ValueError: no way); the tokenizer and the model" in str(told.error)


def test_the_longest_job_fits_the_window(engine: Engine) -> None:
    [done] = engine.run([Job(prompt=[3] * 100, max_new_tokens=29)])  # the last token is never fed back
    assert done.error is None
    assert len(done.tokens) == 29 or done.finish_reason == "endoftext"
    [failed] = engine.run([Job(prompt=[3] * 100, max_new_tokens=30)])
    assert isinstance(failed.error, JobError)


def test_a_prompt_longer_than_the_pad_fails_alone(build: Callable[[str], Path]) -> None:
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu", "pad-to-seq-len": 32}) as engine:
        good, bad = engine.run([Job(prompt=[3] * 32, max_new_tokens=2), Job(prompt=[3] * 33, max_new_tokens=2)])
    assert len(good.tokens) == 2
    assert isinstance(bad.error, JobError)
    assert "33 tokens" in str(bad.error)
    assert "pad-to-seq-len 32" in str(bad.error)


def test_a_job_whose_logits_are_not_finite_fails_alone(build: Callable[[str], Path], tmp_path: Path) -> None:
    """One token's embedding is damaged: jobs with it fail, greedy or sampled, and their neighbours do not notice."""
    for file in build("llama").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    sampled = Sampling(temperature=1.0, seed=1)
    bad = [Job(prompt=[7], prompt_logprobs=True), Job(prompt=[4, 7, 5], sampling=sampled)]
    good = [Job(prompt=[4, 9, 5], sampling=sampled), Job(prompt=[8, 9, 6], prompt_logprobs=True)]
    with Engine.from_pretrained(str(tmp_path), policy={"device": "cpu"}) as engine:
        expected = engine.run(good)
        found = engine.run([bad[0], good[0], bad[1], good[1]])
        assert [found[1].tokens, found[3].tokens] == [completion.tokens for completion in expected]
        for failed in (found[0], found[2]):
            assert isinstance(failed.error, JobError)
            assert "not finite" in str(failed.error)
        assert_nothing_held(engine)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt-oss", "gptj"])
@pytest.mark.parametrize("percent", [[100, 0, 100, 0, 100, 0], [0, 100, 0, 100, 0, 100]])
def test_what_is_not_finite_stays_with_its_job_among_sharers_of_a_prefix(
    family: str, percent: list[int], build: Callable[[str], Path], tmp_path: Path
) -> None:
    for file in build(family).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
    tensors[name][7] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    spoiled = [*PREFIX, 7, *range(300, 320)]
    jobs = [Job(prompt=[*PREFIX, 200 + i, 9], max_new_tokens=4, prompt_logprobs=i % 2 == 0) for i in range(6)]
    jobs += [Job(prompt=[*PREFIX, 220 + i], max_new_tokens=0, prompt_logprobs=True) for i in range(3)]
    bad = [Job(prompt=[*PREFIX, 210, 7], max_new_tokens=4), Job(prompt=[7, *PREFIX, 9], max_new_tokens=4)]
    bad += [Job(prompt=[*spoiled, 5 + i], max_new_tokens=i, prompt_logprobs=True) for i in range(3)]
    with Engine.from_pretrained(str(tmp_path), policy={"device": "cpu", "percent": percent}) as engine:
        expected = engine.run(jobs)
        assert all(completion.error is None for completion in expected)
        mixed = [*bad[:2], *jobs[:4], *bad[2:], *jobs[4:]]
        found = dict(zip(map(id, mixed), engine.run(mixed), strict=True))
        assert_nothing_held(engine)
    for job, completion in zip(jobs, expected, strict=True):
        assert found[id(job)].tokens == completion.tokens
        assert found[id(job)].logprobs == pytest.approx(completion.logprobs, abs=1e-5)
        assert (found[id(job)].prompt_logprobs or ())[1:] == pytest.approx(
            (completion.prompt_logprobs or ())[1:], abs=1e-5
        )
        assert found[id(job)].prompt_greedy == completion.prompt_greedy
    for job in bad:
        assert isinstance(found[id(job)].error, NumericsError)


def shrink_cache(engine: Engine, rows: int) -> None:
    """Leave room for this many tokens in the cache."""
    cache_of(engine).room._max_rows = {"device": rows, "host": 0, "disk": 0}


def test_a_full_cache_makes_sequences_wait(engine: Engine, build: Callable[[str], Path]) -> None:
    jobs = [Job(prompt=[*PREFIX, 50 + i], max_new_tokens=6) for i in range(8)]
    expected = engine.run(jobs)
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as small:
        shrink_cache(small, len(PREFIX) + 2 * 6)  # the prefix and two sequences
        found = small.run(jobs)
        assert [done.tokens for done in found] == [done.tokens for done in expected]
        assert small.num_sweeps == 4 * 6


def test_a_prompt_whose_attention_fits_nowhere_fails_alone(build: Callable[[str], Path]) -> None:
    """A family that carries its own attention holds the scores of all pairs of tokens; this one has no window."""
    endless, good = Job(prompt=[7] * 200_000, max_new_tokens=1), Job(prompt=PREFIX, max_new_tokens=3)
    with Engine.from_pretrained(str(build("bloom")), policy={"device": "cpu"}) as engine:
        assert engine.window is None
        first, bad, last = within_seconds(lambda: engine.run([good, endless, good]))
        assert first.tokens == last.tokens == engine.run([good])[0].tokens
        assert len(first.tokens) == 3
        assert isinstance(bad.error, CapacityError)
        assert "attention has no room for a sequence of 200000 tokens" in str(bad.error)


def test_a_sequence_that_never_fits_fails_alone(engine: Engine) -> None:
    shrink_cache(engine, 60)
    good, bad = engine.run([Job(prompt=PREFIX, max_new_tokens=6), Job(prompt=[*range(100, 160)], max_new_tokens=6)])
    assert good.error is None
    assert isinstance(bad.error, CapacityError)
    assert "65 tokens" in str(bad.error)
    assert_nothing_held(engine)


def test_calls_on_a_closed_engine_fail(build: Callable[[str], Path]) -> None:
    engine = Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"})
    stream = engine.stream([*long_jobs(), Job(prompt=[3], max_new_tokens=1)])
    next(stream)
    found: list[BaseException] = []

    def listen() -> None:
        try:
            list(stream)
        except EngineError as error:
            found.append(error)

    listener = threading.Thread(target=listen)
    listener.start()
    engine.close()
    listener.join(timeout=20)
    assert "closed" in str(found[0])
    with pytest.raises(EngineError, match="closed"):
        engine.run([Job(prompt=[3])])
    engine.close()
    assert engine.num_sweeps < 90


def test_a_fault_of_the_engine_reaches_every_caller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    both_called = threading.Event()

    def break_down(*_: Any) -> None:
        assert both_called.wait(20)
        raise RuntimeError("the machine\nis on fire")

    monkeypatch.setattr(engine.parts.lanes[0].executor, "sweep", break_down)
    streams = [engine.stream(long_jobs(1)), engine.stream(long_jobs(1))]
    both_called.set()
    for stream in streams:
        with pytest.raises(EngineError, match="RuntimeError: the machine is on fire"):
            next(stream)
    with pytest.raises(EngineError, match="on fire"):
        engine.run(long_jobs(1))


@pytest.mark.parametrize("where", ["advance.add_token", "sweep_loop.completion_of"])
def test_a_fault_beside_the_tokenizer_is_not_laid_at_its_door(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def break_down(*_: Any) -> None:
        raise ZeroDivisionError("of all")

    monkeypatch.setattr(f"engine.{where}", break_down)
    with pytest.raises(EngineError, match="the engine failed: ZeroDivisionError: of all") as caught:
        within_seconds(lambda: engine.run(long_jobs(2)))
    assert not isinstance(caught.value, JobError)


def test_a_fault_while_jobs_are_taken_in_reaches_every_caller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    both_called = threading.Event()
    next_sweep = engine.parts.lanes[0].scheduler.next_sweep

    def wait_and_go_on() -> Any:
        assert both_called.wait(20)
        monkeypatch.setattr(engine.parts.lanes[0].scheduler, "add", break_down)
        return next_sweep()

    def break_down(*_: Any) -> None:
        raise RuntimeError("the machine is on fire")

    monkeypatch.setattr(engine.parts.lanes[0].scheduler, "next_sweep", wait_and_go_on)
    first = engine.stream(long_jobs(1))
    wait_until(lambda: engine._loop.num_jobs > 0)
    streams = [first, engine.stream(long_jobs(1)), engine.stream(long_jobs(1))]  # the last two arrive together
    both_called.set()
    for stream in streams:
        with pytest.raises(EngineError, match="on fire"):
            within_seconds(lambda stream=stream: next(stream))


def test_sweeps_come_whole_and_an_observer_sees_each(engine: Engine) -> None:
    timings: list[SweepTiming] = []
    engine.observer = timings.append
    engine.wait_until_loaded()
    sampling = Sampling(temperature=1.0, seed=0)  # sampled: no drafts
    jobs = [Job(prompt=[*PREFIX, 50 + n], max_new_tokens=1, sampling=sampling) for n in range(3)]
    jobs += [Job(prompt=[7, 8], max_new_tokens=3, sampling=sampling), Job(prompt=[], max_new_tokens=1)]
    begun = time.perf_counter()
    sweeps = [sorted(index for index, _ in finished) for finished in engine.sweeps(jobs)]
    seconds = time.perf_counter() - begun
    assert sweeps == [[4], [0, 1, 2], [3]]  # the bad job at once
    assert [timing.prefill_rows for timing in timings] == [len(PREFIX) + 3 + 2, 0, 0]
    assert [timing.decode_rows for timing in timings] == [0, 1, 1]
    assert [timing.num_sequences for timing in timings] == [4, 1, 1]
    assert [timing.new_tokens for timing in timings] == [4, 1, 1]
    assert all(timing.load_s == 0.0 < timing.sweep_s for timing in timings)
    assert sum(timing.sweep_s + timing.host_s for timing in timings) <= seconds
    assert begun <= timings[0].begun <= timings[1].begun
    engine.observer = None
    assert [index for index, _ in engine.stream(jobs[:1])] == [0]
    assert len(timings) == 3
