"""Translates HELM's requests to the engine's jobs, and to the keys of HELM's cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from helm.common.request import Request

from engine.errors import JobError, UnsupportedError
from engine.job import Completion, Job, Sampling, check_num_completions
from engine.logit_rules import LogitRules, refused_settings
from engine.text.prompt import PromptTokenizer
from engine.thinking import Thinking
from flexgen_helm.helm.requests.model_sampling import ModelSampling
from flexgen_helm.helm.requests.rendering import Rendering
from flexgen_helm.helm.requests.results import PromptError, Response, Timing, response
from flexgen_helm.helm.requests.shaping import Shaping
from flexgen_helm.helm.requests.thinking import Reasoner
from flexgen_helm.helm.requests.tokenizer import EarlierRule, Spelling, sha256_of, tokenizer_digests

if TYPE_CHECKING:
    from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer

_PROBES = ("a", " a", "1", ".", "a\n")
"""Short prompts that interact with a template's text in different ways."""

_NO_LIMIT = 1_000_000
"""transformers writes 10**30 if a tokenizer sets no limit."""

Key = dict[str, Any]

SEEDS = "of completion i of a sampled request: 15 hex digits of sha256([what is asked, i]); the same in every process"
"""A description of how seeds are derived, for records; nothing else affects them."""
CLIENT = "flexgen_helm"
"""The name of the client in keys of HELM's cache."""


class Translator:
    """Translates for one deployment; raises `EngineError` for requests that cannot be run.

    `window` is the maximum number of positions of the model (if None, the tokenizer's), `pad_to` the length to which
    the policy pads prompts, if any. `generation_config` is the checkpoint's: its rules on texts are applied.
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
        shaping: Shaping | None = None,
        is_window_given: bool = False,
        generation_config: Mapping[str, Any] | None = None,
    ) -> None:
        settings, shaping = generation_config or {}, shaping or Shaping()
        self._refused = refused_settings(settings)
        found = settings.get("eos_token_id")
        with tokenizer as hf_tokenizer:
            found = hf_tokenizer.eos_token_id if found is None else found
        self._rules = LogitRules.of(settings, [] if found is None else [found] if isinstance(found, int) else found)
        self._tokenizer = tokenizer
        self._given_window = window if is_window_given else None
        self._model = model
        self._pad_to = pad_to
        self._end_of_text_token = end_of_text_token or None
        self._sampling = ModelSampling.of(shaping.sampling, settings, model=model, top_k=shaping.top_k)
        self._top_k = self._sampling.top_k
        with tokenizer as hf_tokenizer:
            self._prompts = PromptTokenizer.of(hf_tokenizer)
            self._earlier_rule = EarlierRule.of(hf_tokenizer, self._prompts.prefix)
            self._spelling = Spelling(hf_tokenizer)
            tokenizer_limit = limit if (limit := int(hf_tokenizer.model_max_length)) < _NO_LIMIT else None
            end_of_text_id = hf_tokenizer.get_vocab().get(end_of_text_token or "")
        self.window = window if window is not None else tokenizer_limit
        """The maximum number of positions; None if it is not known."""
        self._end_of_text: list[str | list[int]] = [] if end_of_text_id is None else [[int(end_of_text_id)]]
        if self._end_of_text_token:
            self._end_of_text.append(self._end_of_text_token)
        self._rendering = Rendering(
            tokenizer,
            model=model,
            apply_chat_template=shaping.apply_chat_template,
            variables=shaping.chat_template_kwargs,
        )
        probe = self._rendering.probe()
        with tokenizer as hf_tokenizer:
            self._reasoner = Reasoner.of(
                hf_tokenizer,
                model=model,
                template=self._rendering.template,
                probe=probe,
                reasoning=shaping.reasoning,
                budget=shaping.thinking_budget,
            )
        self._digests = tokenizer_digests(tokenizer)
        self._numbers: dict[int, int] = {}

    @cached_property
    def num_added(self) -> int:
        """The most tokens by which a prompt grows: those of its chat template, which HELM does not count in a window.

        The tokenizer's prefix of an unrendered prompt is left out where there is no space for it.
        """
        try:
            texts = [self.render(Request(prompt=text)) for text in _PROBES]
        except UnsupportedError:  # a template that refuses these refuses all prompts, and raises then
            return 0
        with self._tokenizer:
            pairs = [
                (self._prompts.rendered(after), self._prompts.rendered(before))
                for after, before in zip(texts, _PROBES, strict=True)
            ]
        return max(0, *(len(after) - len(before) for after, before in pairs))

    # Requests

    @property
    def notes(self) -> list[str]:
        """Settings of the deployment that affect its answers in addition to the requests, one line each."""
        notes = [self._rendering.note]
        if self._rules is not None:
            told = ", ".join(f"{name} {value}" for name, value in self._rules.told().items())
            notes.append(
                f"generation_config.json of {self._model} is followed in {told}, as HELM's client follows it; its "
                "settings of sampling are only where sampling: model is given"
            )
        own = (self._reasoner.note(self._model), self._sampling.note(self._model))
        return notes + [note for note in own if note is not None]

    @property
    def applies_chat_template(self) -> bool:
        """Whether prompts that are answered go through the chat template."""
        return self._rendering.applies_template

    @property
    def writes_date(self) -> bool:
        """Whether the chat template writes the date."""
        return self._rendering.writes_date

    def begin(self, moment: datetime) -> None:
        """Set the time that chat templates see to `moment`."""
        self._rendering.moment = moment

    def render(self, request: Request) -> str:
        """The text that the model will see."""
        return self._rendering.text(request)

    def key(self, request: Request, text: str) -> Key:
        """Everything that can change the result of a request whose rendered prompt is `text`, without the identity."""
        request = self._sampling.applied(request)
        key = {
            "client": CLIENT,
            "tokenizer": self._digests.whole,
            "chat_template": self._rendering.digest(request),
            "end_of_text_token": self._end_of_text_token,
            "num_completions": request.num_completions,
            **self._what_is_asked(request, text),
        }
        if self._rules is not None and request.max_tokens > 0:
            key["generation_config"] = self._rules.told()
        if self._earlier_rule.made_others(text, is_templated=self._rendering.is_templated(request)):
            key["special_tokens"] = "once"  # answers to the ids of the earlier rule are in caches under the same key
        if self._rule(request, text) is not None:
            key["thinking"] = self._reasoner.key
        if self._given_window is not None:  # else it follows from the model's files
            key["window"] = self._given_window
        return key if request.random is None else {**key, "random": request.random}

    def earlier_key(self, key: Key) -> Key:
        """Return `key` as earlier releases made it."""
        return {**key, "tokenizer": self._digests.earlier}

    def _rule(self, request: Request, text: str) -> Thinking | None:
        """Return the rule for thinking at the beginning of an answer; prompts that are only scored have no answer."""
        if request.max_tokens == 0 or not (self._rendering.is_templated(request) or not self.applies_chat_template):
            return None
        return self._reasoner.rule(text)

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

    def encode(self, request: Request, text: str, own: Sequence[int] | None = None) -> tuple[int, ...]:
        """Token ids of a request whose rendered prompt is `text`, by `PromptTokenizer`; raises `PromptError`.

        HELM begins language-modelling prompts with the tokenizer's own beginning, and fills windows without counting
        it. `own`: what the tokenizer makes of the text without special tokens, where that is known.
        """
        try:
            with self._tokenizer:
                if self._rendering.is_templated(request):
                    ids = self.one_of_each(self._prompts.rendered(text) if own is None else own)
                else:
                    ids = self.one_of_each(self._prompts.plain(text, self.window, own))
        except JobError as error:
            raise PromptError(str(error)) from None
        self._check_length(ids)
        return ids

    def one_of_each(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Make equal numbers the same objects: those of a suite hold millions of equal ones."""
        return tuple(map(self._numbers.setdefault, ids, ids))

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
        check_num_completions(request.num_completions)
        request = self._sampling.applied(request)
        thinking = self._rule(request, text)
        room = self._room(request.max_tokens, ids)
        if self._refused and request.max_tokens > 0:
            told = ", ".join(f"{name} {value}" for name, value in self._refused.items())
            raise UnsupportedError(
                f"generation_config.json of {self._model} sets {told}, which is not supported; remove it from that "
                "file to run the model without it"
            )
        rules = self._rules
        if rules is not None and request.max_tokens > 0:
            rules = replace(rules, prompt=tuple(ids), max_new_tokens=room)
        as_asked = Sampling(
            temperature=float(request.temperature),
            top_k=self._top_k,
            top_p=float(request.top_p),
            presence_penalty=float(request.presence_penalty),
            frequency_penalty=float(request.frequency_penalty),
            rules=rules if request.max_tokens > 0 else None,
        )
        as_asked.check()
        if request.temperature == 0:  # settings that restrict sampling have no effect, so that equal jobs look equal
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
                max_new_tokens=room,
                sampling=each,
                stop=[*request.stop_sequences, *self._end_of_text, *(thinking.style.stops if thinking else ())],
                prompt_logprobs=request.echo_prompt,
                thinking=thinking,
            )
            for each in sampling
        ]

    def _room(self, max_tokens: int, ids: Sequence[int]) -> int:
        """Tokens to generate: at most as many as there are positions; the last one needs none."""
        return max_tokens if self.window is None else min(max_tokens, self.window - len(ids) + 1)

    def response(
        self, request: Request, jobs: Sequence[Job], completions: Sequence[Completion], timing: Timing
    ) -> Response:
        """Make the cache entry for the completions of a request's `jobs`; raises the error of one that failed."""
        return response(self._tokenizer, self._spelling, request, jobs[0], completions, timing)


def _seed(asked: Key, index: int) -> int:
    """Return the seed of completion `index`: the same in every process, and independent of other completions."""
    return int(sha256_of([asked, index])[:15], 16)
