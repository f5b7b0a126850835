"""Request bodies of OpenAI's completions and chat completions: every field is obeyed, or refused by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import ConfigError, JobError, did_you_mean, shown
from engine.job import MOST_COMPLETIONS, Sampling, check_num_completions

Endpoint = Literal["/v1/completions", "/v1/chat/completions"]
COMPLETIONS: Endpoint = "/v1/completions"
CHAT: Endpoint = "/v1/chat/completions"
ENDPOINTS: tuple[Endpoint, ...] = (COMPLETIONS, CHAT)

Prompt = str | tuple[int, ...]
"""Text, or token ids, which include special ones."""


class RefusedBody(ConfigError):
    """Raised for a body that is refused; `param` is the field at fault, `status` the HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The contents of a request body."""

    endpoint: Endpoint
    model: str
    prompts: tuple[Prompt, ...] = ()
    """The prompts of a completion; empty for a chat."""
    messages: tuple[Mapping[str, str], ...] = ()
    """The messages of a chat: `role` and `content` of each."""
    template_variables: Mapping[str, Any]
    """The variables of the chat template in addition to the messages."""
    max_tokens: int | None
    """The most tokens to generate; None leaves it to the window."""
    sampling: Sampling
    """The sampling of the first choice; choice i of a prompt has seed + i."""
    num_choices: int
    """The number of choices of each prompt."""
    stop: tuple[str, ...]
    logprobs: bool
    """Whether log-probabilities of tokens are requested; with `echo`, the prompt's, too."""
    names_likeliest: bool
    """Whether the likeliest token in each place is requested."""
    echo: bool
    """Whether the prompt comes back before the completion."""
    stream: bool
    stream_usage: bool
    """Whether a stream ends with the numbers of tokens."""

    @property
    def num_jobs(self) -> int:
        """Choices of all prompts."""
        return self.num_choices * max(1, len(self.prompts))


def read_body(body: Any, endpoint: Endpoint) -> Asked:
    """Parse a JSON body for an endpoint; raises `RefusedBody` naming the field that is not supported."""
    if not isinstance(body, dict):
        raise RefusedBody(f"the body is {shown(body)}, not a JSON object")
    known = {*_COMMON, *_UNCHANGED, *(_OF_CHAT if endpoint == CHAT else _OF_COMPLETIONS)}
    for name in sorted(body.keys() - known):
        raise RefusedBody(f"unknown field {name!r} of {endpoint}{did_you_mean(name, known, _NEAR)}; leave it out", name)
    given = {name: value for name, value in body.items() if value is not None}
    for name, harmless in _UNCHANGED.items():
        if name in given and given[name] not in harmless:
            raise RefusedBody(f"field {name!r}: {shown(given[name])} is not supported; leave it out", name)
    read = _Fields(given)
    max_tokens = _max_tokens(read, given, endpoint)
    asked = Asked(
        endpoint=endpoint,
        model=read("model", _text),
        prompts=() if endpoint == CHAT else read("prompt", _prompts),
        messages=read("messages", _messages) if endpoint == CHAT else (),
        template_variables=read("chat_template_kwargs", _mapping, {}),
        max_tokens=max_tokens,
        sampling=_sampling(read),
        num_choices=read("n", _whole, 1),
        stop=read("stop", _stop, ()),
        logprobs=read("logprobs", _truth, False) if endpoint == CHAT else "logprobs" in given,
        names_likeliest=read("top_logprobs" if endpoint == CHAT else "logprobs", _num_likeliest, 0) == 1,
        echo=read("echo", _truth, False),
        stream=read("stream", _truth, False),
        stream_usage=read("stream_options", _stream_usage, False),
    )
    _check(asked, given)
    return asked


class _Fields:
    """Reads the fields of a body, each by the function for its kind."""

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def __call__(self, name: str, read: Callable[[Any], Any], default: Any = ...) -> Any:
        """Return the field's value, or `default` if it is missing or null; a default `...` makes the field required."""
        if name not in self._given:
            if default is ...:
                raise RefusedBody(f"field {name!r} is missing", name)
            return default
        try:
            return read(self._given[name])
        except ValueError as error:
            raise RefusedBody(f"field {name!r}: {shown(self._given[name])} is {error}", name) from None


def _max_tokens(read: _Fields, given: Mapping[str, Any], endpoint: Endpoint) -> int | None:
    if endpoint == COMPLETIONS:
        return int(read("max_tokens", _whole, 16))
    if "max_tokens" in given and "max_completion_tokens" in given:
        raise RefusedBody("give either 'max_completion_tokens' or 'max_tokens'", "max_tokens")
    found = read("max_completion_tokens", _whole, read("max_tokens", _whole, None))
    if found == 0:
        raise RefusedBody("max_tokens 0 of a chat requests nothing; it must be at least 1", "max_tokens")
    return None if found is None else int(found)


def _sampling(read: _Fields) -> Sampling:
    return Sampling(
        temperature=read("temperature", _number, 1.0),
        top_k=read("top_k", _top_k, None),
        top_p=read("top_p", _number, 1.0),
        seed=read("seed", _whole, None),
        presence_penalty=read("presence_penalty", _number, 0.0),
        frequency_penalty=read("frequency_penalty", _number, 0.0),
    )


def _check(asked: Asked, given: Mapping[str, Any]) -> None:
    """Raise for fields that contradict each other, and for values that the engine refuses."""
    try:
        check_num_completions(asked.num_choices)
        asked.sampling.check()
    except JobError as error:
        raise RefusedBody(str(error)) from None
    if asked.num_jobs > MOST_COMPLETIONS:
        raise RefusedBody(
            f"{len(asked.prompts)} prompts of n = {asked.num_choices} choices are more than {MOST_COMPLETIONS}; "
            "ask in several requests",
            "n" if asked.num_choices > 1 else "prompt",
        )
    if "top_logprobs" in given and not asked.logprobs:
        raise RefusedBody("'top_logprobs' needs logprobs: true", "top_logprobs")
    if asked.max_tokens == 0 and not asked.echo:
        raise RefusedBody("max_tokens 0 without echo requests nothing", "max_tokens")
    if "best_of" in given and given["best_of"] != asked.num_choices:
        raise RefusedBody(f"field 'best_of': {shown(given['best_of'])} is not n, {asked.num_choices}", "best_of")
    if "stream_options" in given and not asked.stream:
        raise RefusedBody("'stream_options' needs stream: true", "stream_options")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("no text")
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("neither true nor false")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError("no whole number from 0")
    return value


def _top_k(value: Any) -> int | None:
    return None if value == -1 else _whole(value) or None  # other servers mean all tokens by -1 and by 0


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ValueError("no number")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
        raise ValueError("neither a text nor a list of texts, none of them empty")
    return tuple(stops)


def _num_likeliest(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value not in (0, 1):
        raise ValueError("neither 0 nor 1: at most one of the likeliest tokens is available")
    return value


def _stream_usage(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() - {"include_usage"}:
        raise ValueError('no {"include_usage": true}')
    return _truth(value.get("include_usage", False))


def _prompts(value: Any) -> tuple[Prompt, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(_is_id(each) for each in value):
            return (tuple(value),)
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if all(isinstance(each, list) and each and all(map(_is_id, each)) for each in value):
            return tuple(map(tuple, value))
    raise ValueError("neither a text, nor a list of texts, of token ids, or of lists of token ids")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _messages(value: Any) -> tuple[Mapping[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError('no list of {"role": ..., "content": ...}')
    return tuple(map(_message, value))


def _message(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise ValueError('no list of {"role": ..., "content": ...}')
    given = {name: each for name, each in value.items() if each not in (None, [])}
    for name in sorted(given.keys() - {"role", "content"}):
        raise RefusedBody(f"field 'messages': {name!r} of a message is not supported; leave it out", "messages")
    return {"role": value["role"], "content": _content(given.get("content"))}


def _content(value: Any) -> str:
    """Return the text of a message: a string, or a list with one text part."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        part: Mapping[str, Any] = value[0]
        if part.get("type") == "text" and not part.keys() - {"type", "text"}:
            value = part.get("text")
    if not isinstance(value, str):
        raise RefusedBody(
            f"field 'messages': the content {shown(value)} is neither a text nor one part of text; join several parts",
            "messages",
        )
    return value


_NEAR = 0.82
"""How similar a misspelt field must be to a known one: `min_tokens` must not match `max_tokens`."""
_COMMON = (
    *("model", "n", "max_tokens", "stop", "logprobs", "stream", "stream_options"),
    *("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty"),
)
_OF_COMPLETIONS = ("prompt", "echo", "best_of")
_OF_CHAT = ("messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs")


class _Anything:
    """Accepts every value: for fields that identify the caller and change no answer."""

    def __contains__(self, value: object) -> bool:
        return True


_UNCHANGED: Mapping[str, Any] = {
    **dict.fromkeys(("user", "metadata", "safety_identifier"), _Anything()),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "modalities": (["text"],),
}
"""Known fields that are not supported, with the values that have no effect."""
