"""Protects: a chat template that does not end is told in a line, and one that ends is rendered as ever after."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from family_tokenizers import family_tokenizer

from engine.errors import CheckpointError
from engine.text import template
from engine.text.prompt import PromptTokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]
LOOP = "{% for a in range(99999) %}"
ENDLESS = {
    "nested loops": f"{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}",
    "loops that never write": f"{LOOP}{LOOP}{{% if a < 0 %}}x{{% endif %}}{{% endfor %}}{{% endfor %}}",
    "loops inside of a filter": f"{LOOP}{{{{ range(99999) | map('string') | join }}}}{{% endfor %}}",
    "macros that call each other twice": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}"
    ),
    "for more than one message": (
        f"{{% if messages | length > 1 %}}{LOOP}{LOOP}{{% endfor %}}{{% endfor %}}{{% endif %}}"
    ),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_does_not_end_is_told_with_its_bound(kind: str) -> None:
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = ENDLESS[kind]
    with pytest.raises(CheckpointError, match=r"template of .* does not end: .* more than 2,000,000 steps") as told:
        PromptTokenizer.of(tokenizer).chat(MESSAGES)
    assert "\n" not in str(told.value)


def test_steps_that_are_long_by_themselves_end_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "MOST_S", 0.5)
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = f"{LOOP}{{{{ range(99999) | sum }}}}{{% endfor %}}"
    with pytest.raises(CheckpointError, match=r"does not end: .* or 0.5 s"):
        PromptTokenizer.of(tokenizer).chat(MESSAGES)


def test_a_power_of_a_number_is_refused_unread() -> None:
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = "{{ 9 ** 9 ** 9 ** 9 }}"
    with pytest.raises(CheckpointError, match=r"chat template of .* computes a power"):
        PromptTokenizer.of(tokenizer).chat(MESSAGES)


def test_a_template_that_is_cut_off_is_told_with_its_line() -> None:
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = "{% for m in messages %}\n{{ m.content"
    with pytest.raises(CheckpointError, match=r"chat template of .* cannot be read: line 2: "):
        PromptTokenizer.of(tokenizer).chat(MESSAGES)


PLAIN = {
    "a loop": "{% for m in messages %}{{ m.content }}{% endfor %}",
    "named arguments": (
        "{% macro f(a, b) %}{{ a }}{{ b }}{% endmacro %}{% set both = {'a': 'He', 'b': 'llo'} %}{{ f(**both) }}"
    ),
    "long, but with an end": f"{LOOP}{{% endfor %}}{{{{ messages[0].content }}}}",
    "refuses a system's message": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}"
    ),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_template_that_ends_is_rendered_and_nothing_is_traced_after(kind: str) -> None:
    tokenizer = family_tokenizer("qwen")
    tokenizer.chat_template = PLAIN[kind]
    seen: list[Any] = []

    def trace(*event: Any) -> None:
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        found = PromptTokenizer.of(tokenizer).chat(MESSAGES)
        assert sys.gettrace() is trace
    finally:
        sys.settrace(before)
    assert found == tokenizer.encode("Hello", add_special_tokens=False)
