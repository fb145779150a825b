"""The house: arrows go down only, a function fits a screen, a file is imported without side effects.

python -m pytest tests/test_house.py -q
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {path.stem: path for path in ROOT.glob("*.py")}
KIT = {f"kit.{path.stem}": path for path in (ROOT / "kit").glob("*.py")}
FILES = {**ROOMS, **KIT, **{f"demo.{path.stem}": path for path in (ROOT / "demo").glob("*.py")}}
# Floors from the top; a file imports from floors below its own, or from its own where `BESIDE` says so.
SIDES = {"report", "baselines", "judge"}
FLOORS = [
    {"bench"},
    {"experiment"},
    {"audit"},
    SIDES,
    {"icu", "knn", "tasks"},
    {"metrics"},
    set(KIT),
]
# Contracts of before this rule: positional parameters that users may have written.
MANY_PARAMETERS = {"cosine_knn", "extraction_likelihood"}


def imports(path):
    """Names of this repository's files that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & set(FILES)


def floor(name):
    return next(number for number, names in enumerate(FLOORS) if name in names)


@pytest.mark.parametrize("name", [name for name in FILES if not name.startswith("demo.")])
def test_arrows_go_down_only(name):
    """Each import is of a lower floor, or inside kit/, which knows nothing of the top level."""
    for other in imports(FILES[name]) - {"demo.tiny"}:
        assert floor(other) > floor(name) or (
            name.startswith("kit.") and other.startswith("kit.")
        ), (name, other)
    assert "experiment" not in imports(FILES[name])


def test_kit_has_no_circle():
    """Each file of kit/ can be read with only files that are read before it."""
    left = {name: imports(path) for name, path in KIT.items()}
    while left:
        ready = {name for name, needs in left.items() if not needs & set(left)}
        assert ready, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in ready}


@pytest.mark.parametrize("name", list(FILES))
def test_a_function_fits_a_screen(name):
    """At most 50 lines, docstring included, and at most four positional parameters besides self."""
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [
                a.arg
                for a in [*node.args.posonlyargs, *node.args.args]
                if a.arg not in ("self", "cls")
            ]
            assert node.end_lineno - node.lineno < 50, f"{name}.{node.name}"
            assert (
                len(parameters) <= 4 or node.name in MANY_PARAMETERS or node.name.startswith("_")
            ), node.name


def test_importing_has_no_side_effects(tmp_path):
    """Every file can be imported from an empty folder: nothing is printed, written or started."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(ROOMS)}, examples.lora, examples.rmu"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0 and done.stdout == "" and list(tmp_path.iterdir()) == [], (
        done.stderr
    )
