"""Chooses next tokens from logits, each row by its own sampling."""

from __future__ import annotations

import torch

from engine.job import Sampling
from engine.planning.limits import LOGITS_BYTES

_MIN_TEMPERATURE = 1e-20
"""Below it, logits divided by the temperature would overflow; the choice is greedy long before."""
_SORTED_BYTES = 64
"""What a logit takes, about, where it is sorted and summed up: 14 times its own bytes."""


def choose(
    logits: torch.Tensor,
    samplings: list[Sampling],
    draws: list[float],
    generated: list[list[int]],
    most_bytes: int = LOGITS_BYTES,
) -> torch.Tensor:
    """Next token of each row: float32 logits `[rows, vocabulary]` -> ids `[rows]`, both on the device.

    It takes `most_bytes` more than the logits, about, or what a row takes.

    `draws` are uniform numbers in [0, 1), one a row: a row's choice is its distribution's quantile there, so that it
    does not depend on the rows beside it. `generated` are the tokens that penalties look at.
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
    # In one copy, whatever the parts: each would wait for the weights that are on the link by now.
    settings = torch.tensor(
        [(row, *_settings(samplings[row], logits.shape[-1]), draws[row]) for row in sampled], dtype=torch.float64
    ).to(logits.device)
    for part in settings.split(max(1, most_bytes // _SORTED_BYTES // logits.shape[-1])):
        rows = part[:, 0].long()
        tokens[rows] = _sample(logits[rows], *part[:, 1:].unbind(1))
    return tokens


def _settings(sampling: Sampling, vocabulary: int) -> tuple[float, int, float]:
    """Temperature, how many of the likeliest tokens count, and what part of the distribution does."""
    top_k = min(sampling.top_k or vocabulary, vocabulary)
    return max(sampling.temperature, _MIN_TEMPERATURE), top_k, sampling.top_p


def _penalized(logits: torch.Tensor, samplings: list[Sampling], generated: list[list[int]]) -> torch.Tensor:
    """OpenAI's definition: minus presence_penalty if the token was generated, minus frequency_penalty per time."""
    logits = logits.clone()
    for row, (sampling, tokens) in enumerate(zip(samplings, generated, strict=True)):
        if tokens and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = torch.tensor(tokens, device=logits.device).unique(return_counts=True)
            logits[row, ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


def _sample(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, draws: torch.Tensor
) -> torch.Tensor:
    """Logits `[rows, vocabulary]`, the others float64 `[rows]` -> ids `[rows]`."""
    values, ids = (logits / temperature.float()[:, None]).sort(dim=-1, descending=True, stable=True)
    beyond = torch.arange(values.shape[-1], device=logits.device) >= top_k[:, None]
    probabilities = values.masked_fill(beyond, float("-inf")).double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = before < top_p[:, None]  # the token that crosses top_p is in; the first always is
    probabilities = probabilities.masked_fill(~kept, 0.0)
    cumulated = probabilities.cumsum(dim=-1)
    point = draws[:, None] * cumulated[:, -1:]
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    index = torch.minimum((cumulated <= point).sum(dim=-1, keepdim=True), last)
    index = index.clamp(min=0)  # a row that is not finite has no last; its sequence fails, not its neighbours
    return ids.gather(-1, index)[:, 0]
