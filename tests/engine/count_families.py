"""Counts what becomes of every causal family of `transformers`, and of its variants: writes a table of the outcomes.

    make families TABLE=table.md

Each is a tiny random model that the engine runs beside plain `transformers` (`outcomes.py`). It takes half an
hour on one core; lines are written as they come. Rows of a table that is there already are kept, so that a count that
was ended goes on.
"""

from __future__ import annotations

import re
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import family_matrix
import torch
from outcomes import CASES, outcome

from flexgen_helm.checking.undecided import UndecidedError

HEAD = "| name | outcome | words |\n|---|---|---|\n"
_DIFFERS = re.compile(r"job \d+[ :(]")


def row_of(name: str) -> str:
    """A case's line of the table."""
    if name in family_matrix.NOT_BUILT:
        return f"| {name} | not built | {family_matrix.NOT_BUILT[name]} |\n"
    with tempfile.TemporaryDirectory(prefix="flexgen-count-") as folder:
        try:
            words = outcome(name, Path(folder))
        except UndecidedError as error:
            return f"| {name} | not built | {_line(error)} |\n"
        except Exception as error:
            traceback.print_exc()
            return f"| {name} | crashed | {type(error).__name__}: {_line(error)} |\n"
    if words == "equal":
        return f"| {name} | equal | |\n"
    return f"| {name} | {'different' if _DIFFERS.match(words) else 'refused'} | {words} |\n"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].replace("|", "/")


def counts(table: str) -> str:
    """Outcomes by number, of causal model types, of their variants, and of multimodal models on text alone."""
    found: dict[str, Counter[str]] = {"model types": Counter(), "variants": Counter(), "multimodal": Counter()}
    for line in table.splitlines()[2:]:
        name, outcome_of = (cell.strip() for cell in line.split("|")[1:3])
        kind = "multimodal" if name in family_matrix.MULTIMODAL else "variants" if "+" in name else "model types"
        found[kind][outcome_of] += 1
    return "\n".join(
        f"{kind}: {', '.join(f'{number} {what}' for what, number in each.most_common())}; {each.total()} in all"
        for kind, each in found.items()
    )


def main() -> None:
    """Write what is missing of the table."""
    file, *names = sys.argv[1:]
    table = Path(file)
    torch.set_num_threads(1)
    if not table.exists():
        table.write_text(HEAD, encoding="utf-8")
    known = {line.split("|")[1].strip() for line in table.read_text(encoding="utf-8").splitlines()[2:]}
    for name in names or CASES:
        if name not in known:
            with table.open("a", encoding="utf-8") as lines:
                lines.write(row_of(name))
    print(counts(table.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
