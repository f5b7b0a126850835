"""Protects: HELM is told what plain transformers writes and a split by hand makes of it, whatever the chat template is.

One model recites a text for each of the templates: each token decides the next one. Stops are everywhere, and so are
ends for want of room.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helm.common.cache import BlackHoleCacheConfig
from helm.common.request import GeneratedOutput, Request
from helm.tokenizers.huggingface_tokenizer import HuggingFaceTokenizer
from tiny_models import random_llama, save_tiny_model, train_tokenizer
from transcripts import CHANNELS, MISTRAL, OWN, THINK, Transcript
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import Engine, Job
from flexgen_helm.helm.requests.results import Timing, result
from flexgen_helm.helm.requests.shaping import Shaping
from flexgen_helm.helm.requests.translate import Translator

MARKS = ("<think>", "</think>", "[THINK]", "[/THINK]", "<|start|>", "<|channel|>", "<|message|>", "<|end|>")
CLOSING = "<think>\n\n</think>\n\n"
_ANALYSIS, _FINAL = "<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"
OWN_PAIR = {"reasoning": {"begin": OWN.begin, "end": OWN.end}}
TRANSCRIPTS = (  # each piece that ends with its number is a token, with the marks before it
    Transcript(
        "1", THINK, "|1|",
        (("mark", "<think>\n"), ("thinking", "It1 is\n so1.1"), ("mark", "\n</think>\n\n"), ("answer", "A1 or\nB1")),
    ),
    Transcript(
        "2", THINK, "|2|<think>\n",
        (("thinking", "It2 is\n so2.2"), ("mark", "\n</think>\n\n"), ("answer", "  A2 or\nB2")),
    ),
    Transcript("3", THINK, f"|3|{CLOSING}", (("answer", "A3 or\nB3"),)),
    Transcript(
        "4", MISTRAL, "|4|",
        (("mark", "[THINK]"), ("thinking", "It4 is\n so4.4"), ("mark", "[/THINK]"), ("answer", "A4 or\nB4")),
    ),
    Transcript(
        "5", CHANNELS, "|5|<|start|>assistant",
        (("mark", _ANALYSIS), ("thinking", "It5 is\n so5.5"), ("mark", _FINAL), ("answer", "A5 or\nB5")),
    ),
    Transcript(
        "6", OWN, "|6|",
        (("mark", OWN.begin), ("thinking", "It6 is\n so6.6"), ("mark", OWN.end), ("answer", "A6 or\nB6")),
    ),
    Transcript("7", THINK, "|7|", (("answer", "A7 </think>\nB7"),)),
)  # fmt: skip
SHAPINGS: dict[str, dict[str, Any]] = {"3": {"chat_template_kwargs": {"enable_thinking": False}}, "6": OWN_PAIR}
MARKS_OF = {THINK: "<think></think>", MISTRAL: "[THINK][/THINK]", CHANNELS: _ANALYSIS, OWN: ""}


def tokens_of(transcript: Transcript) -> list[str]:
    """Its text, cut behind each of its number."""
    return re.findall(f".*?{transcript.name}", transcript.text, re.DOTALL)


def template_of(transcript: Transcript) -> str:
    """A chat template that ends with the transcript's prompt, and tells which marks the model writes."""
    told = transcript.prompt.removesuffix(CLOSING)
    ending = f"{{{{ {json.dumps(told)} }}}}"
    if told != transcript.prompt:
        ending += f"{{% if enable_thinking is false %}}{{{{ {json.dumps(CLOSING)} }}}}{{% endif %}}"
    return "{#" + MARKS_OF[transcript.style] + "#}{% for m in messages %}{{ m.content }}{% endfor %}" + ending


def train(path: Path, **fields: Any) -> Any:
    tokenizer = train_tokenizer(path, **fields)
    tokenizer.add_tokens([*MARKS, *(token for each in TRANSCRIPTS for token in (each.prompt, *tokens_of(each)))])
    tokenizer.save_pretrained(path)
    return tokenizer


def reciting(tokenizer: Any) -> Any:
    """Layers that add nothing, below a head that sees the last token alone."""
    model = random_llama(tokenizer)
    into, out = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        pairs = [pair for each in TRANSCRIPTS for pair in pairwise([each.prompt, *tokens_of(each), "</s>"])]
        for place, (token, following) in enumerate(pairs):
            into[tokenizer.convert_tokens_to_ids(token), place] = 1.0
            out[tokenizer.convert_tokens_to_ids(following), place] = 1.0
    return model


@dataclass(frozen=True)
class Written:
    """What plain transformers writes to a prompt."""

    tokens: list[int]
    ends: list[int]
    """Characters of the text up to each of the tokens."""
    logprobs: list[float]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("reciting"), reciting, train=train, loud=())


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with Engine.from_pretrained(str(folder), policy={"device": "cpu"}) as engine:
        yield engine


def translator_of(transcript: Transcript, folder: Path) -> Translator:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template_of(transcript)
    own = folder / transcript.name
    tokenizer.save_pretrained(own)
    wrapped = HuggingFaceTokenizer(BlackHoleCacheConfig(), str(own), str(own)).get_wrapped_tokenizer()
    shaping = Shaping.of(SHAPINGS.get(transcript.name, {}))
    return Translator(
        wrapped, model="m", window=512, pad_to=None, end_of_text_token="</s>", shaping=shaping, generation_config={}
    )


def written(folder: Path, prompt: list[int]) -> Written:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=99, do_sample=False)
        logits = model(out).logits[0].log_softmax(-1)
    tokens = out[0, len(prompt) :].tolist()
    assert tokens.pop() == tokenizer.eos_token_id
    places = range(len(prompt), len(prompt) + len(tokens))
    return Written(
        tokens=tokens,
        ends=list(accumulate(len(tokenizer.decode([token])) for token in tokens)),
        logprobs=[float(logits[place - 1, int(out[0, place])]) for place in places],
    )


def by_hand(transcript: Transcript, whole: Written, request: Request) -> tuple[str | None, str, str, int, float]:
    """Thinking, answer, reason, tokens of the answer and their log-probability."""
    count = min(request.max_tokens, len(whole.tokens))
    thinking, answer = transcript.until(whole.ends[count - 1])
    reason, begin = "length" if count == request.max_tokens else "endoftext", transcript.begin
    places = [at for stop in request.stop_sequences if (at := answer.find(stop)) >= 0]
    if places:
        answer, reason = answer[: min(places)], "stop"
        count = next(n for n in range(count + 1) if [0, *whole.ends][n] >= begin + len(answer))
    first = next((n for n in range(count) if whole.ends[n] > begin), count) if answer else count
    return thinking, answer, reason, count - first, sum(whole.logprobs[first:count])


@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda each: each.name)
def test_what_helm_is_told_is_what_is_split_by_hand(transcript: Transcript, folder: Path, engine: Engine) -> None:
    translator = translator_of(transcript, folder)
    asked = Request(model="m", prompt="q", temperature=0.0, max_tokens=99)
    text = translator.render(asked)
    assert text.endswith(transcript.prompt)
    prompt = translator.encode(asked, text)
    whole = written(folder, list(prompt))
    assert transcript.text == "".join(tokens_of(transcript))
    assert whole.ends[-1] == len(transcript.text)
    pieces = {*transcript.text, *(transcript.text[at : at + 4] for at in range(0, len(transcript.text), 2))}
    requests = [
        Request(model="m", prompt="q", temperature=0.0, max_tokens=most, stop_sequences=[stop] if stop else [])
        for most in (*range(1, len(whole.tokens) + 1), 99)
        for stop in ["", *(sorted(pieces) if most == 99 else "\n")]
    ]
    jobs: list[Job] = [job for each in requests for job in translator.jobs(each, text, prompt)]
    reasons = set()
    for request, job, done in zip(requests, jobs, engine.run(jobs), strict=True):
        timing = Timing(seconds=1.0, started=1.0, num_requests=1)
        told = result(translator.response(request, [job], [done], timing), cached=False).completions[0]
        assert _parts(told) == (*by_hand(transcript, whole, request)[:4],), (request.max_tokens, request.stop_sequences)
        assert told.logprob == pytest.approx(by_hand(transcript, whole, request)[4], abs=1e-5)
        reasons.add(told.finish_reason["reason"] if told.finish_reason else None)
    assert reasons == {"stop", "length", "endoftext"}


def _parts(told: GeneratedOutput) -> tuple[str | None, str, str, int]:
    assert told.finish_reason is not None
    return told.thinking and told.thinking.text, told.text, told.finish_reason["reason"], len(told.tokens)
