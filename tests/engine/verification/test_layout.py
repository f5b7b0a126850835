"""Protects: every token has one row, which stock layers compute once, behind the tokens before it."""

from __future__ import annotations

import random

import torch

from engine import Job
from engine.planning.limits import Limits
from engine.planning.planner import Plan
from engine.policy import Share
from engine.schedule.prefix import share_prefixes
from engine.schedule.sequence import Sequence
from engine.verification.layout import Layout, lay_out_rows
from engine.verification.passes import pass_limits

CPU = torch.device("cpu")


def texts(seed: int) -> list[Sequence]:
    """Sequences that share prefixes in up to three levels, some of them alone."""
    rng = random.Random(seed)

    def words(count: int) -> list[int]:
        return [rng.randrange(3, 500) for _ in range(count)]

    outer, inner, last = words(30), words(20), words(18)
    prompts = [outer + words(rng.randrange(1, 9)) for _ in range(4)]
    prompts += [outer + inner + words(rng.randrange(1, 4)) for _ in range(3)]
    prompts += [outer + inner + last + words(rng.randrange(1, 4)) for _ in range(3)]
    prompts += [words(rng.randrange(1, 40)) for _ in range(3)]
    rng.shuffle(prompts)
    sequences = [Sequence.of(Job(prompt=prompt, max_new_tokens=1)) for prompt in prompts]
    share_prefixes(sequences)
    return sequences


def laid_out(
    sequences: list[Sequence], *, continues: bool, rows_per_batch: int = 100
) -> tuple[Layout, list[list[int]]]:
    fed = [list(each.job.prompt) for each in sequences]
    return lay_out_rows(sequences, fed, rows_per_batch, device=CPU, table_device=CPU, continues=continues), fed


def test_each_row_is_computed_behind_the_tokens_before_it() -> None:
    for seed in range(8):
        sequences = texts(seed)
        for continues in (True, False):
            layout, fed = laid_out(sequences, continues=continues)
            table = torch.full((layout.num_rows,), -1)
            context: dict[int, list[int]] = {}
            """Of each piece that others continue, all tokens to its end."""
            behind: dict[int, list[int]] = {}
            """Of each row, the tokens to it."""
            for rectangle in layout.rectangles:
                before = [token for number in rectangle.before for token in context[number]]
                assert len(before) == rectangle.num_before
                flat = rectangle.ids.flatten()
                rows = rectangle.taken.view(rectangle.ids.shape).tolist()
                for row, ids in zip(rows, rectangle.ids.tolist(), strict=True):
                    for at, number in enumerate(row):
                        assert behind.setdefault(number, before + ids[: at + 1]) == before + ids[: at + 1]
                assert bool((table[rectangle.put] == -1).all())
                table[rectangle.put] = flat if rectangle.kept is None else flat[rectangle.kept]
                for number, place in rectangle.followed.items():
                    context[number] = rectangle.ids[place].tolist()
                assert len(rectangle.ids) == 1 or len(rectangle.ids) * (len(before) + rectangle.ids.shape[1]) <= 100
                assert continues == (rectangle.kept is None) or rectangle.kept is None
            for rows, ids in zip(layout.rows, fed, strict=True):
                assert table[rows].tolist() == ids
                assert behind[int(rows[-1])] == ids
            computed = sum(rectangle.ids.numel() for rectangle in layout.rectangles)
            assert computed == (layout.num_rows if continues else sum(map(len, fed)))
            assert layout.longest_continued == (
                max(len(s.job.prompt) for s in sequences if s.chain) if continues else 0
            )


def test_a_prefix_of_one_text_is_no_piece_of_its_own() -> None:
    """As of prompts that memory forced into pieces: their keys and values would be kept for nobody."""
    sequence = Sequence.of(Job(prompt=list(range(50)), max_new_tokens=1))
    assert len(sequence.split(20)) == 2
    layout, _ = laid_out([sequence], continues=True)
    assert [each.ids.shape for each in layout.rectangles] == [(1, 50)]
    assert not layout.rectangles[0].followed


def test_kept_keys_and_values_count() -> None:
    limits = Limits(
        sequences_per_batch=8, batches=8, rows_per_batch=100, cached_rows_per_batch=100, rows_per_sweep=1200
    )
    share = Share(gpu=100, cpu=0)
    plan = Plan(weights=share, kv_cache=None, activations=share, cache_budgets={}, limits=limits)
    assert [pass_limits(plan, limits, 2, width).num_rows for width in (0.25, 2.0, 6.0)] == [600, 600, 200]
    assert pass_limits(plan, limits, 4, 2.0).num_rows == 300
