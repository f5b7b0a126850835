"""The `args` of a model deployment that affect its answers in addition to the requests."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from engine.errors import ConfigError, shown

Reasoning = str | Mapping[str, str]
"""How a model thinks: a word, or the strings {begin, end} around its thinking."""


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """The args by name; None means not set, so that the documented default applies."""

    apply_chat_template: bool | None = None
    """Whether prompts to answer go through the chat template; by default, if the tokenizer has one."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """The chat template's own arguments, such as `enable_thinking`; none by default."""
    reasoning: Reasoning | None = None
    """How the model thinks before it answers (`Reasoner`); "auto": as shown by chat template and vocabulary."""
    thinking_budget: int | None = None
    """The most tokens of thinking; None without a limit."""
    sampling: str | None = None
    """`model` if its generation_config.json overrides the sampling of requests; `entry` if not."""
    top_k: int | None = None
    """Sample among this many of the most likely tokens (HELM's `top_k_per_token` is a number of candidates and never
    does that).
    """

    def __post_init__(self) -> None:
        _expect("apply_chat_template", self.apply_chat_template, bool, "true or false")
        _expect("chat_template_kwargs", self.chat_template_kwargs, Mapping, "a mapping")
        _expect("top_k", self.top_k, int, "a whole number")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} is below 1; leave it out to sample among all tokens")

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> Shaping:
        """The shaping by named args; raises `ConfigError` for an unknown one."""
        for name in args:
            if name not in NAMES:
                near = get_close_matches(name, NAMES, n=1)
                raise ConfigError(
                    f"a model deployment has no arg {shown(name)}{f'; did you mean {near[0]}?' if near else ''}"
                )
        return cls(**args)

    def given(self) -> dict[str, Any]:
        """The args that are set, for a deployment's `args`."""
        return {name: value for name in NAMES if (value := getattr(self, name)) is not None}


def _expect(name: str, value: object, kind: type, words: str) -> None:
    """Raise `ConfigError` for an arg of another kind; YAML's booleans are no numbers."""
    if value is not None and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        raise ConfigError(f"{name} {shown(value)} of a model deployment is not {words}")


NAMES = tuple(field.name for field in dataclasses.fields(Shaping))
