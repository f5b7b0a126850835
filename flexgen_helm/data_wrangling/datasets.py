"""The data sets: their tasks, the locations of their files, the columns that are shown and the questions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from engine.errors import ConfigError, did_you_mean

YES, NO = "Yes", "No"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the data sets of one kind have in common."""

    folder: str
    """The folder of its data sets in the archive."""
    tables: tuple[str, ...]
    """Files in addition to those of the splits."""
    label: str | None
    """Column of a split that is 1 or 0; None where the answer is a cell's text."""
    max_tokens: int
    """The most tokens of an answer."""
    missing: str = ""
    """How an empty cell is written."""

    @property
    def is_binary(self) -> bool:
        """Whether answers are Yes or No."""
        return self.label is not None


TASKS = {
    "entity_matching": Task(
        folder="entity_matching/structured", tables=("tableA.csv", "tableB.csv"), label="label", max_tokens=5
    ),
    "data_imputation": Task(folder="data_imputation", tables=(), label=None, max_tokens=10),
    "error_detection": Task(
        folder="error_detection", tables=("table.csv",), label="is_clean", max_tokens=5, missing="nan"
    ),
    "schema_matching": Task(folder="schema_matching", tables=(), label="label", max_tokens=5),
}


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One data set, with the form of its questions."""

    name: str
    task_name: str
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns shown, in this order, and what the prompt calls them; empty where rows say themselves."""
    noun: str = ""
    """What is matched."""
    target: str = ""
    """The column to impute."""
    shows_row: bool = False
    """Whether a cell to check is shown with its row."""
    instructions: str
    output_noun: str
    """What stands before an answer."""

    @property
    def task(self) -> Task:
        """What it has in common with others."""
        return TASKS[self.task_name]

    @property
    def folder(self) -> str:
        """The folder of its files in the archive."""
        return f"{self.task.folder}/{self.name}"


def _same(*columns: str) -> dict[str, str]:
    return {column: column for column in columns}


def _matching(name: str, noun: str, columns: Mapping[str, str]) -> Dataset:
    return Dataset(
        name=name,
        task_name="entity_matching",
        columns=columns,
        noun=noun.capitalize(),
        instructions=f"Two records may describe one and the same {noun}. Decide whether they do: Yes or No.",
        output_noun=f"Same {noun}",
    )


_PAPER = _same("title", "authors", "venue", "year")
_SONG = {
    "Song_Name": "name",
    "Artist_Name": "artist",
    "Album_Name": "album",
    "Genre": "genre",
    "Price": "price",
    "Time": "time",
    "Released": "released",
}

DATASETS = {
    dataset.name: dataset
    for dataset in (
        # `class` is left out: it is the number of the restaurant, equal in both records just where they match
        _matching("Fodors-Zagats", "restaurant", _same("name", "addr", "city", "phone", "type")),
        # as in the paper, without style and strength, without copyright, without category, brand and price
        _matching("Beer", "beer", {"Beer_Name": "name", "Brew_Factory_Name": "factory"}),
        _matching("iTunes-Amazon", "song", _SONG),
        _matching("Walmart-Amazon", "product", _same("title", "modelno")),
        _matching("Amazon-Google", "product", _same("title", "manufacturer", "price")),
        _matching("DBLP-ACM", "paper", _PAPER),
        _matching("DBLP-GoogleScholar", "paper", _PAPER),
        Dataset(
            name="Restaurant",
            task_name="data_imputation",
            columns=_same("name", "addr", "phone", "type"),
            target="city",
            instructions="Each record describes a restaurant. Name the city it is in.",
            output_noun="City",
        ),
        Dataset(
            name="Buy",
            task_name="data_imputation",
            columns=_same("name", "description"),
            target="manufacturer",
            instructions="Each record describes a product. Name the company that makes it.",
            output_noun="Manufacturer",
        ),
        Dataset(
            name="Hospital",
            task_name="error_detection",
            instructions="In some cells of a table, letters or digits were replaced by the letter x. "
            "Decide whether that happened to the cell: Yes or No.",
            output_noun="Misspelled",
        ),
        Dataset(
            name="Adult",
            task_name="error_detection",
            shows_row=True,
            instructions="Each record is a row of a census, followed by one of its cells. Decide whether the cell "
            "holds an error: Yes or No. An empty cell, written nan, is none.",
            output_noun="Error",
        ),
        Dataset(
            name="Synthea",
            task_name="schema_matching",
            instructions="A and B are columns of two databases of patients, each written as table-column. "
            "Decide whether both hold the same thing: Yes or No.",
            output_noun="Same",
        ),
    )
}


def find_dataset(name: str, task_name: str | None = None) -> Dataset:
    """The data set of that name; `ConfigError` where there is none, or none of that task."""
    if task_name is not None and task_name not in TASKS:
        raise ConfigError(f"data_wrangling: no task {task_name!r}{did_you_mean(task_name, TASKS)}")
    known = [dataset.name for dataset in DATASETS.values() if task_name in (None, dataset.task_name)]
    if name not in DATASETS:
        raise ConfigError(f"data_wrangling: no dataset {name!r}{did_you_mean(name, known)}")
    if name not in known:
        raise ConfigError(
            f"data_wrangling: dataset {name!r} is of task {DATASETS[name].task_name}, not {task_name}; "
            f"leave task= out, or take one of {', '.join(known)}"
        )
    return DATASETS[name]
