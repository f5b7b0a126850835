"""Protects: decode steps that are replayed give what plain transformers gives, whatever their company and contexts.

What a card records is played on the CPU: a recording is the call that it was made of, made again when it is replayed.
So the test sees whether all that changes from step to step lies where the recording looks for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parity
import pytest
import torch
from parity import JOBS
from played_flash import Kernel
from transformers import PreTrainedModel

from engine import Engine, Job
from engine.batch.step_batch import StepBatch, padded_count
from engine.errors import UnsupportedError
from engine.memory import accelerator
from engine.model.attention import flash, interface
from engine.model.replayed.arguments import Arguments
from engine.model.replayed.recording import Recording
from engine.model.stub import LayerCall
from engine.planning import planner
from engine.schedule.block import Block
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence
from engine.schedule.turns import are_steps
from engine.verification.difference import KindOfRows, StageDifference


class Recorder:
    """Plays `accelerator.Recorder`."""

    made = replayed = 0
    fails = False

    def __init__(self, device: torch.device) -> None:
        assert device.type == "cpu"

    def record(self, call: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """A place for the result, which the call fills when it is replayed."""
        if Recorder.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        Recorder.made += 1
        result = call().fill_(torch.nan)

        def replay() -> None:
            Recorder.replayed += 1
            result.copy_(call())

        return replay, result


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> type[Recorder]:
    """Plays the card's attention and recordings, for plans that want steps replayed."""
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", Kernel())
    monkeypatch.setattr(flash, "has_kernels", lambda device, dtype, key_dim, value_dim: True)
    monkeypatch.setattr(interface, "BACKENDS", (flash.Flash(),))
    monkeypatch.setattr(planner._Planner, "_replays", lambda *_: True)
    monkeypatch.setattr(accelerator, "Recorder", Recorder)
    monkeypatch.setattr(Recorder, "made", 0)
    monkeypatch.setattr(Recorder, "replayed", 0)
    return Recorder


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3-moe"])
def test_replayed_steps_equal_transformers(
    family: str, build: Callable[[str], Path], reference: Callable[[str], PreTrainedModel], recorder: type[Recorder]
) -> None:
    with Engine.from_pretrained(str(build(family)), policy={"device": "cpu"}) as engine:
        done = [engine.run(JOBS), engine.run([*JOBS, *JOBS])]  # the second time tables have grown
        assert engine.parts.lanes[0].executor.steps.refusal is None
    expected = parity.expect(reference(family))
    for each in (done[0], done[1][: len(JOBS)], done[1][len(JOBS) :]):
        found, largest = parity.differences(expected, each)
        assert not found
        assert largest < parity.TOLERANCE
    assert recorder.replayed > 2 * recorder.made > 2


def replayed(stage: StageDifference) -> KindOfRows:
    return next(kind for kind in stage.kinds if kind.name == "replayed")


def test_replayed_steps_are_compared_layer_by_layer_as_they_are_replayed(
    build: Callable[[str], Path], recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that only replays have is found in the layer that has it, in the rows that are replayed."""
    jobs = [Job(prompt=[*range(5, 30), own], max_new_tokens=9) for own in (40, 41, 42)]
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as engine:
        done = engine.run(jobs)
        num_replays, recorder.replayed = engine.parts.lanes[0].executor.steps.num_replays, 0
        found = engine.compare_with_stock(jobs, done)
        assert all(stage.is_within for stage in found.stages)
        first, *others = found.stages[1:-1]
        assert recorder.replayed == 3 * num_replays  # in each layer the sweeps that the engine replayed
        assert replayed(first).num_rows > num_replays
        assert {replayed(stage) for stage in others} == {replayed(first)}
        assert engine.run(jobs) == done  # all layers are replayed together again
        assert recorder.replayed == 4 * num_replays
        run = Recording.run

        def wrong(self: Recording, batch: StepBatch, *others: Any) -> torch.Tensor:
            return run(self, batch, *others) * (1.01 if context.layer == 1 else 1)

        def late(self: StepBatch, other: StepBatch) -> None:
            lengths = self.lengths.clone()
            take(self, other)
            self.lengths.copy_(lengths)

        context, take = engine.parts.model.sweeping, StepBatch.take
        with monkeypatch.context() as patch:
            patch.setattr(Recording, "run", wrong)
            stages = engine.compare_with_stock(jobs, done).stages
        assert [stage.name for stage in stages if not stage.is_within] == ["layer 1"]
        assert stages[2].num_beyond == replayed(stages[2]).num_beyond == replayed(first).num_rows
        monkeypatch.setattr(StepBatch, "take", late)
        stages = engine.compare_with_stock(jobs, done).stages
        assert [stage.name for stage in stages if not stage.is_within] == ["layer 0", "layer 1", "layer 2"]
        assert all(0 < stage.num_beyond == replayed(stage).num_beyond for stage in stages[1:-1])


def test_what_cannot_be_recorded_is_computed(
    build: Callable[[str], Path],
    reference: Callable[[str], PreTrainedModel],
    recorder: type[Recorder],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder, "fails", True)
    with Engine.from_pretrained(str(build("llama")), policy={"device": "cpu"}) as engine:
        found, _ = parity.differences(parity.expect(reference("llama")), engine.run(JOBS))
        assert not found
        assert "capturing" in str(engine.parts.lanes[0].executor.steps.refusal)
        assert not engine.parts.lanes[0].scheduler.limits.replays  # drafts are tried again, and prompts wait for nobody


def test_prompts_come_in_together_between_replayed_steps(
    build: Callable[[str], Path], recorder: type[Recorder]
) -> None:
    """Of two seats one becomes free at a time: the next prompt waits for eight steps of the other, at most."""
    jobs = [Job(prompt=[7 + i, 9, 11], max_new_tokens=count) for i, count in enumerate((40, 4, 4, 4))]
    mixed: list[int] = []
    policy = {"device": "cpu", "gpu-batch-size": 2, "num-gpu-batches": 1}
    with Engine.from_pretrained(str(build("llama")), policy=policy) as engine:
        engine.observer = lambda timing: mixed.append(timing.prefill_rows)
        done = engine.run(jobs)
    assert [len(completion.tokens) for completion in done] == [40, 4, 4, 4]
    assert [number for number, rows in enumerate(mixed) if rows] == [0, 9, 18]
    assert len(mixed) == 40


def test_only_what_is_seen_to_stay_is_recorded() -> None:
    here, other = torch.ones(2), torch.zeros(2)
    calls = [
        LayerCall((1, 2), (here,), {"pair": (here, other), "name": None}),
        LayerCall((1, 2), (), {"again": [other]}),
    ]
    arguments = Arguments(calls, here.device)
    assert [id(tensor) for tensor in arguments.tensors] == [id(here), id(other)]
    first, second = arguments.calls_with(["a", "b"])  # type: ignore[list-item]
    assert (first.args, first.kwargs, second.kwargs) == (("a",), {"pair": ("a", "b"), "name": None}, {"again": ["b"]})
    assert arguments.form == Arguments(calls, here.device).form
    for value in (object(), {1, 2}, OrderedDict(), here.to("meta")):
        with pytest.raises(UnsupportedError, match=type(value).__name__):
            Arguments([LayerCall((1, 2), (), {"cache": value})], here.device)


def test_prefixes_that_are_elsewhere_are_not_waited_for() -> None:
    """Own tokens on the device, a prefix on the host: such sweeps are computed as ever, with drafts and prompts."""
    prefix = Prefix(tokens=[1, 2], num_users=1)
    prefix.block = Block("host", 0, 2)
    job = Job(prompt=[1, 2, 3], max_new_tokens=4)
    sequence = Sequence(job=job, tokens=[3, 4], num_prompt=1, parent=prefix)
    sequence.block, sequence.cached = Block("device", 0, 4), 1
    assert not are_steps([Segment(sequence, 1)])
    prefix.block = Block("device", 4, 2)
    assert are_steps([Segment(sequence, 1)])


def test_the_places_of_new_rows_are_sent_once_those_of_copies_included(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps, padded to four rows: the copy writes where the last step does."""
    steps = []
    for first, cached in ((40, 3), (10, 7), (90, 1)):
        sequence = Sequence(job=Job(prompt=[1], max_new_tokens=9), tokens=[5] * (cached + 1), num_prompt=1)
        sequence.block, sequence.cached = Block("device", first, 9), cached
        steps.append(Segment(sequence, 1, first=len(steps)))
    sent: list[list[int]] = []
    send = accelerator.sent

    def noted(tensor: torch.Tensor, *others: Any) -> torch.Tensor:
        sent.append(tensor.flatten().tolist())
        return send(tensor, *others)

    monkeypatch.setattr(accelerator, "sent", noted)
    batch = StepBatch(steps, torch.device("cpu"))
    assert batch.device_slots is not None
    assert batch.device_slots.tolist() == [43, 17, 91, 91]
    assert (batch.num_steps, batch.num_rows, batch.device_rows) == (3, 4, None)
    assert [each for each in sent if each[:3] == [43, 17, 91]] == [[43, 17, 91, 91]]


@pytest.mark.parametrize(("steps", "rows"), [(1, 1), (5, 8), (17, 24), (256, 256), (257, 512)])
def test_rows_are_padded_to_round_numbers(steps: int, rows: int) -> None:
    assert padded_count(steps) == rows
