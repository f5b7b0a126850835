"""Rows of a data set's files, and the questions they make."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError
from engine.reading import read_bytes
from flexgen_helm.data_wrangling.datasets import NO, YES, Dataset

Row = Mapping[str, str]
_OWN = ("", "Unnamed: 0", "row_id", "col_name", "is_clean")
"""Columns that say something of a row, but are no part of it."""


@dataclass(frozen=True)
class Example:
    """A question and its right answer."""

    question: str
    answer: str


# Questions


def serialize(row: Row, columns: Mapping[str, str], missing: str = "") -> str:
    """`name: value. name: value` of the columns of a row; white space is one blank each."""
    return ". ".join(f"{name}: {' '.join(row[column].split()) or missing}".rstrip() for column, name in columns.items())


def pair_question(dataset: Dataset, a: Row, b: Row) -> str:
    """Two records that may describe one thing."""
    shown = [serialize(row, dataset.columns, dataset.task.missing) for row in (a, b)]
    return f"{dataset.noun} A: {shown[0]}\n{dataset.noun} B: {shown[1]}"


def imputation_question(dataset: Dataset, row: Row) -> str:
    """A record without the cell that is to be predicted."""
    return serialize(row, dataset.columns, dataset.task.missing)


def cell_question(dataset: Dataset, row: Row, column: str) -> str:
    """A cell, below its row if that is shown."""
    cell = serialize(row, {column: column}, dataset.task.missing)
    if not dataset.shows_row:
        return cell
    whole = {name: name for name in row if name not in _OWN}
    return f"{serialize(row, whole, dataset.task.missing)}\nCell: {cell}"


def schema_question(a: str, b: str) -> str:
    """Two columns of two schemas."""
    return f"A: {a}\nB: {b}"


# Files


def read_examples(dataset: Dataset, root: Path, split: str) -> list[Example]:
    """The examples of a split (`train`, `valid`, `test`), in the order of its file, every row one.

    `root` is the archive, unpacked. Raises `ConfigError` for files, columns or rows that are missing, and for labels
    other than 0 and 1.
    """
    folder = root / dataset.folder
    needed = (*dataset.task.tables, f"{split}.csv")
    if lacking := [name for name in needed if not (folder / name).is_file()]:
        raise ConfigError(f"{folder} lacks {', '.join(lacking)}; data_wrangling needs {', '.join(needed)} there")
    examples = _READERS[dataset.task_name](dataset, folder, folder / f"{split}.csv")
    if not examples:
        raise ConfigError(f"{folder / split}.csv has no rows")
    return examples


def _read_pairs(dataset: Dataset, folder: Path, file: Path) -> list[Example]:
    tables = []
    for name in dataset.task.tables:
        rows = read_table(folder / name, ("id", *dataset.columns))
        tables.append({row["id"]: row for row in rows})
    pairs = read_table(file, ("ltable_id", "rtable_id", "label"))
    examples = []
    for number, pair in enumerate(pairs):
        a, b = (
            _found(table, pair[key], file, number, key, name)
            for table, key, name in zip(tables, ("ltable_id", "rtable_id"), dataset.task.tables, strict=True)
        )
        examples.append(Example(pair_question(dataset, a, b), _yes_or_no(pair, "label", "1", file, number)))
    return examples


def _read_imputation(dataset: Dataset, folder: Path, file: Path) -> list[Example]:
    rows = read_table(file, (*dataset.columns, dataset.target))
    return [Example(imputation_question(dataset, row), " ".join(row[dataset.target].split())) for row in rows]


def _read_cells(dataset: Dataset, folder: Path, file: Path) -> list[Example]:
    table = {str(number): row for number, row in enumerate(read_table(folder / "table.csv", ()))}
    examples = []
    for number, cell in enumerate(read_table(file, ("row_id", "col_name", "is_clean"))):
        column = cell["col_name"]
        row = _found(table, cell["row_id"], file, number, "row_id", "table.csv")
        if column not in row or row.get("col_name", column) != column:
            raise ConfigError(
                f"{file}, row {number}: table.csv has no cell of column {column!r} in row {cell['row_id']}; "
                f"its columns are {', '.join(row)}"
            )
        answer = _yes_or_no(cell, "is_clean", "0", file, number)
        examples.append(Example(cell_question(dataset, row, column), answer))
    return examples


def _read_schema(dataset: Dataset, folder: Path, file: Path) -> list[Example]:
    rows = read_table(file, ("omop", "table", "label"))
    return [
        Example(schema_question(row["omop"], row["table"]), _yes_or_no(row, "label", "1", file, number))
        for number, row in enumerate(rows)
    ]


_READERS = {
    "entity_matching": _read_pairs,
    "data_imputation": _read_imputation,
    "error_detection": _read_cells,
    "schema_matching": _read_schema,
}


_MOST_BYTES = 1 << 28
"""Ten times the largest table of these benchmarks."""


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a CSV file with a header, cells as they are written; `ConfigError` if it lacks one of `columns`."""
    content = read_bytes(path, ConfigError, limit=_MOST_BYTES)
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), restval="")
        present = list(reader.fieldnames or ())
        if lacking := [column for column in columns if column not in present]:
            raise ConfigError(f"{path} lacks the columns {', '.join(lacking)}; it has {', '.join(present)}")
        return [{name: row[name] for name in present} for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _found(table: Mapping[str, Row], key: str, file: Path, number: int, column: str, where: str) -> Row:
    try:
        return table[key]
    except KeyError:
        raise ConfigError(f"{file}, row {number}: {column} {key!r} is not in {where}") from None


def _yes_or_no(row: Row, column: str, yes: str, file: Path, number: int) -> str:
    if row[column] not in ("0", "1"):
        raise ConfigError(f"{file}, row {number}: {column} is {row[column]!r}; it must be 0 or 1")
    return YES if row[column] == yes else NO
