"""The input and output of the engine: Job, Sampling, Completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import EngineError, JobError
from engine.logit_rules import LogitRules
from engine.thinking import Thinking

MOST_COMPLETIONS = 10_000
"""The most completions of one prompt: each is a job, and a billion of them would fill the memory."""

FinishReason = Literal["stop", "length", "endoftext"]
Likeliest = tuple[int, float]
"""A token, and the natural log of its probability under the model's unmodified distribution."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; every job has its own."""

    temperature: float = 0.0
    """0 is greedy decoding, exactly; otherwise logits are divided by it."""
    top_k: int | None = None
    """Sample among this many most likely tokens; None: among all."""
    top_p: float = 1.0
    """Sample among the smallest set of tokens whose probabilities sum to at least this, in (0, 1]."""
    seed: int | None = None
    """The same seed gives the same sample regardless of other jobs; None draws one."""
    presence_penalty: float = 0.0
    """It is subtracted from the logits of tokens generated before (OpenAI's definition)."""
    frequency_penalty: float = 0.0
    """It is subtracted from the logits of tokens generated before, once per occurrence."""
    rules: LogitRules | None = None
    """The rules on texts in a checkpoint's generation_config.json; they are applied only if set here."""

    @property
    def reads_generated(self) -> bool:
        """Whether a choice depends on earlier generated tokens other than through the logits."""
        return self.rules is not None or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    def check(self) -> None:
        """Raise `JobError` for a value outside its range."""
        if not _is_finite(self.temperature) or self.temperature < 0.0:
            raise JobError(f"temperature {_shown(self.temperature)} is not a number >= 0; 0 is greedy")
        if self.top_k is not None and (not is_whole(self.top_k) or self.top_k < 1):
            raise JobError(f"top_k {_shown(self.top_k)} is below 1; leave it out to sample among all tokens")
        if not _is_finite(self.top_p) or not 0.0 < self.top_p <= 1.0:
            raise JobError(f"top_p {_shown(self.top_p)} is outside (0, 1]; 1 samples among all tokens")
        if self.seed is not None and not is_whole(self.seed):
            raise JobError(f"seed {_shown(self.seed)} is no whole number; leave it out to draw one")
        for name in ("presence_penalty", "frequency_penalty"):
            if not _is_finite(getattr(self, name)):
                raise JobError(f"{name} {_shown(getattr(self, name))} is not finite; 0 leaves logits as they are")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One prompt and how to process it."""

    prompt: Sequence[int]
    """The token ids, special tokens included; at least one."""
    max_new_tokens: int = 16
    """The most tokens to generate; 0 (with `prompt_logprobs`) only scores the prompt, which then may have one token
    more than the model's window, since nothing follows the last one."""
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str | Sequence[int]] = ()
    """Strings, or lists of token ids, that end the completion; matched in generated text only."""
    thinking: Thinking | None = None
    """How the model thinks before it answers: strings of `stop` are then matched in the answer only, lists anywhere."""
    prompt_logprobs: bool = False
    """Whether to return the log-probability of each prompt token, and whether greedy decoding would have chosen it."""
    likeliest: bool = False
    """Whether to return, with each log-probability, the likeliest token there and its log-probability."""

    def check(self) -> None:
        """Raise `JobError` for a job that no model could run."""
        if isinstance(self.prompt, str):
            raise JobError(
                "the prompt is text; give token ids, for example those of engine.text.prompt: "
                "PromptTokenizer.of(engine.tokenizer, engine.window).plain(text)"
            )
        if len(self.prompt) == 0:
            raise JobError("the prompt is empty; a model needs at least one token (its BOS, for example)")
        if not is_whole(self.max_new_tokens):
            raise JobError(f"max_new_tokens {_shown(self.max_new_tokens)} is no whole number")
        if self.max_new_tokens < 0:
            raise JobError(f"max_new_tokens {self.max_new_tokens} is negative")
        if self.max_new_tokens == 0 and not self.prompt_logprobs:
            raise JobError("max_new_tokens 0 without prompt_logprobs requests nothing")
        for stop in self.stop:
            if not isinstance(stop, str) and not (isinstance(stop, Sequence) and all(map(is_whole, stop))):
                raise JobError(f"stop {_shown(stop)} is neither a text nor a list of token ids")
        if any(len(stop) == 0 for stop in self.stop):
            raise JobError("a stop sequence is empty; it would end every completion at once")
        self.sampling.check()
        if self.thinking is not None:
            self.thinking.check()

    def check_fits(self, vocabulary: int, window: int | None, pad: int | str | None) -> None:
        """Raise `JobError` for a job that a model of this vocabulary and window cannot run; `pad` is the policy's."""
        if {*map(type, self.prompt)} != {int}:  # else there is nothing to look for, token by token
            strange = next((token for token in self.prompt if not is_whole(token)), None)
            if strange is not None:
                raise JobError(f"the prompt holds {strange!r}, which is no token id")
        if not 0 <= min(self.prompt) <= max(self.prompt) < vocabulary:
            outside = next(token for token in self.prompt if not 0 <= token < vocabulary)
            raise JobError(
                f"prompt token {outside} is outside the model's vocabulary of {vocabulary}; the tokenizer and the "
                "model do not belong together, use the tokenizer that the model was trained with"
            )
        closing = () if self.thinking is None else self.thinking.closing
        if any(token >= vocabulary for token in closing):
            raise JobError(
                f"token {max(closing)}, which is to close thinking, is outside the model's vocabulary of {vocabulary}"
            )
        rows = max(1, len(self.prompt) - (self.max_new_tokens == 0))  # the last token of all is never fed
        positions = rows + max(0, self.max_new_tokens - 1)
        if window is not None and positions > window:
            raise JobError(
                f"prompt of {len(self.prompt)} tokens + {self.max_new_tokens} new ones exceed the model's window of "
                f"{window}; shorten it"
            )
        if isinstance(pad, int) and rows > pad:
            raise JobError(f"prompt of {len(self.prompt)} tokens is longer than pad-to-seq-len {pad}; raise it")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The result of a job."""

    text: str = ""
    """The generated text, thinking included, ending before the stop; end-of-text is not in it."""
    tokens: tuple[int, ...] = ()
    """The generated token ids that spell `text`."""
    logprobs: tuple[float, ...] = ()
    """Natural logs, one per token, under the model's unmodified distribution."""
    prompt_logprobs: tuple[float | None, ...] | None = None
    """`prompt_logprobs[i]` belongs to `prompt[i]`; the first is None. None if not requested."""
    prompt_greedy: tuple[bool | None, ...] | None = None
    """Whether greedy decoding chooses `prompt[i]` after `prompt[:i]`; present with `prompt_logprobs`."""
    likeliest: tuple[Likeliest, ...] | None = None
    """The likeliest token in the place of each of `tokens`; None if not requested."""
    prompt_likeliest: tuple[Likeliest | None, ...] | None = None
    """The likeliest token in the place of each prompt token, if those are scored; the first is None."""
    finish_reason: FinishReason | None = None
    """Why the text ended; "length" for a job that only scores; None when `error` is set."""
    end_token: int | None = None
    """The end-of-text token that ended the text, if one did; it is not among `tokens`."""
    error: EngineError | None = None
    """The error of a failed job; then the other fields are empty."""


def check_num_completions(count: int) -> None:
    """Raise `JobError` for a number of completions of one prompt that is no number, or too large."""
    if not is_whole(count) or not 1 <= count <= MOST_COMPLETIONS:
        raise JobError(f"num_completions {_shown(count)} is not a number from 1 to {MOST_COMPLETIONS}")


def is_whole(value: object) -> bool:
    """Whether `value` is an integer, of Python or of an array library."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def _shown(value: object) -> str:
    shown = repr(value) if not isinstance(value, int) or abs(value) < 10**20 else "of more than 20 digits"
    return shown if len(shown) < 60 else shown[:60] + "..."
