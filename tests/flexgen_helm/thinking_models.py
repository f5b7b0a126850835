"""Chat templates of models that think, of several kinds, and tiny models that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_models import random_llama, save_tiny_model, train_tokenizer


@dataclass(frozen=True)
class Kind:
    """A chat template, and the tokens that its tokenizer has for it."""

    template: str
    tokens: tuple[str, ...] = ()

    def train(self, path: Path, **fields: Any) -> Any:
        """A tiny tokenizer of this kind."""
        tokenizer = train_tokenizer(path, **{**fields, "adds_bos": False, "chat_template": self.template})
        tokenizer.add_tokens(list(self.tokens), special_tokens=True)
        tokenizer.save_pretrained(path)
        return tokenizer

    def save(self, path: Path, loud: Sequence[str] = ("Ċ",)) -> Path:
        """A tiny model of this kind; `loud` tokens come often."""
        return save_tiny_model(path, random_llama, train=self.train, loud=loud)


TAGS = ("<think>", "</think>")
_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
)

KINDS = {
    "opened by the model": Kind(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
        TAGS,
    ),
    "opened by the template": Kind(
        _TURNS + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    ),
    "mistral": Kind(
        "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}"
        "{{ m.content.split('[/THINK]')[-1] }}</s>{% endif %}{% endfor %}",
        ("[THINK]", "[/THINK]", "[INST]", "[/INST]"),
    ),
    "harmony": Kind(
        "<|start|>system<|message|>Reasoning: {{ reasoning_effort | default('medium') }}<|end|>"
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"),
    ),
    "a chat model": Kind("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"),
    "marks without tokens": Kind(_TURNS + "<|im_start|>assistant\n"),
    "tokens without marks": Kind("{% for m in messages %}{{ m.content }}{% endfor %}", TAGS),
}
