"""A model behind OpenAI's endpoints: turns request bodies into jobs, and completions into response bodies."""

from __future__ import annotations

import codecs
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engine.errors import ConfigError, EngineError, JobError
from engine.job import Completion, Job, Likeliest
from engine.text.prompt import PromptTokenizer
from engine.text.template import names_in_template
from flexgen_helm.adapters.openai.bodies import CHAT, Asked, Prompt, RefusedBody
from flexgen_helm.helm.requests.thinking import Reasoner
from flexgen_helm.helm.requests.tokenizer import Spelling


@dataclass(frozen=True, kw_only=True)
class Model:
    """The names, tokenizer, template and vocabulary by which bodies are answered."""

    names: tuple[str, ...]
    """The names by which a body may call it; the first one is used in responses without a name."""
    prompts: PromptTokenizer
    reasoner: Reasoner | None
    """How the model thinks before it answers a chat; None without a chat template."""
    vocab_size: int | None
    """The number of token ids of the model; None leaves it to the engine to refuse others."""
    spelling: Spelling
    """The spelling of tokens by its tokenizer, which caches what it finds."""

    @classmethod
    def of(cls, names: Sequence[str], prompts: PromptTokenizer, vocab_size: int | None) -> Model:
        """Create the model of a tokenizer and a number of token ids.

        Raises `ConfigError` where its template does not show how it thinks.
        """
        tokenizer = prompts.tokenizer
        reasoner = None
        if tokenizer.chat_template:
            try:
                probe = prompts.chat_text([{"role": "user", "content": "a"}])
            except EngineError:
                raise
            except Exception:  # templates can raise any exception
                probe = ""
            template = str(tokenizer.get_chat_template())
            reasoner = Reasoner.of(
                tokenizer, model=names[0], template=template, probe=probe, reasoning=None, budget=None
            )
        return cls(
            names=tuple(names),
            prompts=prompts,
            reasoner=reasoner,
            vocab_size=vocab_size,
            spelling=Spelling(tokenizer),
        )

    def jobs(self, asked: Asked) -> list[Job]:
        """A job for each choice of each prompt, choices of one prompt together; raises `RefusedBody`."""
        if asked.model not in self.names:
            raise RefusedBody(f"model {asked.model!r} is not here; {self.names[0]!r} is", "model", 404)
        try:
            first = [self._chat(asked)] if asked.endpoint == CHAT else [self._plain(asked, p) for p in asked.prompts]
            for job in first:
                job.check()
                job.check_fits(_ANY_VOCABULARY, self.prompts.window, None)
        except JobError as error:
            raise RefusedBody(str(error)) from None
        return [_choice(job, number) for job in first for number in range(asked.num_choices)]

    def _plain(self, asked: Asked, prompt: Prompt) -> Job:
        ids = self.prompts.plain(prompt) if isinstance(prompt, str) else self._known(prompt)
        return Job(
            prompt=ids,
            max_new_tokens=asked.max_tokens or 0,
            sampling=asked.sampling,
            stop=asked.stop,
            prompt_logprobs=asked.echo and (asked.logprobs or asked.max_tokens == 0),
            likeliest=asked.names_likeliest,
        )

    def _known(self, prompt: Sequence[int]) -> list[int]:
        for token in prompt:
            if token < 0 or (self.vocab_size is not None and token >= self.vocab_size):
                size = "" if self.vocab_size is None else f" of {self.vocab_size}"
                raise RefusedBody(f"field 'prompt': {token} is no token id of the model's vocabulary{size}", "prompt")
        return list(prompt)

    def _chat(self, asked: Asked) -> Job:
        if self.reasoner is None:
            raise RefusedBody(f"{self.names[0]} has no chat template; ask /v1/completions", "messages")
        variables = self._checked(asked.template_variables)
        try:
            ids = self.prompts.chat(asked.messages, **variables)
            text = "" if self.reasoner.style is None else self.prompts.chat_text(asked.messages, **variables)
        except EngineError as error:
            raise RefusedBody(str(error), "messages") from None
        except Exception as error:  # templates can raise any exception
            reason = " ".join(str(error).split())[:200]
            raise RefusedBody(f"the chat template refuses the messages: {reason}", "messages") from None
        most = asked.max_tokens
        if most is None:
            if self.prompts.window is None:
                raise RefusedBody("the model sets no limit; give max_completion_tokens", "max_tokens")
            most = max(1, self.prompts.window - len(ids))
        rule = self.reasoner.rule(text)
        return Job(
            prompt=ids,
            max_new_tokens=most,
            sampling=asked.sampling,
            stop=asked.stop,
            thinking=rule,
            likeliest=asked.names_likeliest,
        )

    def _checked(self, variables: Mapping[str, Any]) -> Mapping[str, Any]:
        known = names_in_template(str(self.prompts.tokenizer.get_chat_template())) if variables else set()
        for name in variables:
            if name not in known or name in _GIVEN:
                raise RefusedBody(
                    f"chat_template_kwargs: the chat template does not look at {name!r}", "chat_template_kwargs"
                )
        return variables

    def body(self, asked: Asked, jobs: Sequence[Job], completions: Sequence[Completion], name: str) -> dict[str, Any]:
        """Make the response body from all `completions` of `jobs`; `name` is the base of its id.

        Raises the error of a completion that failed.
        """
        for completion in completions:
            if completion.error is not None:
                raise completion.error
        is_chat = asked.endpoint == CHAT
        choose = self.chat_choice if is_chat else self.text_choice
        choices = [choose(asked, job, done, at) for at, (job, done) in enumerate(zip(jobs, completions, strict=True))]
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{name}",
            "object": "chat.completion" if is_chat else "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "choices": choices,
            "usage": usage(asked, jobs, completions),
        }

    def chat_choice(self, asked: Asked, job: Job, done: Completion, index: int) -> dict[str, Any]:
        """Make a choice of a chat response, with the reasoning content apart from the answer."""
        reading = job.thinking.read(done.text) if job.thinking is not None else None
        message = {"role": "assistant", "content": done.text, "refusal": None}
        if reading is not None and reading.thinking is not None:
            message |= {"content": done.text[reading.begin :], "reasoning_content": reading.thinking}
        logprobs = None
        if asked.logprobs:
            texts = self.spelling.texts(done.tokens)
            tops = self._likeliest(done.tokens, texts, done.likeliest)
            told = [
                {**_chat_logprob(text, score), "top_logprobs": [] if top is None else [_chat_logprob(*top)]}
                for text, score, top in zip(texts, done.logprobs, tops, strict=True)
            ]
            logprobs = {"content": told, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _reason(done)}

    def text_choice(self, asked: Asked, job: Job, done: Completion, index: int) -> dict[str, Any]:
        """Make a choice of a completion response; `echo` puts the prompt before it."""
        before: list[int] = list(job.prompt) if asked.echo else []
        prompt = asked.prompts[index // asked.num_choices]
        given = prompt if isinstance(prompt, str) else str(self.prompts.tokenizer.decode(list(prompt)))
        text = given + done.text if asked.echo else done.text
        logprobs = None
        if asked.logprobs:
            ids = [*before, *done.tokens]
            texts = self.spelling.texts(ids)
            scores = [*((done.prompt_logprobs or ()) if asked.echo else ()), *done.logprobs]
            likeliest = [*((done.prompt_likeliest or ()) if asked.echo else ()), *(done.likeliest or ())]
            told = zip(texts, scores, self._likeliest(ids, texts, likeliest), strict=True)
            # If two tokens are spelled alike, the more likely one is kept.
            tops = [None if top is None else {token: score, top[0]: top[1]} for token, score, top in told]
            logprobs = {
                "tokens": texts,
                "token_logprobs": scores,
                "top_logprobs": tops if asked.names_likeliest else None,
                "text_offset": _offsets(texts),
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": _reason(done)}

    def _likeliest(
        self, ids: Sequence[int], texts: Sequence[str], likeliest: Sequence[Likeliest | None] | None
    ) -> list[tuple[str, float] | None]:
        """Return spelling and log-probability of the most likely token at each of `ids`; None where it is not known."""
        told: list[tuple[str, float] | None] = []
        for at, top in enumerate(likeliest or [None] * len(ids)):
            if top is None:
                told.append(None)
            else:
                is_same = top[0] == ids[at]
                text = texts[at] if is_same else self.spelling.texts([*ids[max(0, at - 1) : at], top[0]])[-1]
                told.append((text, top[1]))
        return told


_ANY_VOCABULARY = 1 << 62
"""a limit that no id exceeds: the engine, which knows the vocabulary, refuses ids outside it"""
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "tokenize"}
"""Names that templates always receive."""
_BYTES = "bytes:"
"""The prefix of the spelling of a token that is only a part of a character."""


def names_of(model: str, served: str | None) -> tuple[str, ...]:
    """Return the names by which bodies may call a model: `served`, else its command-line and directory names."""
    if served:
        return (served,)
    directory = Path(model)
    return tuple(dict.fromkeys((model, directory.resolve().name))) if directory.is_dir() else (model,)


def usage(asked: Asked, jobs: Sequence[Job], completions: Sequence[Completion]) -> dict[str, int]:
    """The number of prompt tokens, each prompt counted once, and of generated tokens, end-of-text included."""
    prompt = sum(len(job.prompt) for job in jobs[:: asked.num_choices])
    new = sum(len(done.tokens) + (done.end_token is not None) for done in completions)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


def error_body(error: EngineError) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and OpenAI's error object for an error."""
    is_theirs = isinstance(error, ConfigError | JobError)
    status, param = (error.status, error.param) if isinstance(error, RefusedBody) else (400 if is_theirs else 500, None)
    kind = _KINDS.get(status, "invalid_request_error" if is_theirs else "server_error")
    code = "model_not_found" if (status, param) == (404, "model") else None
    return status, {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


_KINDS = {401: "authentication_error", 429: "rate_limit_error"}


def _choice(job: Job, number: int) -> Job:
    seed = job.sampling.seed
    return job if seed is None else replace(job, sampling=replace(job.sampling, seed=seed + number))


def _reason(done: Completion) -> str | None:
    return "stop" if done.finish_reason == "endoftext" else done.finish_reason


def _chat_logprob(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(_bytes(token))}


def _bytes(token: str) -> bytes:
    r"""Return the bytes of a token spelled by `Spelling`, which writes "bytes:\xf0" for a part of a character."""
    if not token.startswith(_BYTES):
        return token.encode()
    return bytes(int(each, 16) for each in token.removeprefix(_BYTES).split("\\x")[1:])


def _offsets(tokens: Sequence[str]) -> list[int]:
    """The number of whole characters before each token."""
    decoder, count, found = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
    for token in tokens:
        found.append(count)
        count += len(decoder.decode(_bytes(token)))
    return found
