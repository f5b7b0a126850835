"""Runs sweeps: all micro-batches through one layer, then the next; then logits, only for the rows that need them."""

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
from engine.stages.in_step import in_step
from engine.stages.line import StageLine
from engine.weights.stream import WeightStream


class Ask(NamedTuple):
    """A request for the logits of one row of a span."""

    span: Span
    row: int
    target: int | None
    """The token whose log-probability is wanted; None: the next token is to be chosen (or, for a prefix, kept)."""
    drafted: tuple[int, ...] = ()
    """Drafted tokens before this row: the choice counts only if the sequence is found to continue with them."""
    num_before: int = 0
    """The number of tokens that the sequence had when the sweep was scheduled."""


class Answer(NamedTuple):
    """What was computed from the logits of one row."""

    ask: Ask
    token: int
    """The target, or the token that was chosen."""
    logprob: float
    """Natural log of its probability under the model's unmodified distribution."""
    greedy: int
    """The most likely token; -1 if it was not asked for."""
    greedy_logprob: float
    """Natural log of its probability; 0 if it was not asked for."""
    is_finite: bool
    """Whether all logits of the row are finite."""
    next_logprobs: torch.Tensor | None = None
    """float32 `[vocabulary]` on the host; only for the last token of a scored prefix."""


class Executor:
    """Computes a sweep: takes micro-batches of segments through the model once."""

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
        """line: connects to the other stages, if the model has several. lane: whose sweeps these are."""
        self._model = model
        self._line, self._lane = line, lane
        self.limits = limits
        """The limits by which the scheduler puts micro-batches together."""
        self._weights = weights
        self._cache, self._states = cache, states
        self._hidden = hidden
        self._joint = JointExperts(model.sweeping, compute, model.device)
        self.steps = Steps(model, cache, is_wanted=limits.replays)
        """Replays recorded decode steps of a model that is entirely on the device."""
        self.reads: Callable[[list[Segment], torch.Tensor], None] | None = None
        """Called with the output of the last layer for each micro-batch `[rows, width]`, if the head is here."""
        self.num_sweeps = 0
        """Sweeps so far."""

    def close(self) -> None:
        """Release keys, values, states and hidden states; the arena frees the memory."""
        self.steps.forget("the engine is closed")
        self._cache.close()
        self._states.close()
        self._hidden.close()

    def recover(self) -> None:
        """Reset to a state in which the next sweep can begin, after one that ended in an error."""
        self._weights.release_all()
        self._hidden.begin(())
        self.steps.clear()

    def choices(self, batches: list[list[Segment]]) -> dict[int, int]:
        """Compute every segment; returns the token chosen after the last row of each, by `id()` of its span."""
        return {id(answer.ask.span): answer.token for answer in self.sweep(batches)}

    def sweep(self, batches: list[list[Segment]]) -> list[Answer]:
        """Compute every segment and return the answers for its span, in the order of the rows; changes no span.

        A stage without the last layers sends their hidden states on, and returns no answers. Raises `LostSweepError` if
        this or another stage has run out of memory.
        """
        line = self._line
        if line is None:
            return self._swept(batches)
        line.begin(self._lane, [segments[-1].end for segments in batches])
        return in_step(line, lambda: self._swept(batches), self.recover, self._model.device)

    @torch.no_grad()
    def _swept(self, batches: list[list[Segment]]) -> list[Answer]:
        model, weights, cache, hidden, line = self._model, self._weights, self._cache, self._hidden, self._line
        micro = [self._micro_batch(segments) for segments in batches]
        by_layers = [index for index, batch in enumerate(micro) if not isinstance(batch, StepBatch)]
        hidden.begin(micro)
        calls: dict[int, list[LayerCall]] = {}

        def through(layer: int, index: int) -> None:
            """Compute one layer for one micro-batch."""
            batch = micro[index]
            if layer == model.held.start:  # the host looks up embeddings while the device is at the first layer
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

        model.sweeping.cache, model.sweeping.states = cache, self._states
        cache.stage_ahead(micro)
        self._states.stage_ahead(micro)
        for index, batch in enumerate(micro):
            if isinstance(batch, StepBatch):
                weights.look_up(batch.ids)
                hidden.put(index, self.steps.run(batch))
        # A member of a group with nothing to compute still provides its part of each layer to the others.
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
        steps = self.steps.take(segments) if self.num_sweeps else None  # not before all weights are loaded
        return steps or MicroBatch(segments, model.device, self.limits)

    def _together(self, step: int, num_rows: list[int]) -> list[list[int]]:
        """Divide micro-batches of these numbers of rows into runs of neighbours whose experts are computed together."""
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
        # Decode steps need only the chosen token, unless a job asks for the likeliest; prompt scoring needs the argmax.
        greedy, greedy_logprobs = [-1] * len(asks), [0.0] * len(asks)
        if len(choosing) < len(asks) or any(isinstance(a.span, Sequence) and a.span.job.likeliest for a in asks):
            best = logits.argmax(dim=-1)
            greedy, greedy_logprobs = best.tolist(), logprobs.gather(-1, best[:, None])[:, 0].tolist()
        finite = logits.amin(dim=-1).isfinite() & logits.amax(dim=-1).isfinite()  # both are NaN if a logit is NaN
        values = zip(asks, tokens.tolist(), gathered.tolist(), greedy, greedy_logprobs, finite.tolist(), strict=True)
        return [
            Answer(ask, token, logprob, best_token, best_logprob, is_finite, _kept(ask, logprobs, row))
            for row, (ask, token, logprob, best_token, best_logprob, is_finite) in enumerate(values)
        ]


def _with_due(chosen: torch.Tensor, sequences: list[Sequence]) -> torch.Tensor:
    """Replace the tokens chosen for sequences, ids `[sequences]`, by the tokens that their thinking rule prescribes."""
    due = [sequence.thinking.due[0] if sequence.thinking.due else -1 for sequence in sequences]
    if max(due) < 0:
        return chosen
    forced = accelerator.sent(torch.tensor(due), chosen.device)
    return torch.where(forced < 0, chosen, forced)


def _kept(ask: Ask, logprobs: torch.Tensor, row: int) -> torch.Tensor | None:
    """Copy the distribution after a scored prefix, which sequences continue later; a view would keep a whole chunk."""
    return logprobs[row].to("cpu", copy=True) if ask.target is None and isinstance(ask.span, Prefix) else None


def _asks(segment: Segment) -> list[Ask]:
    """The logits that `segment` needs, in the order of its rows."""
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
    """Remove the first `count` rows from a list of row blocks and return them as one tensor."""
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
