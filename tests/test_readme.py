"""README.md, run.sh: what they say exists, and the lines they point at hold what they say.

python -m pytest tests/test_readme.py -q
"""

import argparse
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_icu import asks, toy_sides

import experiment
from kit.protocols import DIFFERENCES

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_equation_of_the_paper_stands_on_the_line_that_the_readme_names():
    """The table equation -> file#L holds all ten, and each line (or the docstring it opens) names its equation."""
    rows = re.findall(
        r"^\| Eq\. \((\d+)\)[^|]*\| \[[^]]*\]\((\w+\.py)#L(\d+)\)", README, re.MULTILINE
    )
    assert {int(number) for number, _, _ in rows} == set(range(1, 11))
    for number, file, line in rows:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.search(rf"Eq\. \(?({number}\b|\d+\), \({number}\))", text), (
            f"{file}:{line} is not Eq. ({number}): {text}"
        )


def test_every_file_and_link_of_the_readme_exists():
    """Relative links point at files of the repository."""
    links = [
        link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link
    ]
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing


def test_every_flag_in_the_readme_exists():
    """A --flag in the README is in the help of a script; what run.sh takes is in experiment.py's."""
    scripts = [
        "experiment.py",
        "icu.py",
        "knn.py",
        "evals/report.py",
        "evals/tasks.py",
        "demo/tiny.py",
        "dev/bench.py",
    ]
    scripts += ["evals/audit.py", "evals/judge.py"]
    scripts += ["tests/survive.py"]
    helps = [
        subprocess.run(
            [sys.executable, str(ROOT / s), "--help"], capture_output=True, text=True
        ).stdout
        for s in scripts
    ]
    purge = [sys.executable, "-m", "kit.purge", "--help"]
    helps.append(subprocess.run(purge, capture_output=True, text=True, cwd=ROOT).stdout)
    known = set(re.findall(r"--[a-z][a-z-]+", " ".join(helps)))
    unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) - known
    assert not unknown


def bash(*args):
    """bash run.sh ARGS without a hub; (exit code, stdout, stderr)."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "run.sh"), *args], capture_output=True, text=True, env=environment
    )
    return done.returncode, done.stdout, done.stderr


def test_an_unknown_preset_lists_them_and_exits_2():
    """One line on stderr."""
    code, _, error = bash("neo125")
    assert code == 2 and error.count("\n") == 1
    assert all(preset in error for preset in ("tiny", "neo125m", "neo2.7b", "tinyllama", "opt1.3b"))


def test_help_names_every_command_and_exits_0():
    """bash run.sh --help makes nothing and tells everything."""
    for flags in (["--help"], ["help"], ["neo125m", "--help"], ["compare", "--help"]):
        code, text, _ = bash(*flags)
        assert code == 0
        assert all(
            word in text
            for word in ("tiny", "neo125m", "compare", "ablation", "sweep", "ask", "purge", "test")
        )


def test_several_runs_do_not_override_a_flag_silently():
    """What compare and sweep set themselves is refused, with the flag to pass instead."""
    for args, instead in (
        (["compare", "tiny", "--method", "npo"], "--methods"),
        (["sweep", "--beta", "2"], "--points"),
    ):
        code, _, error = bash(*args, "--dry-run")
        assert code == 2 and instead in error.splitlines()[-1]


@pytest.mark.skipif(
    not (ROOT / ".venv/requirements.sha256").exists(),
    reason="run.sh has not made its environment here",
)
def test_without_a_hub_a_paper_preset_stops_with_one_line():
    """Before any work, with exit 2 and the flag to pass instead."""
    code, _, error = bash("neo125m", "--out", "runs/never")
    assert code == 2 and error.count("\n") == 1 and "--model DIR" in error
    assert not (ROOT / "runs/never").exists()


# --- the second edition's promises ---


def blocks(language="", text=README):
    """The code blocks of the README, or of another text, that say this language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for said, code in found if said == language]


def test_every_name_with_a_line_is_defined_there():
    """[name](file.py#L12) points into the definition of that name."""
    found = re.findall(r"\[(\w+)\]\((\w+\.py)#L(\d+)\)", README)
    assert len(found) >= 12
    for name, file, line in found:
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        node = next(node for node in tree.body if getattr(node, "name", None) == name)
        assert node.lineno <= int(line) <= node.end_lineno, (name, file, line)


def test_the_lines_of_each_file_are_its_lines():
    """The table of files, and what is said of reading icu.py: lines and words as they are, and the promised sizes."""
    said = dict(re.findall(r"^\| \[[^]]*\]\(([\w./]+)\).*\| (\d+) \|$", README, re.MULTILINE))
    assert {"icu.py", "knn.py", "metrics.py", "experiment.py"} <= set(said)
    for path, number in said.items():
        files = (
            [ROOT / path] if path.endswith((".py", ".sh")) else sorted((ROOT / path).glob("*.py"))
        )
        assert sum(file.read_text(encoding="utf-8").count("\n") for file in files) == int(number), (
            path
        )
    text = (ROOT / "icu.py").read_text(encoding="utf-8")
    assert (
        f"{text.count(chr(10))} lines, {len(text.split()):,} words" in README
        and text.count("\n") <= 590
    )
    assert README.count("\n") <= 250 and (ROOT / "run.sh").read_text().count("\n") < 80


def test_the_table_of_protocols_is_the_one_that_the_code_asks():
    """A row a difference, in its words."""
    table = (ROOT / "docs" / "protocols.md").read_text(encoding="utf-8")
    for difference in DIFFERENCES:
        assert (
            f"| {difference.what} | {difference.paper_says} | {difference.released_does} |" in table
        )


def test_every_command_of_the_readme_is_one():
    """bash run.sh ...: a preset or experiment with flags that are read; python FILE: a file."""
    commands = [line.split("#")[0].split() for block in blocks() for line in block.splitlines()]
    ours = [words[2:] for words in commands if words[:2] == ["bash", "run.sh"]]
    assert len(ours) > 8
    for words in ours:
        if words[:1] not in (["test"], ["bench"], ["ask"], ["purge"], ["help"], ["lint"]):
            experiment.read_flags(words)
    assert all((ROOT / words[1]).is_file() for words in commands if words[:1] == ["python"])


def test_the_readmes_method_is_a_method():
    """The example of a file of its own: it can be imported, its needs hang on it, and its loss is finite."""
    (code,) = [block for block in blocks("python") if "def mine" in block]
    names = {"__name__": "mine"}
    exec(compile(code, "mine.py", "exec"), names)
    assert names["mine"].needs.beta == 2.0 and names["mine"].needs.frozen == ("learn",)
    args = argparse.Namespace(forget_weight=1.0, beta=2.0, protocol="paper")
    terms = names["mine"](asks(toy_sides()), args)
    assert sum(weight * value for weight, value in terms.values()).isfinite()


def test_the_documented_preset_is_a_preset():
    """The entry can stand in PRESETS as it is."""
    (code,) = blocks("python", (ROOT / "docs" / "running.md").read_text())
    (preset,) = eval(f"{{{code}}}", {"Preset": experiment.Preset}).values()
    assert preset.model == "models/ours" and "--forget" in preset.source
