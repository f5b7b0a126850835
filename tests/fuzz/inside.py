"""The process of a fuzz target: runs its cases one after the other, and records the outcomes in a directory."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

_BYTES = 4000
"""Most bytes that a case is made from."""
_NOTES_S = 1.0


def main(name: str, cases: int, seed: int, state: Path) -> NoReturn:
    """Run `cases` cases of the target with this name."""
    os.environ.update(
        XDG_CACHE_HOME=str(state / "scratch" / "cache"), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"
    )
    logging.disable()
    warnings.simplefilter("ignore")
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is None:
        enter_all(name, cases, seed, state, None)
    with atheris.instrument_imports(include=["engine", "flexgen_helm"]):
        enter_all(name, cases, seed, state, atheris)


def enter_all(name: str, cases: int, seed: int, state: Path, atheris: Any) -> NoReturn:
    """Make cases from bytes: from inputs that the fuzzer found to reach new code, or random ones."""
    import files
    from door import STARTS_S, Tally
    from doors import DOORS
    from hypothesis import HealthCheck, given, settings

    files.SCRATCH = state / "scratch"
    door = next(door for door in DOORS if door.name == name)
    let_in = door.opened()
    tally, current = Tally(), os.open(state / "current", os.O_CREAT | os.O_WRONLY, 0o600)
    noted, parent = time.monotonic(), os.getppid()

    @settings(database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(door.cases())
    def note(case: Any) -> None:
        nonlocal noted
        text = repr(case).encode(errors="backslashreplace")
        os.pwrite(current, text, 0)
        os.ftruncate(current, len(text))
        # The first case may have to wait for imports.
        tally.enter(let_in, case, door.limit_s if tally.num_cases else STARTS_S)
        is_whole = tally.num_cases >= cases
        if is_whole or time.monotonic() > noted + _NOTES_S:
            _note(tally, state, is_whole=is_whole)
            noted = time.monotonic()
        if is_whole or os.getppid() != parent:  # the process that started this one has ended
            os._exit(0)

    fuzz = note.hypothesis.fuzz_one_input  # type: ignore[attr-defined]

    def guided(data: bytes) -> None:
        fuzz(data + random.Random(data).randbytes(_BYTES))  # enough bytes for a case, however short `data` is

    chosen = random.Random(seed)
    if atheris is None or not door.is_guided:
        while True:
            fuzz(chosen.randbytes(_BYTES))
    corpus = state / "corpus"
    corpus.mkdir()
    for number in range(100):
        (corpus / str(number)).write_bytes(chosen.randbytes(chosen.randint(10, 500)))
    # No limit but the door's: under `-timeout=0` atheris ends the process when the first case takes a second.
    options = [f"-seed={seed}", "-max_len=500", "-len_control=0", "-timeout=1000000", "-rss_limit_mb=0"]
    options += ["-handle_int=0", "-handle_term=0", f"-artifact_prefix={state}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], guided)
    atheris.Fuzz()
    raise AssertionError("it goes on until there are enough cases")


def _note(tally: Any, state: Path, *, is_whole: bool) -> None:
    told = {
        "outcomes": tally.outcomes,
        "finds": {kind: vars(find) for kind, find in tally.finds.items()},
        "is_whole": is_whole,
    }
    (state / "told.new").write_text(json.dumps(told))
    (state / "told.new").replace(state / "told")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
