"""The house: imports go one way, a function fits a screen, and the sums that keep it readable."""

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("kit", "evals", "extras", "demo", "dev", "examples")
PROGRAM = [file for room in (".", *ROOMS) for file in sorted((ROOT / room).glob("*.*"))]
PROGRAM = [file for file in PROGRAM if file.suffix in (".py", ".sh", ".html")]
TREES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text("utf-8"))
    for file in PROGRAM
    if file.suffix == ".py"
}
CORE = {name for name in TREES if name.startswith("kit.")} | {"icu", "baselines", "knn", "metrics"}


def imports(nodes):
    """The names of this repository's files among import statements."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & set(TREES)


def test_imports_go_one_way(tmp_path):
    """The core knows nothing above it, no circle, and an import prints and writes nothing."""
    for name, tree in TREES.items():
        needed = imports(ast.walk(tree))
        assert name not in CORE or needed <= CORE, (name, needed - CORE)
        assert not name.startswith("kit.") or all(other[:4] == "kit." for other in needed), name
        assert "experiment" not in needed or name.startswith(("dev.", "extras.")), name
    order = TopologicalSorter({name: imports(tree.body) for name, tree in TREES.items()})
    assert list(order.static_order())  # CycleError names a circle
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(TREES)}"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "") and not list(tmp_path.iterdir()), done.stderr


def test_a_function_fits_a_screen():
    """At most 50 lines, docstring included."""
    functions = [
        (node.end_lineno - node.lineno + 1, f"{name}.{node.name}")
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    assert [function for function in functions if function[0] > 50] == []


def test_the_house_stays_small():
    """The sums of the program, and of README.md."""
    texts = [file.read_text("utf-8") for file in PROGRAM]
    readme = (ROOT / "README.md").read_text("utf-8")
    lines = sum(text.count("\n") for text in texts)
    raises = sum(isinstance(node, ast.Raise) for tree in TREES.values() for node in ast.walk(tree))
    tests = [file.read_text("utf-8") for file in (ROOT / "tests").glob("*.py")]

    def words(texts):
        return sum(len(re.findall(r"[A-Za-z_]\w*|\d+", text)) for text in texts)

    # DESIGN's sums.
    sums = {
        "words of program": (words(texts), 74_800),
        "words of tests": (words(tests), 55_000),
        "lines of program": (lines, 12_400),
        "lines of over 100 columns": (
            sum(len(line) > 100 for text in texts for line in text.splitlines()),
            0,
        ),
        "files of program": (len(PROGRAM), 45),
        "Python files in kit": (sum(name.startswith("kit.") for name in TREES), 13),
        "raises a thousand lines": (round(1000 * raises / lines, 1), 11),
        "lines of README": (readme.count("\n"), 130),
        "words of README": (len(readme.split()), 1_300),
    }
    over = {name: f"{number} > {limit}" for name, (number, limit) in sums.items() if number > limit}
    assert not over
