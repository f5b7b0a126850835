"""Sequences and the prefixes that they share (pure)."""

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
    """The position of the first token."""
    chain: tuple[Prefix, ...] = field(init=False, repr=False)
    """The prefixes before this span, the first one first."""
    cached: int = 0
    """The number of `tokens` whose keys and values are in `block`."""
    block: Block | None = None
    prompt_logprobs: list[float] = field(default_factory=list)
    """The log-probabilities of the prompt tokens among `tokens`, except the first, if requested."""
    prompt_greedy: list[bool] = field(default_factory=list)
    """Whether greedy decoding would have chosen each of those tokens."""
    prompt_likeliest: list[Likeliest] = field(default_factory=list)
    """The likeliest token in the place of each of those; a prefix always keeps them."""
    is_finite: bool = True
    """Whether all logits so far were finite; if not, this span or a neighbour in its micro-batch is the cause."""

    def __post_init__(self) -> None:
        self.follow(self.parent)

    def follow(self, parent: Prefix | None) -> None:
        """Continue `parent`, whose tokens and parent are final: position and chain are computed here, once."""
        self.parent = parent
        self.start = 0 if parent is None else parent.start + len(parent.tokens)
        self.chain = () if parent is None else (*parent.chain, parent)

    @property
    def num_shareable(self) -> int:
        """The number of own tokens that may be moved to a prefix: at least one row stays with the span."""
        return max(0, len(self.tokens) - 1)

    def split(self, most: int) -> list[Prefix]:
        """Move all but the last tokens to new prefixes, each of at most `most` (2 or more), and return them.

        Nothing of the span may be computed yet. Spans that continue it must `follow` it again.
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
        """Whether log-probabilities of its prompt tokens were requested."""
        raise NotImplementedError

    @property
    def num_rows(self) -> int:
        """The number of own tokens that pass through the layers at first."""
        return len(self.tokens)

    @property
    def capacity(self) -> int:
        """The most own tokens whose keys and values must be stored."""
        return len(self.tokens)


@dataclass(eq=False, kw_only=True)
class Prefix(Span):
    """Tokens shared by several sequences; computed once, kept while they are needed."""

    num_users: int = 0
    """The number of waiting and running sequences, and prefixes, whose parent this one is."""
    scored: bool = False
    """Whether log-probabilities of these tokens were requested."""
    is_piece: bool = False
    """Whether it is a part of a span that was too long, which only that span continues."""
    next_logprobs: Any = None
    """The log-probabilities of the token after the last one, float32 `[vocabulary]` on the host; only if `scored`."""
    next_greedy: int | None = None
    """The greedy choice after the last token; only if `scored`."""
    is_closed: bool = False
    """Whether no other span can continue it: the state after its last token is not kept."""

    @property
    def is_scored(self) -> bool:
        """Whether log-probabilities of these tokens were requested."""
        return self.scored

    @property
    def is_computed(self) -> bool:
        """Whether all of it is in the cache."""
        return self.cached == len(self.tokens)

    def forget(self) -> None:
        """Reset it to before it was computed."""
        self.cached = 0
        self.prompt_logprobs, self.prompt_greedy, self.prompt_likeliest = [], [], []
        self.next_logprobs = self.next_greedy = None
        self.is_finite, self.is_closed = True, False


@dataclass(eq=False, kw_only=True)
class Sequence(Span):
    """A job being processed: `tokens` are its own prompt tokens, then the generated ones."""

    job: Job
    num_prompt: int
    """The number of `tokens` that are prompt."""
    generated_logprobs: list[float] = field(default_factory=list)
    generated_likeliest: list[Likeliest] = field(default_factory=list)
    """The likeliest token in each place, and in that of end-of-text, if the job requests them."""
    rng: random.Random | None = None
    """The generator of `draws`; created at first use."""
    draws: list[float] = field(default_factory=list)
    """The uniform numbers in [0, 1) by which the generated tokens were chosen, and the one for the next token."""
    finish_reason: FinishReason | None = None
    end_token: int | None = None
    error: EngineError | None = None
    drafter: Drafter | None = None
    """Drafts coming tokens; created at first use."""
    is_alone: bool = False
    """Whether it gets micro-batches of its own and shares nothing, so that no neighbour can affect it."""
    thinking: Progress = field(init=False)
    """The progress of its thinking."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.thinking = Progress.of(self.job.thinking)

    @classmethod
    def of(cls, job: Job) -> Sequence:
        """Create a sequence for a checked job."""
        return cls(job=job, tokens=list(job.prompt), num_prompt=len(job.prompt))

    def restart_alone(self) -> None:
        """Restart it like `restart`, and run it alone from now on."""
        self.restart()
        self.is_alone = True

    def restart(self) -> None:
        """Reset it to before anything was computed, sharing nothing; its prefixes and block must have been released."""
        self.tokens, self.num_prompt = list(self.job.prompt), len(self.job.prompt)
        self.follow(None)
        self.begin_again()

    def begin_again(self) -> None:
        """Reset it to the end of its prefixes; its block must have been released."""
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
        """The number of generated tokens so far."""
        return self.tokens[self.num_prompt :]

    def draw(self, ahead: int = 0) -> float:
        """The random number that chooses the next token, or the one `ahead` tokens later; 0 for greedy decoding.

        A repeated sweep gets the same number, and so does a token that was drafted before.
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
        """The most tokens that may be drafted, for the model to check in the same sweep.

        The last new token is never fed back, so the block has space for all but that one. A sequence that is alone
        drafts none: a wrong guess with infinite or NaN logits would be taken for its own fault. Forced tokens come one
        by one.
        """
        if self.is_alone or self.thinking.due:
            return 0
        return max(0, self.job.max_new_tokens - len(self.generated_logprobs) - 1)

    def draft(self) -> tuple[int, ...]:
        """Tokens that may come next by prompt lookup; only with greedy decoding."""
        sampling, room = self.job.sampling, self.most_drafted
        if room < 1 or sampling.temperature > 0 or sampling.reads_generated:
            return ()
        if self.drafter is None:
            self.drafter = Drafter(chain.from_iterable(prefix.tokens for prefix in self.chain))
        self.drafter.extend(self.tokens[len(self.drafter) - self.start :])
        return self.drafter.draft(room)

    @property
    def num_rows(self) -> int:
        """As in `Span`; the last token of a job that only scores never passes through the layers."""
        return max(1, len(self.tokens) - (self.job.max_new_tokens == 0))

    @property
    def num_shareable(self) -> int:
        """As in `Span`; a job that only scores never computes its last token."""
        return max(0, len(self.tokens) - (2 if self.job.max_new_tokens == 0 else 1))

    @property
    def is_scored(self) -> bool:
        """Whether its job requests the log-probabilities of its prompt."""
        return self.job.prompt_logprobs

    def split(self, most: int) -> list[Prefix]:
        """As in `Span`, for a prompt."""
        heads = super().split(most)
        self.num_prompt -= sum(len(head.tokens) for head in heads)
        return heads

    @property
    def needs_cache(self) -> bool:
        """Whether keys and values are kept after the layer is computed; jobs of at most one new token need none."""
        return self.job.max_new_tokens > 1

    @property
    def capacity(self) -> int:
        """As in `Span`, new tokens included; the last one is never fed back."""
        return self.num_prompt + max(0, self.job.max_new_tokens - 1)

    @property
    def is_finite_with_prefixes(self) -> bool:
        """Whether its own logits and those of its prefixes were all finite."""
        return self.is_finite and all(prefix.is_finite for prefix in self.chain)

    @property
    def is_done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return self.finish_reason is not None or self.error is not None

    def continue_from(self, prefix: Prefix) -> None:
        """Move the first own tokens to `prefix`, and to those prefixes before it that this sequence does not follow.

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
        """Take back the tokens that were moved to a chain of prefixes: this sequence then shares nothing."""
        assert self.cached == 0
        self.follow(None)
        self.tokens = shared + self.tokens
        self.num_prompt += len(shared)


def _rng(job: Job) -> random.Random:
    return random.Random() if job.sampling.seed is None else random.Random(int(job.sampling.seed))
