"""Protects: outside content is accepted, or refused in one line; and the fuzzer reports everything else."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

sys.path.insert(0, str(Path(__file__).parent))  # as in `python tests/fuzz`

import files
from changes import OTHERS, changed
from door import ACCEPTED, REFUSED, BadLine, Tally, check_line
from doors import DOORS

from engine.errors import ConfigError

CHEAP = ("policies", "hardware profiles", "lines of prompts", "lines of OpenAI's batches")
CHEAP += ("configs of models", "headers of safetensors files", "headers of GGUF files")


@pytest.fixture
def _scratch(tmp_path: Path) -> Iterator[None]:
    before = files.SCRATCH
    files.SCRATCH = tmp_path
    yield
    files.SCRATCH = before


@pytest.mark.usefixtures("_scratch")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHEAP)
def test_a_few_cases_at_each_cheap_door(name: str) -> None:
    from model_files import model_directory

    model_directory.cache_clear()
    (door,) = (door for door in DOORS if door.name == name)
    tally, let_in = Tally(), door.opened()

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(door.cases())
    def note(case: Any) -> None:
        tally.enter(let_in, case, 120)

    chosen = random.Random(0)
    while tally.num_cases < 20:
        note.hypothesis.fuzz_one_input(chosen.randbytes(4000))  # type: ignore[attr-defined]
    assert tally.finds == {}
    assert set(tally.outcomes) <= {ACCEPTED, REFUSED}
    assert tally.outcomes[ACCEPTED] > 0


def test_what_is_neither_is_a_find_of_its_kind_with_the_shortest_case() -> None:
    def let_in(case: str) -> None:
        if case.startswith("refused"):
            raise ConfigError("no")
        if case.startswith("two lines"):
            raise ConfigError("one\ntwo")
        if case.startswith("fault"):
            raise KeyError(case)

    tally = Tally()
    for case in ("fine", "refused", "fault, long", "fault", "two lines"):
        tally.enter(let_in, case)
    assert dict(tally.outcomes) == {ACCEPTED: 1, REFUSED: 1}
    assert sorted((find.case, find.count) for find in tally.finds.values()) == [("'fault'", 2), ("'two lines'", 1)]


def test_no_case_changes_what_later_ones_are_made_of() -> None:
    """A list that was put in, and then into itself, has no end."""
    before, chosen = copy.deepcopy(OTHERS), random.Random(0)

    @settings(database=None, deadline=None)
    @given(changed([{"a": 1, "b": [2]}]))
    def look(_: Any) -> None:
        return

    for _ in range(100):
        look.hypothesis.fuzz_one_input(chosen.randbytes(400))  # type: ignore[attr-defined]
    assert before == OTHERS


def test_a_case_without_end_is_a_find() -> None:
    def let_in(case: str) -> None:
        try:
            while True:
                pass
        except Exception:
            return

    tally = Tally()
    tally.enter(let_in, "x", 0.05)
    ((kind, _),) = tally.finds.items()
    assert kind.startswith("TooLong")


@pytest.mark.parametrize("line", ["", " ", "a\nb", "\x1b[31m", "x" * 5000, "\u202e"])
def test_what_is_no_line(line: str) -> None:
    with pytest.raises(BadLine):
        check_line(line)
