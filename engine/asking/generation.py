"""Arguments and results of `Engine.generate`, which takes and gives what `transformers`' `generate` does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypedDict

import torch

from engine.errors import JobError
from engine.job import Completion, Job, Sampling, is_whole


class Settings(TypedDict, total=False):
    """The keyword arguments of `Engine.generate`, which describes them, but for `return_dict`."""

    max_new_tokens: int
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    stop: str | Iterable[str | Iterable[int]] | None
    num_return_sequences: int
    seed: int | None
    pad_token_id: int | None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What `Engine.generate` returns with `return_dict=True`."""

    sequences: torch.Tensor
    """int64 `[prompts * num_return_sequences, longest]`: the input row, the new tokens, padding."""
    completions: tuple[Completion, ...]
    """One completion for each row: its text, its log-probabilities and its finish reason."""


def rows_of(input_ids: Any, name: str = "input_ids") -> list[list[int]]:
    """The rows of `input_ids`: a tensor or array `[prompts, length]` or `[length]`, or lists of any lengths.

    Raises `JobError` for anything else; `name` is what it then speaks of.
    """
    rows = _nested(input_ids, name)
    for number, row in enumerate(rows):
        if not isinstance(row, list | tuple | range) or not all(map(is_whole, row)):
            raise JobError(f"row {number} of {name} is no list of token ids; give [prompts, length] of integers")
    return [[int(token) for token in row] for row in rows]


def _nested(values: Any, name: str = "attention_mask") -> list[Any]:
    """Return one row for each prompt; what a row holds is not checked here."""
    plain = values.tolist() if hasattr(values, "tolist") else values
    if isinstance(plain, str | bytes) or not isinstance(plain, Iterable):
        raise JobError(f"{name} is a {type(values).__name__}; give token ids, as engine.tokenizer makes of text")
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in plain]
    return [rows] if rows and not any(isinstance(row, Iterable) for row in rows) else rows


def prompts_of(rows: list[list[int]], attention_mask: Any) -> list[list[int]]:
    """The tokens of each row that `attention_mask` (of the same form; None: all ones) does not mask out."""
    if attention_mask is None:
        return rows
    masks = rows_of([[bool(kept) for kept in row] for row in _nested(attention_mask)], "attention_mask")
    if [len(mask) for mask in masks] != [len(row) for row in rows]:
        raise JobError(
            f"attention_mask has rows of {_lengths(masks)} tokens and input_ids of {_lengths(rows)}; "
            "give one number for each token"
        )
    pairs = zip(rows, masks, strict=True)
    return [[token for token, kept in zip(row, mask, strict=True) if kept] for row, mask in pairs]


def jobs_of(
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float,
    top_k: int | None,
    top_p: float,
    stop: str | Iterable[str | Iterable[int]] | None,
    num_return_sequences: int,
    seed: int | None,
) -> list[Job]:
    """`num_return_sequences` jobs for each prompt, neighbours; `JobError` for settings that contradict each other."""
    if not is_whole(num_return_sequences) or num_return_sequences < 1:
        raise JobError(f"num_return_sequences {num_return_sequences} is below 1")
    if seed is not None and not is_whole(seed):
        raise JobError(f"seed {seed} is no whole number; leave it out to draw one")
    if do_sample and not temperature > 0:
        raise JobError(f"temperature {temperature} with do_sample; give one above 0, or leave do_sample out")
    if stop is None or isinstance(stop, str):
        stop = [] if stop is None else [stop]
    stops = [one if isinstance(one, str) or not isinstance(one, Iterable) else list(one) for one in stop]
    sampling = Sampling(temperature=temperature, top_k=top_k or None, top_p=top_p) if do_sample else Sampling()
    return [
        Job(
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            sampling=replace(sampling, seed=None if seed is None else int(seed) + number),
            stop=stops,
        )
        for number, prompt in enumerate(prompt for prompt in prompts for _ in range(num_return_sequences))
    ]


def sequences_of(rows: list[list[int]], completions: list[Completion], pad: int) -> torch.Tensor:
    """Each input row with its new tokens, end-of-text included, padded on the right: int64 `[rows, longest]`."""
    whole = [
        [*row, *done.tokens, *([] if done.end_token is None else [done.end_token])]
        for row, done in zip(rows, completions, strict=True)
    ]
    longest = max(map(len, whole), default=0)
    return torch.tensor([row + [pad] * (longest - len(row)) for row in whole], dtype=torch.int64).view(
        len(rows), longest
    )


def _lengths(rows: list[list[int]]) -> str:
    lengths = [len(row) for row in rows]
    return ", ".join(map(str, lengths[:5])) + (", ..." if len(lengths) > 5 else "") or "no"
