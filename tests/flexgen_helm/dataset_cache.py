"""Small data of the scenarios that HELM fetches with `datasets`, made here, as that library's cache keeps them.

Without a network `datasets` reads what is in its cache: <cache>/<dataset>/<config>/<version>/<hash>/*.arrow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scenario_files import CITIES, NAMES, question, story

Rows = list[dict[str, Any]]


def place_datasets(output: Path, default_cache: Path) -> None:
    """Write them below HELM's output directory, or into `default_cache` where HELM lets the library choose."""
    root = output / "scenarios"
    write_dataset(root / "raft/data", "ought/raft", "ade_corpus_v2", {"train": _labelled(20, "Sentence", "Label")})
    for subset in ("abercrombie", "proa"):
        rows = [{"text": story(i), "answer": ("Yes", "No")[i % 2]} for i in range(6)]
        write_dataset(root / "legalbench/data", "nguha/legalbench", subset, {"train": rows, "test": rows[:4]})
    write_dataset(root / "MATH/data", "hendrycks/competition_math", "default", {"train": _math(10), "test": _math(4)})
    for scenario, dataset, subset, kind in (
        ("lex_glue", "lex_glue", "ledgar", _labelled(6, "text", "label")),
        ("lex_glue", "lex_glue", "unfair_tos", [{"text": story(i), "labels": [i % 3]} for i in range(6)]),
        ("lex_glue", "lex_glue", "case_hold", _holdings(6)),
        ("lextreme", "joelito/lextreme", "brazilian_court_decisions_judgment", _labelled(6, "input", "label")),
        (
            "lextreme",
            "joelito/lextreme",
            "covid19_emergency_event",
            [{"input": story(i), "label": [i % 4]} for i in range(6)],
        ),
        (
            "lextreme",
            "joelito/lextreme",
            "lener_br",
            [{"input": story(i).split()[:5], "label": [3, 0, 0, 0, 0]} for i in range(6)],
        ),
    ):
        splits = {"train": kind, "validation": kind[:2], "test": kind[2:]}
        write_dataset(root / scenario / "data", dataset, subset, splits)
    acts = [{"text": _long(i, 210), "summary": story(i)} for i in range(12)]
    write_dataset(root / "summarization/data", "billsum", "default", {"train": acts, "test": acts[:4]})
    cases = [{"summary/long": _long(i, 110), "summary/short": story(i)} for i in range(12)]
    splits = {"train": cases, "validation": cases[:2], "test": cases[2:6]}
    write_dataset(root / "summarization/data", "allenai/multi_lexsum", "v20220616", splits)
    pairs = [{"translation": {"cs": f"Kniha {i}: {CITIES[i % 8]}", "en": f"Book {i}: {story(i)}"}} for i in range(6)]
    write_dataset(default_cache, "wmt14", "cs-en", {"train": pairs, "validation": pairs[:2], "test": pairs[2:]})


def write_dataset(
    cache: Path, dataset: str, config: str, splits: dict[str, Rows], features: Any = None, **how: Any
) -> None:
    """Write a dataset as if it had been loaded; `features` and `how` are what else `load_dataset` is called with."""
    import datasets
    from datasets.arrow_writer import ArrowWriter
    from datasets.naming import camelcase_to_snakecase

    name = camelcase_to_snakecase(dataset.split("/")[-1])
    config = datasets.BuilderConfig(config).create_config_id(how, features)
    folder = cache / "___".join([*dataset.split("/")[:-1], name]) / config / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True, exist_ok=True)
    info = datasets.DatasetInfo(dataset_name=name, config_name=config, version="0.0.0", splits=datasets.SplitDict())
    for split, rows in splits.items():
        data = datasets.Dataset.from_list(rows, features=features)
        for column in data.column_names:
            if column.lower() == "label" and data.features[column].dtype == "int64":
                data = data.cast_column(column, datasets.ClassLabel(names=["no", "yes"]))
        with ArrowWriter(features=data.features, path=str(folder / f"{name}-{split}.arrow")) as writer:
            writer.write_table(data.data.table)
            writer.finalize()
        info.features = data.features
        info.splits.add(datasets.SplitInfo(split, num_examples=len(rows), dataset_name=name))
    info.write_to_directory(str(folder))


def _long(number: int, num_words: int) -> str:
    """A document of at least so many words, as many more as one sentence has at most."""
    words: list[str] = []
    while len(words) < num_words:
        number += 7
        words += story(number).split()
    return " ".join(words)


def _labelled(count: int, text: str, label: str) -> Rows:
    return [{text: story(i), label: i % 2} for i in range(count)]


def _holdings(count: int) -> Rows:
    return [
        {"context": f"{story(i)} <HOLDING>", "endings": [f"that {name} won" for name in NAMES[:5]], "label": i % 2}
        for i in range(count)
    ]


def _math(count: int) -> Rows:
    return [
        {
            "problem": f"{question(i)[0]}, if {i} and {kind} are added to {level}?",
            "level": f"Level {level}",
            "type": kind,
            "solution": f"It is {i}. So the answer is $\\boxed{{{i}}}$.",
        }
        for i in range(count)
        for kind in ("Number Theory", "Algebra")
        for level in (1, 5)
    ]
