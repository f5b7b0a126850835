"""Files in the formats of HELM's downloads, and the little stories that fill them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
CITIES = ("Oslo", "Lima", "Cairo", "Rome", "Kyoto", "Quito", "Accra", "Delhi")


def text(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def jsonl(path: Path, rows: Iterable[Any]) -> None:
    text(path, "".join(json.dumps(row) + "\n" for row in rows))


def table(path: Path, rows: Iterable[Sequence[Any]], delimiter: str = ",") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=delimiter).writerows(rows)


def story(i: int) -> str:
    """A passage with one fact to ask for."""
    name, city = NAMES[i % 8], CITIES[i * 3 % 8]
    return f"{name} left home on day {i}. {name} walked to {city} and bought {i + 2} red apples there."


def question(i: int) -> tuple[str, str]:
    """What `story` answers."""
    return (f"where did {NAMES[i % 8]} walk", CITIES[i * 3 % 8])
