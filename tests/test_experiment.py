"""experiment.py, run.sh: the commands of a preset, who gets a flag, what a signal leaves."""

import importlib
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

import experiment
import icu

ROOT = Path(__file__).resolve().parents[1]
SHA = "21def0189f5705e2521767faed922f1f15e7d7db"
last = experiment.value


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """ran(*words): the commands of `bash run.sh WORDS`, as (program, flags, argv). None is run.

    The folder is empty, no GPU is there, and each training leaves a model.
    """
    commands = []

    def run(argv, environment=None, quiet=False):
        start = next(i for i, word in enumerate(argv) if word.endswith(".py"))
        words = itertools.dropwhile(lambda word: word[:2] != "--", argv[start:])
        flags = experiment.flags_in(words)
        commands.append((argv[start], flags, argv[start:]))
        if "--pairs" in flags:
            (Path(last(flags, "--out")) / "model").mkdir(parents=True, exist_ok=True)
        return 0

    def call(*words):
        commands.clear()
        experiment.main([str(word) for word in words])
        return list(commands)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    monkeypatch.setattr(experiment, "run", run)
    monkeypatch.setattr(experiment, "visible_gpus", lambda: 0)
    return call


def names(commands):
    return [program for program, _, _ in commands]


def of(commands, program):
    """The flags of a program's last command."""
    return [flags for name, flags, _ in commands if name == program][-1]


def training(commands):
    """The flags of the runs, that of the never-saw model left out."""
    return [flags for _, flags, _ in commands if "--pairs" in flags and "--eval-only" not in flags]


def settings(commands, *flags):
    return [tuple(last(run, flag) for flag in flags) for run in training(commands)]


# --- a preset ---


def test_the_default_is_made_checked_mined_unlearned_and_reported(ran):
    """`bash run.sh`: seven commands with these flags; the same command can be typed twice."""
    commands = [shlex.join(argv) for _, _, argv in ran()]
    run = "--bert minilm --bert-threshold auto --ppl heldout=runs/tiny-data/heldout.jsonl "
    run += "--targets all --batch-size {} --lr {} --alpha 1 --beta 4 --preset tiny"
    mined = "--forget runs/tiny-data/forget.jsonl --pool runs/tiny-data/pool.jsonl "
    mined += "--neighbours 45 --out runs/tiny.pairs.jsonl --overwrite"
    other, pairs = run.format(8, "3e-3") + " --el lazy", "runs/tiny.pairs.jsonl"
    run = run.format(32, "2e-4")
    model, twin = "--model runs/tiny-data/model", "--never-saw runs/tiny.never-saw"
    never_saw = f"{run} --pairs {pairs} --out runs/tiny.never-saw --thresholds paper --eval-only"
    assert commands[0].startswith("demo/tiny.py --out runs/tiny-data")
    assert commands[2].startswith("knn.py ") and commands[2].endswith(mined)
    assert commands[1:2] + commands[3:] == [
        f"icu.py {model} {run} --out runs/tiny --overwrite --dry-run",
        f"icu.py --model runs/tiny-data/never-saw {never_saw} --overwrite",
        f"icu.py {model} {run} --pairs {pairs} --out runs/tiny {twin} --overwrite",
        f"examples/regrow.py {model} {other} --pairs {pairs} --out runs/tiny-regrow "
        f"{twin} --overwrite",
        "extras/explain.py runs/tiny runs/tiny-regrow runs/tiny.never-saw",
        "evals/report.py runs/tiny runs/tiny-regrow runs/tiny.never-saw --out runs/tiny",
    ]


def test_a_paper_preset_has_its_revision_its_folder_and_the_pile(ran):
    """`neo125m`: the pinned model, --pile, runs/PRESET-setN-METHOD-PROTOCOL."""
    commands, out = ran("neo125m", "--set", 3, "--method=npo"), "runs/neo125m-set3-npo-paper"
    assert names(commands) == ["icu.py", "knn.py", "icu.py", "evals/report.py"]
    run, mined = commands[2][1], of(commands, "knn.py")
    assert run["--revision"] == [SHA] and run["--method"] == ["npo"] and run["--out"] == [out]
    assert run["--pairs"] == mined["--out"] == [f"{out}.pairs.jsonl"]
    assert mined["--set"] == ["3"] and "--pile" in mined and commands[-1][2][1:] == [out]
    other = settings(ran("neo125m", "--model", "mine"), "--model", "--revision")
    assert other == [("mine", None)]


def test_the_released_protocol_allows_copies_and_sets_the_rate_of_large_models(ran):
    """It takes the DeepSpeed file's rate. The user's rate wins; the paper's protocol has none."""
    commands = ran("neo1.3b", "--protocol", "released")
    assert "--allow-copies" in of(commands, "knn.py")
    assert settings(commands, "--lr", "--out") == [("2e-6", "runs/neo1.3b-set0-icu-released")]
    assert settings(ran("neo1.3b", "--protocol", "released", "--lr", "1"), "--lr") == [("1",)]
    assert settings(ran("neo125m", "--protocol", "released"), "--lr") == [(None,)]
    commands = ran("neo1.3b")
    assert "--allow-copies" not in of(commands, "knn.py")
    assert settings(commands, "--lr") == [(None,)]


# --- a dry run ---


def test_a_dry_run_checks_and_names_the_rest(ran, capsys):
    """icu.py and knn.py look; a preset whose model is still to be made is named, not checked."""

    def named():
        lines = re.findall(r"^would run: (.*)", capsys.readouterr().out, re.MULTILINE)
        return [re.search(r"\S+\.py", line.partition(experiment.PYTHON)[2])[0] for line in lines]

    runs = ["icu.py", "icu.py", "examples/regrow.py"]
    tables = ["extras/explain.py", "evals/report.py"]
    assert names(ran("tiny", "--judge", "m", "--dry-run")) == ["evals/judge.py"]
    assert named() == ["demo/tiny.py", "icu.py", "knn.py", *runs, "evals/judge.py", *tables]
    for model in ("model", "never-saw"):
        Path("runs/tiny-data", model).mkdir(parents=True)
    commands = ran("tiny", "--dry-run")
    assert names(commands) == ["icu.py", "knn.py"]
    assert all("--dry-run" in flags for _, flags, _ in commands)
    assert named() == ["demo/tiny.py", *runs, *tables]


def test_a_dry_run_of_a_real_preset_prints_its_plan(world):
    """Both programs look, and say what they would do."""
    flags = ["--model", world.model, "--bert", "minilm", "--ppl", f"a={world.root}/heldout.jsonl"]
    texts = ["--forget", world.root / "unseen.jsonl", "--pool", world.root / "heldout.jsonl"]
    argv = [sys.executable, "experiment.py", "neo125m", "--dry-run", *flags, *texts]
    done = subprocess.run([*argv, "--max-overlap", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("^[$] ", done.stdout, re.MULTILINE)) == 2
    assert done.stdout.count("dry run: ") == 2 and done.stdout.count("would run: ") == 2


# --- who gets a flag ---


def test_flags_read_from_the_text_are_those_of_the_parsers():
    """The flags of each program, as its own parser has them, --no-NAME too."""
    for script in ["icu.py", "knn.py", *experiment.ON_REQUEST, "demo/tiny.py", "demo/smollm.py"]:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        flags = {flag for flag in module.make_parser()._option_string_actions if flag[:2] == "--"}
        assert experiment.flags_of(script) == flags - {"--help"}, script


def test_a_flag_goes_to_every_program_that_has_it(ran):
    """--device to all, --data to icu.py and knn.py, --limit to knn.py, a new one to icu.py."""
    words = ["--device", "cpu", "--data", "d", "--limit", 2, "--new=1", "--tasks", "copa"]
    commands = ran("neo125m", *words, "--audit", "--no-refine")
    flags = {name: flags for name, flags, _ in commands} | {"icu.py": training(commands)[0]}
    for flag, programs in (
        ("--device", {"icu.py", "knn.py", "evals/tasks.py", "evals/audit.py"}),
        ("--data", {"icu.py", "knn.py"}),
        ("--limit", {"knn.py"}),
        ("--new", {"icu.py"}),
        ("--no-refine", {"icu.py"}),
    ):
        assert {name for name in flags if flag in flags[name]} == programs, flag
    assert flags["evals/tasks.py"]["--task-data"] == ["d"] and flags["icu.py"]["--new"] == ["1"]


def test_tasks_and_a_judge_are_looked_for_before_the_work(ran):
    """--tasks measures the model before and the run's after; --judge is shown the run's folder."""
    words = ["--judge", "m", "--base-url", "http://localhost:1/v1", "--send-texts"]
    commands, out = ran("neo125m", *words, "--tasks", "copa"), "runs/neo125m-set0-icu-paper"
    judging = [argv[1:] for name, _, argv in commands if name == "evals/judge.py"]
    assert judging == [[*words, "--dry-run"], [out, *words]]
    assert names(commands)[:2] == ["evals/judge.py", "evals/tasks.py"]
    check, before, after = [flags for name, flags, _ in commands if name == "evals/tasks.py"]
    assert "--dry-run" in check and before["--revision"] == [SHA] and "--revision" not in after
    assert before["--out"] == [f"{out}/tasks-before"] and after["--model"] == [f"{out}/model"]
    assert after["--out"] == [f"{out}/tasks-after"] and after["--tasks"] == ["copa"]


def test_an_audit_is_beside_the_never_saw_model(ran):
    """--audit: every run of the preset's texts, with one rate of relearning; not --model."""
    audits = [run for run in ran("tiny", "--audit") if run[0] == "evals/audit.py"]
    assert [argv[1] for _, _, argv in audits] == ["runs/tiny", "runs/tiny-regrow"]
    for _, flags, _ in audits:
        assert flags["--relearn-lr"] == ["2e-4"] and "--model" not in flags
        assert flags["--never-saw"] == ["runs/tiny-data/never-saw"]


# --- scripts ---


def test_a_script_runs_in_place_of_icu(ran):
    """Checked first, with the same flags; its stem names the folder. So it does in a comparison."""
    Path("mine.py").write_text("icu.main(Mine)")
    commands = ran("neo125m", "--script", "mine.py")
    assert names(commands) == ["mine.py", "knn.py", "mine.py", "evals/report.py"]
    assert commands[-1][2][1:] == ["runs/neo125m-set0-mine-paper"]
    words = ["--methods", "icu", "mine.py", "--lrs", "mine=1e-4", "--seeds", 0, 1]
    commands, folder = ran("compare", "tiny", *words), "runs/compare/tiny-paper"
    assert names(commands)[:4] == ["demo/tiny.py", "icu.py", "mine.py", "knn.py"]
    assert names(commands)[-5:-1] == ["icu.py", "mine.py"] * 2
    assert settings(commands, "--lr", "--out") == [
        (lr, f"{folder}/{name}-set0-seed{seed}")
        for seed in (0, 1)
        for lr, name in (("2e-4", "icu"), ("1e-4", "mine"))
    ]
    assert not [flags for _, flags, _ in commands if "--script" in flags]


def test_a_script_in_another_folder_finds_icu(monkeypatch):
    """Its line begins with PYTHONPATH=. and keeps what the user has there."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), "/elsewhere"]))
    path = experiment.path_to_icu(ROOT / "examples/mine.py")
    assert path == {"PYTHONPATH": f".{os.pathsep}/elsewhere"}
    assert experiment.path_to_icu(ROOT / "mine.py") == {}


# --- several runs ---


def test_a_comparison_is_every_method_for_every_set_and_seed(ran):
    """The sets are mined before the first run, and one report is over all."""
    words = ["--sets", 0, 4, "--seeds", 1, 2, "--lrs", "kl=1e-5"]
    commands, folder = ran("compare", "neo125m", *words), "runs/compare/neo125m-paper"
    mined = [flags for name, flags, _ in commands if name == "knn.py"]
    assert [last(flags, "--set") for flags in mined] == ["0", "4"]
    jobs = list(itertools.product("04", "12", experiment.METHODS))
    outs = [f"{folder}/{method}-set{number}-seed{seed}" for number, seed, method in jobs]
    assert settings(commands, "--out", "--pairs", "--seed", "--lr") == [
        (out, f"{folder}/set{number}.pairs.jsonl", seed, "1e-5" if method == "kl" else None)
        for out, (number, seed, method) in zip(outs, jobs, strict=True)
    ]
    assert commands[-1][2][1:] == [*outs, "--out", folder]
    assert all(icu.method_named(name, icu.ICU) for name in experiment.METHODS)


def test_finished_runs_are_kept_and_interrupted_ones_go_on(ran):
    """A run with config.json gets --resume, which keeps a finished one."""
    words = ["compare", "tiny", "--methods", "icu", "kl", "--out", "x"]
    assert settings(ran(*words), "--alpha") == [("1",), (None,)]  # the preset's is ICU's
    Path("x/kl-set0-seed0/config.json").write_text("{}")
    assert ["--resume" in flags for flags in training(ran(*words))] == [False, True]
    assert all("--overwrite" in flags for flags in training(ran(*words, "--overwrite")))


def test_a_run_that_diverged_is_a_result(ran, monkeypatch):
    """Exit code 1: the comparison goes on. Whatever else fails ends it."""
    run, words = experiment.run, ["compare", "tiny", "--methods", "icu"]

    def failing(status):
        return lambda argv, *_, **__: run(argv) or (status if "--seed" in argv else 0)

    monkeypatch.setattr(experiment, "run", failing(1))
    assert ran(*words)[-1][0] == "evals/report.py"
    monkeypatch.setattr(experiment, "run", failing(3))
    with pytest.raises(SystemExit, match="3"):
        ran(*words)


def test_an_ablation_leaves_out_each_loss_and_both(ran):
    """Figure 3, with the preset's weights or the user's."""
    for words, a, b in ((["tiny"], "1", "4"), (["neo125m", "--beta", "2"], "0.5", "2")):
        weights = settings(ran("ablation", *words), "--alpha", "--beta")
        assert weights == [(a, b), ("0", b), (a, "0"), ("0", "0")]


def test_a_sweep_is_table_2_or_table_5(ran):
    """The grid, given points, or learning rates, with enough epochs for the smallest."""
    grid = settings(ran("sweep", "neo125m"), "--alpha", "--beta")
    assert len(grid) == 10 and grid[2] == ("0.5", "0.1")
    commands = ran("sweep", "neo125m", "--points", "0.3,0.7", "--out", "y")
    out = "y/alpha0.3-beta0.7-set0-seed0"
    assert settings(commands, "--alpha", "--beta", "--out") == [("0.3", "0.7", out)]
    commands = ran("sweep", "neo125m", "--table", 5)
    assert [lr for (lr,) in settings(commands, "--lr")] == experiment.RATES
    assert settings(commands, "--alpha", "--beta", "--max-epochs")[0] == ("0.5", "0.5", "200")


def test_several_processes_are_deepspeeds(ran, monkeypatch, capsys):
    """--gpus, every GPU for a large preset, --offload and --zero 3; otherwise plain Python."""
    assert experiment.launcher(2)[0] == {"DS_ACCELERATOR": "cpu"}
    monkeypatch.setattr(experiment, "launcher", lambda n: ({}, ["python", f"processes={n}"]))

    def processes(*words):
        capsys.readouterr()
        ran(*words, "--dry-run")
        return re.findall(r"processes=(\d)", capsys.readouterr().out)

    assert processes("neo125m", "--gpus", 2) == ["2"]
    assert processes("neo125m", "--offload") == processes("neo125m", "--zero", 3) == ["1"]
    assert processes("neo125m", "--zero", 2) == processes("neo2.7b") == []
    monkeypatch.setattr(experiment, "visible_gpus", lambda: 3)
    assert processes("neo2.7b") == ["3"]
    assert processes("neo125m") == processes("neo2.7b", "--gpus", 1) == []


# --- one command ---

FAMILY = """
import pathlib, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if "deaf" in sys.argv else signal.SIG_DFL)
if "deaf" in sys.argv:  # a child that does not listen
    pathlib.Path("started").write_text(str(__import__("os").getpid()))
else:
    subprocess.Popen([sys.executable, __file__, "deaf"])
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_every_process_quickly(tmp_path, number, code):
    """The command, and a child of it that ignores the signal, are gone with the experiment."""
    (tmp_path / "family.py").write_text(FAMILY)
    call = "import sys, experiment; experiment.run([sys.executable, 'family.py'])"
    parent = subprocess.Popen([sys.executable, "-c", call], cwd=tmp_path, stderr=subprocess.DEVNULL)
    started = tmp_path / "started"
    while not (started.exists() and started.read_text()) and parent.poll() is None:
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(timeout=30) == code
    state = Path("/proc", started.read_text(), "stat")  # a zombie waits for process 1 to reap it
    assert not state.is_file() or state.read_text().split()[2] in "ZX"


def test_the_printed_line_can_be_pasted(capfd):
    """A shell makes the same words of it, whatever is in them."""
    words = ["a b", "$HOME", "it's", '"', "*", "--x=1", ""]
    show = "import os, sys; print(os.environ['A'], sys.argv[1:])"
    experiment.run([sys.executable, "-c", show, *words], {"A": "b c"})
    line, result = capfd.readouterr().out.splitlines()
    again = subprocess.run(["bash", "-c", line.removeprefix("$ ")], capture_output=True, text=True)
    assert again.stdout.splitlines() == [result] == [f"b c {words}"]


# --- refusals, help, run.sh ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny stray", "'stray'"),
        ("tiny --script a.py", "a.py: no icu.main(...) in it"),
        ("compare --methods icu no.py", "no.py: no such file"),
        ("compare --method npo", "--methods NAME"),
        ("compare tiny --sets 1", "--sets: tiny has its own texts"),
        ("tiny --task-data x", "--task-data goes with --tasks"),
        ("tiny --pairs x", "--pairs"),
    ],
)
def test_wrong_words_are_refused_before_any_command(ran, words, message):
    """A ValueError names the value, and what to write instead."""
    Path("a.py").write_text("print('no method')")
    with pytest.raises(ValueError, match=re.escape(message)):
        ran(*words.split())


@pytest.fixture
def checkout(tmp_path):
    """run_sh(*words) of a copy of the repository whose programs print their words."""
    folder = tmp_path / "a folder"
    shutil.copytree(ROOT / "kit", folder / "kit")
    for name in ("run.sh", "experiment.py", "requirements.txt", "tests/requirements.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    for name in ("icu.py", "knn.py", "dev/bench.py", "evals/report.py", *experiment.ON_REQUEST):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("import sys; print(sys.argv)")

    def run_sh(*words):
        argv = ["bash", folder / "run.sh", *words]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    run_sh.folder = folder
    return run_sh


def test_run_sh_hands_on_every_word_as_it_is(checkout):
    """Words with blanks and stars."""
    folder = checkout.folder
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / ".venv"], check=True)
    both = [folder / "requirements.txt", folder / "tests/requirements.txt"]
    text = "".join(file.read_text() for file in both)
    (folder / ".venv/requirements.txt").write_text(text)
    assert checkout("bench", "--a b", "*") == (0, "['dev/bench.py', '--a b', '*']\n", "")
    words = ["runs/x", "help -h me"]
    assert checkout("ask", *words) == (0, f"{['evals/report.py', '--ask', *words]}\n", "")
    code, _, error = checkout("neo125m")
    assert code == 2 and "no torch: bash run.sh makes the environment" in error


def test_run_sh_without_an_environment_helps_and_refuses(checkout):
    """Neither makes one or imports torch; help names every preset and command."""
    (checkout.folder / "torch.py").write_text("raise SystemExit('heavy')")
    for words in (["help"], ["compare", "neo125m", "--help"]):
        code, out, error = checkout(*words)
        assert code == 0 and not error
        known = [*experiment.PRESETS, *experiment.EXPERIMENTS, "ask", "purge", "test", "--out"]
        assert all(word in out for word in known)
    for words in (["neo125"], ["tiny", "--methods", "x"]):
        code, _, error = checkout(*words)
        assert code == 2 and error.startswith("error: ") and error.count("\n") == 1
    assert not (checkout.folder / ".venv").exists()
