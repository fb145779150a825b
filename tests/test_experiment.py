"""experiment.py, run.sh: which commands a preset is made of, whose a flag is, and what a signal or a failure leaves.

python -m pytest tests/test_experiment.py -q
"""

import argparse
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import baselines
import experiment
import icu
import knn
from evals import tasks
from kit import commands, data

ROOT = Path(__file__).resolve().parents[1]
TINY = ["--model", "runs/tiny-data/model", "--bert", "minilm", "--bert-threshold", "auto"]
TINY += ["--ppl", "heldout=runs/tiny-data/heldout.jsonl", "--targets", "all", "--batch-size", "32"]
TINY += ["--lr", "2e-4", "--alpha", "1", "--beta", "4", "--preset", "tiny"]
TINY_SOURCE = ["--forget", "runs/tiny-data/forget.jsonl", "--pool", "runs/tiny-data/pool.jsonl"]
SHA = "21def0189f5705e2521767faed922f1f15e7d7db"


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """ran(*words): the commands of `bash run.sh WORDS`, without the interpreter; none is run, and no GPU is there.

    Each call of icu.py leaves the summary.json that a comparison looks for. The folder is an empty one, so that what
    other runs have left in runs/ does not matter.
    """
    found = []

    def run(argv, environment, *, quiet=False):
        assert argv[0] == commands.PYTHON
        found.append([*(f"{name}={value}" for name, value in environment.items()), *argv[1:]])
        if "--pairs" in argv:
            out = Path(commands.last(argv, "--out"))
            (out / "model").mkdir(parents=True, exist_ok=True)
            method = commands.last(argv, "--method", "icu")
            data.write_json(out / "summary.json", {"method": method})
        return 0

    def call(*words):
        found.clear()
        experiment.main([str(word) for word in words])
        return list(found)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    monkeypatch.setattr(commands, "run", run)
    monkeypatch.setattr(commands, "visible_gpus", lambda: 0)
    monkeypatch.setattr(commands, "path_to_icu", lambda script: {})
    return call


def one(found, program, *, without=()):
    """The only command of a program, less its name; `without`: not those with these flags."""
    (command,) = [words for words in found if program in words and not set(without) & set(words)]
    return command[command.index(program) + 1 :]


def training(found):
    """The commands that train by the preset's or the user's method: those with pairs."""
    others = ("runs/tiny-data/never-saw", "examples/analogous.py")
    return [words for words in found if "--pairs" in words and not set(others) & set(words)]


def last(words, flag):
    return commands.last(words, flag)


# --- a preset ---


def test_a_command_says_a_flag_once():
    """Of a run's flags the last one counts and is printed; a script's own may be given twice, each with its value."""
    words = ["--lr", "1", "--mine", "a", "--ppl", "x", "y", "--resume", "--lr", "-2", "--mine", "b"]
    left = ["--mine", "a", "--ppl", "x", "y", "--resume", "--lr", "-2", "--mine", "b"]
    assert commands.once(words, {"--lr", "--ppl", "--resume"}) == left


def test_the_default_is_make_check_mine_unlearn_report(ran):
    """`bash run.sh`: seven commands, with exactly these flags; it may be typed twice."""
    pairs, twin = ["--pairs", "runs/tiny.pairs.jsonl"], ["--never-saw", "runs/tiny.never-saw"]
    never = [
        "--model",
        "runs/tiny-data/never-saw",
        "--thresholds",
        "paper",
        "--eval-only",
        "--overwrite",
    ]
    own = ["--lr", "5e-4", "--beta", "4", "--batch-size", "16"]
    shared = [
        *TINY[: TINY.index("--batch-size")],
        "--alpha",
        "1",
        "--preset",
        "tiny",
    ]  # the preset's, less these three
    assert ran() == [
        ["demo/tiny.py", "--out", "runs/tiny-data"],
        ["icu.py", *TINY, "--out", "runs/tiny", "--overwrite", "--dry-run"],
        ["knn.py", *TINY_SOURCE, "--out", "runs/tiny.pairs.jsonl", "--overwrite"],
        [
            "icu.py",
            *TINY[2:],
            *pairs,
            "--out",
            "runs/tiny.never-saw",
            *never,
        ],  # of two --model the last
        ["icu.py", *TINY, *pairs, "--out", "runs/tiny", *twin, "--overwrite"],
        [
            "examples/analogous.py",
            *shared,
            *pairs,
            "--out",
            "runs/tiny-analogous",
            *twin,
            "--overwrite",
            *own,
        ],
        [
            "evals/report.py",
            "runs/tiny",
            "runs/tiny-analogous",
            "runs/tiny.never-saw",
            "--out",
            "runs/tiny",
            "--explain",
        ],
    ]


def test_the_real_speaker_has_the_better_method_beside(ran):
    """ICU, the method of our own, and the twin in one report; where a user gives a rate, ICU alone."""
    commands = ran("smollm")
    assert [words[0] for words in commands[-4:]] == [
        "icu.py",
        "icu.py",
        "examples/gentle.py",
        "evals/report.py",
    ]
    assert commands[-1][1:4] == ["runs/smollm", "runs/smollm-gentle", "runs/smollm.never-saw"]
    assert "examples/gentle.py" not in {words[0] for words in ran("smollm", "--lr", "1e-5")}


def test_a_quick_preset_is_explained_where_there_are_texts(ran):
    """Not what measured only, nor a run without texts; pickles are loaded where the user has said so."""
    assert ran("smollm")[-1][-1] == "--explain"
    assert ran("tiny", "--allow-pickle")[-1][-2:] == ["--explain", "--allow-pickle"]
    for flag in ("--redact", "--eval-only"):
        assert "--explain" not in ran("tiny", flag)[-1]


def test_a_paper_preset_has_its_revision_its_folder_and_the_pile(ran):
    """`neo125m`: the pinned model, --pile, runs/PRESET-setN-METHOD-PROTOCOL; the user's flags come last."""
    out = "runs/neo125m-set3-npo-paper"
    model = [
        "--model",
        "EleutherAI/gpt-neo-125m",
        "--revision",
        SHA,
        "--ppl",
        "pile",
        "wikitext",
        "--el",
        "lazy",
    ]
    flags = [*model, "--preset", "neo125m", "--method", "npo"]
    assert ran("neo125m", "--set", 3, "--method", "npo") == [
        ["icu.py", *flags, "--out", out, "--dry-run"],
        ["knn.py", "--pile", "--out", f"{out}.pairs.jsonl", "--overwrite", "--set", "3"],
        ["icu.py", *flags, "--pairs", f"{out}.pairs.jsonl", "--out", out],
        ["evals/report.py", out],
    ]


def test_another_model_has_no_pinned_revision(ran):
    """--model DIR is not asked of the hub."""
    (command,) = training(ran("neo125m", "--model", "mine"))
    assert (
        "--revision" not in command
        and command.count("--model") == 1
        and last(command, "--model") == "mine"
    )


@pytest.mark.parametrize(
    ("preset", "lr"), [("neo125m", None), ("neo1.3b", "2e-6"), ("tinyllama", "2e-6")]
)
def test_what_the_protocol_changes(ran, preset, lr):
    """released: copies may be neighbours, and the large presets take the DeepSpeed file's rate."""
    found = ran(preset, "--protocol", "released")
    assert "--allow-copies" in one(found, "knn.py") and last(training(found)[0], "--lr") == lr
    assert last(training(found)[0], "--out") == f"runs/{preset}-set0-icu-released"
    assert (
        "--allow-copies" not in one(ran(preset), "knn.py")
        and "--lr" not in training(ran(preset, "--overwrite"))[0]
    )
    own = training(ran(preset, "--protocol", "released", "--lr", "1e-5", "--overwrite"))[0]
    assert last(own, "--lr") == "1e-5"


def test_a_preset_is_one_entry_and_may_have_its_own_texts(ran, monkeypatch):
    """A row of the table is enough, and its own forget file and pool are the ones that are mined."""
    row = experiment.Preset(
        "ours", "models/ours", source="--forget a.csv --pool b.csv", flags="--bert minilm"
    )
    monkeypatch.setitem(experiment.PRESETS, "ours", row)
    out = "runs/ours-icu-paper"
    assert ran("ours")[1:3] == [
        [
            "knn.py",
            "--forget",
            "a.csv",
            "--pool",
            "b.csv",
            "--out",
            f"{out}.pairs.jsonl",
            "--overwrite",
        ],
        ["icu.py", "--model", "models/ours", "--bert", "minilm", "--preset", "ours"]
        + ["--pairs", f"{out}.pairs.jsonl", "--out", out],
    ]
    assert "--set" not in one(ran("compare", "ours", "--methods", "icu"), "knn.py")
    assert "ours" in experiment.help_text()


def test_the_user_may_name_other_texts(ran):
    """--forget and --pool take the place of the Pile's rows, --pile that of files."""
    mined = one(ran("neo125m", "--forget", "a.csv", "--pool", "b.csv"), "knn.py")
    assert "--pile" not in mined and last(mined, "--forget") == "a.csv"
    assert last(one(ran("tiny", "--pool", "b.csv"), "knn.py"), "--pool") == "b.csv"
    mined = one(ran("tiny", "--pile", "--set", 1), "knn.py")
    assert "--forget" not in mined and last(mined, "--set") == "1"


def test_a_run_that_goes_on_keeps_its_pairs(ran):
    """--resume: nothing is mined where pairs are; without them they are."""
    assert one(ran("tiny", "--resume", "--seed", 1), "knn.py")
    Path("runs/tiny.pairs.jsonl").write_text("")
    found = ran("tiny", "--resume", "--seed", 1)
    assert not [words for words in found if "knn.py" in words]
    assert "--resume" in training(found)[0] and "--overwrite" not in training(found)[0]


def test_what_runs_beside_an_own_folder_is_kept(ran):
    """tiny with --out: the twin's run and the other method's are gone on with where they are there, never replaced."""
    for name in ("x.never-saw", "x-analogous"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
    found = [words for words in ran("tiny", "--out", "x") if "--pairs" in words]
    assert ["--resume" in words for words in found] == [True, False, True]
    assert not [words for words in found if "--overwrite" in words]


def test_the_user_has_the_last_word_in_what_runs_beside(ran):
    """--max-epochs is also told the method beside, behind its own flags."""
    found = [words for words in ran("smollm", "--max-epochs", "2") if "examples/gentle.py" in words]
    assert [commands.last(words, "--max-epochs") for words in found] == ["2"]


def test_a_dry_run_checks_and_names_the_rest(ran, capsys):
    """--dry-run: icu.py and knn.py look, the commands that train are printed and not run."""
    for model in ("model", "never-saw"):
        Path("runs/tiny-data", model).mkdir(parents=True)
    found = ran("tiny", "--dry-run")
    assert [words[0] for words in found] == ["icu.py", "knn.py"]
    assert all(words[-1] == "--dry-run" for words in found)
    files_named = ["demo/tiny.py", "icu.py", "icu.py", "examples/analogous.py", "evals/report.py"]
    assert named(capsys) == files_named


def test_a_dry_run_does_not_teach_a_model(ran, capsys):
    """Before the preset's own model is made there is nothing to look at: what needs it is named, and a note says so."""
    assert not ran("tiny", "--dry-run")
    found = [
        "demo/tiny.py",
        "icu.py",
        "knn.py",
        "icu.py",
        "icu.py",
        "examples/analogous.py",
        "evals/report.py",
    ]
    assert named(capsys) == found
    assert not ran("compare", "tiny", "--methods", "icu", "--dry-run") and len(named(capsys)) == 6
    assert [words[0] for words in ran("tiny", "--judge", "gpt-x", "--dry-run")] == [
        "evals/judge.py"
    ]  # it needs no model
    assert capsys.readouterr().out.count("note: runs/tiny-data is still to be made") == 1


def named(capsys):
    """The files of the commands that a dry run says it would run."""
    lines = [
        line.split()
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("would run: ")
    ]
    return [next(word for word in line if word.endswith(".py")) for line in lines]


# --- whose a flag is ---


def flags_of(call):
    """The flags of the parser that a function makes on its way."""

    class Found(Exception):
        pass

    def stop(parser, *_):
        raise Found(
            {flag for action in parser._actions for flag in action.option_strings}
            - {"-h", "--help"}
        )

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        call()
    return found.value.args[0]


def test_every_flag_of_two_programs_is_known_as_such():
    """COMMON is what knn.py or evals/tasks.py shares with icu.py; a new flag of the same name has to be thought about."""
    shared = flags_of(lambda: icu.parse_args([])) & (
        flags_of(knn.parse_args) | flags_of(tasks.parse_args)
    )
    assert shared == experiment.COMMON
    own = flags_of(lambda: experiment.make_parser().parse_args([]))
    assert not own & (flags_of(knn.parse_args) - experiment.COMMON)


def test_every_flag_of_knn_works_behind_a_preset(ran):
    """Its own by its name, one that icu.py has too as --knn-FLAG; what the experiment sets itself is refused."""
    for flag in flags_of(knn.parse_args):
        words = (
            ["0"]
            if flag in ("--set", "--limit", "--max-overlap", "--batch-size", "--passage-words")
            else ["x"]
        )
        words = ["1"] if flag == "--neighbours" else words
        words = words if flag not in ("--pile", "--allow-copies", "--debug") else []
        given = flag if flag not in experiment.COMMON else f"--knn-{flag[2:]}"
        if flag in experiment.TOLD:
            with pytest.raises(ValueError, match=given):
                ran("neo125m", given, *words)
        else:
            found = ran("neo125m", given, *words, "--overwrite")
            mined = one(found, "knn.py")
            assert mined[mined.index(flag) : mined.index(flag) + 1 + len(words)] == [flag, *words]
            assert given not in training(found)[0]


def test_a_flag_of_two_programs_is_icus_and_data_is_for_all(ran):
    """--batch-size 5 and --device cpu train; --knn-batch-size 7 embeds; --data goes to both."""
    found = ran(
        "neo125m",
        "--batch-size=5",
        "--knn-batch-size=7",
        "--device",
        "cpu",
        "--data",
        "d",
        "--debug",
    )
    mined, trained = one(found, "knn.py"), training(found)[0]
    assert (
        last(mined, "--batch-size") == "7"
        and "--device" not in mined
        and last(mined, "--data") == "d"
    )
    assert (
        last(trained, "--batch-size") == "5"
        and last(trained, "--device") == "cpu"
        and last(trained, "--data") == "d"
    )
    assert "--debug" in trained and "--debug" not in mined


def test_what_no_one_knows_goes_to_icu(ran):
    """Its parser, or a script's own, reports it or knows it."""
    assert training(ran("tiny", "--sigma", "0.1", "2", "--on"))[0][-11:-7] == [
        "--sigma",
        "0.1",
        "2",
        "--on",
    ]


def test_tasks_are_looked_for_before_and_measured_twice(ran):
    """--tasks with flags of its own, --task-limit, and the run's model, device and data; before anything else runs."""
    words = [
        "--tasks",
        "copa",
        "piqa",
        "--task-limit",
        3,
        "--tasks-batch-tokens",
        9,
        "--length-norm",
        "--limit",
        2,
    ]
    found = ran(
        "neo125m", *words, "--device", "cpu", "--data", "d", "--dtype", "bf16", "--allow-pickle"
    )
    looked, before, after = [command for command in found if command[0] == "evals/tasks.py"]
    assert found[0] == looked and looked[-1] == "--dry-run"
    own = ["--tasks", "copa", "piqa", "--task-limit", "3", "--batch-tokens", "9", "--length-norm"]
    same = [
        "--protocol",
        "paper",
        "--device",
        "cpu",
        "--dtype",
        "bf16",
        "--task-data",
        "d",
        "--allow-pickle",
    ]
    out = "runs/neo125m-set0-icu-paper"
    model = ["--model", "EleutherAI/gpt-neo-125m", "--revision", SHA]
    assert before == [
        "evals/tasks.py",
        *same,
        *own,
        *model,
        "--out",
        f"{out}/tasks-before",
        "--overwrite",
    ]
    assert after == [
        "evals/tasks.py",
        *same,
        *own,
        "--model",
        f"{out}/model",
        "--out",
        f"{out}/tasks-after",
        "--overwrite",
    ]
    assert last(one(found, "knn.py"), "--limit") == "2"


# --- scripts ---


def test_a_script_runs_in_place_of_icu(ran):
    """--script FILE.py: checked and run with the same flags; its stem names the folder."""
    Path("simnpo.py").write_text("")
    found = ran("neo125m", "--script", "simnpo.py")
    assert found[-1] == ["evals/report.py", "runs/neo125m-set0-simnpo-paper"]
    assert [words[0] for words in found] == ["simnpo.py", "knn.py", "simnpo.py", "evals/report.py"]
    assert "--script" not in sum(found, [])
    report = [
        "evals/report.py",
        "runs/tiny-simnpo",
        "runs/tiny-simnpo.never-saw",
        "--out",
        "runs/tiny-simnpo",
        "--explain",
    ]
    assert ran("tiny", "--script", "simnpo.py")[-1] == report


def test_a_script_stands_in_a_comparison_beside_methods(ran):
    """--methods icu kl FILE.py: the file is looked at before the first run, and its stem names its runs."""
    Path("examples").mkdir()
    Path("examples/simnpo.py").write_text("")
    found = ran(
        "compare",
        "tiny",
        "--methods",
        "icu",
        "examples/simnpo.py",
        "--lrs",
        "simnpo=1e-4",
        "--seeds",
        0,
        1,
    )
    assert [words[0] for words in found[:4]] == [
        "demo/tiny.py",
        "icu.py",
        "examples/simnpo.py",
        "knn.py",
    ]
    runs = [
        (words[0], last(words, "--method"), last(words, "--lr"), last(words, "--out"))
        for words in training(found)
    ]
    folder = "runs/compare/tiny-paper"
    assert runs == [
        (file, method, lr, f"{folder}/{name}-set0-seed{seed}")
        for seed in (0, 1)
        for file, method, lr, name in (
            ("icu.py", "icu", "2e-4", "icu"),
            ("examples/simnpo.py", None, "1e-4", "simnpo"),
        )
    ]


def test_runs_of_one_name_are_refused(ran):
    """Two files of one stem would share a folder."""
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "mine.py").write_text("")
    with pytest.raises(ValueError, match="mine"):
        ran("compare", "tiny", "--methods", "a/mine.py", "b/mine.py")


def test_a_script_in_another_folder_finds_icu(monkeypatch, tmp_path):
    """It is told where this icu.py is, unless the environment knows: another checkout's would be taken for it."""
    (tmp_path / "icu.py").write_text("")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    mine, here, elsewhere = ROOT / "examples" / "mine.py", str(ROOT), str(tmp_path)
    assert commands.path_to_icu(mine, [elsewhere, here]) == {"PYTHONPATH": "."}
    assert commands.path_to_icu(ROOT / "mine.py", [elsewhere, here]) == {}
    assert commands.path_to_icu(mine, [here, elsewhere]) == {}


def test_without_run_sh_an_example_finds_icu_too():
    """Under a Python that has the packages and no icu.pth: the demo that was imported for its flags changes nothing."""
    packages = [folder for folder in sys.path if folder.endswith("-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}
    argv = [sys.executable, "-S", "experiment.py", "smollm", "--dry-run"]
    done = subprocess.run(
        argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    (line,) = (line for line in done.stdout.splitlines() if " examples/gentle.py " in line)
    assert line.startswith(f"would run: PYTHONPATH={os.pathsep.join(['.', *packages])} ")


# --- several runs ---


def test_a_comparison_is_every_method_for_every_set_and_seed(ran):
    """Names, order, one report over all; the sets are mined before the first run."""
    found = ran(
        "compare", "neo125m", "--sets", 0, 4, "--seeds", 1, 2, "--lrs", "kl=1e-5", "--limit", 2
    )
    folder = "runs/compare/neo125m-paper"
    sets = [(last(words, "--set"), last(words, "--out")) for words in found if "knn.py" in words]
    assert sets == [("0", f"{folder}/set0.pairs.jsonl"), ("4", f"{folder}/set4.pairs.jsonl")]
    jobs = list(itertools.product("04", "12", experiment.METHODS))
    outs = [f"{folder}/{method}-set{number}-seed{seed}" for number, seed, method in jobs]
    runs = training(found)
    assert [last(words, "--out") for words in runs] == outs
    assert [last(words, "--pairs") for words in runs] == [
        f"{folder}/set{n}.pairs.jsonl" for n, _, _ in jobs
    ]
    assert [last(words, "--seed") for words in runs] == [seed for _, seed, _ in jobs]
    assert {last(words, "--method") for words in runs if last(words, "--lr") == "1e-5"} == {"kl"}
    assert found[-1] == ["evals/report.py", *outs, "--out", folder]
    assert set(experiment.METHODS) == {"icu"} | {
        name for name, f in vars(baselines).items() if hasattr(f, "needs")
    }


def test_finished_runs_are_kept_and_interrupted_ones_go_on(ran):
    """config.json: --resume, which keeps a finished run; --overwrite makes every run anew."""
    words = ["compare", "tiny", "--methods", "icu", "kl", "--out", "x"]
    assert all("--overwrite" in command for command in training(ran(*words)))
    Path("x/kl-set0-seed0/config.json").write_text("{}")
    first, second = training(ran(*words))
    assert first[-1] == "--overwrite" and second[-1] == "--resume"
    assert all(command[-1] == "--overwrite" for command in training(ran(*words, "--overwrite")))


@pytest.mark.parametrize(
    ("status", "summary", "ends"),
    [
        (1, "new", "evals/report.py"),
        (1, "old", 1),
        (1, "none", 1),
        (0, "old", "evals/report.py"),
        (0, "none", ValueError),
        (3, "new", 3),
    ],
)
def test_a_run_that_diverged_is_a_result(ran, monkeypatch, status, summary, ends):
    """Exit 1 with a summary of its own: the comparison goes on. Whatever else fails ends it with its exit code."""
    out = Path("runs/compare/tiny-paper/icu-set0-seed0")
    run = commands.run

    def failing(argv, environment, *, quiet=False):
        trains = "--pairs" in argv and "--eval-only" not in argv
        if not trains or summary == "new":
            run(argv, environment, quiet=quiet)
        return status if trains else 0

    if summary == "old":
        data.write_json(out / "summary.json", {"method": "icu"})
    monkeypatch.setattr(commands, "run", failing)
    words = ["compare", "tiny", "--methods", "icu"]
    if ends == "evals/report.py":
        ran(*words)
    else:
        with pytest.raises((SystemExit, ValueError)) as error:
            ran(*words)
        assert (
            error.value.code == ends
            if ends is not ValueError
            else "no summary.json" in str(error.value)
        )


def settings(found, *flags):
    return [tuple(last(words, flag) for flag in flags) for words in training(found)]


def test_an_ablation_leaves_out_each_loss_and_both(ran):
    """Figure 3, with the preset's weights or the user's."""
    assert settings(ran("ablation", "tiny"), "--alpha", "--beta") == [
        ("1", "4"),
        ("0", "4"),
        ("1", "0"),
        ("0", "0"),
    ]
    found = ran("ablation", "neo125m", "--beta", "2")
    assert settings(found, "--alpha", "--beta") == [
        ("0.5", "2"),
        ("0", "2"),
        ("0.5", "0"),
        ("0", "0"),
    ]
    assert (
        last(training(found)[1], "--out") == "runs/ablation/neo125m-paper/alpha0-beta2-set0-seed0"
    )


def test_a_sweep_is_table_2_or_table_5(ran):
    """The grid; given points; the learning rates, with epochs enough for the smallest unless the user says how many."""
    found = ran("sweep", "neo125m")
    assert len(training(found)) == 10 and settings(found, "--alpha", "--beta")[2] == ("0.5", "0.1")
    found = ran("sweep", "neo125m", "--points", "0.3,0.7", "--out", "y")
    assert settings(found, "--alpha", "--beta", "--out") == [
        ("0.3", "0.7", "y/alpha0.3-beta0.7-set0-seed0")
    ]
    found = ran("sweep", "neo125m", "--table", 5)
    assert [lr for lr, *_ in settings(found, "--lr")] == ["1e-5", "5e-6", "2e-6", "1e-6", "5e-7"]
    assert settings(found, "--alpha", "--beta", "--max-epochs")[0] == ("0.5", "0.5", "200")
    found = ran("sweep", "neo125m", "--lrs", "1e-3", "--max-epochs", 2)
    assert settings(found, "--lr", "--max-epochs") == [("1e-3", "2")]
    assert found[-1][1] == "runs/sweep/neo125m-paper/lr1e-3-set0-seed0"


# --- several processes ---


def test_several_processes_are_deepspeeds(ran, monkeypatch):
    """--gpus, every GPU for a large preset, --offload and --zero 3; DS_ACCELERATOR only where there is no GPU."""

    def first(*words):
        return training(ran(*words, "--overwrite"))[0]

    start = ["-m", "deepspeed.launcher.runner", "--quiet", "--no_local_rank", "--num_gpus"]
    assert first("tiny", "--gpus", 2)[:7] == ["DS_ACCELERATOR=cpu", *start, "2"]
    assert (
        first("tiny", "--gpus", 2)[7] == "--master_port"
        and first("tiny", "--gpus", 2)[9] == "icu.py"
    )
    assert first("neo125m", "--offload")[6] == first("neo125m", "--zero", 3)[6] == "1"
    assert first("neo125m", "--zero", 2)[0] == first("neo2.7b")[0] == "icu.py"
    monkeypatch.setattr(commands, "visible_gpus", lambda: 3)
    assert (
        first("neo2.7b")[:6] == [*start, "3"]
        and first("neo125m")[0] == first("neo2.7b", "--gpus", 1)[0] == "icu.py"
    )
    measured = ran("neo2.7b", "--tasks", "copa", "--overwrite")
    assert [words[0] for words in measured if "evals/tasks.py" in words] == [
        "evals/tasks.py",
        "-m",
        "-m",
    ]


# --- one command ---

FAMILY = """
import os, pathlib, signal, subprocess, sys, time
if len(sys.argv) > 1:  # the child: it takes its time to end
    signal.signal(int(sys.argv[1]), lambda *_: (time.sleep(0.5), pathlib.Path("ended").touch(), os._exit(0)))
    pathlib.Path("started").touch()
    time.sleep(60)
subprocess.Popen([sys.executable, __file__, sys.argv[-1] if len(sys.argv) > 1 else os.environ["NUMBER"]])
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_reaches_every_process_and_their_end_is_waited_for(tmp_path, number, code):
    """The command's child, too, hears it, and what it does then is done when the experiment has ended."""
    (tmp_path / "family.py").write_text(FAMILY)
    call = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from kit import commands; "
    call += f"commands.run([sys.executable, 'family.py'], {{'NUMBER': '{int(number)}'}})"
    parent = subprocess.Popen(
        [sys.executable, "-c", call], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    deadline = time.time() + 60
    while not (tmp_path / "started").exists() and time.time() < deadline:
        time.sleep(0.05)
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=60)
    assert parent.returncode == code and (tmp_path / "ended").exists()
    assert out.startswith("$ NUMBER=") and out.count("\n") == 1


def test_exit_codes_are_those_of_the_command():
    """Its own, or 128 + n where a signal has ended it."""
    assert commands.run([sys.executable, "-c", "raise SystemExit(7)"], {}) == 7
    assert commands.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], {}) == 137


def test_a_failed_command_ends_the_experiment(ran, monkeypatch):
    """With its exit code, before the next one."""
    monkeypatch.setattr(
        commands, "run", lambda argv, environment, *, quiet: 2 if "knn.py" in argv else 0
    )
    with pytest.raises(SystemExit) as exit:
        ran("tiny")
    assert exit.value.code == 2


def test_the_printed_line_can_be_pasted(capfd):
    """A shell makes the same words of it, whatever is in them."""
    words = ["icu.py", "a b", "$HOME", "it's", '"', "*", "--x=1", ""]
    assert shlex.split(commands.shown(words, {"A": "b c"})) == ["A=b c", *words]
    show = "import os, sys; print(os.environ['A'], sys.argv[1:])"
    commands.run([sys.executable, "-c", show, *words], {"A": "b c"})
    line, result = capfd.readouterr().out.splitlines()
    assert line.startswith("$ ")
    assert subprocess.run(
        ["bash", "-c", line[2:]], capture_output=True, text=True
    ).stdout.splitlines() == [result]


# --- refusals, help, run.sh ---


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["neo125"], "unknown preset 'neo125'; one of: tiny smollm"),
        (["compare", "neo125"], "neo125"),
        (["tiny", "stray"], "'stray'"),
        (["tiny", "--gpus", "0"], "'0'"),
        (["tiny", "--gpus"], "--gpus"),
        (["tiny", "--script", "no.py"], "no.py: no such file"),
        (["compare", "--methods", "icu", "no.py"], "no.py: no such file"),
        (["compare", "--method", "npo"], "--methods NAME"),
        (["compare", "--script", "no.py"], "--methods FILE.py"),
        (["sweep", "--alpha", "1"], "--points ALPHA,BETA"),
        (["tiny", "--methods", "icu"], "--methods goes with compare"),
        (["ablation", "--points", "1,1"], "--points goes with sweep"),
        (["sweep", "--points", "1"], "'1' is not ALPHA,BETA"),
        (["sweep", "--table", "3"], "3"),
        (["sweep", "--lrs", "fast"], "--lrs fast"),
        (["compare", "--lrs", "1e-5"], "--lrs 1e-5: not METHOD=LR"),
        (["compare", "--lrs", "kll=1e-5"], "--lrs kll=1e-5"),
        (["compare", "--lrs", "kl=fast"], "--lrs kl=fast"),
        (["compare", "--tasks", "all"], "evals/tasks.py"),
        (["neo125m", "--set", "7"], "'7'"),
        (["compare", "neo125m", "--sets", "0", "7"], "'7'"),
        (["tiny", "--set"], "--set"),
        (["tiny", "--task-data", "x"], "--task-data goes with --tasks"),
        (["tiny", "--task-limit", "3"], "--task-limit goes with --tasks"),
        (["tiny", "--knn-out", "x"], "--knn-out"),
        (["neo125m", "--fetch", "all"], "--fetch"),
    ],
)
def test_wrong_words_are_refused_before_any_command(ran, words, said):
    """A ValueError names the value, and what to write instead where that is not plain."""
    with pytest.raises(ValueError, match=re.escape(said)):
        ran(*words)


def test_the_help_needs_nothing_but_python():
    """No package: it names every preset, every command and this file's flags; errors are one line and exit 2."""
    command = [sys.executable, "-S", str(ROOT / "experiment.py")]
    for words in (["--help"], ["help"], ["neo125m", "-h"]):
        done = subprocess.run([*command, *words], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr
        assert all(
            word in done.stdout
            for word in [*experiment.PRESETS, *experiment.EXPERIMENTS, "ask", "--script"]
        )
    done = subprocess.run([*command, "tiny"], capture_output=True, text=True)
    assert (
        done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    )
    assert "bash run.sh" in done.stderr


def unquoted_expansions(script):
    """Every $ of a shell script outside quotes, but for `name=$(...)`, which is not split into words."""
    found, stack, before = [], [], ""
    for line in script.splitlines():
        for i, c in enumerate(line):
            inside = stack[-1] if stack else ""
            if inside == "'" or (inside == '"' and c == '"'):
                stack.pop() if c == inside else None
            elif c == "#" and not inside and before in " ;":
                break
            elif c == "$" and inside != '"' and not re.search(r"\w=$", line[:i]):
                found.append(line)
            elif c == "(" and before == "$":
                stack.append(")")
            elif c == inside == ")":
                stack.pop()
            elif c == '"' or (c == "'" and inside != '"'):
                stack.append(c)
            before = c
        before = " "
    return found


def test_run_sh_is_short_and_quotes_what_it_expands():
    """Under 80 lines; no expansion that a blank or a star in a path would break; bash finds no fault."""
    script = (ROOT / "run.sh").read_text()
    assert script.count("\n") < 80 and not unquoted_expansions(script)
    assert (
        unquoted_expansions("echo $a")
        and unquoted_expansions('echo "$(cat $a)"')
        and unquoted_expansions("a $(b)")
    )
    assert not unquoted_expansions("""a=$(cat "$b") && echo "$(cat "$c") 'd'" '$e' # $f""")
    assert subprocess.run(["bash", "-n", str(ROOT / "run.sh")]).returncode == 0


@pytest.fixture
def checkout(tmp_path):
    """A copy of run.sh and experiment.py beside programs that print what they were given; its .venv is up to date."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    shutil.copytree(ROOT / "kit", folder / "kit")
    for name in ("run.sh", "experiment.py", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    for name in ("icu.py", "dev/bench.py", "evals/report.py"):
        (folder / name).write_text("import sys\nif __name__ == '__main__': print(sys.argv)\n")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    (folder / ".venv/requirements.sha256").write_text(
        f"{data.sha256_of(ROOT / 'requirements.txt')}\n"
    )
    return folder


def run_sh(folder, *words):
    done = subprocess.run(
        ["bash", folder / "run.sh", *words], capture_output=True, text=True, cwd=folder.parent
    )
    return done.returncode, done.stdout, done.stderr


def test_run_sh_hands_on_every_word_as_it_is(checkout):
    """bench and ask, with blanks in their words; `import icu` then works from any folder with this environment."""
    assert run_sh(checkout, "bench", "--a b", "*") == (0, "['dev/bench.py', '--a b', '*']\n", "")
    assert run_sh(checkout, "ask", "runs/x", "help -h me") == (
        0,
        "['evals/report.py', '--ask', 'runs/x', 'help -h me']\n",
        "",
    )
    find = [checkout / ".venv/bin/python", "-c", "import icu; print(icu.__file__)"]
    found = subprocess.run(find, cwd=checkout.parent, capture_output=True, text=True)
    assert Path(found.stdout.strip()) == checkout / "icu.py", found.stderr


def test_run_sh_without_an_environment_helps_and_refuses(checkout):
    """Neither makes one."""
    shutil.rmtree(checkout / ".venv")
    for words in (["help"], ["-h"], ["compare", "neo125m", "--help"]):
        code, out, error = run_sh(checkout, *words)
        assert code == 0 and "usage: bash run.sh" in out and not error
    code, _, error = run_sh(checkout, "neo125")
    assert code == 2 and error.startswith("error: unknown preset") and error.count("\n") == 1
    assert not (checkout / ".venv").exists()


def test_an_environment_of_another_checkout_is_left_as_it_is(checkout):
    """A .venv that is a link: its `import icu` stays the other's."""
    (checkout / ".venv").rename(checkout.parent / "other")
    (checkout / ".venv").symlink_to(checkout.parent / "other")
    assert run_sh(checkout, "bench")[0] == 0
    assert not list((checkout.parent / "other").glob("lib/python3*/site-packages/icu.pth"))
