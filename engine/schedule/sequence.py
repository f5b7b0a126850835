"""Sequences in work and the prefixes that they share (pure)."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any

from engine.errors import EngineError
from engine.job import FinishReason, Job, Likeliest
from engine.schedule.drafts import Drafter
from engine.thinking import Progress

if TYPE_CHECKING:
    from engine.schedule.block import Block


@dataclass(eq=False, kw_only=True)
class Span:
    """Consecutive tokens whose keys and values are computed together and kept in one block."""

    tokens: list[int]
    parent: Prefix | None = field(default=None, repr=False)
    """The prefix that these tokens continue; `follow` sets it."""
    start: int = field(init=False)
    """Position of the first token."""
    chain: tuple[Prefix, ...] = field(init=False, repr=False)
    """The prefixes before this span, the first one first."""
    cached: int = 0
    """How many of `tokens` have their keys and values in `block`."""
    block: Block | None = None
    prompt_logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of the prompt tokens among `tokens`, but the first, where asked for."""
    prompt_greedy: list[bool] = field(default_factory=list)
    """Whether each of those is the token that greedy choice would have taken."""
    prompt_likeliest: list[Likeliest] = field(default_factory=list)
    """The likeliest token in the place of each of those; a prefix keeps them in any case."""
    is_finite: bool = True
    """Whether all logits so far were numbers; else it, or a neighbour of its micro-batch, is at fault."""

    def __post_init__(self) -> None:
        self.follow(self.parent)

    def follow(self, parent: Prefix | None) -> None:
        """Continue `parent`, whose tokens and parent are final: position and chain are computed here, once."""
        self.parent = parent
        self.start = 0 if parent is None else parent.start + len(parent.tokens)
        self.chain = () if parent is None else (*parent.chain, parent)

    @property
    def num_shareable(self) -> int:
        """Own tokens that may be left to a prefix: at least one row stays the span's own."""
        return max(0, len(self.tokens) - 1)

    def split(self, most: int) -> list[Prefix]:
        """Leave all but the last tokens to new prefixes, each of at most `most` (2 or more), and return them.

        Nothing of the span may be computed. Spans that continue it must `follow` it again.
        """
        assert self.cached == 0
        count = math.ceil(len(self.tokens) / most)
        size = math.ceil(len(self.tokens) / count)
        borders = [min(size * number, self.num_shareable) for number in range(count)]
        heads: list[Prefix] = []
        for first, end in pairwise(borders):
            parent = heads[-1] if heads else self.parent
            tokens = self.tokens[first:end]
            heads.append(Prefix(tokens=tokens, parent=parent, num_users=1, scored=self.is_scored, is_piece=True))
        self.tokens = self.tokens[borders[-1] :]
        self.follow(heads[-1] if heads else self.parent)
        return heads

    @property
    def is_scored(self) -> bool:
        """Whether somebody asked for the log-probabilities of its prompt tokens."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """Own tokens that go through the layers at first."""
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        """Own tokens whose keys and values must be kept at most."""
        return len(self.tokens)


@dataclass(eq=False, kw_only=True)
class Prefix(Span):
    """Tokens shared by several sequences; computed once, kept while somebody needs them."""

    num_users: int = 0
    """Waiting and running sequences, and prefixes, whose parent this one is."""
    scored: bool = False
    """Whether somebody asked for the log-probabilities of these tokens."""
    is_piece: bool = False
    """Whether it is a part of a span that was too long, which that span alone begins from."""
    next_logprobs: Any = None
    """float32 `[vocabulary]` on the host: log-probabilities of what follows the last token; only if `scored`."""
    next_greedy: int | None = None
    """What greedy choice takes to follow the last token; only if `scored`."""
    is_closed: bool = False
    """Whether nobody can continue it any more: it is computed, and its state has been let go."""

    @property
    def is_scored(self) -> bool:
        """Whether somebody asked for the log-probabilities of these tokens."""
        return self.scored

    @property
    def is_computed(self) -> bool:
        """Whether all of it is in the cache."""
        return self.cached == len(self.tokens)

    def forget(self) -> None:
        """Be as before it was computed."""
        self.cached = 0
        self.prompt_logprobs, self.prompt_greedy, self.prompt_likeliest = [], [], []
        self.next_logprobs = self.next_greedy = None
        self.is_finite, self.is_closed = True, False


@dataclass(eq=False, kw_only=True)
class Sequence(Span):
    """A job on its way: `tokens` are its own prompt tokens, then what was generated."""

    job: Job
    num_prompt: int
    """How many of `tokens` are prompt."""
    generated_logprobs: list[float] = field(default_factory=list)
    generated_likeliest: list[Likeliest] = field(default_factory=list)
    """The likeliest token in each place, and in that of end-of-text, if the job asks for them."""
    rng: random.Random | None = None
    """Draws them; made when the first one is wanted."""
    draws: list[float] = field(default_factory=list)
    """Uniform numbers in [0, 1) that the generated tokens were chosen by, and the one for the next token."""
    finish_reason: FinishReason | None = None
    end_token: int | None = None
    error: EngineError | None = None
    drafter: Drafter | None = None
    """Guesses coming tokens; made when they are first wanted."""
    is_alone: bool = False
    """Whether it gets micro-batches of its own and shares nothing, so that no neighbour can be to blame."""
    thinking: Progress = field(init=False)
    """How far its thinking is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.thinking = Progress.of(self.job.thinking)

    @classmethod
    def of(cls, job: Job) -> Sequence:
        """A new sequence for a checked job."""
        return cls(job=job, tokens=list(job.prompt), num_prompt=len(job.prompt))

    def restart_alone(self) -> None:
        """As `restart`, but alone from now on."""
        self.restart()
        self.is_alone = True

    def restart(self) -> None:
        """Be as before anything was computed, sharing nothing; its prefixes and block must have been left."""
        self.tokens, self.num_prompt = list(self.job.prompt), len(self.job.prompt)
        self.follow(None)
        self.begin_again()

    def begin_again(self) -> None:
        """Be as before anything behind its prefixes was computed; its block must have been left."""
        assert self.block is None
        self.tokens = self.tokens[: self.num_prompt]
        self.rng, self.draws = None, []
        self.cached = 0
        self.prompt_logprobs, self.prompt_greedy, self.generated_logprobs = [], [], []
        self.prompt_likeliest, self.generated_likeliest = [], []
        self.is_finite, self.drafter = True, None
        self.finish_reason, self.end_token, self.error = None, None, None
        self.thinking = Progress.of(self.job.thinking)

    @property
    def generated(self) -> list[int]:
        """Generated tokens so far."""
        return self.tokens[self.num_prompt :]

    def draw(self, ahead: int = 0) -> float:
        """The number that chooses the next token, or one so many behind it; 0 where the likeliest one is taken.

        A sweep that is repeated gets the same one, and so does a token that was drafted before.
        """
        if self.job.sampling.temperature == 0:
            return 0.0
        if self.rng is None:
            self.rng = _rng(self.job)
        number = len(self.generated_logprobs) + ahead
        while len(self.draws) <= number:
            self.draws.append(self.rng.random())
        return self.draws[number]

    @property
    def most_drafted(self) -> int:
        """How many tokens may be drafted to come next, for the model to check in the same sweep.

        The last new token is never fed back, so the block has room for all but that one. A sequence that is alone
        drafts none: a wrong guess that yields no number would be taken for its own fault. Tokens that are due come one
        by one.
        """
        if self.is_alone or self.thinking.due:
            return 0
        return max(0, self.job.max_new_tokens - len(self.generated_logprobs) - 1)

    def draft(self) -> tuple[int, ...]:
        """Tokens that may come next, since they did so earlier; only where greedy choice takes them."""
        sampling, room = self.job.sampling, self.most_drafted
        if room < 1 or sampling.temperature > 0 or sampling.reads_generated:
            return ()
        if self.drafter is None:
            self.drafter = Drafter(chain.from_iterable(prefix.tokens for prefix in self.chain))
        self.drafter.extend(self.tokens[len(self.drafter) - self.start :])
        return self.drafter.draft(room)

    @property
    def num_rows(self) -> int:
        """As for any span; the last token of a job that only scores never goes through them."""
        return max(1, len(self.tokens) - (self.job.max_new_tokens == 0))

    @property
    def num_shareable(self) -> int:
        """As for any span; a job that only scores never computes its last token."""
        return max(0, len(self.tokens) - (2 if self.job.max_new_tokens == 0 else 1))

    @property
    def is_scored(self) -> bool:
        """Whether its job asks for the log-probabilities of its prompt."""
        return self.job.prompt_logprobs

    def split(self, most: int) -> list[Prefix]:
        """As for any span, of a prompt."""
        heads = super().split(most)
        self.num_prompt -= sum(len(head.tokens) for head in heads)
        return heads

    @property
    def needs_cache(self) -> bool:
        """Whether keys and values are kept after the layer is computed; jobs of at most one new token need none."""
        return self.job.max_new_tokens > 1

    @property
    def capacity(self) -> int:
        """As for any span, new tokens included; the last one is never fed back."""
        return self.num_prompt + max(0, self.job.max_new_tokens - 1)

    @property
    def is_finite_with_prefixes(self) -> bool:
        """Whether neither its own logits nor those of its prefixes were anything but finite."""
        return self.is_finite and all(prefix.is_finite for prefix in self.chain)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.finish_reason is not None or self.error is not None

    def continue_from(self, prefix: Prefix) -> None:
        """Leave the first own tokens to `prefix`, and to those prefixes before it that do not come before this yet.

        These tokens must be equal, and the prefixes must continue this sequence's parent.
        """
        assert self.cached == 0
        assert prefix.chain[: len(self.chain)] == self.chain
        size = prefix.start + len(prefix.tokens) - self.start
        assert self.tokens[size - len(prefix.tokens) : size] == prefix.tokens
        if self.parent is not None:
            self.parent.num_users -= 1
        self.tokens = self.tokens[size:]
        self.num_prompt -= size
        self.follow(prefix)
        prefix.num_users += 1

    def take_back(self, shared: list[int]) -> None:
        """Own again the tokens that were left to a chain of prefixes: this sequence then shares nothing."""
        assert self.cached == 0
        self.follow(None)
        self.tokens = shared + self.tokens
        self.num_prompt += len(shared)


def _rng(job: Job) -> random.Random:
    return random.Random() if job.sampling.seed is None else random.Random(int(job.sampling.seed))
