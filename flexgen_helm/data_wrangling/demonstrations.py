"""Demonstrations written for each data set: invented records, with the data set's own questions."""

from __future__ import annotations

from flexgen_helm.data_wrangling.datasets import Dataset
from flexgen_helm.data_wrangling.invented_records import ADULT, ADULT_COLUMNS, CELLS, COLUMNS, PAIRS, RECORDS, Record
from flexgen_helm.data_wrangling.rows import (
    Example,
    Row,
    cell_question,
    imputation_question,
    pair_question,
    schema_question,
)


def manual_demonstrations(dataset: Dataset) -> list[Example]:
    """The demonstrations written for `dataset`, the same for all its requests."""
    name = dataset.name
    if name in PAIRS:
        return [
            Example(pair_question(dataset, _row(dataset, a), _row(dataset, b)), answer) for a, b, answer in PAIRS[name]
        ]
    if name in RECORDS:
        return [
            Example(imputation_question(dataset, _row(dataset, values)), answer) for values, answer in RECORDS[name]
        ]
    if name == "Hospital":
        return [Example(cell_question(dataset, {column: cell}, column), answer) for column, cell, answer in CELLS]
    if name == "Adult":
        rows = [(dict(zip(ADULT_COLUMNS, values, strict=True)), column, answer) for values, column, answer in ADULT]
        return [Example(cell_question(dataset, row, column), answer) for row, column, answer in rows]
    return [Example(schema_question(a, b), answer) for a, b, answer in COLUMNS]


def _row(dataset: Dataset, values: Record) -> Row:
    return dict(zip(dataset.columns, values, strict=True))
