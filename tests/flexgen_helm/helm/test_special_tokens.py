"""Protects: special tokens of HELM's requests are the template's or those of one rule; old answers stay valid."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from family_tokenizers import NAMES, family_tokenizer
from helm.common.request import Request
from helm.tokenizers.huggingface_tokenizer import WrappedPreTrainedTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from flexgen_helm.helm.requests.translate import Translator

TEMPLATES = {
    "none": None,
    "spells a beginning": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}\n",
    "spells none": "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]",
}


def translator(name: str, template: str | None) -> tuple[Translator, Any]:
    tokenizer = copy.deepcopy(family_tokenizer(name))
    tokenizer.chat_template = template
    made = Translator(
        WrappedPreTrainedTokenizer(tokenizer),
        model="local/tiny",
        window=512,
        pad_to=None,
        end_of_text_token=None,
    )
    return made, tokenizer


def earlier(tokenizer: Any, text: str) -> list[int]:
    """What the translation made of a text before there was one rule; caches hold the answers to it."""
    ids, own = list(tokenizer(text)["input_ids"]), list(tokenizer("a", add_special_tokens=False)["input_ids"])
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos] != own[:1]
    begun = adds_bos and text.startswith(str(tokenizer.bos_token)) and len(ids) > 1 and ids[1] == ids[0]
    return ids[1:] if begun else ids


@pytest.mark.parametrize("kind", [kind for kind in TEMPLATES if kind != "none"])
@pytest.mark.parametrize("name", ["llama-2", "llama-2 with an end", "mistral", "gemma", "gpt-2", "glm", "qwen"])
def test_a_templates_ids_are_those_that_transformers_makes_of_it(name: str, kind: str) -> None:
    translated, tokenizer = translator(name, TEMPLATES[kind])
    request = Request(prompt="don't we?", model="local/tiny")
    conversation = [{"role": "user", "content": request.prompt}]
    expected = tokenizer.apply_chat_template(conversation, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert list(translated.encode(request, translated.render(request))) == expected


@pytest.mark.parametrize("name", ["llama-2 with an end", "t5"])
def test_no_end_stands_behind_a_prompt_that_is_to_go_on(name: str) -> None:
    translated, tokenizer = translator(name, None)
    whole = list(tokenizer("a b")["input_ids"])
    assert whole[-1] == tokenizer.eos_token_id
    assert list(translated.encode(Request(prompt="a b"), "a b")) == whole[:-1]


def test_a_beginning_of_several_tokens_is_there_once() -> None:
    translated, tokenizer = translator("glm", None)
    text = "[gMASK]<sop>a b"
    once = list(tokenizer("a b")["input_ids"])
    assert once[:2] == tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    assert list(translated.encode(Request(prompt=text), text)) == once
    assert list(translated.encode(Request(prompt="a b"), "a b")) == once


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", TEMPLATES)
@settings(deadline=None, max_examples=25)
@given(
    text=st.tuples(
        st.sampled_from(["", " ", "\n"]),
        st.sampled_from(["", "<s>", "<bos>", "[gMASK]", "<sop>", "[CLS]", "</s>", "<|endoftext|>"]),
        st.text(st.sampled_from("ab .\n日"), max_size=6),
    ).map("".join)
)
def test_only_prompts_whose_ids_are_others_now_are_asked_anew(name: str, kind: str, text: str) -> None:
    translated, tokenizer = translator(name, TEMPLATES[kind])
    request = Request(prompt=f"{text}b", model="local/tiny")
    rendered = translated.render(request)
    have_changed = list(translated.encode(request, rendered)) != earlier(tokenizer, rendered)
    key = translated.key(request, rendered)
    assert ("special_tokens" in key) == have_changed
