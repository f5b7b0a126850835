"""What a HELM request should give, token by token, from plain `transformers` forwards; and HELM's own client.

Written from the docstrings of helm/common/request.py and from docs/fidelity.md, without a line of the code under test.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from helm.common.cache import BlackHoleCacheConfig
from helm.common.request import Request, RequestResult
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from tiny_models import WINDOW

GREEDY_TIE = 1e-4
"""Logits closer than this may change places between two correct implementations."""
DRAW_TIE = 3e-6
"""So may tokens whose logits are this close when one of them is drawn, or a draw this close to a border."""


@dataclass(frozen=True)
class Generation:
    """One completion: what the request should give."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: str
    sure: int | None
    """How many tokens are beyond doubt; None: all. The choice behind them is a near-tie."""


@dataclass(frozen=True)
class Answer:
    """What a request should give."""

    prompt: tuple[int, ...]
    prompt_logprobs: tuple[float, ...]
    """Of every prompt token; HELM writes 0.0 for the first."""
    generations: tuple[Generation, ...]


class Reference:
    """A model directory in float32 on the CPU, one forward over the whole text for every token."""

    def __init__(self, model: Path, *, end_of_text_token: str, window: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = model
        self.window = window
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self._end_of_text_token = end_of_text_token
        self._plain = AutoModelForCausalLM.from_pretrained(model, dtype="float32").eval()
        self._end = self._plain.generation_config.eos_token_id
        self._known: dict[tuple[int, ...], np.ndarray] = {}

    # Prompts

    def render(self, request: Request) -> str:
        """The text that the model sees: with a chat template, a prompt is what the user says.

        But for a prompt that is only scored: "for evaluating perplexity of the prompt", which is the prompt alone.
        """
        is_only_scored = request.echo_prompt and request.max_tokens == 0 and not request.messages
        if self.tokenizer.chat_template is None or is_only_scored:
            return request.prompt
        messages = request.messages or [{"role": "user", "content": request.prompt}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def encode(self, text: str) -> tuple[int, ...]:
        """With the tokenizer's special tokens, but one BOS at most, and none where it would overflow the window."""
        with_special = tuple(self.tokenizer(text)["input_ids"])
        plain = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        adds_bos = with_special == (bos, *plain)
        return plain if adds_bos and (plain[:1] == (bos,) or len(plain) == self.window) else with_special

    # Numbers

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Of what follows each of `ids`: float64 `[tokens, vocabulary]`."""
        import torch

        with torch.no_grad():
            return self._plain(torch.tensor([list(ids)])).logits[0].double().numpy()

    def next_logits(self, ids: tuple[int, ...]) -> np.ndarray:
        """Of what follows the last of `ids`: float64 `[vocabulary]`."""
        if ids not in self._known:
            self._known[ids] = self.logits(ids)[-1].copy()
        return self._known[ids]

    def answer(self, request: Request, *, top_k: int | None = None) -> Answer:
        """Everything that HELM should be told; `top_k` is the deployment's, never the request's top_k_per_token."""
        text = self.render(request)
        ids = self.encode(text)
        logprobs = log_softmax(self.logits(ids)) if request.echo_prompt else None
        scored = () if logprobs is None else (0.0, *(float(logprobs[i, token]) for i, token in enumerate(ids[1:])))
        generations = [self._generate(request, text, ids, index, top_k) for index in range(request.num_completions)]
        return Answer(ids, scored, tuple(generations))

    def _generate(self, request: Request, text: str, ids: tuple[int, ...], index: int, top_k: int | None) -> Generation:
        dice = random.Random(seed(request, text, index, top_k))
        stops = [*request.stop_sequences, self._end_of_text_token]
        tokens: list[int] = []
        logprobs: list[float] = []
        sure: int | None = None
        for _ in range(min(request.max_tokens, self.window - len(ids) + 1)):  # the last token needs no position
            row = self.next_logits((*ids, *tokens))
            token, is_tie = choose(penalized(row, tokens, request), request, dice.random(), top_k)
            sure = len(tokens) if is_tie and sure is None else sure
            if token == self._end:
                return self._finish(tokens, logprobs, self.decode(tokens), "endoftext", sure)
            tokens.append(token)
            logprobs.append(float(log_softmax(row)[token]))
            written = self.decode(tokens)
            found = [written.index(stop) for stop in stops if stop in written]
            if found:
                return self._finish(tokens, logprobs, written[: min(found)], "stop", sure)
        return self._finish(tokens, logprobs, self.decode(tokens), "length", sure)

    def _finish(self, tokens: list[int], logprobs: list[float], text: str, reason: str, sure: int | None) -> Generation:
        """Keep the fewest tokens that spell all of the text before a stop."""
        count = len(tokens)
        if reason == "stop":
            count = next(n for n in range(count + 1) if self.decode(tokens[:n]).startswith(text)) if text else 0
        return Generation(tuple(tokens[:count]), tuple(logprobs[:count]), text, reason, sure)

    def whole_text(self, answer: Answer, generation: Generation, *, echo: bool) -> str:
        """Text of a completion; with `echo` the prompt in front.

        Prompt and completion are decoded in one piece: a tokenizer may write a token differently at the beginning of
        a text. Unless the completion changes what the prompt was (a half character makes its neighbours unreadable).
        """
        if not echo:
            return generation.text
        spelled, prompt = self.decode(generation.tokens), self.decode(answer.prompt)
        assert spelled.startswith(generation.text)
        whole = self.decode((*answer.prompt, *generation.tokens))
        if not whole.startswith(prompt):
            return prompt + generation.text
        return whole[: len(whole) - (len(spelled) - len(generation.text))]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones spelled out."""
        return str(self.tokenizer.decode(list(tokens))) if tokens else ""


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logs of probabilities over the last axis."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def penalized(logits: np.ndarray, generated: Sequence[int], request: Request) -> np.ndarray:
    """OpenAI's definition, over generated tokens only."""
    logits = logits.copy()
    for token in set(generated):
        logits[token] -= request.presence_penalty + request.frequency_penalty * list(generated).count(token)
    return logits


def choose(logits: np.ndarray, request: Request, point: float, top_k: int | None) -> tuple[int, bool]:
    """The next token, and whether another correct implementation might choose a different one.

    At temperature 0 the most likely one; otherwise the token in which `point`, uniform in [0, 1), falls when those that
    top-k and top-p leave lie side by side, in the order of their ids.
    """
    order = np.argsort(-logits, kind="stable")
    ranked = logits[order]
    if request.temperature == 0:
        return int(order[0]), bool(ranked[0] - ranked[1] < GREEDY_TIE)
    ranked = ranked[:top_k] / request.temperature
    probabilities = np.exp(log_softmax(ranked))
    before = probabilities.cumsum() - probabilities
    kept = before < request.top_p
    is_tie = request.top_p < 1 and bool(np.abs(before - request.top_p).min() < DRAW_TIE)
    if top_k is not None and top_k < len(order):
        is_tie |= bool(logits[order[top_k - 1]] - logits[order[top_k]] < DRAW_TIE)
    ids = np.sort(order[: len(kept)][kept])
    borders = np.exp(log_softmax(logits[ids] / request.temperature)).cumsum()
    place = point * borders[-1]
    index = min(int(np.searchsorted(borders, place, side="right")), len(borders) - 1)
    is_tie |= bool(np.abs(borders[:-1] - place).min(initial=1.0) < DRAW_TIE)
    return int(ids[index]), is_tie


def seed(request: Request, text: str, index: int, top_k: int | None) -> int:
    """Seed of completion `index`: the first 60 bits of a SHA-256 of what the request asks, as docs/fidelity.md says."""
    asked = {
        "prompt": text,
        "temperature": float(request.temperature),
        "top_k": top_k,
        "top_p": float(request.top_p),
        "max_tokens": request.max_tokens,
        "stop_sequences": request.stop_sequences,
        "echo_prompt": request.echo_prompt,
        "presence_penalty": float(request.presence_penalty),
        "frequency_penalty": float(request.frequency_penalty),
        "random": request.random,
    }
    return int(hashlib.sha256(json.dumps([asked, index], sort_keys=True).encode()).hexdigest()[:15], 16)


def is_spelling_of(text: str, alone: str) -> bool:
    """Whether `text` is what a token adds to a text, where `alone` is what it is by itself."""
    goes_on = alone.removesuffix("@@")  # CTRL's mark of a token that does not end its word
    return text.removeprefix(" ") in (alone.removeprefix(" "), goes_on) or (
        text.startswith("bytes:") and "\ufffd" in alone
    )


# Beside each other


@dataclass
class Bench:
    """A model with three who answer for it: our client, HELM's, and the plain reference."""

    path: Path
    client: Any
    """Our client, without a cache."""
    helm: Callable[[Request], RequestResult]
    """`make_request` of HELM's HuggingFaceClient."""
    reference: Reference

    @classmethod
    def of(cls, model: Path, **args: Any) -> Bench:
        """The bench of a model directory whose end-of-text is "</s>"; `args` are our client's."""
        reference = Reference(model, end_of_text_token="</s>", window=WINDOW)
        return cls(model, our_client(model, **args), helms_client(model), reference)

    def request(self, prompt: str = "the capital of", **fields: Any) -> Request:
        """A request to this model; greedy if nothing else is said."""
        return Request(model=f"local/{self.path.name}", **{"prompt": prompt, "temperature": 0.0, **fields})

    def filling(self, count: int) -> str:
        """A prompt of `count` tokens as HELM counts them, without special ones."""
        tokenizer = self.reference.tokenizer
        text = "Question: What is the capital of France?\nAnswer: Paris\n\n" * (count // 4)
        text = str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:count]))
        while len(tokenizer(text, add_special_tokens=False)["input_ids"]) > count:
            text = text[:-1]
        return text


def benches_of(request: Any) -> Iterator[Callable[[str], Bench]]:
    """For a fixture: the bench of a model that is named by its own fixture, each set up once."""
    import torch

    from flexgen_helm.helm.engines import engines

    known: dict[str, Bench] = {}

    def of(name: str) -> Bench:
        if name not in known:
            known[name] = Bench.of(request.getfixturevalue(name))
        return known[name]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny matrices
    yield of
    torch.set_num_threads(threads)
    engines.close()


def our_client(model: Path, **args: Any) -> Any:
    """FlexGenClient on the CPU, if nothing else is said without a cache."""
    from flexgen_helm.helm.client import FlexGenClient

    args = {"cache_config": BlackHoleCacheConfig(), "end_of_text_token": "</s>", "policy": {"device": "cpu"}, **args}
    tokenizer = HuggingFaceTokenizer(BlackHoleCacheConfig(), f"test{model}", str(model))
    return FlexGenClient(tokenizer=tokenizer, pretrained_model_name_or_path=str(model), **args)


def helms_client(model: Path, **args: Any) -> Callable[[Request], RequestResult]:
    """`make_request` of HELM's own HuggingFaceClient, float32 on the CPU, without a cache.

    It keeps models by the request's model name, so that name must tell model directories apart.
    """
    from helm.clients.huggingface_client import HuggingFaceClient

    tokenizer = HuggingFaceTokenizer(BlackHoleCacheConfig(), f"test{model}", str(model))
    args = {"device": "cpu", "torch_dtype": "torch.float32", "end_of_text_token": "</s>", **args}
    return HuggingFaceClient(BlackHoleCacheConfig(), tokenizer, str(model), **args).make_request
