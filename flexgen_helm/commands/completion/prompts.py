"""Prompts of `flexgen-helm complete`: from arguments, a text file with one a line, or a JSONL file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from engine.errors import ConfigError, did_you_mean
from engine.reading import parse_json


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a prompt is to be continued; a JSONL line may override any of these."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    """Sample i gets seed + i; None draws one."""
    stop: tuple[str, ...] = ()
    num_completions: int = 1


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt of the input."""

    index: int
    """Its position in the input, from 0; bad lines have one, too."""
    where: str
    """The argument, or file and line, for errors."""
    text: str = ""
    messages: tuple[dict[str, str], ...] | None = None
    """A conversation for the model's chat template, instead of `text`."""
    settings: Settings
    given: dict[str, Any]
    """What goes into the answer as it came: id, prompt or messages, metadata."""


@dataclass(frozen=True, kw_only=True)
class BadPrompt:
    """An input that cannot be run."""

    index: int
    where: str
    reason: str
    """The reason in one line, without `where`."""


_SETTINGS = {field.name for field in fields(Settings)}
_KEYS = {"prompt", "messages", "id", "metadata"} | _SETTINGS
_TYPES: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int, type(None)),
    "top_p": (int, float),
    "seed": (int, type(None)),
    "num_completions": (int,),
}


def from_arguments(texts: Iterable[str], settings: Settings) -> list[Prompt | BadPrompt]:
    """A prompt each."""
    found: list[Prompt | BadPrompt] = []
    for index, text in enumerate(texts):
        try:
            text.encode()
        except UnicodeEncodeError:
            found.append(BadPrompt(index=index, where=f"argument {index + 1}", reason="it is not UTF-8"))
        else:
            found.append(_of_text(text, index, f"argument {index + 1}", settings))
    return found


def from_lines(lines: Iterable[str], name: str, settings: Settings) -> list[Prompt | BadPrompt]:
    """A prompt for each line of a text file called `name`; empty lines are none."""
    numbered = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1)]
    asked = [(number, line) for number, line in numbered if line.strip()]
    return [_of_text(line, index, f"{name}, line {number}", settings) for index, (number, line) in enumerate(asked)]


def from_jsonl(lines: Iterable[str], name: str, settings: Settings) -> list[Prompt | BadPrompt]:
    """A prompt for each line of a JSONL file called `name`: `{"prompt": …}` or `{"messages": […]}`.

    A line may also have an `id` and `metadata`, which are returned with the answer, and any of `Settings`.
    """
    found: list[Prompt | BadPrompt] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                found.append(_of_json(line, len(found), where, settings))
            except ConfigError as error:
                found.append(BadPrompt(index=len(found), where=where, reason=str(error)))
    return found


def _of_text(text: str, index: int, where: str, settings: Settings) -> Prompt:
    return Prompt(index=index, where=where, text=text, settings=settings, given={"prompt": text})


def _of_json(line: str, index: int, where: str, settings: Settings) -> Prompt:
    entry = parse_json(line.encode(), "the line", ConfigError)
    try:
        json.dumps(entry, allow_nan=False)  # which Python's reader takes, and no other
    except ValueError:
        raise ConfigError("the line holds NaN or an infinite number, which is no JSON") from None
    if not isinstance(entry, dict):
        raise ConfigError(f'a {type(entry).__name__} instead of an object such as {{"prompt": "..."}}')
    if unknown := sorted(entry.keys() - _KEYS):
        raise ConfigError(f"unknown key {unknown[0]!r}{did_you_mean(unknown[0], _KEYS)}; other data goes to 'metadata'")
    if ("prompt" in entry) == ("messages" in entry):
        raise ConfigError("give either 'prompt' or 'messages'")
    text, messages = entry.get("prompt", ""), entry.get("messages")
    if not isinstance(text, str):
        raise ConfigError(f"'prompt' is a {type(text).__name__}, not a text")
    return Prompt(
        index=index,
        where=where,
        text=text,
        messages=_messages(messages) if "messages" in entry else None,
        settings=_with(settings, {key: value for key, value in entry.items() if key in _SETTINGS}),
        given={key: entry[key] for key in ("id", "prompt", "messages", "metadata") if key in entry},
    )


def _messages(messages: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ConfigError('\'messages\' is no list of {"role": ..., "content": ...}')
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ConfigError('\'messages\' holds something other than {"role": text, "content": text}')
    return tuple(messages)


def _with(settings: Settings, own: dict[str, Any]) -> Settings:
    for key, value in own.items():
        if key == "stop":
            own["stop"] = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value
            if not isinstance(own["stop"], tuple) or not all(isinstance(stop, str) for stop in own["stop"]):
                raise ConfigError("'stop' is neither a text nor a list of texts")
        elif isinstance(value, bool) or not isinstance(value, _TYPES[key]):
            kinds = " or ".join("null" if kind is type(None) else kind.__name__ for kind in _TYPES[key])
            raise ConfigError(f"{key!r} is a {type(value).__name__}, not {kinds}")
    return replace(settings, **own)
