"""lm-evaluation-harness's model `flexgen`, registered when this is imported: requests become jobs of the engine."""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import inspect
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import engine
from engine.checkpoint.hub import commit_of, with_revision
from engine.checkpoint.identity.result import identity_beside_weights
from engine.errors import ConfigError, InstallationError, JobError, did_you_mean
from engine.job import Completion, Job, Sampling
from engine.policy import Policy
from engine.text.prompt import check_characters
from engine.text.template import check_template_ends
from flexgen_helm.adapters.generation_settings import RULES, GenerationSettings
from flexgen_helm.adapters.lm_eval_arguments import check_stops, device_asked, limit, refuse_others
from flexgen_helm.planning.environment import environment
from flexgen_helm.workers.cluster.flags import use_cluster
from flexgen_helm.workers.engine_processes import engine_processes

try:
    from jinja2 import TemplateError
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.models import utils
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise InstallationError(f"lm-eval is missing ({error}); run `pip install 'flexgen-helm[lm-eval]'`") from error

_Names = Sequence[tuple[str, ...]]
_Pair = tuple[list[int], list[int]]
_SUPPORTED = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", *RULES)
_MEANT = {"stop": "until", "stop_sequences": "until", "max_length": "max_gen_toks", "seed": "--seed of the harness"}
"""The harness's names for generation arguments that other programs call differently."""


class ThinkingError(ConfigError, ValueError):
    """A model that is to think first cannot score continuations; the harness's own model raises `ValueError` for it."""


class FlexGenLM(TemplateLM):
    """Gives the answers of `lm_eval.models.huggingface.HFLM`, with an engine whose model may be larger than the GPU.

    `policy` is "auto", the name of a shipped policy, a YAML file or a mapping; `dtype`, `device`, `gpu_memory` and
    `cpu_memory` ("16GB", "16GiB" or a number of GiB) override it. `max_length` is the context window in tokens, by
    default the model's own. `revision` is a branch, tag or commit of a hub id. `add_bos_token`, `prefix_token_id`,
    `think_end_token` (text, or a token's id), `enable_thinking` and `chat_template_args` mean what they mean in HFLM.
    If the harness's default device does not exist, the policy's is used, or the CPU, as HFLM does. Generated texts
    follow the checkpoint's generation_config.json, as HFLM's do. The batch sizes that the harness passes to every model
    have no effect: the policy determines the size of sweeps. `ray` (an address, auto, local, or true), `workers`,
    `gpus_per_worker` and `no_wait` are the flags of `flexgen-helm complete`. Raises `EngineError`; the error of a bad
    request names the request and ends the evaluation.
    """

    def __init__(
        self,
        pretrained: str = "",
        policy: str | Mapping[str, Any] | None = "auto",
        dtype: str | None = None,
        device: str | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: Mapping[str, Any] | None = None,
        gpu_memory: str | float | None = None,
        cpu_memory: str | float | None = None,
        revision: str | None = None,
        ray: str | bool | None = None,
        workers: int | None = None,
        gpus_per_worker: int | None = None,
        no_wait: bool = False,
        **others: Any,
    ) -> None:
        super().__init__()
        refuse_others(others, inspect.signature(FlexGenLM).parameters.keys() - {"others"})
        if enable_thinking and think_end_token is None:
            raise ConfigError("model_args: enable_thinking needs think_end_token, so that no thinking counts as answer")
        if not pretrained:
            raise ConfigError("model_args name no model; write pretrained=, a hub id or a directory")
        pretrained = with_revision(pretrained, None if revision is None else str(revision))
        named = Policy.load(policy)
        loaded = dataclasses.replace(
            named,
            dtype=dtype or named.dtype,
            device=device_asked(device, named.device, is_here=ray is None),
            gpu_memory=limit(gpu_memory, "gpu_memory", named.gpu_memory),
            cpu_memory=limit(cpu_memory, "cpu_memory", named.cpu_memory),
        )
        loaded.check("model_args")
        self._beside_weights = identity_beside_weights(pretrained, loaded)
        asked = argparse.Namespace(
            ray="" if ray is True else ray, workers=workers, gpus_per_worker=gpus_per_worker, no_wait=no_wait
        )
        use_cluster(asked)
        self.engine: Any = (
            engine.Engine.from_pretrained(pretrained, policy=loaded)
            if ray is None
            else engine_processes.spread(pretrained, loaded, None, (), 1.0)
        )
        atexit.register(self.engine.close)
        self.tokenizer: Any = self.engine.tokenizer
        self._path = Path(self.tokenizer.name_or_path)
        if add_bos_token is not None:
            self.tokenizer = type(self.tokenizer).from_pretrained(self._path, add_bos_token=add_bos_token)
        self._settings = GenerationSettings(self._path, self.tokenizer.eos_token_id)
        window = self.engine.window
        if max_length is not None and not 1 <= max_length <= (window or max_length):
            raise ConfigError(f"model_args: max_length {max_length} is not within the model's window of {window}")
        self.max_length: int = max_length or window or utils.resolve_max_length(None, self.tokenizer)
        self._pretrained, self._add_bos_token = pretrained, add_bos_token
        self._prefix_token_id, self.enable_thinking = prefix_token_id, enable_thinking
        is_id = isinstance(think_end_token, str) and think_end_token.isdigit()
        self.think_end_token = int(think_end_token) if think_end_token is not None and is_id else think_end_token
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self._chat_template_args = {**(chat_template_args or {}), **thinking}

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness records besides its own arguments and seeds: what the answers were made with."""
        identity = {"weights": self.engine.weights_digest(), **self._beside_weights}
        made = {"policy": self.engine.policy.as_mapping(), "identity": identity, "window": self.max_length}
        return {"flexgen": {**made, **environment().as_mapping()}, "model_sha": commit_of(self._path) or ""}

    @property
    def eot_token_id(self) -> int | None:
        """The id of the tokenizer's end-of-text token, if it has one."""
        return self.tokenizer.eos_token_id  # type: ignore[no-any-return]

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: beginning-of-text, else end-of-text."""
        for token in (self._prefix_token_id, self.tokenizer.bos_token_id, self.eot_token_id):
            if token is not None:
                return int(token)
        raise ConfigError(f"the tokenizer of {self._pretrained} knows no beginning of text; give prefix_token_id")

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer in the keys of the harness's request cache."""
        return self._pretrained.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokenize `string`; a beginning-of-text token that is spelled out in it is not added again."""
        return self._encode_all(string, add_special_tokens, window=self.max_length)

    def _encode_all(self, string: str, add_special_tokens: bool | None = None, window: int | None = None) -> list[int]:
        """Like `tok_encode`, but with `window` None for texts that are cut into windows later."""
        check_characters(len(string), window)
        if add_special_tokens is None:
            return self._encode(string, self.tokenizer.decode(self.prefix_token_id))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decode token ids."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens))

    def _encode(self, text: str, beginning: str | None) -> list[int]:
        special = False if utils.has_bos_prefix(text, beginning) else self._add_bos_token
        return list(self.tokenizer.encode(text, **({} if special is None else {"add_special_tokens": special})))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the chat as text; without its system messages if the template refuses them."""
        _ = self._template_ends
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        options |= {"tokenize": False, **self._chat_template_args}
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except TemplateError:
            rest = [message for message in chat_history if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(rest, **options))

    @cached_property
    def _template_ends(self) -> None:
        """Check once, by the cache of the property, that rendering the chat template terminates."""
        check_template_ends(self.tokenizer)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-probability, is greedy) of each (context, continuation); raises for a model that is to think."""
        if self.enable_thinking:
            names = ", ".join(sorted({str(name) for each in requests if (name := getattr(each, "task_name", None))}))
            raise ThinkingError(
                f"enable_thinking=True is for tasks that generate; {names or 'this one'} scores continuations"
            )
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scores

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, is greedy) of each (strings, context, continuation)."""
        names, pairs = [request[0] for request in requests], [request[1:] for request in requests]
        answers = {}
        for place, answer in self._scored(pairs, names, disable_tqdm):
            answers[place] = answer
            self.cache_hook.add_partial("loglikelihood", names[place], answer)
        return [answers[place] for place in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text, in windows that overlap by one token of context."""
        windows, owners = list[_Pair](), list[int]()
        for owner, tokens in enumerate(self._encode_all(request.args[0]) for request in requests):
            cut = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += map(make_disjoint_window, cut)
            owners += [owner] * (len(windows) - len(owners))
        totals, missing = [0.0] * len(requests), Counter(owners)
        for place, (logprob, _) in self._scored(windows, [requests[owner].args for owner in owners], disable_tqdm):
            owner = owners[place]
            totals[owner] += logprob
            missing[owner] -= 1
            if not missing[owner]:
                self.cache_hook.add_partial("loglikelihood_rolling", requests[owner].args, totals[owner])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate a text for each (context, generation arguments), ending before its stop sequence."""
        jobs = [self._generation(*request.args) for request in requests]
        texts, names = {}, [request.args[:1] for request in requests]
        for place, done in self._run(jobs, names, disable_tqdm):
            texts[place] = self._text(done, jobs[place].stop)
            self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return [texts[place] for place in range(len(requests))]

    def _scored(self, pairs: Sequence[_Pair], names: _Names, quiet: bool) -> Iterator[tuple[int, tuple[float, bool]]]:
        """Yield (index, (log-probability of the continuation, is greedy)) as answers arrive."""
        jobs = []
        for (context, continuation), name in zip(pairs, names, strict=True):
            if not context or not 1 <= len(continuation) <= self.max_length:
                sizes = f"{len(context)} + {len(continuation)} tokens"
                raise JobError(f"{_name(name)}: {sizes}; each part needs one, the last may have {self.max_length}")
            tokens = (context + continuation)[-(self.max_length + 1) :]  # the last token takes no place in the window
            jobs.append(Job(prompt=tuple(tokens), max_new_tokens=0, prompt_logprobs=True))
        for place, done in self._run(jobs, names, quiet):
            size = len(pairs[place][1])
            logprobs, greedy = (done.prompt_logprobs or ())[-size:], (done.prompt_greedy or ())[-size:]
            yield place, (sum(logprob or 0.0 for logprob in logprobs), all(greedy))

    def _generation(self, context: str, gen_kwargs: dict[str, Any]) -> Job:
        kwargs: dict[str, Any] = dict(utils.normalize_gen_kwargs(gen_kwargs))
        is_sampled, temperature = kwargs.pop("do_sample"), float(kwargs.pop("temperature", 0.0))
        if is_sampled and temperature == 0.0:
            raise ConfigError("generation arguments: do_sample=True needs a temperature above 0, as with hf")
        until = [
            each for each in utils.handle_stop_sequences(kwargs.pop("until"), eos=self.tokenizer.eos_token) if each
        ]
        check_stops(until, self.think_end_token)
        count, cuts = kwargs.pop("max_gen_toks"), {name: kwargs.pop(name, None) for name in ("top_k", "top_p")}
        rules = {name: kwargs.pop(name) for name in RULES if name in kwargs}
        for name, value in kwargs.items():
            if (name, value) != ("num_beams", 1):
                meant = f"; did you mean {_MEANT[name]!r}?" if name in _MEANT else did_you_mean(name, _SUPPORTED)
                raise ConfigError(f"generation argument {name}={value}: not supported{meant}")
        if (room := self.max_length - count) < 1:
            raise ConfigError(f"{_name((context,))}: max_gen_toks {count} leave no room in {self.max_length}; lower it")
        check_characters(len(context), self.max_length)
        prompt = tuple(self._encode(context, self.tokenizer.bos_token)[-room:])
        # The harness seeds `random`: a repeated run draws the same samples, and repeats of a request draw different
        # ones.
        sampling = Sampling(temperature=temperature, seed=random.getrandbits(32))
        if is_sampled:
            sampling = dataclasses.replace(sampling, **self._settings.sampled(cuts))
        sampling = self._settings.applied(sampling, prompt, count, rules)
        return Job(prompt=prompt, max_new_tokens=count, sampling=sampling, stop=tuple(until))

    def _text(self, done: Completion, until: Sequence[Any]) -> str:
        """Return the completion's text without special tokens, which the engine's text includes."""
        tokens, thought = list(done.tokens), self.think_end_token
        beyond = len(self.tokenizer.decode(tokens)) - len(done.text)  # characters of the last token after the stop
        if isinstance(thought, int) and thought in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(thought) :]
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        if beyond and text != self.tokenizer.decode(tokens[:-1], skip_special_tokens=True):  # else it is special
            text = text[:-beyond]
        if isinstance(thought, int):
            text, thought = text.lstrip(), None
        return str(utils.postprocess_generated_text(text, list(until), thought))

    def _run(self, jobs: Sequence[Job], names: _Names, quiet: bool) -> Iterator[tuple[int, Completion]]:
        """Yield (index, completion) as answers arrive; all jobs go to the engine in one call."""
        for place, completion in tqdm(self.engine.stream(jobs), "flexgen", len(jobs), disable=quiet):
            if completion.error is not None:
                raise type(completion.error)(f"{_name(names[place])}: {completion.error}")
            yield place, completion


model_registry.register("flexgen", target=FlexGenLM)


def _name(texts: tuple[str, ...]) -> str:
    return f"the request {' + '.join(repr(text if len(text) < 80 else '…' + text[-80:]) for text in texts)}"
