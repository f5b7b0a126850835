"""Chooses next tokens from logits, each row by its own sampling."""

from __future__ import annotations

import torch

from engine.job import Sampling

_MIN_TEMPERATURE = 1e-20
"""Below it, logits divided by the temperature would overflow; the choice is greedy long before."""
_LOGITS_AT_ONCE = 2 << 20
"""How many are sorted and summed up at once: that takes 14 times their bytes, 0.1 GB, whatever the vocabulary."""


def choose(
    logits: torch.Tensor, samplings: list[Sampling], draws: list[float], generated: list[list[int]]
) -> torch.Tensor:
    """Next token of each row: float32 logits `[rows, vocabulary]` -> ids `[rows]`, both on the device.

    `draws` are uniform numbers in [0, 1), one a row: a row's choice is its distribution's quantile there, so that it
    does not depend on the rows beside it. `generated` are the tokens that penalties look at.
    """
    if any(sampling.presence_penalty or sampling.frequency_penalty for sampling in samplings):
        logits = _penalized(logits, samplings, generated)
    tokens = logits.argmax(dim=-1)
    sampled = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    most = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    for part in (sampled[first : first + most] for first in range(0, len(sampled), most)):
        rows = torch.tensor(part, device=logits.device)
        tokens[rows] = _sample(logits[rows], [samplings[row] for row in part], [draws[row] for row in part])
    return tokens


def _penalized(logits: torch.Tensor, samplings: list[Sampling], generated: list[list[int]]) -> torch.Tensor:
    """OpenAI's definition: minus presence_penalty if the token was generated, minus frequency_penalty per time."""
    logits = logits.clone()
    for row, (sampling, tokens) in enumerate(zip(samplings, generated, strict=True)):
        if tokens and (sampling.presence_penalty or sampling.frequency_penalty):
            ids, counts = torch.tensor(tokens, device=logits.device).unique(return_counts=True)
            logits[row, ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
    return logits


def _sample(logits: torch.Tensor, samplings: list[Sampling], draws: list[float]) -> torch.Tensor:
    device = logits.device
    temperatures = [max(sampling.temperature, _MIN_TEMPERATURE) for sampling in samplings]
    temperature = torch.tensor(temperatures, device=device, dtype=torch.float32)
    values, ids = (logits / temperature[:, None]).sort(dim=-1, descending=True, stable=True)
    size = values.shape[-1]
    top_k = torch.tensor([min(sampling.top_k or size, size) for sampling in samplings], device=device)
    values = values.masked_fill(torch.arange(size, device=device) >= top_k[:, None], float("-inf"))
    probabilities = values.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    top_p = torch.tensor([sampling.top_p for sampling in samplings], device=device, dtype=torch.float64)
    kept = before < top_p[:, None]  # the token that crosses top_p is in; the first always is
    probabilities = probabilities.masked_fill(~kept, 0.0)
    cumulated = probabilities.cumsum(dim=-1)
    point = torch.tensor(draws, device=device, dtype=torch.float64)[:, None] * cumulated[:, -1:]
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    index = torch.minimum((cumulated <= point).sum(dim=-1, keepdim=True), last)
    index = index.clamp(min=0)  # a row that is not finite has no last; its sequence fails, not its neighbours
    return ids.gather(-1, index)[:, 0]
