"""Small data of the data_wrangling scenario, made here, in the layout of its archive."""

from __future__ import annotations

from pathlib import Path

from scenario_files import CITIES, NAMES, table

NUM_TRAIN, NUM_TEST = 12, 7
COLUMNS = {
    "Fodors-Zagats": ("name", "addr", "city", "phone", "type", "class"),
    "Beer": ("Beer_Name", "Brew_Factory_Name", "Style", "ABV"),
    "iTunes-Amazon": (*("Song_Name", "Artist_Name", "Album_Name", "Genre", "Price", "CopyRight", "Time", "Released"),),
    "Walmart-Amazon": ("title", "category", "brand", "modelno", "price"),
    "Amazon-Google": ("title", "manufacturer", "price"),
    "DBLP-ACM": ("title", "authors", "venue", "year"),
    "DBLP-GoogleScholar": ("title", "authors", "venue", "year"),
}
HOSPITAL = ("City", "Score", "Condition")
ADULT = ("age", "workclass", "income")


def is_match(i: int) -> int:
    """The label of pair `i` of an entity matching data set."""
    return int(i % 3 == 0)


def data_wrangling(root: Path) -> None:
    """Write the archive, unpacked, where the scenario looks for it."""
    write_archive(root / "data_wrangling" / "data")


def write_archive(folder: Path) -> None:
    """Write all data sets."""
    for name, columns in COLUMNS.items():
        pairs = folder / "entity_matching/structured" / name
        for side in "AB":
            rows = ((i, *(_value(column, i, side) for column in columns)) for i in range(NUM_TRAIN + NUM_TEST))
            table(pairs / f"table{side}.csv", [("id", *columns), *rows])
        for split, numbers in _splits():
            labels = ((i, i if is_match(i) else i // 2, is_match(i)) for i in numbers)
            table(pairs / f"{split}.csv", [("ltable_id", "rtable_id", "label"), *labels])
    for name, head, target in (
        ("Restaurant", ("name", "addr", "phone", "type"), "city"),
        ("Buy", ("name", "description"), "manufacturer"),
    ):
        for split, numbers in _splits():
            rows = ((*(_value(column, i, "") for column in head), CITIES[i % 8]) for i in numbers)
            table(folder / "data_imputation" / name / f"{split}.csv", [(*head, target), *rows])
    for name, head in (("Hospital", HOSPITAL), ("Adult", ADULT)):
        checked = folder / "error_detection" / name
        rows = (tuple(f"{column.lower()} {'x' * (i % 2)}{i}" for column in head) for i in range(NUM_TRAIN + NUM_TEST))
        table(checked / "table.csv", [("", *head), *((i, *row) for i, row in enumerate(rows))])
        for split, numbers in _splits():
            cells = ((i, head[i % len(head)], int(i % 2 == 0)) for i in numbers)
            table(checked / f"{split}.csv", [("row_id", "col_name", "is_clean"), *cells])
    for split, numbers in _splits():
        rows = ((f"person-{NAMES[i % 8]}", f"patients-{i}", is_match(i), "a", "b") for i in numbers)
        table(folder / "schema_matching/Synthea" / f"{split}.csv", [("omop", "table", "label", "des1", "des2"), *rows])


def _splits() -> tuple[tuple[str, range], ...]:
    return ("train", range(NUM_TRAIN)), ("test", range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))


def _value(column: str, i: int, side: str) -> str:
    if column == "class":
        return f"class-{i}"
    return "" if column == "price" and i % 4 == 1 else f"{column.lower()} {NAMES[i % 8]} {i} {side}"
