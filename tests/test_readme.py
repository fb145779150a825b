"""README.md and docs/: commands can be run, links lead somewhere, figures are recorded ones."""

import re
import runpy
import sys
from pathlib import Path

import pytest

import experiment
from kit.protocols import DIFFERENCES

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    page.name: page.read_text("utf-8") for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
}
README, RUN_SH = PAGES["README.md"], (ROOT / "run.sh").read_text("utf-8")
PROGRAMS = [*ROOT.glob("*.py"), *ROOT.glob("[!.r]*/*.py")]  # not runs/, not .venv/


def blocks(text, language=""):
    """The code blocks of a page in a language."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in found if name == language]


def test_every_command_can_be_run():
    """A preset's flags are resolved; a file of Python is there."""
    lines = [line.split("#")[0].split() for block in blocks(README) for line in block.splitlines()]
    other = set(re.findall(r"\w+", " ".join(re.findall(r"^  ([\w| ]+)\)", RUN_SH, re.MULTILINE))))
    assert len(lines) > 8
    for words in lines:
        if words[:1] == ["python"] and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        elif words[:2] == ["bash", "run.sh"] and not other & set(words[2:3]):
            experiment.read_plan(words[2:])


def test_every_flag_that_is_named_exists():
    """In any page: each --flag is one of a program's."""
    known = set().union(*(experiment.flags_of(file.relative_to(ROOT)) for file in PROGRAMS))
    for command in (None, *experiment.EXPERIMENTS):
        known |= set(experiment.make_parser(command)._option_string_actions)
    named = re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z-]+)\b(?!-)", "".join(PAGES.values()))
    assert {f"--{name}" for name in named} - known == set()


def test_every_link_leads_somewhere():
    """[Eq. (n)](file.py#L12) points at that equation, for each of the ten."""
    for page, text in PAGES.items():
        folder = ROOT if (ROOT / page).is_file() else ROOT / "docs"
        links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text)]
        missing = [link for link in links if "://" not in link and not (folder / link).exists()]
        assert not missing, page
    equations = re.findall(r"\[Eq\. \((\d+)\)\]\((\w+\.py)#L(\d+)\)", README)
    assert sorted(int(number) for number, *_ in equations) == [*range(1, 11)]
    for number, file, line in equations:
        text = (ROOT / file).read_text("utf-8").splitlines()[int(line) - 1]
        assert re.search(rf"Eq\. \(?{number}\b", text), (number, file, text)
    ((line,),) = [re.findall(r"\[icu\.Method\]\(icu\.py#L(\d+)\)", README)]
    assert (ROOT / "icu.py").read_text("utf-8").splitlines()[int(line) - 1] == "class Method:"


def test_the_first_table_is_the_recorded_one():
    """It is that of docs/tiny.md."""
    tables = [
        {
            cells[0]: cells[1:]
            for row in re.findall(r"^\| .*", text, re.MULTILINE)[:5]
            if (cells := [cell.strip() for cell in row.strip("|").split("|")])
        }
        for text in (README, PAGES["tiny.md"])
    ]
    assert "icu" in tables[0] and tables[0] == tables[1]


def test_the_table_of_protocols_is_the_one_that_the_code_asks():
    """docs/protocols.md has a row a difference, in its words."""
    for _, _, *words in DIFFERENCES.values():
        assert f"| {' | '.join(words)} |" in PAGES["protocols.md"]


@pytest.mark.parametrize("code", [c for c in blocks(README, "python") if "icu.main(" in c])
def test_the_method_of_the_readme_runs(code, world, tmp_path, monkeypatch):
    """The file can be copied as it stands: it trains an epoch."""
    (tmp_path / "mine.py").write_text(code)
    flags = [*world.flags, "--max-epochs", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["mine.py", *flags])
    runpy.run_path(str(tmp_path / "mine.py"), run_name="__main__")
    assert (tmp_path / "run/summary.json").is_file()


def test_the_documented_preset_is_a_preset():
    """The entry can stand in PRESETS as it is."""
    (code,) = blocks(PAGES["running.md"], "python")
    (preset,) = eval(f"{{{code}}}", {"Preset": experiment.Preset}).values()
    assert preset.model == "models/ours" and "--forget" in preset.source
