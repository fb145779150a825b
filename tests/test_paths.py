"""What is written: never over what the command reads, over what is no plain file, or over somebody else's file.

python -m pytest tests/test_paths.py -q
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import icu
import knn
from evals import tasks
from kit import data, flags, paths

ROOT = Path(__file__).resolve().parents[1]

RECORD = {"id": "a", "context": "", "prefix": "The van near", "suffix": " the old mill."}
PAIR = {**RECORD, **{f"learn_{name}": value for name, value in RECORD.items()}, "similarity": 0.5}
LEAK = {"id": "a", "target_id": "b", "share": 1.0, "reason": "copy"}


@pytest.fixture
def folder(tmp_path, monkeypatch, encoder_dir):
    """The working folder of a command, with its input and with what must not be written over."""
    monkeypatch.chdir(tmp_path)
    data.write_jsonl("forget.jsonl", [{"id": "a", "text": "Anna Smith lives near the mill"}])
    data.write_jsonl("pool.jsonl", [{"text": "The market closed higher today"}])
    data.write_jsonl("pairs.jsonl", [PAIR])
    data.write_jsonl("leaks.jsonl", [LEAK])
    Path("mine.txt").write_text("my own notes\n")
    Path("link.jsonl").symlink_to("forget.jsonl")
    os.link("forget.jsonl", "hard.jsonl")
    os.mkfifo("fifo")
    Path("to-fifo").symlink_to("fifo")
    Path("to-nothing").symlink_to("nothing/at/all")
    return tmp_path


def listing(folder):
    """{name: what it is} of all in a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = (
            os.readlink(path)
            if path.is_symlink()
            else path.read_bytes()
            if path.is_file()
            else path.lstat().st_mode
        )
        found[str(path.relative_to(folder))] = kind
    return found


def refused(command, capsys, folder):
    """The one line of a command that ends with exit 2 and leaves the folder as it was."""
    before = listing(folder)
    with pytest.raises(SystemExit) as stopped:
        flags.run_cli(command)
    error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and error[-1].startswith("error: "), error
    assert listing(folder) == before
    return error[-1]


KNN = {
    "the forget file": (["--out", "forget.jsonl"], "read by this command"),
    "the pool": (["--out", "./pool.jsonl"], "read by this command"),
    "a link to the forget file": (["--out", "link.jsonl"], "read by this command"),
    "another name of the forget file": (["--out", "hard.jsonl"], "read by this command"),
    "leaks over the pool": (
        ["--out", "new.jsonl", "--leak-report", "pool.jsonl"],
        "read by this command",
    ),
    "one path twice": (["--out", "new.jsonl", "--leak-report", "./new.jsonl"], "written twice"),
    "one old path twice": (
        ["--out", "pairs.jsonl", "--leak-report", "../x/pairs.jsonl"],
        "written twice",
    ),
    "a fifo": (["--out", "fifo"], "no plain file"),
    "a link to a fifo": (["--out", "to-fifo"], "no plain file"),
    "a link to nothing": (["--out", "to-nothing"], "no plain file"),
    "leaks into a fifo": (["--out", "new.jsonl", "--leak-report", "fifo"], "no plain file"),
    "somebody's text": (["--out", "mine.txt"], "not what this command writes"),
    "somebody's JSON lines": (["--out", "leaks.jsonl"], "not what this command writes"),
    "leaks over pairs": (
        ["--out", "new.jsonl", "--leak-report", "pairs.jsonl"],
        "not what this command writes",
    ),
    "the encoder": (["--out", "encoder/new.jsonl", "--encoder", "encoder"], "read by this command"),
}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("name", list(KNN))
def test_knn_writes_over_nothing_that_is_not_its_own(
    name, overwrite, folder, encoder_dir, capsys, monkeypatch
):
    """Its input under any name, a fifo, one path twice, another kind of file: refused, also with --overwrite."""
    words, message = KNN[name]
    Path("encoder").symlink_to(encoder_dir)
    words = [word.replace("../x", f"../{folder.name}") for word in words]
    argv = ["knn.py", "--forget", "forget.jsonl", "--pool", "pool.jsonl", *words, *overwrite]
    monkeypatch.setattr(sys, "argv", argv)
    error = refused(knn.main, capsys, folder)
    assert message in error or (not overwrite and "exists already" in error)


def test_knn_replaces_its_own_files_and_empty_ones(folder, encoder_dir, monkeypatch):
    """pairs.jsonl and a leak report of an earlier call, and what mktemp made."""
    Path("empty").touch()
    for out, leaks in (("pairs.jsonl", "leaks.jsonl"), ("empty", "leaks.jsonl")):
        words = [
            "--forget",
            "forget.jsonl",
            "--pool",
            "pool.jsonl",
            "--out",
            out,
            "--leak-report",
            leaks,
        ]
        monkeypatch.setattr(sys, "argv", ["knn.py", *words, "--overwrite"])
        knn.main()
        assert data.read_pairs(out)[0]["suffix"].endswith("mill")


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(folder):
    Path("to-pairs").symlink_to("pairs.jsonl")
    data.write_jsonl("to-pairs", [LEAK])
    assert Path("to-pairs").is_symlink() and data.read_jsonl("pairs.jsonl") == [LEAK]


@pytest.mark.parametrize("name", ["tasks.json", "tasks.md", "task_rows.jsonl"])
def test_tasks_writes_over_nothing_that_is_not_its_own(name, folder, capsys):
    """Somebody's file of that name, and a fifo, also with --overwrite; the rows that it reads."""
    data.write_jsonl("data/piqa.jsonl", [{"goal": "x", "sol1": "y", "sol2": "z", "label": 0}])
    given = ["--model", "m", "--tasks", "piqa", "--task-data", "data", "--dry-run", "--out"]
    for number, make in enumerate((lambda path: path.write_text("mine\n"), os.mkfifo)):
        Path(str(number)).mkdir()
        make(Path(str(number), name))
        for more in ([], ["--overwrite"]):
            assert name in refused(
                lambda out=number, more=more: tasks.main([*given, str(out), *more]), capsys, folder
            )


def run_args(folder, *words):
    """The flags of a run, with inputs that lie in the folder `run`."""
    given = [
        "--model",
        str(folder / "run" / "m"),
        "--pairs",
        "pairs.jsonl",
        "--device",
        "cpu",
        "--overwrite",
    ]
    return icu.parse_args([*given, "--out", str(folder / "run"), *words])


@pytest.mark.parametrize("flag", ["--model", "--pairs", "--ppl", "--unseen", "--bert"])
def test_a_run_folder_never_holds_what_the_run_reads(flag, folder):
    """Whatever is read lies elsewhere: --overwrite would remove it, or the next run read what this one wrote."""
    (folder / "run").mkdir()
    data.write_json("run/config.json", {"thresholds_used": {}})
    data.write_jsonl("run/metrics.jsonl", [PAIR])
    value = (
        f"x={folder}/run/metrics.jsonl"
        if flag == "--ppl"
        else str(folder / "run" / "metrics.jsonl")
    )
    args = run_args(folder, "--model", "m", flag, value)
    with pytest.raises(ValueError, match=f"{flag} .*lies in it"):
        paths.check_run_folder(args)


def test_a_folder_with_a_config_of_something_else_is_no_run(folder):
    """A model folder is not replaced by a run, whatever --overwrite says."""
    (folder / "run").mkdir()
    data.write_json("run/config.json", {"model_type": "gpt2"})
    args = run_args(folder, "--model", "elsewhere")
    with pytest.raises(ValueError, match="something else"):
        paths.check_run_folder(args)
    Path("out").symlink_to("fifo")
    with pytest.raises(ValueError, match="not a folder"):
        paths.check_out(Path("out"), overwrite=True)


def test_nothing_is_removed_where_a_command_is_refused(folder, encoder_dir):
    """The command itself, in a process of its own: the forget file is as it was."""
    text = Path("forget.jsonl").read_bytes()
    words = [
        "--forget",
        "forget.jsonl",
        "--pool",
        "pool.jsonl",
        "--out",
        "forget.jsonl",
        "--overwrite",
    ]
    command = [sys.executable, str(ROOT / "knn.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and Path("forget.jsonl").read_bytes() == text
    )
