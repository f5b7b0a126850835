"""Runs sweeps: all micro-batches through one layer, then the next layer; then logits only where somebody asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from engine.batch.micro_batch import MicroBatch
from engine.cache.hidden import HiddenStates
from engine.cache.key_value import KVCache
from engine.model.causal_model import CausalModel, LayerCall
from engine.model.padded import PaddedBatch
from engine.planning.planner import LOGITS_BYTES
from engine.sampling import choose
from engine.schedule.scheduler import Limits, Segment
from engine.schedule.sequence import Prefix, Sequence, Span
from engine.weights.store import WeightStore


@dataclass(frozen=True)
class _Ask:
    """Logits that somebody wants: those of one row of one span."""

    span: Span
    row: int
    target: int | None
    """Token whose log-probability is asked for; None: the next token is to be chosen (or, for a prefix, kept)."""
    drafted: tuple[int, ...] = ()
    """Tokens that are taken to follow those the sequence had: the choice counts only if they did."""
    num_before: int = 0
    """How many tokens the sequence had."""

    @property
    def counts(self) -> bool:
        """Whether the row was computed on what really came before it."""
        had = self.span.tokens[self.num_before :]
        return not self.drafted or (had == list(self.drafted) and not cast(Sequence, self.span).is_done)


class Executor:
    """Takes micro-batches of segments through the model once."""

    def __init__(
        self, model: CausalModel, weights: WeightStore, cache: KVCache, hidden: HiddenStates, limits: Limits
    ) -> None:
        self._model = model
        self._limits = limits
        self._weights = weights
        self._cache = cache
        self._hidden = hidden
        self._chunk = max(1, LOGITS_BYTES // (4 * model.vocab_size))
        self.num_sweeps = 0
        """Passes over the layers so far."""

    def close(self) -> None:
        """Let go of keys, values and hidden states; the arena frees the memory."""
        self._cache.close()
        self._hidden.close()

    @torch.no_grad()
    def sweep(self, batches: list[list[Segment]], advance: Callable[[Sequence, int, float], None]) -> None:
        """Compute every segment; then call `advance(sequence, token, logprob)` for each sequence's next token.

        Log-probabilities of prompts, and which of their tokens are greedy, are added to their spans; spans whose logits
        are not all numbers are marked so and not advanced.
        """
        model, weights, cache, hidden = self._model, self._weights, self._cache, self._hidden
        micro: list[MicroBatch | PaddedBatch] = [
            PaddedBatch(segments, model.device, model.sweeping)
            if model.is_padded
            else MicroBatch(segments, model.device, self._limits)
            for segments in batches
        ]
        hidden.begin(micro)
        calls: list[list[LayerCall]] = []
        model.sweeping.cache = cache
        cache.begin_sweep(micro)
        for layer in range(len(model.layers)):
            weights.acquire(layer)
            model.sweeping.layer = layer
            for index, batch in enumerate(micro):
                if layer == 0:  # not before: the host looks up embeddings while the device is at the first layer
                    weights.look_up(batch.ids)
                    if index + 1 < len(micro):
                        weights.look_up_ahead(micro[index + 1].ids)
                    states, recorded = model.record(batch.inputs())
                    calls.append(recorded)
                else:
                    states = hidden.take(index)
                model.sweeping.batch = batch
                hidden.put(index, model.layer(layer, states, calls[index][layer]))
            weights.release(layer)
        weights.acquire(len(model.layers))
        self._answer(batches, advance)
        weights.release(len(model.layers))
        self.num_sweeps += 1

    def _answer(self, batches: list[list[Segment]], advance: Callable[[Sequence, int, float], None]) -> None:
        asks: list[_Ask] = []
        states: list[torch.Tensor] = []
        for index, segments in enumerate(batches):
            wanted = [ask for segment in segments for ask in _asks(segment)]
            last = self._hidden.take(index)
            if wanted:
                states.append(last[torch.tensor([ask.row for ask in wanted], device=last.device)])
                asks += wanted
            for segment in segments:
                segment.span.cached += segment.num_rows - len(segment.draft)
        for first in range(0, len(asks), self._chunk):
            part = asks[first : first + self._chunk]
            self._answer_chunk(part, _take_rows(states, len(part)), advance)

    def _answer_chunk(
        self, asks: list[_Ask], states: torch.Tensor, advance: Callable[[Sequence, int, float], None]
    ) -> None:
        logits = self._model.head(states)
        logprobs = logits.log_softmax(dim=-1)
        tokens = torch.tensor([ask.target or 0 for ask in asks], device=logits.device)
        choosing = [i for i, ask in enumerate(asks) if ask.target is None and isinstance(ask.span, Sequence)]
        if choosing:
            rows = torch.tensor(choosing, device=logits.device)
            sequences = [ask.span for ask in asks if ask.target is None and isinstance(ask.span, Sequence)]
            tokens[rows] = choose(
                logits if len(choosing) == len(asks) else logits[rows],
                [sequence.job.sampling for sequence in sequences],
                [sequence.rng.random() for sequence in sequences],
                [sequence.generated for sequence in sequences],
            )
        chosen = logprobs.gather(-1, tokens[:, None])[:, 0]
        # Decode steps ask for no more than they choose; a prompt's tokens are compared with the greedy ones.
        greedy = [-1] * len(asks) if len(choosing) == len(asks) else logits.argmax(dim=-1).tolist()
        for i, ask in enumerate(asks):
            if ask.target is None and isinstance(ask.span, Prefix):
                ask.span.next_logprobs = logprobs[i].to("cpu", copy=True)  # a view would keep the whole chunk
                ask.span.next_greedy = greedy[i]
        finite = torch.isfinite(logits).all(dim=-1)
        answers = zip(asks, tokens.tolist(), chosen.tolist(), greedy, finite.tolist(), strict=True)
        for ask, token, logprob, best, is_finite in answers:
            span = ask.span
            if not ask.counts:
                continue
            span.cached += bool(ask.drafted)
            span.is_finite &= is_finite
            if ask.target is not None:
                span.prompt_logprobs.append(logprob)
                span.prompt_greedy.append(token == best)
            elif isinstance(span, Sequence) and span.is_finite:
                advance(span, token, logprob)


def _asks(segment: Segment) -> list[_Ask]:
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
        asks = [_Ask(span, segment.first + i - 1, span.tokens[i]) for i in range(1, known)]
    if chooses:
        num_drafted, before = len(segment.draft), len(span.tokens)
        asks += [_Ask(span, last - num_drafted + i, None, segment.draft[:i], before) for i in range(num_drafted + 1)]
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
