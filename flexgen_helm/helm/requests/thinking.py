"""How a deployment's model thinks before it answers: as set by `reasoning`, or as shown by template and vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError, UnsupportedError, shown
from engine.thinking import Channels, Style, Tags, Thinking
from flexgen_helm.helm.requests.shaping import Reasoning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES: Mapping[str, Style] = {
    "think": Tags(begin="<think>", end="</think>"),
    "mistral": Tags(begin="[THINK]", end="[/THINK]"),
    "harmony": Channels(),
}
WORDS = ("auto", "none", *STYLES)
_CHANNEL_TOKENS = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")


@dataclass(frozen=True, kw_only=True)
class Reasoner:
    """Makes the rule for thinking of each request of a deployment; `style` None: no text counts as thinking."""

    style: Style | None
    name: str
    why: str
    budget: int | None
    closing: tuple[int, ...]

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model: str,
        template: str,
        probe: str,
        reasoning: Reasoning | None,
        budget: int | None,
    ) -> Reasoner:
        """The reasoner of a deployment with the given `reasoning` and `thinking_budget`; None: `auto`, and no budget.

        template: the chat template that renders prompts, empty if none. probe: a short prompt, rendered by it. Raises
        `ConfigError` for a style that the template does not have, and for a budget without thinking.
        """
        asked = "auto" if reasoning is None else reasoning
        style: Style | None
        if isinstance(asked, Mapping):
            name, style, why = "of its own", _pair(asked, model), "as reasoning says"
        elif asked == "auto":
            name, style = _proven(tokenizer, template, probe, model)
            why = "as its chat template and vocabulary have it"
        elif asked == "none":
            name, style, why = asked, None, "as reasoning says"
        elif asked in STYLES:
            name, style, why = asked, STYLES[asked], "as reasoning says"
            if not any(mark in template for mark in _marks(STYLES[asked])):
                what = "has none of its marks" if template else "is not applied"
                marks = " ".join(_marks(STYLES[asked]))
                raise ConfigError(
                    f"reasoning {asked!r}: the chat template of {model} {what} ({marks}); say auto or none, or give "
                    "the two strings that its thinking stands between (begin and end)"
                )
        else:
            raise ConfigError(
                f"reasoning {shown(asked)} of {model} is none of {', '.join(WORDS)}, nor a pair of strings (begin, end)"
            )
        closing: tuple[int, ...] = ()
        if budget is not None:
            closing = _closing(tokenizer, style, budget, model)
        return cls(style=style, name=name, why=why, budget=budget, closing=closing)

    def rule(self, prompt: str) -> Thinking | None:
        """Return the rule for a request with a rendered prompt; None if the prompt ends within the answer."""
        if self.style is None:
            return None
        place = self.style.after(prompt)
        if place == "answer":
            return None
        return Thinking(style=self.style, is_open=place == "thinking", budget=self.budget, closing=self.closing)

    @property
    def key(self) -> dict[str, Any] | None:
        """The parts that can change a result, for cache keys, if prompts show whether they open the thinking."""
        if self.style is None:
            return None
        return {"marks": list(_marks(self.style)), "budget": self.budget}

    def note(self, model: str) -> str | None:
        """Describe how thinking is handled, in one line; None if there is none."""
        if self.style is None:
            return None
        limit = "" if self.budget is None else f"; it is closed after {self.budget} tokens, as thinking_budget says"
        return (
            f"what {model} thinks goes to HELM's field for thinking and is not scored (reasoning: {self.name}, "
            f"{self.why}){limit}"
        )


def _pair(given: Mapping[str, Any], model: str) -> Tags:
    if set(given) != {"begin", "end"} or not all(isinstance(each, str) and each for each in given.values()):
        raise ConfigError(f"reasoning {shown(dict(given))} of {model} is no pair of strings, begin and end")
    return Tags(begin=given["begin"], end=given["end"])


def _proven(tokenizer: PreTrainedTokenizerBase, template: str, probe: str, model: str) -> tuple[str, Style | None]:
    """Return the only style whose marks template and vocabulary have, or with which the template begins an answer."""
    if not template:
        return "none", None
    whole = set(tokenizer.get_added_vocab())
    found = [
        name
        for name, style in STYLES.items()
        if any(mark in template for mark in _marks(style)) and whole.issuperset(_tokens(style))
    ]
    if not found:
        found = [name for name, style in STYLES.items() if style.after(probe) == "thinking"]
    if len(found) > 1:
        raise ConfigError(
            f"the chat template of {model} has marks of {' and '.join(found)}; say which it means (reasoning: "
            f"{found[0]})"
        )
    return (found[0], STYLES[found[0]]) if found else ("none", None)


def _marks(style: Style) -> tuple[str, ...]:
    return (style.begin, style.end) if isinstance(style, Tags) else ("<|channel|>",)


def _tokens(style: Style) -> tuple[str, ...]:
    return (style.begin, style.end) if isinstance(style, Tags) else _CHANNEL_TOKENS


def _closing(tokenizer: PreTrainedTokenizerBase, style: Style | None, budget: object, model: str) -> tuple[int, ...]:
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
        raise ConfigError(
            f"thinking_budget {shown(budget)} of {model} is no number of tokens; 0 closes thinking at once"
        )
    if style is None:
        raise ConfigError(
            f"thinking_budget {budget} of {model}: how it thinks is not known; set reasoning "
            f"({', '.join(STYLES)}, or the two strings around it), or leave the budget out"
        )
    ids = tuple(map(int, tokenizer.encode(style.closing, add_special_tokens=False)))
    if style.closing not in str(tokenizer.decode(list(ids))):
        raise UnsupportedError(
            f"the tokenizer of {model} cannot spell {style.closing!r}, which is to close thinking; leave "
            "thinking_budget out"
        )
    return ids
