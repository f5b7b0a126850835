"""The settings that a checkpoint's generation_config.json adds to a request, as `generate` of `transformers` does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.checkpoint.side_files import read_generation_config
from engine.errors import UnsupportedError
from engine.job import Sampling
from engine.logit_rules import LogitRules, refused_settings

_DEFAULT_TOP_K = 50
"""The default top_k of `transformers`, where neither request nor checkpoint sets one."""
_SAMPLING = ("top_k", "top_p")
_NOT_SAMPLED_BY = {"min_p": (0.0,), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "top_h": ()}
"""Unsupported sampling settings, with the values that have no effect."""
_OF_A_JOB = ("end_of_text", "prompt", "max_new_tokens")
RULES = tuple(each.name for each in fields(LogitRules) if each.name not in _OF_A_JOB)
"""The names of the rules on a text that a request may set, too."""


class GenerationSettings:
    """The settings of one checkpoint; those of a request take precedence."""

    def __init__(self, path: Path, end_of_text: int | None) -> None:
        """`path` is the model's directory, `end_of_text` its tokenizer's, which is used where the file names none.

        Raises `CheckpointError` for a file with invalid values.
        """
        found = read_generation_config(path)
        self._path = path
        self._given: Mapping[str, Any] = {} if found is None else found.to_dict()
        ids = self._given.get("eos_token_id")
        ids = end_of_text if ids is None else ids
        self._end_of_text = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)

    @property
    def temperature(self) -> float:
        """The temperature of a sampled request that sets none."""
        found = self._given.get("temperature")
        return 1.0 if found is None else float(found)

    def applied(
        self, sampling: Sampling, prompt: tuple[int, ...], max_new_tokens: int, rules: Mapping[str, Any] | None = None
    ) -> Sampling:
        """`sampling` with the checkpoint's rules, for one prompt; `rules` are those that the request sets itself.

        Raises `UnsupportedError` where the checkpoint has unsupported settings.
        """
        found = LogitRules.of({**self._given, **rules}, self._end_of_text) if rules else self._own_rules
        self._refuse(refused_settings(self._given))
        if found is not None:
            found = replace(found, prompt=prompt, max_new_tokens=max_new_tokens)
        return replace(sampling, rules=found)

    def sampled(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """`top_k` and `top_p` of a request that is sampled, as `Sampling` takes them.

        Raises `UnsupportedError` where the checkpoint samples by unsupported settings.
        """
        odd = {name: self._given[name] for name in _NOT_SAMPLED_BY if self._given.get(name) is not None}
        self._refuse({name: value for name, value in odd.items() if value not in _NOT_SAMPLED_BY[name]})
        defaults = {"top_k": _DEFAULT_TOP_K, "top_p": 1.0}
        given = [defaults, self._given, asked]
        found = {n: value for each in given for n in _SAMPLING if (value := each.get(n)) is not None}
        return {"top_k": found["top_k"] or None, "top_p": found["top_p"]}  # `transformers` means no limit by 0

    @cached_property
    def _own_rules(self) -> LogitRules | None:
        return LogitRules.of(self._given, self._end_of_text)

    def _refuse(self, settings: Mapping[str, Any]) -> None:
        if settings:
            told = ", ".join(f"{name} {value}" for name, value in settings.items())
            raise UnsupportedError(
                f"generation_config.json in {self._path} sets {told}, which is not supported; remove it from that "
                "file to run the model without it"
            )
