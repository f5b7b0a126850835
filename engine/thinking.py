"""How a model writes its thinking before its answer: where both are in a generated text, and the thinking budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import JobError, shown

Place = Literal["before", "thinking", "answer"]


@dataclass(frozen=True)
class Reading:
    """The thinking and the answer in a generated text."""

    place: Place
    """Where the text ends: undecided, in the thinking, or in the answer."""
    thinking: str | None
    """The thinking without white space around it; None where the model did not begin to think."""
    begin: int
    """The start of the answer: the index of its first character, after the blank lines that follow the thinking."""


@dataclass(frozen=True, kw_only=True)
class Tags:
    """The thinking is between two strings at the beginning of a text, such as `<think>` and `</think>`.

    It ends with the first `end`. A text that does not begin with `begin`, white space aside, is an answer as a whole.
    """

    begin: str
    end: str

    def read(self, text: str, *, is_open: bool) -> Reading:
        """Split a text; `is_open` is whether the prompt ended with `begin`."""
        first = len(text) - len(text.lstrip())
        rest = text[first:]
        if rest.startswith(self.begin):
            first += len(self.begin)
        elif is_open:
            first = 0
        else:
            return Reading("before" if self.begin.startswith(rest) else "answer", None, 0)
        end = text.find(self.end, first)
        if end < 0:
            return Reading("thinking", text[first:].strip(), len(text))
        return Reading("answer", text[first:end].strip(), _behind_space(text, end + len(self.end)))

    def may_have_moved(self, place: Place, tail: Callable[[int], str]) -> bool:
        """Whether a new token may have moved the end of a text; `tail` gives that many of its last characters."""
        return place == "before" or self.end in tail(len(self.end))

    def after(self, prompt: str) -> Place:
        """Where a text begins that follows a rendered prompt."""
        return "thinking" if prompt.rstrip().endswith(self.begin) else "before"

    @property
    def closing(self) -> str:
        """The string that ends the thinking."""
        return self.end

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the answer in addition to end-of-text."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Messages in channels, as gpt-oss writes them (harmony): the answer is the message in the channel `final`.

    Messages of all other channels before it are thinking.
    """

    def read(self, text: str, *, is_open: bool) -> Reading:
        """Split a text; `is_open` is whether the prompt ended within a message of another channel."""
        thoughts: list[str] = []
        at = 0
        while True:
            if not is_open:
                header = text.find(_MESSAGE, at)
                if header < 0:
                    has_begun = bool(thoughts) or text.startswith((_CHANNEL, _START))
                    return Reading("before", _joined(thoughts) or "" if has_begun else None, len(text))
                is_final = _FINAL in text[at:header]
                at = header + len(_MESSAGE)
                if is_final:
                    return Reading("answer", _joined(thoughts), _behind_space(text, at))
            end = text.find(_END, at)
            if end < 0:
                return Reading("thinking", _joined([*thoughts, text[at:]]), len(text))
            thoughts.append(text[at:end])
            at, is_open = end + len(_END), False

    def may_have_moved(self, place: Place, tail: Callable[[int], str]) -> bool:
        """See `Tags.may_have_moved`."""
        end = tail(max(len(_MESSAGE), len(_END)))
        return _MESSAGE in end or _END in end

    def after(self, prompt: str) -> Place:
        """See `Tags.after`; "answer" where the prompt itself ends within the message in the channel `final`."""
        last = prompt[max(0, prompt.rfind(_START)) :]
        header, is_message, message = last.partition(_MESSAGE)
        if not is_message or _END in message:
            return "before"
        return "answer" if _FINAL in header else "thinking"

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end the answer in addition to end-of-text."""
        return (_END,)

    @property
    def closing(self) -> str:
        """The string that ends a thought and begins the answer."""
        return f"{_END}{_START}assistant{_FINAL}{_MESSAGE}"


_START, _CHANNEL, _MESSAGE, _END = "<|start|>", "<|channel|>", "<|message|>", "<|end|>"
_FINAL = f"{_CHANNEL}final"


Style = Tags | Channels


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """States that a job's model thinks before it answers. Stop strings are then matched in the answer only."""

    style: Style
    is_open: bool = False
    """Whether the prompt ends within the thinking."""
    budget: int | None = None
    """The most tokens between the beginning of the thinking and `closing`; None leaves its length to the model."""
    closing: tuple[int, ...] = ()
    """The tokens that end the thinking, which are forced after the last token of the budget."""

    def read(self, text: str) -> Reading:
        """Split a generated text into thinking and answer."""
        return self.style.read(text, is_open=self.is_open)

    def check(self) -> None:
        """Raise `JobError` for a rule that cannot be applied."""
        if not isinstance(self.style, Tags | Channels):
            raise JobError(f"style of thinking {shown(self.style)} is neither Tags nor Channels")
        if isinstance(self.style, Tags) and not (self.style.begin and self.style.end):
            raise JobError(f"thinking stands between {self.style.begin!r} and {self.style.end!r}; neither may be empty")
        if not isinstance(self.closing, tuple):
            raise JobError(f"what closes thinking is a tuple of token ids, not {shown(self.closing)}")
        if self.budget is None:
            return
        if not _is_count(self.budget):
            raise JobError(f"thinking budget {shown(self.budget)} is no number of tokens; 0 closes thinking at once")
        if not self.closing or not all(map(_is_count, self.closing)):
            raise JobError("a thinking budget needs the token ids that close thinking (closing)")


@dataclass
class Progress:
    """The progress of a sequence's thinking."""

    place: Place = "answer"
    num_tokens: int = 0
    """The number of tokens in the thinking so far."""
    due: tuple[int, ...] = ()
    """The tokens that are forced next."""

    @classmethod
    def of(cls, rule: Thinking | None) -> Progress:
        """The progress of a sequence without generated tokens."""
        if rule is None:
            return cls()
        started = cls("thinking" if rule.is_open else "before")
        started._spend(rule)
        return started

    def take(self, rule: Thinking, tail: Callable[[int], str], whole: Callable[[], str]) -> None:
        """Update the progress by a token that was generated.

        `tail(n)` gives the end of the text up to the token, of n characters or more; `whole()` all of the text.
        """
        was_last = len(self.due) == 1
        self.due, before = self.due[1:], self.place
        if before == "answer" or self.due:
            return
        if was_last:  # what closes thinking is forced once, whatever it spells
            self.place = "answer"
            return
        if rule.style.may_have_moved(before, tail):
            self.place = rule.read(whole()).place
        self.num_tokens += before == self.place == "thinking"
        self._spend(rule)

    def _spend(self, rule: Thinking) -> None:
        if self.place == "thinking" and rule.budget is not None and self.num_tokens >= rule.budget:
            self.due = rule.closing


def _behind_space(text: str, at: int) -> int:
    """The start of the first line that is not blank, with its indentation, which code needs; `at` is within a line."""
    first = len(text) - len(text[at:].lstrip())
    return text.rfind("\n", at, first) + 1 or first


def _joined(thoughts: list[str]) -> str | None:
    return "\n\n".join(filter(None, map(str.strip, thoughts))) if thoughts else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
