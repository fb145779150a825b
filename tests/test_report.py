"""evals/report.py: what it writes of good runs, and one line and nothing written of run folders that are damaged or foreign.

python -m pytest tests/test_report.py -q
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from survive import memorise

import icu
import knn
from evals import report, tasks
from kit import data, flags, models, processes
from kit.finished import read_run
from kit.text import visible

ROOT = Path(__file__).resolve().parents[1]
TEXTS = [
    ("a", "The parcel for Ines Duarte was left", " at 14 Harbour Lane on Tuesday."),
    ("b", "Payments are due on the first day", " of each month; 7731."),
]
LEARN = {
    "learn_id": "n",
    "learn_context": "",
    "learn_prefix": "A neighbour saw",
    "learn_suffix": " the old mill.",
}
PAIRS = [
    {"id": id, "context": "", "prefix": p, "suffix": s, **LEARN, "similarity": 0.5}
    for id, p, s in TEXTS
]
AVERAGES = {"cls": 0.5, "cls_missing": ["piqa"], "dia": None, "dia_missing": []}
TASKS = {
    "copa": {"metric": "accuracy", "value": 0.5, "bad_rows": 1, "bad": ["row 3: odd"]},
    "averages": AVERAGES,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory, save_tiny, encoder_dir):
    """A run of two epochs with perplexity and tasks, and a report in it; nobody changes it."""
    root = tmp_path_factory.mktemp("report")
    data.write_jsonl(root / "pairs.jsonl", PAIRS)
    data.write_jsonl(
        root / "heldout.jsonl", [{"text": "The driver said that nothing was missing."}]
    )
    memorise(save_tiny("gpt_neo", root / "model"), PAIRS)
    words = ["--pairs", root / "pairs.jsonl", "--model", root / "model", "--bert", encoder_dir]
    words += [
        "--ppl",
        f"heldout={root / 'heldout.jsonl'}",
        "--max-epochs",
        "2",
        "--thresholds",
        "1e-9,1e-9",
    ]
    icu.main(
        argv=[
            str(word) for word in [*words, "--lr", "1e-3", "--device", "cpu", "--out", root / "run"]
        ]
    )
    for when in ("before", "after"):
        data.write_json(
            root / "run" / f"tasks-{when}" / "tasks.json", TASKS | {"settings": {"model": "m"}}
        )
    report.main([str(root / "run")])
    return root / "run"


@pytest.fixture
def run(good, tmp_path):
    """A copy of it."""
    return shutil.copytree(good, tmp_path / "run")


def edit(path, change):
    """A JSON document, or the lines of JSON lines, as `change` leaves or returns them."""
    if path.suffix == ".json":
        value = data.read_json(path)
        data.write_json(path, found if (found := change(value)) is not None else value)
    else:
        rows = data.read_jsonl(path)
        data.write_jsonl(path, found if (found := change(rows)) is not None else rows)


def other(run, folder, **config):
    """A run folder as another run with other settings would have left it."""
    shutil.copytree(run, folder)
    edit(folder / "config.json", lambda old: old | config)
    return folder


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(words, capsys, folder):
    """The one line of a command that ends with exit 2 and leaves every file of a folder as it was."""
    before = listing(folder)
    with pytest.raises(SystemExit) as stopped:
        flags.run_cli(lambda: report.main([str(word) for word in words]))
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, printed
    assert printed.err.startswith("error: ") and listing(folder) == before
    return printed.err


# --- damaged and foreign folders ---


def put(name, value, *keys):
    """A change that puts a value at a place in a JSON value."""

    def change(document):
        for key in keys:
            document = document[key]
        document[name] = value

    return change


def drop(name, *keys):
    def change(document):
        for key in keys:
            document = document[key]
        del document[name]

    return change


NAN, INF, HALF = float("nan"), float("inf"), "\ud800"
CONFIG, SUMMARY, METRICS, SAMPLES = "config.json", "summary.json", "metrics.jsonl", "samples.jsonl"
TASK = "tasks-after/tasks.json"
# what: (file, what is done to its value or bytes, what the error says)
DAMAGE = {
    "a config that is a list": (CONFIG, lambda config: [config], "not an object"),
    "no model": (CONFIG, drop("model"), "no `model`"),
    "a model that is a number": (CONFIG, put("model", 7), "`model` is 7"),
    "a blank model": (CONFIG, put("model", " "), "not blank"),
    "half a character": (
        CONFIG,
        lambda config: json.dumps(config).replace('"paper"', '"\\ud800"'),
        "`protocol`",
    ),
    "no protocol": (CONFIG, drop("protocol"), "no `protocol`"),
    "an unknown protocol": (CONFIG, put("protocol", "draft"), "one of paper, released"),
    "a protocol that is a list": (CONFIG, put("protocol", ["paper"]), "`protocol` is ['paper']"),
    "a preset that is a list": (CONFIG, put("preset", ["neo125m"]), "`preset`"),
    "a published row that is an object": (CONFIG, put("published", {}), "`published`"),
    "fingerprints that are a text": (CONFIG, put("sha256", "abc"), "`sha256`"),
    "a fingerprint that is a list": (CONFIG, put("pairs", [], "sha256"), "sha256"),
    "beams out of range": (CONFIG, put("num_beams", 10**9), "`num_beams`"),
    "a setting that is an object": (CONFIG, put("lr", {"a": 1}), "`lr`"),
    "a setting that is not finite": (CONFIG, put("alpha", INF), "`alpha`"),
    "redact that is a word": (CONFIG, put("redact", "no"), "`redact`"),
    "a request before it that is true": (CONFIG, put("after", True), "`after` is True"),
    "earlier requests that are none": (CONFIG, put("earlier", 5), "`earlier`"),
    "a number of 5000 digits": (CONFIG, lambda _: '{"model": ' + "9" * 5000 + "}", "not JSON"),
    "brackets without end": (CONFIG, lambda _: "[" * 100_000, "not JSON"),
    "no JSON": (CONFIG, lambda _: "model: gpt", "not JSON"),
    "no UTF-8": (CONFIG, lambda _: b'{"model": "\xff"}', "not UTF-8"),
    "an empty summary": (SUMMARY, lambda _: "", "empty"),
    "a summary of something else": (SUMMARY, lambda _: {"accuracy": 0.9}, "no `method`"),
    "a method that is null": (SUMMARY, put("method", None), "`method` is None"),
    "epochs that are a text": (SUMMARY, put("epochs", "2"), "`epochs` is '2'"),
    "epochs that are true": (SUMMARY, put("epochs", True), "`epochs` is True"),
    "epochs below 0": (SUMMARY, put("epochs", -1), "`epochs` is -1"),
    "more epochs than were measured": (SUMMARY, put("epochs", 3), METRICS),
    "no measures before": (SUMMARY, drop("before"), "no `before`"),
    "measures after that are null": (SUMMARY, put("after", None), "`after` is None"),
    "no MA after": (SUMMARY, drop("ma", "after"), "after: no `ma`"),
    "MA over 1": (SUMMARY, put("ma", 1.5, "after"), "`ma` is 1.5"),
    "EL that is NaN": (SUMMARY, put("el10", NAN, "before"), "`el10` is nan"),
    "a perplexity that is infinite": (
        SUMMARY,
        put("ppl_heldout", INF, "after"),
        "`ppl_heldout` is inf",
    ),
    "a perplexity that is a list": (SUMMARY, put("ppl_heldout", [9.5], "before"), "`ppl_heldout`"),
    "no thresholds": (SUMMARY, drop("thresholds"), "no `thresholds`"),
    "thresholds that are a list": (SUMMARY, put("thresholds", [0.05, 0.6]), "`thresholds`"),
    "a threshold that is a text": (SUMMARY, put("ma", "0.6", "thresholds"), "`ma` is '0.6'"),
    "collapsed that is a number": (SUMMARY, put("collapsed", 0), "`collapsed`"),
    "an empty metrics.jsonl": (METRICS, lambda _: "", "empty"),
    "a line cut off": (
        METRICS,
        lambda rows: "\n".join(map(json.dumps, rows))[:-20],
        "line 3: not JSON",
    ),
    "a line that is a number": (
        METRICS,
        lambda rows: json.dumps(rows[0]) + "\n7\n",
        "line 2: expected an object",
    ),
    "an epoch lost": (METRICS, lambda rows: rows[::2], "line 2: epoch 2 where 1 should follow"),
    "an epoch doubled": (METRICS, lambda rows: [rows[0], *rows], "line 2: epoch 0"),
    "the last epoch lost": (METRICS, lambda rows: rows[:-1], "2 lines"),
    "an epoch that is a fraction": (METRICS, put("epoch", 1.5, 1), "line 2: `epoch` is 1.5"),
    "a row without entropy": (METRICS, drop("entropy", 1), "line 2: no `entropy`"),
    "an entropy below 0": (METRICS, put("entropy", -1, 1), "line 2: `entropy` is -1"),
    "active samples that are null": (METRICS, put("active", None, 2), "line 3: `active`"),
    "a measure that is an object": (METRICS, put("bleu", {}, 0), "line 1: `bleu`"),
    "a measure of 400 digits": (METRICS, put("ma", 10**400, 0), "line 1: `ma`"),
    "an empty samples.jsonl": (SAMPLES, lambda _: "\n\n", "empty"),
    "a sample without an id": (SAMPLES, drop("id", 0), "line 1: no `id`"),
    "an id that is a number": (SAMPLES, put("id", 7, 2), "line 3: `id` is 7"),
    "a generation that is a list": (SAMPLES, put("generation", ["x"], 3), "line 4: `generation`"),
    "a generation with half a character": (
        SAMPLES,
        lambda _: '{"generation": "\\ud800"}',
        "line 1: ",
    ),
    "one generation that is null": (SAMPLES, put("generation", None, 3), "line 4: some lines"),
    "a sample lost": (
        SAMPLES,
        lambda rows: rows[:2] + rows[3:],
        "line 3: 'b' of epoch 1 where 'a'",
    ),
    "a sample doubled": (SAMPLES, lambda rows: [rows[0], *rows], "epoch"),
    "an id that stands twice": (
        SAMPLES,
        lambda rows: [row | {"id": "a"} for row in rows],
        "stands twice",
    ),
    "samples in another order": (SAMPLES, lambda rows: rows[::-1], "line 1: "),
    "the last epoch's samples lost": (SAMPLES, lambda rows: rows[:-2], "4 lines"),
    "samples without epoch 0": (SAMPLES, lambda rows: rows[2:], "line 1: "),
    "BLEU that is a text": (SAMPLES, put("bleu", "0.5", 0), "line 1: `bleu`"),
    "tasks without averages": (TASK, drop("averages"), "no `averages`"),
    "averages that are a list": (TASK, put("averages", [0.5]), "`averages`"),
    "an average over 1": (TASK, put("cls", 50, "averages"), "`cls` is 50"),
    "missing sets that are a number": (TASK, put("cls_missing", 3, "averages"), "`cls_missing`"),
    "a set's result that is a number": (TASK, put("copa", 0.5), "copa: is not an object"),
    "a set's figure that is a text": (TASK, put("value", "50", "copa"), "`value`"),
    "bad rows that are numbers": (TASK, put("bad", [3], "copa"), "`bad`"),
}


def damage(path, change):
    """What DAMAGE says: of a value, or the file's new content."""
    value = data.read_json(path) if path.suffix == ".json" else data.read_jsonl(path)
    found = change(value)
    value = value if found is None else found
    if isinstance(value, str | bytes):
        path.write_bytes(value if isinstance(value, bytes) else value.encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in value))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_run_folder_is_one_line(what, run, tmp_path, capsys):
    """It names the file and what is wrong; no file is written or changed, the folder's old report included."""
    file, change, says = DAMAGE[what]
    damage(run / file, change)
    error = refused([run], capsys, tmp_path)
    assert Path(file).name.split("-")[0] in error and says in error, error


@pytest.mark.parametrize("file", [CONFIG, SUMMARY, METRICS, SAMPLES])
def test_a_file_that_is_missing_or_no_file_is_one_line(file, run, tmp_path, capsys):
    """Gone, a folder, a pipe: named, without waiting for a writer."""
    (run / file).unlink()
    assert file in refused([run], capsys, tmp_path)
    (run / file).mkdir()
    assert file in refused([run], capsys, tmp_path)
    (run / file).rmdir()
    os.mkfifo(run / file)
    assert file in refused([run], capsys, tmp_path)


def test_what_is_no_finished_run_is_told_apart(run, tmp_path, capsys):
    """No folder, a file, another folder, a run in progress, a second run that is damaged: each its own line."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "notes").write_text("mine")
    assert "no such folder" in refused([tmp_path / "none"], capsys, tmp_path)
    assert "is no folder" in refused([tmp_path / "notes"], capsys, tmp_path)
    assert "not a run folder" in refused([tmp_path / "mine"], capsys, tmp_path)
    unfinished = other(run, tmp_path / "unfinished")
    (unfinished / SUMMARY).unlink()
    assert "--resume" in refused([unfinished], capsys, tmp_path)
    assert "unfinished" in refused([run, unfinished, "--out", tmp_path / "out"], capsys, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["gone", "other ids", "no pairs", "none named"])
def test_the_pairs_are_checked_too(what, run, tmp_path, capsys):
    """Their file is named, and so is --redact, which does without."""
    pairs = tmp_path / "other.jsonl"
    if what != "gone":
        data.write_jsonl(pairs, PAIRS[:1] if what == "other ids" else [{"id": "a"}])
    edit(run / CONFIG, put("pairs", None if what == "none named" else str(pairs)))
    error = refused([run], capsys, tmp_path)
    assert "no pair b" in error if what == "other ids" else "--redact" in error
    assert what == "none named" or str(pairs) in error
    report.main([str(run), "--redact"])


# --- what may be written ---


def test_a_foreign_file_is_not_replaced(run, tmp_path, capsys):
    """Somebody's table.md, or picture, is named and nothing is written, not even before it."""
    for name in report.OWN:
        out = tmp_path / name.replace(".", "-")
        out.mkdir()
        (out / name).write_bytes(b"\x89PNG of mine" if name.endswith(".png") else b"my own notes\n")
        assert name in refused([run, "--out", out], capsys, tmp_path)
    own = (run / "table.md").read_bytes()
    report.main([str(run)])
    assert (run / "table.md").read_bytes() == own  # its own files are replaced as ever


def test_a_place_where_no_report_can_be_is_one_line(run, tmp_path, capsys):
    """A file, a device, a pipe, a link to nothing, a table that is a folder or leads to the pairs."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nothing/at/all")
    (tmp_path / "folder" / "table.md").mkdir(parents=True)
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "cases.md").symlink_to(run / SAMPLES)
    for out in ("pipe", "link", "folder", "pairs", "run/config.json", "run/config.json/deeper"):
        assert Path(out).name.split(".")[0] in refused(
            [run, "--out", tmp_path / out], capsys, tmp_path
        )
    assert "/dev/null" in refused([run, "--out", "/dev/null"], capsys, tmp_path)


def test_a_failure_in_the_last_figure_leaves_everything_as_it_was(
    run, tmp_path, capsys, monkeypatch
):
    """All is computed before the first file is written."""

    def broken(runs):
        raise ValueError("no ink")

    edit(run / SUMMARY, put("ma", 0.123, "after"))  # so that the table would be another one
    monkeypatch.setattr(report, "plot_tradeoff", broken)
    assert "no ink" in refused([run], capsys, tmp_path)


# --- good runs ---


def test_the_report_of_one_run(run, capsys):
    """Table, plots, cases and tasks; the table has a row before and a row after."""
    report.main([str(run)])
    table = (run / "table.md").read_text().splitlines()
    assert "EL10 (%) ↓" in table[0] and "(before)" in table[2] and table[3].startswith("| icu")
    assert "Cls Avg." in table[0] and (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "| Reference |" in (run / "cases.md").read_text()
        and "row 3: odd" in (run / "tasks.md").read_text()
    )
    printed = capsys.readouterr().out
    assert "curves.png" in printed and "|   icu\n" in printed


def test_the_report_of_several_runs(run, good, tmp_path, capsys):
    """Same settings share a row with a spread; another protocol or encoder is another row, before and after."""
    again = other(run, tmp_path / "again", seed=1)
    edit(again / SUMMARY, put("ma", 0.5, "after"))
    report.main([str(run), str(again), "--out", str(tmp_path / "ours")])
    assert "±" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "ours").iterdir()} == set(report.OWN) - {
        "tasks.md",
        "relearned.png",
    }
    changed = other(run, tmp_path / "changed", protocol="released", bert="another")
    report.main([str(run), str(run), str(changed), "--out", str(tmp_path / "out")])
    rows = [
        line.split(" | ")[0]
        for line in (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    ]
    assert len(rows) == 4 and len(set(rows)) == 4 and "±" not in capsys.readouterr().out


def test_the_published_row_stands_beside_a_released_run(run, capsys):
    """And only there."""
    edit(run / SUMMARY, put("method", "kl"))
    edit(run / CONFIG, lambda config: config | {"preset": "neo125m", "published": None})
    report.main([str(run)])
    assert "published:" not in capsys.readouterr().out
    edit(run / CONFIG, lambda config: config | {"protocol": "released", "published": "kl"})
    report.main([str(run)])
    printed = capsys.readouterr().out
    assert (
        "published: kl (neo125m) | 4.9 | 56.2" in printed
        and "published: before (neo125m) | 51.9" in printed
    )


def test_what_a_run_may_lack_is_read(run, capsys):
    """An older run's settings, lazy EL, texts without a 10-gram, an encoder that cannot read, a run that diverged."""
    for name in (
        "method_file",
        "el",
        "targets",
        "published",
        "num_beams",
        "sha256",
        "revision",
        "versions",
    ):
        edit(
            run / CONFIG,
            lambda config, name=name: {key: config[key] for key in config if key != name},
        )
    edit(run / METRICS, put("el10", None, 1))
    edit(
        run / SAMPLES,
        lambda rows: [row | {"el10": None, "bleu": None, "bertscore": None} for row in rows],
    )
    report.main([str(run)])
    shutil.rmtree(run / "tasks-after")
    for path, keys in ((run / METRICS, [-1]), (run / SUMMARY, ["after"])):
        for measure in ("el10", "ma", "bleu", "bertscore", "entropy", "ppl_heldout"):
            edit(path, put(measure, None, *keys))
    edit(run / SUMMARY, lambda summary: summary | {"stopped": "diverged", "collapsed": True})
    report.main([str(run)])
    assert "icu (collapsed) | - |" in capsys.readouterr().out


def test_a_run_that_only_measured_is_read(run, tmp_path, capsys):
    """Epoch 0 alone: a row before, none after; also where its model was NaN."""
    edit(run / METRICS, lambda rows: rows[:1])
    edit(run / SAMPLES, lambda rows: rows[:2])
    edit(
        run / SUMMARY,
        lambda s: s | {"method": "none", "epochs": 0, "after": s["before"], "stopped": "eval only"},
    )
    report.main([str(run)])
    assert (
        capsys.readouterr().out.count("(before)") == 1
        and "icu" not in (run / "table.md").read_text()
    )
    nothing = dict.fromkeys(("el10", "ma", "bleu", "bertscore", "entropy", "ppl_heldout"))
    edit(run / METRICS, lambda rows: [rows[0] | nothing])
    edit(run / SAMPLES, lambda rows: [row | nothing | {"generation": ""} for row in rows])
    edit(run / SUMMARY, lambda summary: summary | {"before": nothing, "after": nothing})
    for when in ("before", "after"):
        shutil.rmtree(run / f"tasks-{when}")
    report.main([str(run)])


# --- redacted runs ---


def redact(run):
    """As icu.py --redact leaves it; its pairs are gone too."""
    edit(run / CONFIG, lambda config: config | {"redact": True, "pairs": "gone.jsonl"})
    edit(run / SAMPLES, lambda rows: [row | {"generation": None} for row in rows])


@pytest.mark.parametrize(
    "how", ["the flag", "a redacted run", "config.json alone", "samples alone"]
)
def test_a_redacted_report_shows_no_text(how, run, capsys):
    """Table, csv and plots; no cases, and those of an earlier report go; no pairs are read; one line says why."""
    if how != "the flag":
        redact(run)
    if how == "config.json alone":
        edit(run / SAMPLES, lambda rows: [row | {"generation": "the secret"} for row in rows])
    if how == "samples alone":
        edit(run / CONFIG, put("redact", False))
    plain = listing(run)
    report.main([str(run), *(["--redact"] if how == "the flag" else [])])
    printed = capsys.readouterr().out
    assert (
        not (run / "cases.md").exists() and "|   after" not in printed and "secret" not in printed
    )
    assert (
        printed.count("no texts of 1 of 1 runs are shown") == 1
        and "cases.md of an earlier report" in printed
    )
    for name in ("table.md", "table.csv", "curves.png", "tradeoff.png", "tasks.md"):
        assert (run / name).read_bytes() == plain[run / name], name


def test_cases_show_the_runs_that_are_not_redacted(run, tmp_path, capsys):
    """The first run's texts may be gone; somebody's cases.md stays where none is written."""
    hidden = other(run, tmp_path / "hidden", lr=1e-4)
    redact(hidden)
    report.main([str(hidden), str(run), "--out", str(tmp_path / "out")])
    cases = (tmp_path / "out" / "cases.md").read_text()
    assert cases.count("### ") == 2 and cases.count("| Final |") == 2
    assert "no texts of 1 of 2 runs" in capsys.readouterr().out
    (tmp_path / "out" / "cases.md").write_text("my own notes\n")
    report.main([str(hidden), str(run), "--out", str(tmp_path / "out"), "--redact"])
    assert (tmp_path / "out" / "cases.md").read_text() == "my own notes\n"


# --- what reaches a terminal ---

LEGITIMATE = ["Straße, naïve, 50 € – “quoted”\u00a0…", "日本語\u3000です", "❤\ufe0f 🇩🇪 👍🏽"]
ODD = {
    "\x1b[2J": "\\x1b[2J", "\x9b1m": "\\x9b1m", "\x07\x7f\0": "\\x07\\x7f\\x00", "a\r\nb\tc": "a\\r\\nb\\tc",
    "\u202egnp.exe": "\\u202egnp.exe", "\u2066x\u2069": "\\u2066x\\u2069", "a\u200fb": "a\\u200fb",
    "\ud800": "\\ud800", "x\u2028y": "x\\u2028y", "pass\u200dword": "pass\\u200dword", "a\u200bb": "a\\u200bb",
    "\U000e0041": "\\U000e0041", "\ufeffa": "\\ufeffa", "👩\u200d👧": "👩\\u200d👧",
}  # fmt: skip


def test_controls_are_written_out_and_legitimate_text_is_kept():
    """Letters, marks and signs are as they were; what a terminal would obey, or hides, is not."""
    assert [visible(text) for text in LEGITIMATE] == LEGITIMATE
    assert {text: visible(text) for text in ODD} == ODD
    assert visible("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_no_control_of_a_run_folder_reaches_terminal_or_file(run, tmp_path, capsys):
    """Ids, method, model, a setting, generations and pairs are a stranger's; Markdown cells stay in their cells."""
    evil = "$\\x^\x1b]0;x\x07| \u202e\r\n\x9b<b>"
    pairs = [
        pair | {"id": pair["id"] + evil, "prefix": evil + "p", "suffix": evil + "s"}
        for pair in PAIRS
    ]
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    rows = lambda rows: [row | {"id": row["id"] + evil, "generation": evil + "g"} for row in rows]  # noqa: E731
    edit(run / SAMPLES, rows)
    edit(
        run / CONFIG,
        lambda c: c | {"pairs": str(tmp_path / "pairs.jsonl"), "model": "m" + evil, "answer": evil},
    )
    edit(run / SUMMARY, lambda summary: summary | {"method": "_m" + evil, "stopped": evil})
    edit(run / TASK, put("copa", {"error": evil}))
    report.main([str(run)])
    twin = other(run, tmp_path / "twin", answer="x", bert=evil)
    report.main([str(run), str(twin), "--out", str(tmp_path / "out")])
    printed = [capsys.readouterr().out]
    printed += [path.read_bytes().decode() for path in tmp_path.rglob("*.md")]
    printed += [
        path.read_bytes().decode().replace("\r\n", "\n") for path in tmp_path.rglob("*.csv")
    ]
    assert len(printed) == 12  # of the twin too, as it was copied
    for text in printed:
        assert visible(text, keep="\n") == text and "x1b]0;x" in text
    table = (run / "table.md").read_text().splitlines()
    assert len(table) == 4 and {line.replace("\\|", "").count("|") for line in table} == {
        table[0].count("|")
    }
    assert (tmp_path / "out" / "cases.md").read_text().count(
        "\n### "
    ) == 1  # and one at its beginning


def test_no_control_reaches_the_terminal_by_an_error_or_a_note(tmp_path, capsys):
    """One line on stderr, the notes of a run, knn.py's worst leaks and the table of tasks."""
    for text in ODD:
        with pytest.raises(SystemExit):
            flags.run_cli(lambda text=text: data.check_string(1, f"`{text}`"))
        error = capsys.readouterr().err
        assert (
            f"`{visible(' '.join(text.split()))}`" in error and error == visible(error[:-1]) + "\n"
        )
    processes.print0("note: \x1b[2J")
    leak = {"id": "\x1b[2J", "target_id": "\u202e", "share": 0.9, "reason": "copy"}
    knn.print_leaks(torch.tensor([True, False]).numpy(), [leak], 0.5)
    print(tasks.table({"m\x1b": {"copa": {"missing": "\x9b"}, "averages": AVERAGES}}))
    printed = capsys.readouterr().out
    assert visible(printed, keep="\n") == printed and printed.count("x1b") == 5


# --- asking ---


def test_asking_before_and_after(run, capsys):
    """Two lines: what the model said, and says."""
    report.main(["--ask", str(run), "The parcel for"])
    printed = capsys.readouterr().out
    assert (
        printed.startswith("before: The parcel for\x1b[1m")
        and "\n after: The parcel for\x1b[1m" in printed
    )


def test_asking_never_sends_a_control_to_the_terminal(run, capsys, monkeypatch):
    """Neither the prefix nor what the model says; only the bold that evals/report.py puts there."""
    monkeypatch.setattr("metrics.beam_generate", lambda *_, **__: [[1]])
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast.decode", lambda *_, **__: "\x1b[2Jsaid\n\u202e"
    )
    report.main(["--ask", str(run), "The \x1b]0;x\x07parcel"])
    printed = capsys.readouterr().out
    assert printed.count("\x1b") == 4 and printed.count("\\x1b]0;x\\x07parcel") == 2
    assert printed.count("\\x1b[2Jsaid\n\\u202e") == 2


ASKED = {
    "a blank prefix": (lambda run: None, " ", [], "the prefix is blank"),
    "half a character": (lambda run: None, "a\ud800", [], "surrogate"),
    "no room": (lambda run: None, "The parcel for", ["--tokens", "400"], "256 positions"),
    "no model": (lambda run: shutil.rmtree(run / "model"), "x", [], "only measured"),
    "a damaged model": (
        lambda run: (run / "model" / "config.json").write_text("{"),
        "x",
        [],
        "config.json",
    ),
    "cut weights": (
        lambda run: os.truncate(run / "model" / "model.safetensors", 99),
        "x",
        [],
        "cannot be loaded",
    ),
    "a model before that is gone": (
        lambda run: edit(run / CONFIG, put("model", "./gone")),
        "x",
        [],
        "no such folder",
    ),
    "a branch": (
        lambda run: edit(run / CONFIG, put("revision", "main")),
        "x",
        [],
        "names no commit",
    ),
    "a revision that is a number": (
        lambda run: edit(run / CONFIG, put("revision", 7)),
        "x",
        [],
        "`revision` is 7",
    ),
    "a path for a revision": (
        lambda run: edit(run / CONFIG, put("revision", "../x")),
        "x",
        [],
        "names no commit",
    ),
    "beams that are a text": (
        lambda run: edit(run / CONFIG, put("num_beams", "2")),
        "x",
        [],
        "`num_beams`",
    ),
    "a damaged run": (lambda run: edit(run / SAMPLES, drop("id", 0)), "x", [], "line 1: no `id`"),
    "runs to report beside": (lambda run: None, "x", ["another"], "pass no other runs"),
    "redacted": (lambda run: None, "x", ["--redact"], "no --redact"),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_cannot_be_asked_is_one_line_before_a_weight_is_loaded(
    what, run, tmp_path, capsys, monkeypatch
):
    """Run, both model folders and prefix are checked first; nothing is printed or written."""
    change, prefix, more, says = ASKED[what]
    change(run)
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a weight was loaded"))
    assert says in refused(["--ask", run, prefix, *more], capsys, tmp_path)


class Payload:
    """What runs code when it is unpickled: it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_folder_cannot_allow_its_own_pickle(where, run, good, tmp_path, capsys):
    """allow_pickle of config.json is a stranger's word: one line, and the payload has not run."""
    model = (
        run / "model"
        if where == "after"
        else shutil.copytree(good.parent / "model", tmp_path / "model")
    )
    edit(
        run / CONFIG,
        lambda config: config | {"allow_pickle": True, "model": str(good.parent / "model")},
    )
    if where == "before":
        edit(run / CONFIG, put("model", str(model)))
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "hit")))
    assert "pass --allow-pickle" in refused(["--ask", run, "The parcel for"], capsys, tmp_path)
    assert not (tmp_path / "hit").exists()
    pickle.loads((model / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "hit").exists()  # so that the line above can fail


def test_a_pickle_is_loaded_where_the_command_allows_it(run, capsys):
    """--allow-pickle on the command line: the same answer as from safetensors."""
    report.main(["--ask", str(run), "The parcel for"])
    model = models.load_model(str(run / "model"))[0]
    (run / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), run / "model" / "pytorch_model.bin")
    first = capsys.readouterr().out
    report.main(["--ask", str(run), "The parcel for", "--allow-pickle"])
    assert capsys.readouterr().out == first


def test_good_folders_are_read_alone(good):
    """read_run gives what the files hold, with the tasks' averages and the epochs where the table looks."""
    found = read_run(good)
    assert found["summary"]["after"]["epochs"] == 2 and found["summary"]["before"]["cls_avg"] == 0.5
    assert "dia_avg" not in found["summary"]["before"] and set(found["tasks"]) == {
        "before",
        "after",
    }
    assert (
        len(found["samples"]) == 6
        and not found["redacted"]
        and "settings" not in found["tasks"]["after"]
    )


def test_the_commands_themselves(run, tmp_path):
    """In processes of their own: a report, an answer, and one line for a damaged folder."""

    def command(*words):
        words = [sys.executable, str(ROOT / "evals/report.py"), *map(str, words)]
        return subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = command(run, "--out", "out")
    assert done.returncode == 0 and done.stderr == "" and "| icu |" in done.stdout, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(report.OWN) - {
        "relearned.png"
    }
    assert command("--ask", run, "The parcel for").stdout.count("The parcel for") == 2
    edit(run / SUMMARY, put("epochs", None))
    done = command(run, "--out", "new")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "new").exists()
