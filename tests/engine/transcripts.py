"""Texts of models that think, of many kinds, written in pieces by hand, and what of each beginning is what."""

from __future__ import annotations

from dataclasses import dataclass

from engine.thinking import Channels, Style, Tags

THINK = Tags(begin="<think>", end="</think>")
MISTRAL = Tags(begin="[THINK]", end="[/THINK]")
OWN = Tags(begin="<reason>", end="</reason><reply>")
CHANNELS = Channels()

ANSWER = "The answer is 4.\n\nSo: 4"


@dataclass(frozen=True)
class Transcript:
    """A text of a model; `mark` pieces are neither thinking nor answer."""

    name: str
    style: Style
    prompt: str
    """How the rendered prompt ends."""
    pieces: tuple[tuple[str, str], ...]
    """("mark" | "thinking" | "answer", text)."""

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(piece for _, piece in self.pieces)

    @property
    def begin(self) -> int:
        """Where the answer begins."""
        kinds = [kind for kind, _ in self.pieces]
        return sum(len(piece) for _, piece in self.pieces[: kinds.index("answer")])

    def until(self, end: int) -> tuple[str | None, str]:
        """Thinking and answer of the first `end` characters, by the pieces that they are of."""
        text, thoughts = self.text[:end], list[str]()
        is_open = self.prompt.endswith("<think>\n")
        for kind, piece in self.pieces:
            part, end = piece[:end], max(0, end - len(piece))
            if kind == "answer":
                return _joined(thoughts), part
            if kind == "thinking":
                thoughts.append(part)
            elif len(part) < len(piece.rstrip()):  # the mark is not whole
                if not thoughts and not is_open:
                    if isinstance(self.style, Tags):
                        return None, text
                    return "" if text.startswith(("<|channel|>", "<|start|>")) else None, ""  # a header is no answer
                if "<|end|>" not in part:
                    thoughts = [*thoughts[:-1], "".join(thoughts[-1:]) + part]
                break
        return _joined(thoughts), ""


def _joined(thoughts: list[str]) -> str | None:
    return "\n\n".join(each.strip() for each in thoughts if each.strip()) if thoughts else None


TRANSCRIPTS = (
    Transcript(
        "opened by the model",
        THINK,
        "<|im_start|>assistant\n",
        (("mark", "<think>\n"), ("thinking", "2 and 2.\n\nIs it 4?"), ("mark", "\n</think>\n\n"), ("answer", ANSWER)),
    ),
    Transcript(
        "opened by the template",
        THINK,
        "<|Assistant|><think>\n",
        (("thinking", "2 and 2. A < b?"), ("mark", "\n</think>\n\n"), ("answer", ANSWER)),
    ),
    Transcript(
        "opened by both",
        THINK,
        "<|Assistant|><think>\n",
        (("mark", "<think>\n"), ("thinking", "2 and 2."), ("mark", "</think>"), ("answer", ANSWER)),
    ),
    Transcript(
        "a line end before it",
        THINK,
        "<|assistant|>",
        (("mark", "\n<think>"), ("thinking", "2 and 2."), ("mark", "</think>\n"), ("answer", "The end: </think> is 4")),
    ),
    Transcript(
        "nothing thought",
        THINK,
        "<|im_start|>assistant\n",
        (("mark", "<think>\n\n"), ("thinking", ""), ("mark", "</think>\n\n"), ("answer", ANSWER)),
    ),
    Transcript(
        "an answer that is indented",
        THINK,
        "<|im_start|>assistant\n",
        (("mark", "<think>\n"), ("thinking", "2 and 2."), ("mark", "</think>  \n\n"), ("answer", "    return 4\n")),
    ),
    Transcript("closed by the template", THINK, "<think>\n\n</think>\n\n", (("answer", ANSWER),)),
    Transcript("no thinking", THINK, "<|im_start|>assistant\n", (("answer", "<thing>" + ANSWER),)),
    Transcript(
        "mistral",
        MISTRAL,
        "[/INST]",
        (("mark", "[THINK]"), ("thinking", "2 and [2]."), ("mark", "[/THINK]"), ("answer", ANSWER)),
    ),
    Transcript(
        "of its own",
        OWN,
        "assistant:",
        (("mark", "<reason>"), ("thinking", "2 </reason> 2."), ("mark", "</reason><reply>"), ("answer", ANSWER)),
    ),
    Transcript(
        "harmony",
        CHANNELS,
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant",
        (
            ("mark", "<|channel|>analysis<|message|>"),
            ("thinking", "2 and 2."),
            ("mark", "<|end|><|start|>assistant<|channel|>final<|message|>"),
            ("answer", ANSWER),
        ),
    ),
    Transcript(
        "harmony in several messages",
        CHANNELS,
        "<|start|>assistant",
        (
            ("mark", "<|channel|>analysis<|message|>"),
            ("thinking", "2 and 2."),
            ("mark", "<|end|><|start|>assistant<|channel|>commentary<|message|>"),
            ("thinking", "I shall add."),
            ("mark", "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"),
            ("answer", '{"sum": 4}'),
        ),
    ),
    Transcript(
        "harmony without thinking",
        CHANNELS,
        "<|start|>assistant",
        (("mark", "<|channel|>final<|message|>"), ("answer", ANSWER)),
    ),
)
