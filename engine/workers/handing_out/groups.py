"""Groups of jobs whose prompts begin with the same tokens, to be computed by one device (pure)."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from engine.job import Job
from engine.schedule.prefix import MIN_SHARED_TOKENS, common_length

_PIECES = 32
"""Pieces per fair share that a larger group is cut into: enough to make the devices' shares equal within 3 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """The cost of a job for the device that computes it after the preceding jobs of its group."""

    number: int
    """The job's number."""
    rows: int
    """Prompt tokens beyond the prefix shared with the preceding job."""
    new: int
    """Most tokens that the job may generate."""

    @property
    def tokens(self) -> int:
        """Prompt and generated tokens together."""
        return self.rows + self.new


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Jobs that one device should compute, sorted by their prompts' tokens."""

    loads: tuple[Load, ...]
    tokens: int
    """Tokens to compute for all jobs, with shared prefixes counted once."""
    shared: int
    """Length of the prefix common to all jobs: a second device that takes some of the jobs computes it again."""
    family: int
    """Number shared by groups cut from the same larger group: a device computes their common prefix only once."""
    inherited: int = 0
    """Tokens of the first job that belong to the prefix common to the family; not counted in `tokens`."""

    def split(self, count: int) -> tuple[Group, Group]:
        """Split into the first `count` jobs and the others."""
        first = self._of(self.loads[:count], self.inherited)
        tokens = self.tokens - first.tokens  # not summed: a large group is split every time a device takes jobs of it
        return first, self._of(self.loads[count:], max(self.shared, self.inherited), tokens)

    def only(self, numbers: Container[int]) -> Group:
        """Keep only the jobs with these numbers."""
        return self._of(tuple(load for load in self.loads if load.number in numbers), self.inherited)

    def _of(self, loads: tuple[Load, ...], inherited: int, tokens: int | None = None) -> Group:
        if tokens is None:
            tokens = sum(load.tokens for load in loads)
        return Group(loads=loads, tokens=tokens, shared=self.shared, family=self.family, inherited=inherited)


def groups_of(jobs: Mapping[int, Job], num_shares: int, others: int = 0, *, share_prefix: bool = True) -> list[Group]:
    """Group `jobs`, given by number; groups with the longest answers come first, then those with smaller tokens.

    A group larger than a fair share of the work is cut where its jobs have least in common, unless recomputing the
    prefix costs more than the cut saves. `others`: tokens of other work still to be computed by the `num_shares`
    devices.
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
    """Return the prompt as a tuple, which can be compared; a tuple is returned uncopied."""
    return prompt if isinstance(prompt, tuple) else tuple(prompt)


def _joined(borders: list[int], ends: list[int], most: float) -> list[int]:
    """Remove borders between neighbours whose sizes together are at most `most`."""
    kept = borders[:1]
    for border, after in pairwise(borders[1:]):
        if ends[after] - ends[kept[-1]] > most:
            kept.append(border)
    return [*kept, borders[-1]]
