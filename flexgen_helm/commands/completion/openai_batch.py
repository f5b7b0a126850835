"""OpenAI's batch files for `flexgen-helm complete --format openai`: a line for each request in, and out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, EngineError, did_you_mean, shown
from engine.job import Completion, Job
from engine.reading import parse_json
from flexgen_helm.adapters.openai.bodies import ENDPOINTS, Asked, RefusedBody, read_body
from flexgen_helm.adapters.openai.model import Model, error_body, names_of
from flexgen_helm.commands.completion.answers import LineForm, Place
from flexgen_helm.commands.completion.prompts import BadPrompt
from flexgen_helm.commands.completion.questions import Format, Question, read_lines, shown_name

if TYPE_CHECKING:
    from engine.text.prompt import PromptTokenizer

_KEYS = ("custom_id", "method", "url", "body")
_ID = "batch_req"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A request of a batch file."""

    index: int
    where: str
    custom_id: str
    body: Mapping[str, Any]
    asked: Asked


@dataclass(frozen=True, kw_only=True)
class BadLine(BadPrompt):
    """A line that cannot be run, and its error."""

    custom_id: str | None
    error: EngineError


def read_batch(lines: Iterable[str], name: str) -> list[Line | BadLine]:
    """The requests of a batch file called `name`, in its order; empty lines are none."""
    found: list[Line | BadLine] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, entry = f"{name}, line {number}", None
        try:
            entry = parse_json(line.encode(errors="surrogatepass"), "the line", ConfigError)
            found.append(_line(entry, len(found), where, seen))
        except ConfigError as error:
            found.append(_bad(len(found), where, _custom_id(entry), error))
        seen.setdefault(_custom_id(entry) or "", number)
    return found


def _line(entry: Any, index: int, where: str, seen: Mapping[str, int]) -> Line:
    if not isinstance(entry, dict):
        raise ConfigError(f"the line is {shown(entry)}, not a JSON object")
    try:
        json.dumps(entry, allow_nan=False)  # which Python's reader takes, and no other
    except ValueError:
        raise ConfigError("the line holds NaN or an infinite number, which is no JSON") from None
    for unknown in sorted(entry.keys() - set(_KEYS)):
        raise RefusedBody(f"unknown key {unknown!r} of the line{did_you_mean(unknown, _KEYS)}", unknown)
    custom_id = _custom_id(entry)
    if not custom_id:
        raise RefusedBody("the line has no custom_id, a text that identifies its answer", "custom_id")
    if custom_id in seen:
        raise RefusedBody(f"custom_id {custom_id!r} is that of line {seen[custom_id]}, too", "custom_id")
    if entry.get("method") != "POST":
        raise RefusedBody(f"method {shown(entry.get('method'))} is not POST", "method")
    url = entry.get("url")
    if url not in ENDPOINTS:
        raise RefusedBody(f"url {shown(url)} is none of {', '.join(ENDPOINTS)}", "url")
    if "body" not in entry:
        raise RefusedBody("the line has no body", "body")
    asked = read_body(entry["body"], url)
    if asked.stream:
        raise RefusedBody("field 'stream': an answer in a file does not come in parts; leave it out", "stream")
    return Line(index=index, where=where, custom_id=custom_id, body=entry["body"], asked=asked)


def _custom_id(entry: Any) -> str | None:
    found = entry.get("custom_id") if isinstance(entry, dict) else None
    return found if isinstance(found, str) else None


def _bad(index: int, where: str, custom_id: str | None, error: EngineError) -> BadLine:
    return BadLine(index=index, where=where, reason=str(error), custom_id=custom_id, error=error)


@dataclass(frozen=True)
class _Request(Question):
    """All choices of a line."""

    line: Line
    model: Model
    jobs: tuple[Job, ...]

    @property
    def place(self) -> Place:  # type: ignore[override]
        return self.line.index, 0

    @property
    def where(self) -> str:  # type: ignore[override]
        return self.line.where

    def answer(self, completions: Sequence[Completion], key: str) -> dict[str, Any]:
        try:
            body = self.model.body(self.line.asked, self.jobs, completions, key)
        except EngineError as error:
            return _failure(self.line.index, self.line.custom_id, error)
        return _answer(self.line.index, key, self.line.custom_id, 200, body)

    def asked(self, identity: Mapping[str, Any]) -> Any:
        asked = self.line.asked
        prompts = [list(job.prompt) for job in self.jobs]
        return [asked.endpoint, self.line.custom_id, self.line.body, prompts, sorted(identity.items())]


class OpenAIFormat(Format):
    """A batch file; its lines contain all settings, and invalid lines are answered with an error."""

    skips_bad = True

    def __init__(self, args: Any, defaults: Mapping[str, Any]) -> None:
        """`args` are those of the command line, `defaults` what it says of settings by default."""
        self._names = names_of(args.model, args.served_model_name)
        named = [*args.prompts, *([] if args.input is None else [args.input])]
        if len(named) != 1:
            raise ConfigError("--format openai takes one batch file: name it, or - for standard input")
        (self._input,) = named
        for name, default in defaults.items():
            if getattr(args, name) != default:
                raise ConfigError(f"--{name.replace('_', '-')}: with --format openai the bodies say it; leave it out")

    @property
    def form(self) -> LineForm:
        """The id of a line says which request it answers, with a key."""
        return LineForm(beginning=f'{{"id": "{_ID}-', read=_read_answer)

    def prompts(self) -> list[Line | BadLine]:
        """The lines of the file, at least one."""
        name = shown_name(self._input)
        if not (found := read_batch(read_lines(self._input), name)):
            raise ConfigError(f"{name} holds no request")
        return found

    def questions(
        self, prompts: Sequence[Line | BadLine], tokenizer: PromptTokenizer, vocab_size: int | None
    ) -> tuple[list[Question], list[BadPrompt]]:
        """A question for each valid line, and the other lines."""
        model = Model.of(self._names, tokenizer, vocab_size)
        found: list[Question] = []
        bad: list[BadPrompt] = []
        for line in prompts:
            if isinstance(line, BadLine):
                bad.append(line)
                continue
            try:
                found.append(_Request(line, model, tuple(model.jobs(line.asked))))
            except EngineError as error:
                bad.append(_bad(line.index, line.where, line.custom_id, error))
        return found, bad

    def refusal(self, prompt: BadPrompt) -> dict[str, Any]:
        """An answer of status 400 or 404, with the error."""
        assert isinstance(prompt, BadLine)
        return _failure(prompt.index, prompt.custom_id, prompt.error, prompt.where)

    def settings(self) -> dict[str, Any]:
        """What bodies may call the model."""
        return {"format": "openai", "served_model_name": self._names[0]}


def _answer(index: int, key: str, custom_id: str | None, status: int, body: Mapping[str, Any]) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req-{index}-{key}", "body": body}
    return {"id": f"{_ID}-{index}-{key}", "custom_id": custom_id, "response": response, "error": None}


def _failure(index: int, custom_id: str | None, error: EngineError, where: str = "") -> dict[str, Any]:
    """OpenAI's readers look for the status, those of vLLM's files for the error."""
    status, body = error_body(error)
    told = body["error"]
    if custom_id is None:  # then the place is all that tells which line it is
        told["message"] = f"{where}: {told['message']}"
    code = told["code"] or told["type"]
    return {
        **_answer(index, "failed", custom_id, status, body),
        "error": {"code": code, "message": told["message"]},
    }


def _read_answer(entry: Any) -> tuple[Place, str, bool]:
    kind, index, key = entry["id"].split("-")
    if kind != _ID:
        raise ValueError(kind)
    return (int(index), 0), key, entry["error"] is not None
