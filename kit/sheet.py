"""The sheet that people grade texts on, one blind HTML file with an order for each rater; and what they save of it.

evals/judge.py --sheet and --ratings use it. kit/sheet.html is the page; it needs no network and sends nothing.
"""

import csv
import hashlib
import io
import json
import random
from pathlib import Path

from kit import data
from kit.finished import NAME, OBJECT, check, list_of, whole

PAGE = Path(__file__).with_name("sheet.html")
HEADER = ["sheet", "rater", "item", "grade"]
# Appendix B of arXiv:2407.20271 in other words, 1 to 8.
GRADES = (
    "The same as the reference, or the same words over and over",
    "Hardly different from the reference, and it says little",
    "Clearly different, but it makes no sense",
    "Different, and it makes sense in places",
    "Makes sense, and is partly like the reference",
    "Makes sense, and says what the reference says in other words",
    "Different in a way of its own, and sensible",
    "Different throughout, and fully sensible",
)
KEY = {"sheet": NAME, "raters": whole(1, 1000), "runs": list_of(OBJECT), "items": list_of(OBJECT)}
ITEM = {"text": list_of(NAME), "of": list_of(OBJECT)}
PLACE = {"run": whole(0), "epoch": whole(0)}
RUN = {"name": NAME, "summary": NAME}


# --- making it ---


def choose(outputs, n, seed=0):
    """The outputs of n texts, drawn at random, in random order.

    outputs: {(text, generation): anything}, text being hashable. Fewer than n texts: all of them.
    """
    texts = sorted({text for text, _ in outputs})
    drawn = random.Random(seed)
    chosen = set(drawn.sample(texts, min(n, len(texts))))
    found = sorted(key for key in outputs if key[0] in chosen)
    drawn.shuffle(found)
    return found


def page(items, raters):
    """(the id of a sheet, its HTML). items: dicts {prefix, reference, output}, the only thing that a rater sees.

    The order of each rater is drawn from the id, so that the same items make the same sheet. In the JSON inside the
    page no < is left, so that no text can end its element.
    """
    sheet = hashlib.sha256(json.dumps([items, raters]).encode()).hexdigest()[:12]
    orders = []
    for rater in range(raters):
        orders.append(random.Random(f"{sheet} {rater}").sample(range(len(items)), len(items)))
    data = {"sheet": sheet, "grades": GRADES, "orders": orders, "items": items}
    html = PAGE.read_text(encoding="utf-8")
    assert html.count(">DATA<") == 1
    return sheet, html.replace(">DATA<", ">" + json.dumps(data).replace("<", "\\u003c") + "<")


def is_page(path):
    """Whether a file is such a page."""
    with PAGE.open("rb") as page, path.open("rb") as file:
        return file.read(100) == page.read(100)


# --- reading it back ---


def read_key(path):
    """The key of a sheet: {sheet, raters, runs, items}, every field checked. ValueError."""
    key = check(data.read_json(path), KEY, path)
    for run in key["runs"]:
        check(run, RUN, f"{path}: runs")
    for item in key["items"]:
        check(item, ITEM, f"{path}: items")
        for place in item["of"]:
            check(place, PLACE, f"{path}: items: of")
            if place["run"] >= len(key["runs"]):
                raise ValueError(
                    f"{path}: an item of run {place['run']}, and there are {len(key['runs'])}"
                )
    return key


def read_ratings(paths, keys):
    """(key, {item: {rater: grade}}) of the files that raters have saved; keys: {sheet: key}. ValueError.

    All files must be of one sheet, which is among the keys; a rater grades an item once.
    """
    found, used = {}, None
    for path in paths:
        for line, row in ratings_lines(path):
            sheet, rater, item, grade = row
            if sheet not in keys:
                known = ", ".join(keys) or "none"
                raise ValueError(
                    f"{path} line {line}: of sheet {sheet[:40]!r}; the runs have the key of: {known}"
                )
            if used not in (None, sheet):
                raise ValueError(
                    f"{path} line {line}: of sheet {sheet}, other files of {used}: one at a time"
                )
            used = sheet
            count = len(keys[sheet]["items"])
            if not item.isdecimal() or int(item) >= count:
                raise ValueError(
                    f"{path} line {line}: item {item[:40]!r}; the sheet has 0 to {count - 1}"
                )
            if grade not in tuple("12345678"):
                raise ValueError(f"{path} line {line}: grade {grade[:40]!r} is not one of 1 to 8")
            if not rater.strip():
                raise ValueError(f"{path} line {line}: the rater has no name")
            if rater in found.setdefault(int(item), {}):
                raise ValueError(
                    f"{path} line {line}: {rater[:40]!r} has graded item {item} already: one name a rater"
                )
            found[int(item)][rater] = int(grade)
    if not used:
        raise ValueError(f"{', '.join(map(str, paths))}: no grade in it")
    return keys[used], found


def ratings_lines(path):
    """Yield (line, [sheet, rater, item, grade]) of a CSV file. ValueError for one that no sheet has saved."""
    rows = csv.reader(io.StringIO(data.read_text(path), newline=""), strict=True)
    try:
        for row in rows:
            if rows.line_num == 1 and row != HEADER:
                raise ValueError(
                    f"{path}: its first line is not {','.join(HEADER)}: no file that a sheet has saved"
                )
            if row and len(row) != len(HEADER):
                raise ValueError(
                    f"{path} line {rows.line_num}: {len(row)} columns where {len(HEADER)} belong"
                )
            if row and rows.line_num > 1:
                yield rows.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path} line {rows.line_num}: not CSV: {error}") from None
