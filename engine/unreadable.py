"""The error of a sequence whose generated tokens cannot be turned into text."""

from __future__ import annotations

from engine.completion import Text
from engine.errors import JobError
from engine.schedule.sequence import Sequence


def unreadable(sequence: Sequence, text: Text, error: Exception) -> JobError:
    """What to say when decoding the tokens of `sequence` raised `error`; raises it again if it came from elsewhere."""
    generated = sequence.generated
    bad = [token for token in dict.fromkeys(generated) if not _is_readable([token], text)]
    if not bad and _is_readable(generated, text):
        raise error
    named = ", ".join(map(str, (bad or generated)[:10])) + (" ..." if len(bad or generated) > 10 else "")
    return JobError(
        f"the tokenizer cannot decode generated token ids {named} ({type(error).__name__}: "
        f"{' '.join(str(error).split())[:200]}); the tokenizer and the model do not belong together, use the "
        "tokenizer that the model was trained with"
    )


def _is_readable(tokens: list[int], text: Text) -> bool:
    try:
        text.decode(tokens)
    except Exception:
        return False
    return True
