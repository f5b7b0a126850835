"""Chooses next tokens from logits, each row by its own sampling settings."""

from __future__ import annotations

import torch

from engine.job import Sampling
from engine.memory import accelerator
from engine.planning.limits import LOGITS_BYTES

_MIN_TEMPERATURE = 1e-20
"""Below this, logits divided by the temperature would overflow; the choice is greedy long before."""
_SORTED_BYTES = 64
"""The approximate bytes per logit where logits are sorted and summed: 14 times its own bytes."""
_WHOLE_BYTES = 24
"""The approximate bytes per logit where all tokens count."""
_BLOCK = 512
"""The number of probabilities that are summed at once."""


def choose(
    logits: torch.Tensor,
    samplings: list[Sampling],
    draws: list[float],
    generated: list[list[int]],
    most_bytes: int = LOGITS_BYTES,
) -> torch.Tensor:
    """Choose the next token of each row: float32 logits `[rows, vocabulary]` -> ids `[rows]`, both on the device.

    It takes about `most_bytes` more than the logits, or what one row takes.

    `draws` are uniform numbers in [0, 1), one a row: a row's choice is its distribution's quantile there, with tokens
    in the order of their ids, so that it depends neither on other rows, nor on which of two tokens is minimally
    likelier. `generated` are the tokens that penalties apply to.
    """
    if any(sampling.rules is not None for sampling in samplings):
        rows = zip(logits, samplings, generated, strict=True)
        logits = torch.stack([row if each.rules is None else each.rules.apply(said, row) for row, each, said in rows])
    if any(sampling.presence_penalty or sampling.frequency_penalty for sampling in samplings):
        logits = _penalized(logits, samplings, generated)
    tokens = logits.argmax(dim=-1)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not sampled:
        return tokens
    is_cut = [samplings[row].top_k is not None or samplings[row].top_p < 1 for row in sampled]
    sampled = [row for cut in (False, True) for row, each in zip(sampled, is_cut, strict=True) if each == cut]
    # In one copy, whatever the parts: each comes behind the weights that are on the link by now.
    listed = [(row, *_settings(samplings[row], logits.shape[-1]), draws[row]) for row in sampled]
    settings = accelerator.sent(torch.tensor(listed, dtype=torch.float64), logits.device)
    num_whole = is_cut.count(False)
    for some, num_bytes, sample in (
        (settings[:num_whole], _WHOLE_BYTES, _sample_whole),
        (settings[num_whole:], _SORTED_BYTES, _sample_cut),
    ):
        for part in some.split(max(1, most_bytes // num_bytes // logits.shape[-1])):
            chosen = part[:, 0].long()
            tokens[chosen] = sample(logits[chosen], *part[:, 1:].unbind(1))
    return tokens


def _settings(sampling: Sampling, vocabulary: int) -> tuple[float, int, float]:
    """Temperature, top_k and top_p of each row, as tensors."""
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    return max(sampling.temperature, _MIN_TEMPERATURE), top_k, sampling.top_p


def _penalized(logits: torch.Tensor, samplings: list[Sampling], generated: list[list[int]]) -> torch.Tensor:
    """Apply OpenAI's penalties: minus presence_penalty if the token was generated, minus frequency_penalty per time."""
    logits = logits.clone()
    for row, (sampling, tokens) in enumerate(zip(samplings, generated, strict=True)):
        if tokens and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = torch.tensor(tokens, device=logits.device).unique(return_counts=True)
            logits[row, ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


def _sample_whole(
    logits: torch.Tensor, temperature: torch.Tensor, _: torch.Tensor, __: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """Logits `[rows, vocabulary]`, the others float64 `[rows]` -> ids `[rows]`; every token may be chosen."""
    return _quantile(logits / temperature.float()[:, None], draws)


def _sample_cut(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """Like `_sample_whole`, among the likeliest tokens only."""
    logits = logits / temperature.float()[:, None]
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    beyond = torch.arange(values.shape[-1], device=logits.device) >= top_k[:, None]
    probabilities = values.masked_fill(beyond, float("-inf")).double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = (before < top_p[:, None]) & ~beyond  # the token that crosses top_p is in; the first always is
    return _quantile(logits.masked_fill(~torch.zeros_like(kept).scatter(-1, ids, kept), float("-inf")), draws)


def _quantile(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The tokens at which the sums of probabilities, in the order of ids, exceed the draws: ids `[rows]`.

    Logits `[rows, vocabulary]` are overwritten. Sums are taken of blocks first, then within the block in question: many
    threads sum a row, where a running sum over all of it is the work of one thread block. A row that is not finite gets
    some token: its sequence fails, not its neighbours.
    """
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()
    blocks = torch.nn.functional.pad(weights, (0, -weights.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums = blocks.sum(dim=-1, dtype=torch.float64).cumsum(dim=-1)
    point = draws[:, None] * sums[:, -1:]
    block = _first_beyond(sums, point)
    before = sums.gather(-1, (block - 1).clamp(min=0)).where(block > 0, 0.0)
    within = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(dim=-1)
    return (block * _BLOCK + _first_beyond(within, point - before))[:, 0]


def _first_beyond(sums: torch.Tensor, point: torch.Tensor) -> torch.Tensor:
    """The first index at which growing sums `[rows, count]` exceed a point `[rows, 1]`, or their last: `[rows, 1]`."""
    exceeds, grown = (sums <= point).sum(dim=-1, keepdim=True), (sums < sums[:, -1:]).sum(dim=-1, keepdim=True)
    return torch.minimum(exceeds, grown)
