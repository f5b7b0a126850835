"""Protects: special tokens around a prompt are the template's or those of one rule, each once, with no end behind."""

from __future__ import annotations

import pytest
from family_tokenizers import NAMES, family_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from engine.errors import UnsupportedError
from engine.text.prompt import PromptTokenizer

PREFIXES = {
    "llama-2": ["<s>"],
    "llama-2 with an end": ["<s>"],
    "mistral": ["<s>"],
    "gemma": ["<bos>"],
    "gpt-2": [],
    "qwen": [],
    "glm": ["[gMASK]", "<sop>"],
    "t5": [],
    "bert": ["[CLS]"],
}
TEMPLATES = {
    "spells a beginning": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}\n",
    "spells none": "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}",
    "spells one behind white space": " \n{{ bos_token }}{{ messages[0]['content'] }}",
    "asks for the answer": "{{ messages[0]['content'] }}{% if add_generation_prompt %} Answer:{% endif %}",
}
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "don't we? 日本"}]


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """The ids that `text` spells."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", NAMES)
@settings(deadline=None, max_examples=60)
@given(text=st.text(st.sampled_from("ab it'. \n日🙂<s>"), max_size=20))
def test_a_text_is_what_the_tokenizer_makes_of_it_but_for_an_end(name: str, text: str) -> None:
    tokenizer = family_tokenizer(name)
    prefix = tokenizer.convert_tokens_to_ids(PREFIXES[name])
    found = PromptTokenizer.of(tokenizer).plain(text)
    whole = list(tokenizer(text)["input_ids"])
    if text.lstrip().startswith("<s>") and "<s>" in PREFIXES[name]:
        assert found == whole[1 : 1 + len(found)]
        assert found.count(prefix[0]) == whole.count(prefix[0]) - 1
    else:
        assert found == whole[: len(found)]
        assert found[: len(prefix)] == prefix
    added = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    assert all(token in added for token in whole[len(prefix) + len(ids(tokenizer, text)) :])
    assert len(found) in (len(ids(tokenizer, text)), len(ids(tokenizer, text)) + len(prefix))


@pytest.mark.parametrize("name", [name for name in NAMES if PREFIXES[name]])
@pytest.mark.parametrize("before", ["", "\n", "  ", " \n "])
def test_a_beginning_that_the_text_spells_is_not_added_again(name: str, before: str) -> None:
    tokenizer, prefix = family_tokenizer(name), PREFIXES[name]
    prompts = PromptTokenizer.of(tokenizer)
    for spelled in ("".join(prefix), prefix[-1]):
        assert prompts.plain(f"{before}{spelled} a b") == ids(tokenizer, f"{before}{spelled} a b")
    assert prompts.plain("".join(prefix)) == list(prompts.prefix)
    twice = f"{prefix[0]}{prefix[0]}a"
    assert prompts.plain(twice) == ids(tokenizer, twice)
    assert prompts.plain(f"a{prefix[0]}") == [*prompts.prefix, *ids(tokenizer, f"a{prefix[0]}")]
    assert prompts.plain(before) == [*prompts.prefix, *ids(tokenizer, before)]


@pytest.mark.parametrize("name", ["llama-2 with an end", "t5"])
def test_an_end_stands_behind_a_prompt_only_where_the_prompt_spells_it(name: str) -> None:
    tokenizer = family_tokenizer(name)
    prompts = PromptTokenizer.of(tokenizer)
    end = tokenizer.eos_token_id
    assert tokenizer("a b")["input_ids"][-1] == end  # so the tokenizer would have it
    assert end not in prompts.plain("a b")
    assert end not in prompts.plain("")
    assert prompts.plain("a b</s>") == [*prompts.prefix, *ids(tokenizer, "a b"), end]


@pytest.mark.parametrize("name", ["llama-2", "llama-2 with an end", "mistral", "gemma", "gpt-2", "glm"])
@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_alone_says_what_its_ids_are(name: str, kind: str) -> None:
    tokenizer = family_tokenizer(name)
    options = {"chat_template": TEMPLATES[kind], "add_generation_prompt": True}
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False, **options)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, **options)
    prompts = PromptTokenizer.of(tokenizer)
    assert prompts.rendered(str(text)) == expected
    assert prompts.chat(MESSAGES, chat_template=TEMPLATES[kind]) == expected
    if kind == "spells none" and prompts.prefix:
        assert list(tokenizer(str(text))["input_ids"]) != expected  # which is what special tokens added would give


def test_a_prefix_that_alone_is_too_much_is_left_out() -> None:
    prompts = PromptTokenizer.of(family_tokenizer("glm"))
    own = prompts.rendered("a b c d")
    assert [len(prompts.plain("a b c d", room=len(own) + more)) - len(own) for more in (-1, 0, 1, 2, 3)] == [
        2,
        0,
        0,
        2,
        2,
    ]


class Marking(PreTrainedTokenizerFast):
    """Cuts a text otherwise with special tokens."""

    def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:  # type: ignore[override]
        """One token more inside a text."""
        return [5, 6, 7] if add_special_tokens else [5, 7]


def test_a_tokenizer_whose_special_tokens_change_the_text_is_refused() -> None:
    tokenizer = Marking(tokenizer_object=family_tokenizer("gpt-2").backend_tokenizer)
    with pytest.raises(UnsupportedError, match=r"\[5, 6, 7\] of 'a' with special tokens and \[5, 7\] without"):
        PromptTokenizer.of(tokenizer)
