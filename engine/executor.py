"""Runs sweeps: all micro-batches through one layer, then the next layer; then logits only where they are asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from engine.batch.micro_batch import MicroBatch
from engine.batch.step_batch import StepBatch
from engine.cache.hidden import HiddenStates
from engine.cache.key_value import KVCache
from engine.cache.state import StateCache
from engine.memory import accelerator
from engine.model.causal_model import CausalModel
from engine.model.experts.interface import compute
from engine.model.experts.joint import JointExperts
from engine.model.padded import PaddedBatch
from engine.model.replayed.steps import Steps
from engine.model.stub import LayerCall
from engine.planning.limits import WAITING_BATCHES, Limits
from engine.sampling import choose
from engine.schedule.segment import Segment
from engine.schedule.sequence import Prefix, Sequence, Span
from engine.stages.line import StageLine
from engine.weights.stream import WeightStream


class Ask(NamedTuple):
    """A row of one span whose logits are asked for."""

    span: Span
    row: int
    target: int | None
    """Token whose log-probability is asked for; None: the next token is to be chosen (or, for a prefix, kept)."""
    drafted: tuple[int, ...] = ()
    """Tokens that are taken to follow those the sequence had: the choice counts only if they did."""
    num_before: int = 0
    """How many tokens the sequence had."""


class Answer(NamedTuple):
    """What the logits of one row say."""

    ask: Ask
    token: int
    """The target, or the token that was chosen."""
    logprob: float
    """Natural log of its probability under the model's unmodified distribution."""
    greedy: int
    """The token that greedy choice takes by these logits; -1 where nobody asks for it."""
    greedy_logprob: float
    """The natural log of its probability, likewise; 0 where nobody asks."""
    is_finite: bool
    """Whether all logits of the row are numbers."""
    next_logprobs: torch.Tensor | None = None
    """float32 `[vocabulary]` on the host, only behind the last token of a scored prefix."""


class Executor:
    """Takes micro-batches of segments through the model once."""

    def __init__(
        self,
        model: CausalModel,
        weights: WeightStream,
        cache: KVCache,
        states: StateCache,
        hidden: HiddenStates,
        limits: Limits,
        line: StageLine | None = None,
        lane: int = 0,
    ) -> None:
        """line: to the other stages, where the model's layers are here in part. lane: whose sweeps these are."""
        self._model = model
        self._line, self._lane = line, lane
        self.limits = limits
        """How micro-batches are put together; the scheduler's."""
        self._weights = weights
        self._cache, self._states = cache, states
        self._hidden = hidden
        self._joint = JointExperts(model.sweeping, compute, model.device)
        self.steps = Steps(model, cache, is_wanted=limits.replays)
        """What replays decode steps that lie on the device."""
        self.reads: Callable[[list[Segment], torch.Tensor], None] | None = None
        """Is called with the output of the last layer for each micro-batch `[rows, width]`, while the head is there."""
        self.num_sweeps = 0
        """Passes over the layers so far."""

    def close(self) -> None:
        """Let go of keys, values, states and hidden states; the arena frees the memory."""
        self.steps.forget("the engine is closed")
        self._cache.close()
        self._states.close()
        self._hidden.close()

    def recover(self) -> None:
        """Be ready for another sweep after one that ended in an error."""
        self._weights.release_all()
        self._hidden.begin(())
        self.steps.clear()

    def choices(self, batches: list[list[Segment]]) -> dict[int, int]:
        """Compute every segment; the token chosen behind the last row of each, by its span's identity."""
        return {id(answer.ask.span): answer.token for answer in self.sweep(batches)}

    @torch.no_grad()
    def sweep(self, batches: list[list[Segment]]) -> list[Answer]:
        """Compute every segment and answer what its span asks for, in the order of the rows; changes no span.

        Where the last layers are elsewhere, their hidden states are handed on, and nothing is answered.
        """
        model, weights, cache, hidden, line = self._model, self._weights, self._cache, self._hidden, self._line
        micro = [self._micro_batch(segments) for segments in batches]
        by_layers = [index for index, batch in enumerate(micro) if not isinstance(batch, StepBatch)]
        hidden.begin(micro)
        calls: dict[int, list[LayerCall]] = {}

        def through(layer: int, index: int) -> None:
            """Take a micro-batch through a layer."""
            batch = micro[index]
            if (
                layer == model.held.start
            ):  # not before: the host looks up embeddings while the device is at the first layer
                weights.look_up(batch.ids)
                if index + 1 < len(micro):
                    weights.look_up_ahead(micro[index + 1].ids)
                with model.sweeping.arithmetic:
                    states, calls[index] = model.record(batch.inputs())
                if line is not None and layer > 0:
                    states = line.take(index)
            else:
                states = hidden.take(index)
            model.sweeping.batch = batch
            with model.sweeping.around_layer():
                states = model.layer(layer, states, calls[index][layer])
            if line is not None and layer == model.held.stop - 1 and not model.has_head:
                line.hand_on(index, states)
            else:
                hidden.put(index, states)

        if line is not None:
            line.begin(self._lane, [batch.num_rows for batch in micro])
        model.sweeping.cache, model.sweeping.states = cache, self._states
        cache.stage_ahead(micro)
        self._states.stage_ahead(micro)
        for index, batch in enumerate(micro):
            if isinstance(batch, StepBatch):
                weights.look_up(batch.ids)
                hidden.put(index, self.steps.run(batch))
        # A member of a group that has nothing to compute brings its part of each layer for the others.
        for step, layer in enumerate(model.held) if by_layers or not micro else ():
            weights.acquire(step)
            model.sweeping.layer = layer
            for together in self._together(step, [micro[index].num_rows for index in by_layers]):
                self._joint.run([partial(through, layer, by_layers[number]) for number in together])
            weights.release(step)
        answers: list[Answer] = []
        if model.has_head:
            weights.acquire(len(model.held))
            answers = self._answer(batches)
            weights.release(len(model.held))
        self.num_sweeps += 1
        return answers

    def _micro_batch(self, segments: list[Segment]) -> MicroBatch | PaddedBatch | StepBatch:
        model = self._model
        if model.is_padded:
            return PaddedBatch(segments, model.device, model.sweeping, self.limits.most_states)
        steps = self.steps.take(segments) if self.num_sweeps else None  # not before all weights have come
        return steps or MicroBatch(segments, model.device, self.limits)

    def _together(self, step: int, num_rows: list[int]) -> list[list[int]]:
        """Micro-batches, of so many rows each, that wait for each other where a layer computes experts: neighbours."""
        most = self.limits.waiting_rows if self._weights.expands_experts(step) else 0
        found: list[list[int]] = []
        rows = 0
        for index, added in enumerate(num_rows):
            rows += added
            if not found or rows > most or len(found[-1]) == WAITING_BATCHES:
                found.append([])
                rows = added
            found[-1].append(index)
        return found

    def _answer(self, batches: list[list[Segment]]) -> list[Answer]:
        asks: list[Ask] = []
        states: list[torch.Tensor] = []
        for index, segments in enumerate(batches):
            wanted = [ask for segment in segments for ask in _asks(segment)]
            last = self._hidden.take(index)
            if self.reads is not None:
                self.reads(segments, last)
            if wanted:
                states.append(last[accelerator.sent(torch.tensor([ask.row for ask in wanted]), last.device)])
                asks += wanted
        answers: list[Answer] = []
        chunk = max(1, self.limits.logits_bytes // (4 * self._model.vocab_size))
        for first in range(0, len(asks), chunk):
            part = asks[first : first + chunk]
            rows = _take_rows(states, len(part))
            with self._model.sweeping.arithmetic:
                answers += self._answer_chunk(part, rows)
        return answers

    def _answer_chunk(self, asks: list[Ask], states: torch.Tensor) -> list[Answer]:
        logits = self._model.head(states)
        logprobs = logits.log_softmax(dim=-1)
        tokens = accelerator.sent(torch.tensor([ask.target or 0 for ask in asks]), logits.device)
        choosing = [i for i, ask in enumerate(asks) if ask.target is None and isinstance(ask.span, Sequence)]
        if choosing:
            rows = accelerator.sent(torch.tensor(choosing), logits.device)
            wanted = [(ask.span, ask.drafted) for ask in asks if ask.target is None and isinstance(ask.span, Sequence)]
            sequences = [sequence for sequence, _ in wanted]
            chosen = choose(
                logits if len(choosing) == len(asks) else logits[rows],
                [sequence.job.sampling for sequence in sequences],
                [sequence.draw(len(drafted)) for sequence, drafted in wanted],
                [
                    [*sequence.generated, *drafted] if sequence.job.sampling.reads_generated else []
                    for sequence, drafted in wanted
                ],
                self.limits.logits_bytes,
            )
            tokens[rows] = _with_due(chosen, sequences)
        gathered = logprobs.gather(-1, tokens[:, None])[:, 0]
        # Decode steps ask for no more than they choose, but for jobs that say so; a prompt's tokens are compared.
        greedy, greedy_logprobs = [-1] * len(asks), [0.0] * len(asks)
        if len(choosing) < len(asks) or any(isinstance(a.span, Sequence) and a.span.job.likeliest for a in asks):
            best = logits.argmax(dim=-1)
            greedy, greedy_logprobs = best.tolist(), logprobs.gather(-1, best[:, None])[:, 0].tolist()
        finite = logits.amin(dim=-1).isfinite() & logits.amax(dim=-1).isfinite()  # both are NaN where a logit is
        values = zip(asks, tokens.tolist(), gathered.tolist(), greedy, greedy_logprobs, finite.tolist(), strict=True)
        return [
            Answer(ask, token, logprob, best_token, best_logprob, is_finite, _kept(ask, logprobs, row))
            for row, (ask, token, logprob, best_token, best_logprob, is_finite) in enumerate(values)
        ]


def _with_due(chosen: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """The tokens chosen for sequences, ids `[sequences]`, but where one is due whatever is chosen."""
    due = [sequence.thinking.due[0] if sequence.thinking.due else -1 for sequence in sequences]
    if max(due) < 0:
        return chosen
    forced = accelerator.sent(torch.tensor(due), chosen.device)
    return torch.where(forced < 0, chosen, forced)


def _kept(ask: Ask, logprobs: torch.Tensor, row: int) -> torch.Tensor | None:
    """What follows a scored prefix, for sequences that continue it later; a view would keep the whole chunk."""
    return logprobs[row].to("cpu", copy=True) if ask.target is None and isinstance(ask.span, Prefix) else None


def _asks(segment: Segment) -> list[Ask]:
    """What `segment` wants of the logits, in the order of its rows."""
    span = segment.span
    last = segment.first + segment.num_rows - 1
    if isinstance(span, Prefix):
        scored, chooses = span.scored, span.scored
    else:
        assert isinstance(span, Sequence)
        scored = span.job.prompt_logprobs and not segment.is_decode
        chooses = span.job.max_new_tokens > 0
    asks = []
    if scored:
        known = min(segment.num_rows + 1, len(span.tokens))
        asks = [Ask(span, segment.first + i - 1, span.tokens[i]) for i in range(1, known)]
    if chooses:
        num_drafted, before = len(segment.draft), len(span.tokens)
        asks += [Ask(span, last - num_drafted + i, None, segment.draft[:i], before) for i in range(num_drafted + 1)]
    return asks


def _take_rows(states: list[torch.Tensor], count: int) -> torch.Tensor:
    """Remove the first `count` rows from a list of row blocks and return them as one."""
    taken: list[torch.Tensor] = []
    while count:
        block = states[0]
        taken.append(block[:count])
        count -= len(taken[-1])
        if len(taken[-1]) == len(block):
            states.pop(0)
        else:
            states[0] = block[len(taken[-1]) :]
    return taken[0] if len(taken) == 1 else torch.cat(taken)
