"""Rows of public data sets as dicts, from the kinds of file that they come in: CSV, JSON, JSON lines, XML."""

import csv
import io
import json
import xml.etree.ElementTree as ElementTree

from kit.data import read_jsonl, read_text


def read_rows(path):
    """The rows of a file as dicts. The label of each row may stand in a line of FILE-labels.lst, as PIQA has it."""
    rows, labels = READERS[path.suffix](path), path.with_name(f"{path.stem}-labels.lst")
    if labels.is_file():
        values = read_text(labels).split()
        if len(values) != len(rows):
            raise ValueError(
                f"{labels}: {len(values)} labels for the {len(rows)} rows of {path.name}"
            )
        rows = [row | {"label": value} for row, value in zip(rows, values, strict=True)]
    return rows


def read_csv(path):
    csv.field_size_limit(2**31 - 1)  # the default stops at a field of 128 kB
    try:
        return list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}: not CSV: {error}") from None


def read_json(path):
    """A list of rows, or {id: row, ...}, or columns as pandas writes them, {"text": {"0": [turn, ...], "1": ...}}."""
    try:
        data = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if isinstance(data, dict) and all(isinstance(value, dict) for value in data.values()):
        if all(key.isdigit() for value in data.values() for key in value):
            indices = dict.fromkeys(key for column in data.values() for key in column)
            data = {i: {name: column.get(i) for name, column in data.items()} for i in indices}
        data = list(data.values())
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise ValueError(f"{path}: expected a list of objects, an object of objects, or columns")
    return data


def read_copa_xml(path):
    """The original COPA, <item asks-for most-plausible-alternative><p/><a1/><a2/></item>, as SuperGLUE's fields."""
    try:
        items = ElementTree.fromstring(read_text(path)).iter("item")
    except ElementTree.ParseError as error:
        raise ValueError(f"{path}: not XML: {error}") from None
    return [
        {"premise": item.findtext("p"), "choice1": item.findtext("a1"), "choice2": item.findtext("a2"),
         "question": item.get("asks-for"), "label": {"1": 0, "2": 1}.get(item.get("most-plausible-alternative"))}
        for item in items
    ]  # fmt: skip


READERS = {".csv": read_csv, ".json": read_json, ".jsonl": read_jsonl, ".xml": read_copa_xml}
