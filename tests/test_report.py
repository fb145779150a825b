"""evals/report.py: what its tables, plots and cases hold, and what it may write and show."""

import csv
import shutil

import pytest
import torch
from safetensors.torch import load_file

from evals import report
from kit import data

CONFIG, SUMMARY, METRICS, SAMPLES = "config.json", "summary.json", "metrics.jsonl", "samples.jsonl"
AVERAGES = {"cls": 0.5, "cls_missing": ["piqa"], "dia": None, "dia_missing": []}
COPA = {"metric": "accuracy", "value": 0.5, "bad_rows": 1, "bad": ["row 3: odd"]}


@pytest.fixture
def run(own_world):
    """A finished run of two epochs, with tasks."""
    for when in ("before", "after"):
        tasks = {"copa": COPA, "averages": AVERAGES, "settings": {"model": "m"}}
        data.write_json(own_world.run / f"tasks-{when}" / "tasks.json", tasks)
    return own_world.run


def edit(path, change):
    """A JSON document, or each JSON line, as `change` returns it."""
    if path.suffix == ".json":
        data.write_json(path, change(data.read_json(path)))
    else:
        data.write_jsonl(path, map(change, data.read_jsonl(path)))


def put(**values):
    return lambda old: old | values


def other(run, folder, **config):
    """A run folder with other settings."""
    shutil.copytree(run, folder)
    edit(folder / CONFIG, put(**config))
    return folder


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def table_of(folder):
    """{label: {header: cell}} of a table.md."""
    lines = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    header, _, *rows = ([cell.strip() for cell in line.strip("|").split(" | ")] for line in lines)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


# --- tables ---


def test_the_report_of_one_run(run, capsys):
    """A row before and one after; a method's own measure is a column."""
    for when, value in (("before", 0.25), ("after", 7.5)):
        edit(run / SUMMARY, lambda s, w=when, v=value: s | {w: s[w] | {"own_kept": v}})
    report.main([str(run)])
    table, after = table_of(run), data.read_json(run / SUMMARY)["after"]
    assert [*table] == ["model (before)", "icu"]
    assert table["icu"]["MA (%) ↓"] == f"{100 * after['ma']:.1f}"
    assert table["icu"]["Cls Avg. (ACC) ↑"] == "50.0" and table["icu"]["Epoch"] == "2.0"
    assert table["model (before)"]["Epoch"] == "-"
    assert [row["kept"] for row in table.values()] == ["0.250", "7.500"]
    rows = list(csv.DictReader((run / "table.csv").open(encoding="utf-8")))
    assert float(rows[1]["ma"]) == after["ma"] and rows[1]["own_kept_std"] == ""
    assert {path.name for path in run.iterdir()} >= {*report.NAMES} - {"relearned.png"}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in report.PLOTS[:2])
    assert (run / "cases.md").read_text().count("| Reference |") == 4
    assert "row 3: odd" in (run / "tasks.md").read_text()
    printed = capsys.readouterr().out
    assert "curves.png" in printed and (run / "table.md").read_text() in printed


def test_runs_are_averaged_over_sets_and_seeds_alone(run, tmp_path, capsys):
    """Another protocol is another row, a copy none."""
    again = other(run, tmp_path / "again", seed=1)
    edit(run / SUMMARY, lambda summary: summary | {"after": summary["after"] | {"ma": 0.3}})
    edit(
        again / SUMMARY,
        lambda summary: summary | {"after": summary["after"] | {"ma": 0.5, "ppl_heldout": 1e999}},
    )
    report.main([str(run), str(again), "--out", str(tmp_path / "ours")])
    assert table_of(tmp_path / "ours")["icu"]["MA (%) ↓"] == "40.0 ± 14.1"
    assert table_of(tmp_path / "ours")["icu"]["Held-out (PPL) ↓"] == ">10000"
    changed = other(run, tmp_path / "changed", protocol="released", dtype="bf16")
    copy = other(run, tmp_path / "copy", purged=True)
    report.main([*map(str, (run, f"{run}/", copy, changed)), "--out", str(tmp_path / "out")])
    assert f"{copy} is left out: the same run as {run}" in capsys.readouterr().out
    table = table_of(tmp_path / "out")
    assert len(table) == 4 and "icu protocol=released dtype=bf16" in table
    assert "±" not in (tmp_path / "out" / "table.md").read_text()


def test_unlike_runs_neither_share_a_row_nor_look_alike(run, tmp_path):
    """Other weights, or another judge, of one name: labels say so."""
    sha256 = data.read_json(run / CONFIG)["sha256"]
    unlike = other(run, tmp_path / "a", sha256=sha256 | {"model": "f" * 64})
    npo = other(run, tmp_path / "b", seed=1)
    edit(npo / SUMMARY, put(method="npo"))
    for graded, unread in ((run, 0), (npo, 3)):
        ends = {when: {"mean": 5.0, "unread": unread} for when in ("before", "after")}
        served = {"judge": "j", "prompt": "p", "served": [str(graded)]}
        data.write_json(graded / "judge.json", served | ends)
    report.main([*map(str, (run, unlike, npo)), "--out", str(tmp_path)])
    rows = [*table_of(tmp_path).items()][3:]
    assert "±" not in str(rows) and "**" not in str(rows)  # nor is one the best
    assert rows[1][0] == "icu model=model ffffff judge=None"
    for (label, row), name, unread in zip(rows[::2], ("icu", "npo"), ("0.0", "3.0"), strict=True):
        assert label.startswith(f"{name} model=model {sha256['model'][:6]} judge=j ")
        assert row["GPT, unread"] == unread


def test_the_best_is_bold_and_the_second_underlined(run, tmp_path):
    """By the better end of the column; a collapsed row is not."""
    runs = []
    for i, (ma, collapsed) in enumerate([(0.4, False), (0.1, True), (0.3, False), (0.5, False)]):
        runs.append(other(run, tmp_path / str(i), lr=i + 1.0))
        edit(runs[-1] / SUMMARY, put(collapsed=collapsed))
        after = data.read_json(run / SUMMARY)["after"]
        edit(runs[-1] / SUMMARY, put(after=after | {"ma": ma}))
    report.main([*map(str, runs), "--out", str(tmp_path / "out")])
    cells = [row["MA (%) ↓"] for row in table_of(tmp_path / "out").values()][1:]
    assert cells == ["<u>40.0</u>", "10.0", "**30.0**", "50.0"]


def test_the_published_row_stands_beside_a_released_run(run):
    """And only there; what people gave is on GPT's scale."""
    edit(run / SUMMARY, put(method="kumpr"))
    edit(run / CONFIG, put(preset="neo125m", published=None))
    report.main([str(run)])
    assert [*table_of(run)] == ["model (before)", "kumpr"]
    edit(run / CONFIG, put(protocol="released", published="kumpr"))
    for when in ("before", "after"):
        edit(run / SUMMARY, lambda s, w=when: s | {w: s[w] | {"ppl_pile": 9.0, "human": 5.0}})
    report.main([str(run)])
    table = table_of(run)
    assert [*table][1::2] == ["published: before (neo125m)", "published: kumpr (neo125m)"]
    row = table["published: kumpr (neo125m)"]
    assert (row["EL10 (%) ↓"], row["Pile (PPL) ↓"]) == ("0.7", ">10000")
    assert row["Human (0-10) ↑"] == "0.14"  # 1.1 of 1 to 8


def test_what_a_run_may_lack_is_read(run, capsys):
    """Lazy EL, texts without a 10-gram; a run that diverged."""
    nothing = dict.fromkeys(("el10", "bleu", "bertscore"))
    edit(run / METRICS, lambda row: row | {"el10": None} if row["epoch"] == 1 else row)
    edit(run / SAMPLES, put(**nothing))
    report.main([str(run)])
    nothing |= dict.fromkeys(("ma", "entropy", "ppl_heldout"))
    shutil.rmtree(run / "tasks-after")
    edit(run / METRICS, lambda row: row | nothing if row["epoch"] == 2 else row)
    edit(run / SUMMARY, put(after=nothing, stopped="diverged", collapsed=True))
    report.main([str(run)])
    assert "icu (collapsed) | - |" in capsys.readouterr().out


def test_a_run_that_only_measured_is_a_row_before(run, world, tmp_path):
    """Its own row, none after."""
    report.main([str(run), str(world.never_saw), "--out", str(tmp_path / "out")])
    assert [*table_of(tmp_path / "out")] == ["model (before)", "never", "icu"]
    report.main([str(world.never_saw), "--out", str(tmp_path / "alone")])
    assert [*table_of(tmp_path / "alone")] == ["never (before)"]


# --- what may be written ---


def test_only_a_reports_own_files_are_replaced(run, tmp_path, monkeypatch):
    """All is computed before the first file is written."""
    out, before = tmp_path / "out", listing(run)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(report, "plot_tradeoff", None)
        report.main([str(run)])
    assert listing(run) == before
    for _ in range(2):
        report.main([str(run)])
        report.main([str(run), "--out", str(out)])
    table = (run / "table.csv").read_bytes()
    (out / "table.csv").write_text("my,own,table\n")
    with pytest.raises(ValueError, match="table.md exists already: pass --overwrite"):
        report.main([str(run), "--out", str(out)])
    assert (out / "table.csv").read_text() == "my,own,table\n"
    report.main([str(run), "--out", str(out), "--overwrite"])
    assert (out / "table.csv").read_bytes() == table


# --- redacted runs ---


def redact(run):
    """As icu.py --redact leaves it."""
    edit(run / CONFIG, put(redact=True, pairs="gone.jsonl"))
    edit(run / SAMPLES, put(generation=None))


@pytest.mark.parametrize("by_flag", [True, False])
def test_a_redacted_report_shows_no_text(by_flag, run, capsys):
    """Cases of an earlier report go; one line says why."""
    report.main([str(run)])
    if not by_flag:
        redact(run)
    plain = listing(run)
    capsys.readouterr()
    report.main([str(run), *["--redact"] * by_flag])
    printed = capsys.readouterr().out
    assert "no texts of 1 of 1 runs are shown" in printed and "cases.md of an earlier" in printed
    assert "parcel" not in printed and plain.pop("cases.md") and listing(run) == plain


# --- asking ---


def test_asking_before_and_after(run, capsys, monkeypatch):
    """No control of either reaches the terminal."""
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast.decode", lambda *_, **__: "\x1b[2Jsaid"
    )
    report.main(["--ask", str(run), "The \x1b]0;x\x07parcel"])
    before, after = capsys.readouterr().out.splitlines()
    same = ": The \\x1b]0;x\\x07parcel\x1b[1m\\x1b[2Jsaid\x1b[0m"
    assert (before, after) == ("before" + same, " after" + same)


def test_a_folder_cannot_allow_its_own_pickle(run, capsys):
    """allow_pickle of config.json is a stranger's word."""
    report.main(["--ask", str(run), "The parcel for"])
    first = capsys.readouterr().out
    model = run / "model"
    edit(run / CONFIG, put(allow_pickle=True))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="pass --allow-pickle"):
        report.main(["--ask", str(run), "The parcel for"])
    capsys.readouterr()
    report.main(["--ask", str(run), "The parcel for", "--allow-pickle"])
    assert capsys.readouterr().out == first
