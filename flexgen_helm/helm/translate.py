"""From HELM's vocabulary to the engine's and back: the only file that knows both."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from helm.common.request import ErrorFlags, GeneratedOutput, Request, RequestResult, Token

from engine.errors import EngineError, JobError, NumericsError, UnsupportedError
from engine.job import Completion, Job, Sampling

if TYPE_CHECKING:
    from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", " a", "1", ".", "a\n")
"""Short prompts that meet a template's text in different ways."""

_NO_LIMIT = 1_000_000
"""transformers writes 10**30 where a tokenizer sets no limit."""

Key = dict[str, Any]
Response = dict[str, Any]
"""What HELM's cache keeps of a request; JSON types only."""


class PromptError(JobError):
    """A prompt that this model cannot take; the other requests of a run are not to blame for it."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How long a request took, and in what company."""

    seconds: float
    """From the beginning of the engine call that answered it to the answer."""
    started: float
    """When that call began, in seconds since the Epoch."""
    num_requests: int
    """Requests that the engine worked on together."""


class Translator:
    """Translates for one deployment; raises `EngineError` for requests that cannot be run.

    `window` is the most positions the model takes (if None, what the tokenizer says), `pad_to` the length that the
    policy pads prompts to, if any.
    `end_of_text_token` ends a completion also where the model spells it out in other tokens.
    """

    def __init__(
        self,
        tokenizer: WrappedPreTrainedTokenizer,
        *,
        model: str,
        window: int | None,
        pad_to: int | None,
        end_of_text_token: str | None,
        apply_chat_template: bool | None,
        top_k: int | None,
        is_window_given: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._given_window = window if is_window_given else None
        self._model = model
        self._pad_to = pad_to
        self._end_of_text_token = end_of_text_token or None
        self._top_k = top_k
        with tokenizer as hf_tokenizer:
            chat_template = hf_tokenizer.chat_template
            self._bos_token = str(hf_tokenizer.bos_token or "")
            self._adds_bos = _adds_bos(hf_tokenizer)
            tokenizer_limit = limit if (limit := int(hf_tokenizer.model_max_length)) < _NO_LIMIT else None
            end_of_text_id = hf_tokenizer.get_vocab().get(end_of_text_token or "")
        self.window = window if window is not None else tokenizer_limit
        """Most positions; None where nothing tells."""
        self._end_of_text: list[str | list[int]] = [] if end_of_text_id is None else [[int(end_of_text_id)]]
        if self._end_of_text_token:
            self._end_of_text.append(self._end_of_text_token)
        self._applies_chat_template = bool(chat_template) if apply_chat_template is None else apply_chat_template
        self._chat_template = _sha256(chat_template) if self._applies_chat_template else None
        self._fingerprint = tokenizer_fingerprint(tokenizer)
        self._numbers: dict[int, int] = {}

    @cached_property
    def num_added(self) -> int:
        """Tokens by which a prompt grows at most: its chat template and special tokens, but for a BOS that may go.

        HELM counts none of them when it fills a window.
        """
        try:
            texts = [self.render(Request(prompt=text)) for text in _PROBES]
        except UnsupportedError:  # a template that refuses these refuses all prompts, and says so then
            return 0
        with self._tokenizer as tokenizer:
            plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in _PROBES]
            whole = [tokenizer(text)["input_ids"] for text in texts]
        grown = max(len(after) - len(before) for after, before in zip(whole, plain, strict=True))
        return max(0, grown - self._adds_bos)

    # Requests

    def render(self, request: Request) -> str:
        """The text that the model will see."""
        _refuse_what_is_not_text(request)
        if not self._applies_chat_template:
            if request.messages:
                raise UnsupportedError(
                    f"the request has messages, but {self._model} is run without a chat template; "
                    "set apply_chat_template: true if it is a chat model"
                )
            return request.prompt
        messages = request.messages or [{"role": "user", "content": request.prompt}]
        try:
            with self._tokenizer as tokenizer:
                return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UnsupportedError(
                f"the chat template of {self._model} refuses the request: {reason}; set apply_chat_template: false "
                "if it is no chat model"
            ) from None

    def key(self, request: Request, text: str, identity: Mapping[str, str | int | None]) -> Key:
        """Everything that can change the result of a request whose rendered prompt is `text`."""
        key = {
            "client": "flexgen_helm",
            "identity": dict(identity),
            "tokenizer": self._fingerprint,
            "chat_template": self._chat_template,
            "end_of_text_token": self._end_of_text_token,
            "num_completions": request.num_completions,
            **self._what_is_asked(request, text),
        }
        if self._given_window is not None:  # else it follows from the model's files
            key["window"] = self._given_window
        return key if request.random is None else {**key, "random": request.random}

    def _what_is_asked(self, request: Request, text: str) -> Key:
        return {
            "prompt": text,
            "temperature": float(request.temperature),
            "top_k": self._top_k,
            "top_p": float(request.top_p),
            "max_tokens": request.max_tokens,
            "stop_sequences": list(request.stop_sequences),
            "echo_prompt": request.echo_prompt,
            "presence_penalty": float(request.presence_penalty),
            "frequency_penalty": float(request.frequency_penalty),
        }

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered prompt, with the special tokens that the tokenizer adds; raises `PromptError`.

        The tokenizer's BOS is left out where the prompt brings its own (HELM begins language-modelling prompts with
        it), and where it alone would overflow the window: HELM fills windows without counting it.
        """
        try:
            with self._tokenizer as tokenizer:
                ids = self._one_of_each(tokenizer(text, return_token_type_ids=False)["input_ids"])
        except (TypeError, ValueError) as error:  # lone surrogates, for example
            raise PromptError(f"the prompt cannot be tokenized: {' '.join(str(error).split())}") from None
        if self._has_one_bos_too_many(text, ids):
            ids = ids[1:]
        self._check_length(ids)
        return ids

    def _one_of_each(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The same numbers as objects that all prompts share: those of a suite hold millions of equal ones."""
        return tuple(map(self._numbers.setdefault, ids, ids))

    def _has_one_bos_too_many(self, text: str, ids: Sequence[int]) -> bool:
        if not self._adds_bos:
            return False
        if text.startswith(self._bos_token):
            return len(ids) > 1 and ids[1] == ids[0]
        return self.window is not None and len(ids) == self.window + 1

    def _check_length(self, ids: Sequence[int]) -> None:
        if not ids:
            raise PromptError(f"the prompt is empty; {self._model} needs at least one token")
        if self.window is not None and len(ids) > self.window:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, more than the {self.window} that {self._model} takes; "
                f"set max_sequence_length: {max(1, self.window - self.num_added)} (or less) in its model deployment"
            )
        if self._pad_to is not None and len(ids) > self._pad_to:
            raise PromptError(
                f"the prompt has {len(ids)} tokens, more than pad-to-seq-len {self._pad_to}; "
                f"raise pad-to-seq-len to {len(ids)}, or leave it out"
            )

    def jobs(self, request: Request, text: str, ids: Sequence[int]) -> list[Job]:
        """The jobs whose completions make the request's; one is enough where all completions are equal."""
        if request.num_completions < 1:
            raise JobError(f"num_completions {request.num_completions} is below 1")
        as_asked = Sampling(
            temperature=float(request.temperature),
            top_k=self._top_k,
            top_p=float(request.top_p),
            presence_penalty=float(request.presence_penalty),
            frequency_penalty=float(request.frequency_penalty),
        )
        as_asked.check()
        if request.temperature == 0:  # what would restrict sampling changes nothing, so equal jobs look equal
            sampling = [replace(as_asked, top_k=None, top_p=1.0, seed=0)]
        else:
            asked = {**self._what_is_asked(request, text), "random": request.random}
            sampling = [
                replace(as_asked, seed=_seed(asked, index))
                for index in range(request.num_completions if request.max_tokens > 0 else 1)
            ]
        return [
            Job(
                prompt=ids,
                max_new_tokens=self._room(request.max_tokens, ids),
                sampling=each,
                stop=[*request.stop_sequences, *self._end_of_text],
                prompt_logprobs=request.echo_prompt,
            )
            for each in sampling
        ]

    def _room(self, max_tokens: int, ids: Sequence[int]) -> int:
        """Tokens to generate: no more than there are positions for; the last one needs none."""
        return max_tokens if self.window is None else min(max_tokens, self.window - len(ids) + 1)

    # Results

    def response(
        self, request: Request, ids: Sequence[int], completions: Sequence[Completion], timing: Timing
    ) -> Response:
        """What the cache keeps; raises the error of a completion that failed."""
        for completion in completions:
            if completion.error is not None:
                raise completion.error
        if len(completions) < request.num_completions:
            completions = [completions[0]] * request.num_completions
        with self._tokenizer as tokenizer:
            response: Response = {
                "completions": [
                    {
                        "text": _continuation(tokenizer, ids, completion) if request.echo_prompt else completion.text,
                        "tokens": [tokenizer.decode(token) for token in completion.tokens],
                        "logprobs": list(completion.logprobs),
                        "finish_reason": completion.finish_reason,
                    }
                    for completion in completions
                ],
                "request_time": timing.seconds,
                "request_datetime": int(timing.started),
            }
            if request.echo_prompt:
                response["prompt"] = {
                    "text": tokenizer.decode(list(ids)),
                    "tokens": [tokenizer.decode(token) for token in ids],
                    "logprobs": [logprob or 0.0 for logprob in completions[0].prompt_logprobs or ()],
                }
        if timing.num_requests > 1:
            response["batch_size"] = timing.num_requests
            response["batch_request_time"] = timing.seconds
        return response


def _continuation(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], completion: Completion) -> str:
    """Text of a completion as it stands behind its prompt, where a tokenizer like Llama's keeps its first space.

    Where the completion changes what the prompt is (half a character makes its neighbours unreadable), its text alone.
    """
    if not completion.tokens:
        return completion.text
    prompt, whole = str(tokenizer.decode(list(ids))), str(tokenizer.decode([*ids, *completion.tokens]))
    if not whole.startswith(prompt):
        return completion.text
    num_cut = len(tokenizer.decode(list(completion.tokens))) - len(completion.text)  # from the stop on
    return whole[len(prompt) : len(whole) - num_cut]


def result(response: Response, *, cached: bool) -> RequestResult:
    """HELM's result of a response, new or from the cache."""
    prompt = response.get("prompt", {"text": "", "tokens": [], "logprobs": []})
    return RequestResult(
        success=True,
        embedding=[],
        completions=[_generated_output(prompt, completion) for completion in response["completions"]],
        cached=cached,
        request_time=response["request_time"],
        request_datetime=response["request_datetime"],
        batch_size=response.get("batch_size"),
        batch_request_time=response.get("batch_request_time"),
    )


def _generated_output(prompt: Response, completion: Response) -> GeneratedOutput:
    texts = [*prompt["tokens"], *completion["tokens"]]
    logprobs = [*prompt["logprobs"], *completion["logprobs"]]
    tokens = [Token(text=text, logprob=logprob) for text, logprob in zip(texts, logprobs, strict=True)]
    return GeneratedOutput(
        text=prompt["text"] + completion["text"],
        logprob=sum(logprobs),
        tokens=tokens,
        finish_reason={"reason": completion["finish_reason"]},
    )


def failure(request: Request, error: EngineError) -> RequestResult:
    """HELM's result of a request that failed; never to be retried, since HELM would sleep 150 s over it.

    HELM scores a failure that is not fatal as an empty completion. That is the lot of a prompt that the model cannot
    take, or has no finite answer to; but where log-probabilities of the prompt are scored, an empty completion would
    have the best of all (0), so there, and for every fault that is not the prompt's, HELM is told to give up the run.
    """
    fatal = request.echo_prompt or not isinstance(error, PromptError | NumericsError)
    return RequestResult(
        success=False,
        embedding=[],
        completions=[],
        cached=False,
        error=f"{type(error).__name__}: {error}",
        error_flags=ErrorFlags(is_retriable=False, is_fatal=fatal),
    )


def _refuse_what_is_not_text(request: Request) -> None:
    asked = {
        "an embedding": request.embedding,
        "a multimodal prompt": request.multimodal_prompt,
        "an image": request.image_generation_parameters,
        "a response format": request.response_format,
    }
    for what, value in asked.items():
        if value:
            raise UnsupportedError(f"the request asks for {what}; flexgen_helm serves plain text requests only")
    if request.prompt and request.messages:
        raise UnsupportedError("the request has both prompt and messages; set one of them")


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    plain, special = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    return tokenizer.bos_token_id is not None and special[:1] == [tokenizer.bos_token_id] != plain[:1]


_fingerprints: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def tokenizer_fingerprint(wrapped: WrappedPreTrainedTokenizer) -> str:
    """Hex digest of all that decides which ids a text becomes; a tokenizer's name would not tell."""
    with wrapped as tokenizer:  # its lock also keeps two threads from computing this twice
        if wrapped not in _fingerprints:
            backend = getattr(tokenizer, "backend_tokenizer", None)
            if backend is None:
                state: Any = [type(tokenizer).__name__, tokenizer.get_vocab(), tokenizer.special_tokens_map]
            else:
                backend.no_truncation()  # left over from HELM's own calls
                backend.no_padding()
                state = backend.to_str()
            _fingerprints[wrapped] = _sha256(state)
        return _fingerprints[wrapped]


def _seed(asked: Key, index: int) -> int:
    """Seed of completion `index`: the same in every process, whatever other completions are asked for."""
    return int(_sha256([asked, index])[:15], 16)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
