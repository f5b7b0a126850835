"""inspect_ai's model provider `flexgen`: turns samples into jobs of the engine, with the texts of its `hf` provider."""

from __future__ import annotations

import atexit
import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import engine
from engine.errors import ConfigError, InstallationError, JobError, did_you_mean
from engine.job import Completion, Job, Likeliest, Sampling, check_num_completions
from engine.policy import Policy
from engine.reading import parse_bytes
from engine.text.prompt import PromptTokenizer, check_characters
from engine.text.template import check_template_ends
from flexgen_helm.adapters.gathering import Gathering
from flexgen_helm.adapters.generation_settings import GenerationSettings
from flexgen_helm.helm.requests.shaping import Reasoning
from flexgen_helm.helm.requests.thinking import Reasoner
from flexgen_helm.helm.requests.tokenizer import Spelling

try:
    from inspect_ai.model import (
        ChatCompletionChoice,
        ChatMessage,
        ChatMessageAssistant,
        ContentReasoning,
        ContentText,
        GenerateConfig,
        Logprob,
        Logprobs,
        ModelAPI,
        ModelOutput,
        ModelUsage,
        TopLogprob,
    )
    from inspect_ai.model._providers.hf import HuggingFaceAPI
    from inspect_ai.model._providers.util import HFHandler
    from inspect_ai.tool import ToolChoice, ToolInfo
except ImportError as error:
    raise InstallationError(
        f"inspect_ai is missing, or another version ({error}); run `pip install 'flexgen-helm[inspect]'`"
    ) from error

_MOST_CONNECTIONS = 1000
"""The default number of samples in flight: the harness's own rule begins with 20, and a sweep carries hundreds."""
_MOST_TOKENS = 2048
"""The default maximum of generated tokens in the `hf` provider."""
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "response_schema": (),
    "extra_body": ({},),
    "extra_headers": ({},),
    "reasoning_effort": (),
    "effort": (),
    "verbosity": (),
    "fallback_models": ([],),
}
"""Unsupported settings that would change answers, with the values that have no effect."""


class FlexGenAPI(HuggingFaceAPI):
    """Answers as `inspect_ai.model._providers.hf` does, by an engine whose model may be larger than the GPU.

    Conversations, tools and tool calls are rendered and parsed by that provider's own code. `model_path` is the model,
    a hub id or directory, where it is not the name after `flexgen/`. `policy` is "auto", the name of a shipped policy,
    a YAML file or a mapping; `dtype`, `device`, `gpu_memory` and `cpu_memory` override it. `chat_template`,
    `use_chat_template` and `enable_thinking` are the `hf` provider's; `reasoning` is a deployment's (`Reasoner`).
    Raises `EngineError`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        *,
        model_path: str | None = None,
        policy: str | Mapping[str, Any] | None = "auto",
        dtype: str | None = None,
        device: str | None = None,
        gpu_memory: str | float | None = None,
        cpu_memory: str | float | None = None,
        chat_template: str | None = None,
        use_chat_template: bool | None = None,
        enable_thinking: bool | None = None,
        reasoning: Reasoning | None = None,
        **others: Any,
    ) -> None:
        config = GenerateConfig() if config is None else config
        ModelAPI.__init__(self, model_name, base_url, api_key, [], config)
        for name in others:
            raise ConfigError(f"-M {name}: unknown argument{did_you_mean(name, _ARGUMENTS)}")
        if base_url is not None:
            raise ConfigError(f"base_url {base_url}: the model runs here; leave it out")
        if config.max_connections is None and config.adaptive_connections is None and not config.batch:
            config.max_connections = _MOST_CONNECTIONS  # the harness reads it there before it applies its own rule
        named = Policy.load(policy)
        loaded = dataclasses.replace(
            named,
            dtype=dtype or named.dtype,
            device=named.device if device is None else device,
            gpu_memory=named.gpu_memory if gpu_memory is None else parse_bytes(gpu_memory, "-M gpu_memory"),
            cpu_memory=named.cpu_memory if cpu_memory is None else parse_bytes(cpu_memory, "-M cpu_memory"),
        )
        loaded.check("-M")
        self.engine = engine.Engine.from_pretrained(model_path or model_name, policy=loaded)
        atexit.register(self.engine.close)
        self.tokenizer: Any = self.engine.tokenizer
        self.chat_template, self.use_chat_template = chat_template, use_chat_template
        self.enable_thinking = enable_thinking
        if chat_template is not None:
            self.tokenizer.chat_template = chat_template
        self._prompts = PromptTokenizer.of(self.tokenizer, self.engine.window)
        self._is_templated = bool(self.tokenizer.chat_template) and use_chat_template is not False
        check_template_ends(self.tokenizer)
        self._reasoning = reasoning
        self._reasoner = lru_cache(self._make_reasoner)
        self._reasoner(None)
        self._special = [str(each) for each in self.tokenizer.added_tokens_decoder.values() if each.special]
        self._gathering = Gathering(self.engine)
        self._settings = GenerationSettings(Path(self.tokenizer.name_or_path), self.tokenizer.eos_token_id)

    def close(self) -> None:
        """Release everything."""
        self.engine.close()

    def max_connections(self) -> int:
        """The number of samples in flight."""
        return _MOST_CONNECTIONS

    def max_tokens(self) -> int | None:
        """The default maximum of tokens of an answer."""
        return _MOST_TOKENS

    def connection_key(self) -> str:
        """Each model has a separate limit of connections."""
        return str(self.model_name)

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._prompts.rendered(text)

    async def count_text_tokens(self, text: str) -> int:
        """The number of tokens of a text."""
        return len(self._prompts.rendered(text))

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The answer to a conversation; raises `EngineError`, which fails the sample."""
        _refuse_what_is_not_carried_out(config)
        chat = self.hf_chat(input, tools)
        check_characters(len(chat), self.engine.window)
        prompt = self._prompts.rendered(chat) if self._is_templated else self._prompts.plain(chat)
        wanted = config.max_tokens or _MOST_TOKENS
        room = wanted if self.engine.window is None else self.engine.window - len(prompt) + 1
        if room < 1:
            return ModelOutput.from_content(self.model_name, "", stop_reason="model_length")
        jobs = self._jobs(prompt, chat, config, min(wanted, room))
        began = time.monotonic()
        completions = await self._gathering.ask(jobs)
        for done in completions:
            if done.error is not None:
                raise done.error
        pairs = zip(jobs, completions, strict=True)
        choices = [self._choice(job, done, tools, config, is_cut=room < wanted) for job, done in pairs]
        count = sum(len(done.tokens) + (done.end_token is not None) for done in completions)
        return ModelOutput(
            model=self.model_name,
            choices=choices,
            usage=ModelUsage(input_tokens=len(prompt), output_tokens=count, total_tokens=len(prompt) + count),
            time=time.monotonic() - began,
        )

    def _jobs(self, prompt: Sequence[int], chat: str, config: GenerateConfig, most: int) -> list[Job]:
        count = 1 if config.num_choices is None else config.num_choices
        check_num_completions(count)
        rule = self._reasoner(config.reasoning_tokens).rule(chat)

        temperature = self._settings.temperature if config.temperature is None else config.temperature
        asked = {"top_k": config.top_k, "top_p": config.top_p}
        sampling = Sampling(
            temperature=temperature,
            presence_penalty=config.presence_penalty or 0.0,
            frequency_penalty=config.frequency_penalty or 0.0,
            **(self._settings.sampled(asked) if temperature else {}),
        )
        sampling = self._settings.applied(sampling, tuple(prompt), most)
        jobs = [
            Job(
                prompt=tuple(prompt),
                max_new_tokens=most,
                sampling=dataclasses.replace(sampling, seed=None if config.seed is None else config.seed + number),
                stop=tuple(config.stop_seqs or ()),
                thinking=rule,
                prompt_logprobs=config.prompt_logprobs is not None,
                likeliest=bool(config.top_logprobs),
            )
            for number in range(count)
        ]
        jobs[0].check()
        return jobs

    def _choice(
        self, job: Job, done: Completion, tools: list[ToolInfo], config: GenerateConfig, *, is_cut: bool
    ) -> ChatCompletionChoice:
        reading = None if job.thinking is None else job.thinking.read(done.text)
        text = done.text if reading is None else done.text[reading.begin :]
        for token in self._special:  # as the `hf` provider decodes
            text = text.replace(token, "")
        message = ChatMessageAssistant(content=text, model=self.model_name, source="generate")
        if tools:
            message = HFHandler(self.model_name, self.model_family()).parse_assistant_response(text, tools)
        if reading is not None and reading.thinking:
            message.content = [ContentReasoning(reasoning=reading.thinking), ContentText(text=message.text)]
        reason = "stop" if done.finish_reason != "length" else "model_length" if is_cut else "max_tokens"
        scores = self._logprobs(done.tokens, done.logprobs, done.likeliest) if config.logprobs else None
        of_prompt = None
        if done.prompt_logprobs is not None:
            of_prompt = self._logprobs(job.prompt[1:], [score or 0.0 for score in done.prompt_logprobs[1:]], None)
        return ChatCompletionChoice(
            message=message,
            stop_reason="tool_calls" if message.tool_calls else reason,
            logprobs=scores,
            prompt_logprobs=of_prompt,
        )

    def _logprobs(self, ids: Sequence[int], scores: Sequence[float], likeliest: Sequence[Likeliest] | None) -> Logprobs:
        """The log-probabilities of tokens, with the likeliest one in the place of each if requested."""
        texts = Spelling(self.tokenizer).texts
        told = [Logprob(token=token, logprob=score) for token, score in zip(texts(ids), scores, strict=True)]
        for at, (token, score) in enumerate(likeliest or ()):
            spelled = texts([*ids[max(0, at - 1) : at], token])[-1]
            told[at].top_logprobs = [TopLogprob(token=spelled, logprob=score)]
        return Logprobs(content=told)

    def _make_reasoner(self, budget: int | None) -> Reasoner:
        template = str(self.tokenizer.get_chat_template()) if self._is_templated else ""
        try:
            probe = self._prompts.chat_text([{"role": "user", "content": "a"}]) if self._is_templated else "a"
        except Exception:  # templates can raise any exception
            probe = "a"
        return Reasoner.of(
            self.tokenizer,
            model=self.model_name,
            template=template,
            probe=probe,
            reasoning=self._reasoning,
            budget=budget,
        )


_ARGUMENTS = (
    *("model_path", "policy", "dtype", "device", "gpu_memory", "cpu_memory"),
    *("chat_template", "use_chat_template", "enable_thinking", "reasoning"),
)


def _refuse_what_is_not_carried_out(config: GenerateConfig) -> None:
    for name, harmless in _HARMLESS.items():
        value = getattr(config, name, None)
        if value is not None and value not in harmless:
            raise ConfigError(f"{name} {value!r} is not supported; leave it out")
    if config.prompt_logprobs not in (None, 1):
        raise ConfigError(f"prompt_logprobs {config.prompt_logprobs}: of the prompt's tokens alone (1)")
    if config.top_logprobs not in (None, 0, 1):
        raise JobError(f"top_logprobs {config.top_logprobs}: only the most likely token can be returned (1)")
