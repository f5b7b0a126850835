"""Jobs that begin with the same tokens, in groups that one device computes (pure)."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from engine.job import Job
from engine.schedule.prefix import MIN_SHARED_TOKENS, common_length

_PIECES = 32
"""Of a fair share, that a group is cut into where it is larger than one: as many as make shares equal to 3 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a job asks of the device that computes it, after the jobs before it in its group."""

    number: int
    """Of the job."""
    rows: int
    """Tokens of its prompt that those before it do not begin with."""
    new: int
    """Tokens that it may generate."""

    @property
    def tokens(self) -> int:
        """Computed tokens."""
        return self.rows + self.new


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Jobs that are best computed by one device, in the order of their tokens."""

    loads: tuple[Load, ...]
    tokens: int
    """Computed tokens."""
    shared: int
    """Tokens that all of them begin with: another device that takes some of them computes these again."""
    family: int
    """That it was cut from with others: what these begin with, too, a device that has some of them computes once."""
    inherited: int = 0
    """Tokens that the first job has in common with what others of the family begin with; not in `tokens`."""

    def split(self, count: int) -> tuple[Group, Group]:
        """The first `count` jobs, and the others."""
        first = self._of(self.loads[:count], self.inherited)
        tokens = self.tokens - first.tokens  # not added up: a large group is split as often as devices take of it
        return first, self._of(self.loads[count:], max(self.shared, self.inherited), tokens)

    def only(self, numbers: Container[int]) -> Group:
        """The same with only these of its jobs."""
        return self._of(tuple(load for load in self.loads if load.number in numbers), self.inherited)

    def _of(self, loads: tuple[Load, ...], inherited: int, tokens: int | None = None) -> Group:
        if tokens is None:
            tokens = sum(load.tokens for load in loads)
        return Group(loads=loads, tokens=tokens, shared=self.shared, family=self.family, inherited=inherited)


def groups_of(jobs: Mapping[int, Job], num_shares: int, others: int = 0, *, share_prefix: bool = True) -> list[Group]:
    """The groups of `jobs`, by number: those with the longest answers first, then in the order of their tokens.

    A group that alone is larger than a fair share of the work is cut where its jobs have least in common, unless that
    costs more than it spares. `others`: computed tokens of other work that the same `num_shares` devices have left.
    """
    prompts = {number: _tuple(job.prompt) for number, job in jobs.items()}
    order = sorted(prompts, key=prompts.__getitem__) if share_prefix else list(prompts)
    common = [common_length(prompts[one], prompts[other]) if share_prefix else 0 for one, other in pairwise(order)]
    loads = [
        Load(number=number, rows=max(1, len(prompts[number]) - same), new=jobs[number].max_new_tokens)
        for number, same in zip(order, [0, *common], strict=True)
    ]
    ends = [0, *accumulate(load.tokens for load in loads)]
    most = (ends[-1] + others) / num_shares if num_shares > 1 else float("inf")
    groups: list[Group] = []
    work: list[tuple[int, int, int | None, int]] = [(0, len(loads), None, 0)] if loads else []
    while work:
        first, end, family, inherited = work.pop()
        size, tokens = min(common[first : end - 1], default=0), ends[end] - ends[first]
        if end - first == 1 or (size >= MIN_SHARED_TOKENS and (tokens <= most or tokens - size <= size)):
            family = order[first] if family is None else family
            own = tuple(loads[first:end])
            groups.append(Group(loads=own, tokens=tokens, shared=size, family=family, inherited=inherited))
            continue
        borders = [first, *(at + 1 for at in range(first, end - 1) if common[at] == size), end]
        if size >= MIN_SHARED_TOKENS:
            borders = _joined(borders, ends, most / _PIECES)
            work.extend((left, right, order[first], size) for left, right in reversed([*pairwise(borders)][1:]))
            work.append((first, borders[1], order[first], inherited))
        else:
            work.extend((left, right, None, 0) for left, right in reversed([*pairwise(borders)]))
    return sorted(groups, key=lambda group: -max(load.new for load in group.loads))


def _tuple(prompt: Sequence[int]) -> tuple[int, ...]:
    """A prompt as it can be compared with others; one that is a tuple already is not copied."""
    return prompt if isinstance(prompt, tuple) else tuple(prompt)


def _joined(borders: list[int], ends: list[int], most: float) -> list[int]:
    """`borders` without those between neighbours that are small together."""
    kept = borders[:1]
    for border, after in pairwise(borders[1:]):
        if ends[after] - ends[kept[-1]] > most:
            kept.append(border)
    return [*kept, borders[-1]]
