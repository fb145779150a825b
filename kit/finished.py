"""Goes with its last reader: kit/runs.py reads a run, each other reader has one `try` of its own."""

from kit import data
from kit.protocols import PROTOCOLS

WAY_OUT = (
    "this is not what a run wrote there: copy the folder again, make the run again, or leave it out"
)

# --- checks: (what a value has to be, in words; whether it is) ---


def number(low, high, kinds=(int, float)):
    """A finite number in a range; true and false are none."""
    what = "whole number" if float not in kinds else "number"
    return (
        f"a {what} from {low:g} to {high:g}",
        lambda value: type(value) in kinds and low <= value <= high,
    )


def whole(low, high=1e9):
    return number(low, high, kinds=(int,))


def null_or(check):
    what, fits = check
    return f"{what}, or null", lambda value: value is None or fits(value)


def list_of(check):
    what, fits = check
    return (
        f"a list, each item {what}",
        lambda value: isinstance(value, list) and all(map(fits, value)),
    )


def is_text(value):
    """Whether it is a string that can be written: JSON can spell half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


TEXT = "a text", is_text
NAME = "a text that is not blank", lambda value: is_text(value) and value.strip() != ""
BOOL = "true or false", lambda value: isinstance(value, bool)
OBJECT = "an object {...}", lambda value: isinstance(value, dict)
PROTOCOL = (
    f"one of {', '.join(PROTOCOLS)}",
    lambda value: isinstance(value, str) and value in PROTOCOLS,
)

GRADED = {"mean": null_or(number(0, 10)), "n": whole(0)}


def check(value, fields, where):
    """The dict `value` if it has these fields and each is what it has to be, or ValueError."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: is not an object {{...}}; {WAY_OUT}")
    for name, (what, fits) in fields.items():
        name, optional = name.removesuffix("?"), name.endswith("?")
        if name in value and not fits(value[name]):
            raise ValueError(
                f"{where}: `{name}` is {repr(value[name])[:40]}, not {what}; {WAY_OUT}"
            )
        if name not in value and not optional:
            raise ValueError(f"{where}: no `{name}`; {WAY_OUT}")
    return value


def read_grades(path):
    """A judge.json or people.json of evals/judge.py. ValueError."""
    names = {"judge": NAME, "prompt": NAME} if path.name == "judge.json" else {}
    found = check(data.read_json(path), {"before": OBJECT, "after": OBJECT, **names}, path)
    for when in ("before", "after"):
        check(found[when], GRADED, f"{path}: {when}")
    return found
