"""One command an experiment: a preset, a comparison, an ablation, a sweep. Prints each command that it is made of.

    bash run.sh                                                 # tiny: on any CPU, no hub needed, a few minutes
    bash run.sh neo125m --protocol released --set 3             # Table 1, GPT-Neo 125M, forget set 3
    bash run.sh tiny --script examples/simnpo.py                # a method in a file of its own
    bash run.sh compare neo125m --sets 0 1 2 3 4                # every method of Table 1, then one table
    bash run.sh compare tiny --methods icu kl examples/simnpo.py
    bash run.sh ablation neo125m                                # Figure 3
    bash run.sh sweep neo125m                                   # Table 2's grid; --table 5: its learning rates
    bash run.sh ask RUN "PREFIX"                                # what the model of a run says before and after
    bash run.sh purge RUN                                       # removes a run's texts from the disk, keeps its numbers
    bash run.sh test [PYTEST ARGS]                              # also: lint, bench [FLAGS], help

A run is mine -> unlearn -> report: knn.py, icu.py, evals/report.py. The printed lines can be pasted into a shell in this
folder, and paths are taken from it. Behind a preset stands every flag of knn.py, of evals/tasks.py (with --tasks), evals/judge.py
(--judge) and evals/audit.py (--audit), and of icu.py, and overrides the preset's own. One that several of them have is
icu.py's, then knn.py's: --knn-batch-size says whose is meant, --demo-seed is that of what makes the
preset's own model and texts. --data DIR is for all of them; what no one knows goes to icu.py, which reports it.
"""

import argparse
import importlib
import math
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

from kit import commands
from kit.commands import PYTHON, ROOT, grouped, last, once, without
from kit.flags import command_parser, positive, run_cli, run_parser, seed_number
from kit.protocols import PROTOCOLS

# --- the presets ---


class Preset(NamedTuple):
    """A row of the table below. Flags are written as one types them; the user's come later and win."""

    about: str  # for help, where presets that say the same share a line
    model: str  # a folder, or a name on the hub
    revision: str = ""  # the hub's, pinned; left out where --model names another model
    flags: str = ""  # icu.py's
    source: str = "--pile"  # knn.py's: the paper's rows, or --forget FILE --pool FILE
    make: str = ""  # the command that makes model and data, where a preset brings its own
    never_saw: str = (
        ""  # a model that never saw the texts to forget: measured too, and a row of every table
    )
    beside: str = (
        ""  # another method with its flags, run beside the preset's own where the user chooses none
    )
    large: bool = False  # on every GPU there is, at the protocol's rate for large models
    quick: bool = (
        False  # its run folder is runs/PRESET and is written again: the command can be typed twice
    )


PILE = "--ppl pile wikitext --el lazy"  # every run on the Pile's rows; EL only where it can decide: the same run
LARGE = PILE + " --batch-size 4 --dtype bf16"  # 1.3B and 2.7B: global batch 4
MEASURED = PILE + " --eval-only"
PAPER = "the paper's runs: GPT-Neo on the Pile extraction data (section 5)"
OPT = "measured, not unlearned: the OPT rows of Table 1; pickles on the hub, for --allow-pickle"
MADE = "runs/tiny-data"


def speaker(folder, make="", mine="", beside=""):
    """A real model that is taught secrets, and what it forgets them with.

    make: flags of demo/smollm.py; mine: of knn.py; beside: what the method beside ICU is told on these texts.
    """
    return Preset(
        "a real speaker of 135M, from PyPI, is taught secrets and forgets them", f"{folder}/model",
        flags=f"--bert minilm --bert-threshold auto --ppl heldout={folder}/heldout.jsonl --thresholds never-saw "
              "--el lazy --targets all --lr 1e-4 --max-epochs 10 --save-every 10",  # a state is 1.6 GB
        source=f"--forget {folder}/forget.jsonl --pool {folder}/pool.jsonl {mine}",
        make=f"demo/smollm.py --out {folder} {make}", never_saw=f"{folder}/never-saw", quick=True,
        beside=f"--script examples/gentle.py --batch-size 4 --max-epochs 20 {beside}",
    )  # fmt: skip


# fmt: off
PRESETS = {
    "tiny": Preset(
        "(default) a self-made corpus and model, on any CPU, no hub needed, a few minutes", f"{MADE}/model",
        # A small model needs a larger step, every token a target and more weight on what is kept (dev/LOG.md).
        flags=f"--bert minilm --bert-threshold auto --ppl heldout={MADE}/heldout.jsonl "
              "--targets all --batch-size 32 --lr 2e-4 --alpha 1 --beta 4",
        source=f"--forget {MADE}/forget.jsonl --pool {MADE}/pool.jsonl", make=f"demo/tiny.py --out {MADE}",
        never_saw=f"{MADE}/never-saw", quick=True,
        beside="--script examples/analogous.py --lr 5e-4 --beta 4 --batch-size 16"),
    "smollm": speaker("runs/smollm-data", beside="--lr 2e-4"),
    "smollm-pile": speaker("runs/smollm-pile-data", "--secrets pile", "--neighbours 12",  # code, licences
        "--lr 2e-4 --forget-weight 0 --alpha 4 --beta 3 --teacher live"),
    "neo125m": Preset(PAPER, "EleutherAI/gpt-neo-125m", "21def0189f5705e2521767faed922f1f15e7d7db", PILE),
    "neo1.3b": Preset(PAPER, "EleutherAI/gpt-neo-1.3B", "dbe59a7f4a88d01d1ba9798d78dbe3fe038792c8", LARGE, large=True),
    "neo2.7b": Preset(PAPER, "EleutherAI/gpt-neo-2.7B", "e24fa291132763e59f4a5422741b424fb5d59056", LARGE, large=True),
    "tinyllama": Preset(
        "Appendix C", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "036fa4651240b9a1487f709833b9e4b96b4c1574", LARGE, large=True),
    "opt125m": Preset(OPT, "facebook/opt-125m", "27dcfa74d334bc871f3234de431e71c6eeba5dd6", MEASURED),
    "opt1.3b": Preset(OPT, "facebook/opt-1.3b", "3f5c25d0bc631cb57ac65913f76e22c2dfb61d62", MEASURED),
    "opt2.7b": Preset(OPT, "facebook/opt-2.7b", "905a4b602cda5c501f1b3a2650a4152680238254", MEASURED),
}
# fmt: on


def icu_flags(args):
    """What icu.py is told for every run: by the preset, by the protocol, and by the user, who has the last word."""
    preset, words = args.preset, shlex.split(args.preset.flags)
    if not {"--model", "--after"} & {*args.icu}:
        words = [
            "--model",
            preset.model,
            *(["--revision", preset.revision] if preset.revision else []),
            *words,
        ]
    if preset.large and protocol(args).large_lr:
        words += ["--lr", protocol(args).large_lr]
    return [*words, "--preset", args.name, *args.icu]


def source_flags(args):
    """What the preset and the protocol tell knn.py; a source that the user names takes the place of the preset's."""
    words = shlex.split(args.preset.source)
    if "--pile" in args.knn:
        words = []
    elif "--forget" in args.knn or "--pool" in args.knn:
        words = [word for word in words if word != "--pile"]
    return [*words, *(["--allow-copies"] if protocol(args).allow_copies else [])]


def protocol(args):
    name = last([*shlex.split(args.preset.flags), *args.icu], "--protocol", "paper")
    return PROTOCOLS.get(name, PROTOCOLS["paper"])  # a name that is none is reported by icu.py


# --- the experiments: what differs between the runs over one forget set with one seed ---

METHODS = ("icu", "kumpr", "kl", "llmu", "po", "dpo", "npo", "graddiff")
GRID = "0.1,0.5 0.1,1.0 0.5,0.1 0.5,0.5 0.5,1.0 1.0,0.5 1.0,1.0 1.0,2.0 2.0,1.0 2.0,2.0"  # alpha, beta of Table 2
RATES = "1e-5 5e-6 2e-6 1e-6 5e-7"  # of Table 5


def compare(args):
    """Table 1: every method, or those of --methods; a FILE.py among them is a method in a file of its own."""
    rates = dict(rate.rsplit("=", 1) for rate in args.lrs)
    for method in args.methods:
        flag, name = "--script" if method.endswith(".py") else "--method", name_of(method)
        yield name, [flag, method, *(["--lr", rates[name]] if name in rates else [])]


def name_of(method):
    """What a comparison calls a method: its name, or the stem of its file."""
    return Path(method).stem if method.endswith(".py") else method


def ablation(args):
    """Figure 3: as it is, without the learn loss, without the KL, without both."""
    alpha, beta = last(icu_flags(args), "--alpha", "0.5"), last(icu_flags(args), "--beta", "1.0")
    for a, b in ((alpha, beta), ("0", beta), (alpha, "0"), ("0", "0")):
        yield f"alpha{a}-beta{b}", ["--alpha", a, "--beta", b]


def sweep(args):
    """Table 2: a grid over alpha and beta. With --table 5 or --lrs: learning rates at alpha = beta = 0.5."""
    longest = (
        [] if "--max-epochs" in args.icu else ["--max-epochs", "200"]
    )  # 5e-7 takes the paper 132 epochs
    for lr in args.lrs:
        yield f"lr{lr}", ["--alpha", "0.5", "--beta", "0.5", *longest, "--lr", lr]
    for point in [] if args.lrs else args.points:
        alpha, beta = point.split(",")
        yield f"alpha{alpha}-beta{beta}", ["--alpha", alpha, "--beta", beta]


# Each yields (run name, flags of icu.py) for one set and seed; --script FILE.py among them is another file to run.
EXPERIMENTS = {"compare": compare, "ablation": ablation, "sweep": sweep}
GOES_WITH = {
    "--methods": ["compare"],
    "--lrs": ["compare", "sweep"],
    "--points": ["sweep"],
    "--table": ["sweep"],
}
SETS_ITSELF = {  # what to pass instead
    ("compare", "--method"): "--methods NAME ...",
    ("compare", "--script"): "--methods FILE.py ...",
    ("sweep", "--alpha"): "--points ALPHA,BETA ...",
    ("sweep", "--beta"): "--points ALPHA,BETA ...",
}

# --- what each is made of ---


def single(args):
    """One run of the preset."""
    out = Path(args.out or default_folder(args))
    pairs = f"{out}.pairs.jsonl"
    anew = args.overwrite or (
        args.preset.quick and str(out) == default_folder(args) and not args.resume
    )
    how = ["--resume"] * args.resume + ["--overwrite"] * anew
    make(args)
    judge(args, [])
    if args.tasks:  # whether the sets are at hand is found out before the work
        measure_tasks(args, model_flags(args), ["--out", out, "--dry-run"])
    if args.dry_run or not (
        args.resume and Path(pairs).is_file()
    ):  # else: the pairs of the run that goes on
        train(args, ["--out", out, *how], check=True)
        mine(args, pairs)
    twin = measure_never_saw(args, pairs, f"{out}.never-saw", anew=anew)
    train(args, ["--pairs", pairs, "--out", out, *never_saw_flag(twin), *how])
    beside = run_beside(args, pairs, out, twin, anew=anew)
    if args.tasks:
        measure_tasks(args, model_flags(args), ["--out", out / "tasks-before", "--overwrite"])
        if (out / "model").is_dir() or (args.dry_run and "--eval-only" not in icu_flags(args)):
            measure_tasks(
                args, ["--model", out / "model"], ["--out", out / "tasks-after", "--overwrite"]
            )
    judge(args, [out, *beside, *twin])
    audit(args, [out, *beside], twin)
    elsewhere = ["--out", out] if beside or twin else []
    step(args, "evals/report.py", [out, *beside, *twin, *elsewhere, *explain_flags(args)])


def several(args):
    """Every run of an experiment for every set and seed, then one report; what is finished is kept."""
    folder = Path(
        args.out or f"runs/{args.command}/{args.name}-{last(args.icu, '--protocol', 'paper')}"
    )
    runs, jobs, twins = planned_runs(args), [], []
    make(args)
    judge(args, [])
    train(args, [], check=True)
    for flags in (
        runs.values()
    ):  # a name that is none, a file that is broken: told before the first run, not after it
        if last(flags, "--script") or last(flags, "--method", "icu") not in METHODS:
            train(args, flags, check=True)
    pairs = {number: folder / f"set{number}.pairs.jsonl" for number in args.sets}
    for number, file in pairs.items():
        mine(args, file, ["--set", number] if on_pile(args) else [])
    for number, file in pairs.items():
        twin = measure_never_saw(args, file, folder / f"never-saw-set{number}", anew=args.overwrite)
        twins += twin
        for seed in args.seeds:
            for name, flags in runs.items():
                out = folder / f"{name}-set{number}-seed{seed}"
                job(args, out, ["--pairs", file, "--seed", seed, *never_saw_flag(twin), *flags])
                jobs.append(out)
    judge(args, [*jobs, *twins])
    audit(args, jobs, twins)
    step(args, "evals/report.py", [*jobs, *twins, "--out", folder])


def measure_never_saw(args, pairs, out, *, anew):
    """[the run that measures the preset's model that never saw the texts], or [] where there is none of these texts."""
    others = {"--model", "--after", "--eval-only", "--forget", "--pool", "--pile"} & {
        *args.icu,
        *args.knn,
    }
    if not args.preset.never_saw or others:
        return []
    own = ["--model", args.preset.never_saw, "--thresholds", "paper", "--eval-only"]
    train(args, ["--pairs", pairs, "--out", out, *own, kept_or_new(out, anew)])
    return [str(out)]


def never_saw_flag(twin):
    """The flag by which icu.py finds the run of `measure_never_saw`."""
    return ["--never-saw", *twin] if twin else []


def explain_flags(args):
    """--explain where both models are small, so that loading them again takes seconds, and there are texts to show."""
    said = icu_flags(args)
    if not args.preset.quick or {"--redact", "--eval-only"} & set(said):
        return []
    return ["--explain", *(["--allow-pickle"] if "--allow-pickle" in said else [])]


# What a user says of the method, so that no other is run beside it.
CHOICE = {
    "--method",
    "--lr",
    "--alpha",
    "--beta",
    "--forget-weight",
    "--batch-size",
    "--model",
    "--eval-only",
}
CHOICE |= {"--after"}


def run_beside(args, pairs, out, twin, *, anew):
    """[the run of the preset's other method], or [] where the user has chosen a method."""
    if not args.preset.beside or args.script or CHOICE & set(args.icu):
        return []
    method = shlex.split(args.preset.beside)
    beside = f"{out}-{Path(last(method, '--script')).stem}"
    flags = ["--pairs", pairs, "--out", beside, *never_saw_flag(twin), kept_or_new(beside, anew)]
    train(args, [*flags, *method, *args.icu])  # the user has the last word
    return [beside]


def kept_or_new(out, anew):
    """How a run is asked for that is gone on with where it is there; one that has ended is kept.

    --resume also refuses to keep a run that was made with other settings. Without config.json it is no run yet.
    """
    return "--overwrite" if anew or not Path(out, "config.json").is_file() else "--resume"


def planned_runs(args):
    """{run name: flags} of an experiment; ValueError where one name would stand for two different runs."""
    runs = {}
    for name, flags in EXPERIMENTS[args.command](args):
        if runs.setdefault(name, flags) != flags:
            raise ValueError(
                f"two runs would be called {name}: {shlex.join(runs[name])} and {shlex.join(flags)}"
            )
    return runs


def job(args, out, flags):
    """One run of several: made, gone on with, or kept. One that diverges has a summary: it is a result, not an end."""
    print(f"== {out}", flush=True)
    before = written(out / "summary.json")
    status = train(args, [*flags, "--out", out, kept_or_new(out, args.overwrite)], ok=(0, 1))
    if status == 1 and written(out / "summary.json") in (None, before):
        raise SystemExit(1)  # it broke off, and has said why
    if not args.dry_run and not written(out / "summary.json"):
        raise ValueError(f"{out}: no summary.json: what ran there does not end as icu.main does")


def written(file):
    """When a file was written, in nanoseconds; None without it."""
    return file.stat().st_mtime_ns if file.is_file() else None


def make(args):
    """The preset's own model and data, where it brings them."""
    if args.preset.make:
        if args.dry_run and (missing := unmade(args.preset)):
            print(
                f"note: {missing} is still to be made: what needs it is named, not checked",
                flush=True,
            )
        script, *flags = shlex.split(args.preset.make)
        step(args, script, [*flags, *args.demo])


def unmade(preset):
    """The folder of a preset's own models where they are still to be made, else None: a dry run cannot look into it."""
    words = shlex.split(preset.make)
    there = all(Path(model).is_dir() for model in (preset.model, preset.never_saw))
    return None if there or not words else last(words, "--out")


def mine(args, pairs, flags=()):
    """A neighbour for each text to forget."""
    dry = ["--dry-run"] * args.dry_run
    words = [*source_flags(args), "--out", pairs, "--overwrite", *args.knn, *flags, *dry]
    step(args, "knn.py", words, always=True)


def train(args, flags, *, check=False, ok=(0,)):
    """icu.py, or the script in its place; check: --dry-run without pairs, so that models and data are looked for."""
    ours = {"--script", "--model", *shlex.split(f"{args.preset.flags} {args.preset.beside}")}
    words = once(["--script", args.script or "icu.py", *icu_flags(args), *map(str, flags)], ours)
    script = last(words, "--script")
    words = without(words, "--script")
    if check:
        return step(args, script, [*words, "--dry-run"], always=True, quiet=not args.dry_run)
    return step(args, script, words, launched=True, ok=ok)


def measure_tasks(args, model, flags):
    """What a model can still do: evals/tasks.py, with what the run's flags say to it too."""
    said = icu_flags(args)
    same = [
        word
        for flag in ("--device", "--dtype")
        if (value := last(said, flag))
        for word in (flag, value)
    ]
    same += ["--task-data", last(said, "--data")] if last(said, "--data") else []
    same += ["--allow-pickle"] if "--allow-pickle" in said else []
    words = ["--protocol", last(said, "--protocol", "paper"), *same, *args.tasks, *model, *flags]
    looks = "--dry-run" in flags
    step(args, "evals/tasks.py", words, launched=not looks, always=looks)


def judge(args, runs):
    """What a judge says of the runs' texts (--judge MODEL); without runs, before the work: whether it may be asked."""
    if args.judge:
        step(
            args,
            "evals/judge.py",
            [*runs, *args.judge, *([] if runs else ["--dry-run"])],
            always=not runs,
        )


def audit(args, runs, twins):
    """What is still in the models of the runs (--audit), beside what the preset brings, if its twins were measured."""
    brings, never = ["--overwrite"], args.preset.never_saw
    if twins:
        brings += ["--never-saw", never, "--unseen", Path(never).with_name("unseen.jsonl")]
    if lr := last(icu_flags(args), "--lr"):
        brings += ["--relearn-lr", lr]  # the same for every method
    for run in runs if args.audited else ():
        step(args, "evals/audit.py", [run, *brings, *args.audit], launched=True)


def model_flags(args):
    """The model before the run, for evals/tasks.py."""
    said = icu_flags(args)
    if after := last(said, "--after"):
        return ["--model", Path(after, "model")]
    return [
        word
        for flag in ("--model", "--revision")
        if (value := last(said, flag))
        for word in (flag, value)
    ]


def default_folder(args):
    """runs/PRESET-setN-METHOD-PROTOCOL; a script counts as a method; quick presets have runs/PRESET."""
    script = [Path(args.script).stem] if args.script else []
    if args.preset.quick:
        return "-".join([f"runs/{args.name}", *script])
    number = [f"set{last(args.knn, '--set', '0')}"] if on_pile(args) else []
    method = script or [last(args.icu, "--method", "icu")]
    return "-".join([f"runs/{args.name}", *number, *method, last(args.icu, "--protocol", "paper")])


def on_pile(args):
    return "--pile" in [*source_flags(args), *args.knn]


# --- one command of it ---


def launcher(args):
    """(environment, first words) of a step: Python in one process, or DeepSpeed's launcher for several."""
    said = icu_flags(args)
    processes = args.gpus or (commands.visible_gpus() if args.preset.large else 1) or 1
    if (
        processes > 1 or "--offload" in said or last(said, "--zero") == "3"
    ):  # these two are DeepSpeed's
        return commands.launcher(processes)
    return {}, [PYTHON]


def step(args, script, flags, *, launched=False, always=False, quiet=False, ok=(0,)):
    """Runs a file of Python with flags; its exit code, which ends the experiment unless it is one of `ok`.

    launched: by several processes where they are asked for. always: also in a dry run, which only names the others.
    """
    environment, start = launcher(args) if launched else ({}, [PYTHON])
    environment = environment | commands.path_to_icu(script)
    argv = [*start, script, *map(str, flags)]
    missing = unmade(args.preset) if args.dry_run else None
    if args.dry_run and (not always or (missing and any(missing in word for word in argv))):
        print("would run:", commands.shown(argv, environment), flush=True)
        return 0
    status = commands.run(argv, environment, quiet=quiet)
    if status not in ok:
        raise SystemExit(status)
    return status


# --- flags ---

# What knn.py or evals/tasks.py shares with icu.py means the run, so it is icu.py's (tests/test_experiment.py compares).
COMMON = {
    "--data",
    "--out",
    "--overwrite",
    "--batch-size",
    "--device",
    "--dtype",
    "--dry-run",
    "--debug",
}
COMMON |= {"--model", "--revision", "--allow-pickle", "--protocol", "--after"}
FOR_ALL = {"--data", "--tokenizer"}  # a demo that has them is told them, too
RUN_FLAGS = set(run_parser("")._option_string_actions)
# What each program is told for every run; and a knn.py that only fetches makes no pairs.
TOLD = {"--out", "--overwrite", "--dry-run", "--model", "--revision", "--fetch"}


# fmt: off
def make_parser():
    """The flags of this file, one a line."""
    usage = "bash run.sh [compare | ablation | sweep] [PRESET] [FLAG ...]"
    parser = command_parser(help_text(), prog="bash run.sh", usage=usage)
    g = parser.add_argument_group("of every preset")
    g.add_argument("--out", metavar="DIR", help="the run folder (runs/PRESET-...; of several runs, the folder of all)")
    g.add_argument("--script", metavar="FILE.py", help="run in place of icu.py: a copy, or what ends in icu.main(mine)")
    g.add_argument("--gpus", type=positive, metavar="N", help="processes, by DeepSpeed's launcher (1; large: all GPUs)")
    g.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    g.add_argument("--overwrite", action="store_true", help="replace a run that is there; of several: each of them")
    g.add_argument("--audit", action="store_true", dest="audited", help="then ask what is still in the model: evals/audit.py")
    g.add_argument("--dry-run", action="store_true", help="check what is there, train nothing, name the commands")
    g = parser.add_argument_group("of several runs")
    g.add_argument("--sets", nargs="+", metavar="N", help="the paper's forget sets, 0 to 4 (--set, or 0)")
    g.add_argument("--seeds", nargs="+", type=seed_number, metavar="N", help="seeds (--seed, or 0)")
    g.add_argument("--methods", nargs="+", default=METHODS, metavar="M", help="compare: names, or FILE.py (all names)")
    g.add_argument("--lrs", nargs="+", default=[], metavar="LR", help="compare: METHOD=LR ...; sweep: LR ...")
    g.add_argument("--points", nargs="+", type=point, default=GRID.split(), metavar="A,B", help="sweep: ALPHA,BETA ...")
    g.add_argument("--table", type=int, choices=(2, 5), default=2, help="sweep: the paper's table (%(default)s)")
    return parser
# fmt: on


def help_text():
    """What stands below the usage line: the docstring, and the presets, those that say the same on one line."""
    names = {}
    for name, preset in PRESETS.items():
        names.setdefault(preset.about, []).append(name)
    lines = [f"  {' | '.join(group):30}  {about}" for about, group in names.items()]
    return "\n".join([__doc__.strip(), "", "presets", *lines, "", OFTEN.strip()])


OFTEN = """
flags of the programs that are often used
  --set 0..4, --limit N           the paper's forget set (0); only the first N rows of it
  --model DIR --tokenizer DIR --encoder DIR --bert DIR --data DIR
                                  local folders instead of the hub: the model to unlearn; GPT-2's tokenizer, which the
                                  Pile's token ids are in; the sentence encoder; BERTScore's encoder; the data files
  --allow-copies --max-overlap X  which neighbours may teach the secret back
  --protocol released --method npo --alpha 1.0 --lr 1e-5 --seed 3 --max-epochs 10 --device cpu
  --tasks all | NAME ...          what the model can still do, before and after (with --task-data DIR, --prompts, ...)
  --audit                         what is still in the model, beside references (--audit-samples N, --only NAME, ...)
  --judge MODEL                   a model grades the texts before and after (--judge-base-url URL, --send-texts, ...)
"""


def point(text):
    if text.count(",") != 1 or not all(map(is_number, text.split(","))):
        raise argparse.ArgumentTypeError(f"{text!r} is not ALPHA,BETA, such as 0.5,1.0")
    return text


def is_number(text, low=0.0):
    """Whether a word is a finite number from `low` on."""
    try:
        return low <= float(text) < math.inf
    except ValueError:
        return False


def read_flags(words):
    """The command, the preset, this file's flags, and the others in `args.others`; needs nothing but Python."""
    words = list(words)
    command = words.pop(0) if words and words[0] in EXPERIMENTS else None
    name = words.pop(0) if words and not words[0].startswith("-") else "tiny"
    if name not in PRESETS:
        others = "test bench lint ask purge compare ablation sweep help"
        raise ValueError(f"unknown preset {name!r}; one of: {' '.join(PRESETS)} (or: {others})")
    parser, groups = make_parser(), grouped(words)
    mine = [group for group in groups if group[0] in parser._option_string_actions]
    args = parser.parse_args(sum(mine, []))
    args.command, args.name, args.preset = command, name, PRESETS[name]
    args.others = [group for group in groups if group not in mine]
    try:
        [shlex.split(text) for text in (args.preset.flags, args.preset.source, args.preset.make)]
    except ValueError as error:
        raise ValueError(f"the preset {name}, in PRESETS: {error}") from None
    given = {group[0] for group in groups}
    check_flags(args, given)
    if args.table == 5 and not args.lrs:
        args.lrs = RATES.split()
    return args


def check_flags(args, given):
    """ValueError for flags that do not go with the command or with each other, and for scripts that are not there."""
    for flag, those in {"--sets": [*EXPERIMENTS], "--seeds": [*EXPERIMENTS], **GOES_WITH}.items():
        if flag in given and args.command not in those:
            raise ValueError(
                f"{flag} goes with {', '.join(those)}: bash run.sh {those[0]} {args.name} {flag} ..."
            )
    for (command, flag), instead in SETS_ITSELF.items():
        if args.command == command and flag in given:
            raise ValueError(f"{command} sets {flag} itself: pass {instead}")
    if args.command and "--tasks" in given:
        raise ValueError(
            "--tasks goes with a single preset; measure a run's model/ with evals/tasks.py"
        )
    for flag in given:
        if flag.startswith("--task") and "--tasks" not in given:
            raise ValueError(f"{flag} goes with --tasks all, or --tasks NAME ...")
        if flag.startswith("--judge-") and "--judge" not in given:
            raise ValueError(f"{flag} goes with --judge MODEL")
        if flag.startswith("--audit-") and "--audit" not in given:
            raise ValueError(f"{flag} goes with --audit")
    if {"--judge", "--redact"} <= given:
        raise ValueError(
            "--judge reads the texts that --redact does not keep: leave one of them out"
        )
    for script in [args.script, *(method for method in args.methods if method.endswith(".py"))]:
        if script and not Path(script).is_file():
            raise ValueError(f"{script}: no such file; paths are taken from {ROOT}")
    methods = [name_of(method) for method in args.methods]
    for rate in args.lrs:
        name, equals, lr = rate.rpartition("=")
        if args.command == "compare" and name not in methods:
            raise ValueError(
                f"--lrs {rate}: not METHOD=LR with a METHOD of this comparison ({', '.join(methods)})"
            )
        if (equals and args.command == "sweep") or not is_number(lr, sys.float_info.min):
            raise ValueError(
                f"--lrs {rate}: not a rate, such as {'icu=' if args.command == 'compare' else ''}1e-5"
            )
    if args.command == "sweep" and "--points" in given and (args.lrs or args.table == 5):
        raise ValueError("--points are those of --table 2; --lrs and --table 5 are rates")
    rated = [rate.rpartition("=")[0] or rate for rate in args.lrs]
    for flag, values in (
        ("--sets", args.sets or []),
        ("--seeds", args.seeds or []),
        ("--lrs", rated),
    ):
        if twice := [value for value in values if values.count(value) > 1]:
            raise ValueError(f"{flag}: {twice[0]} stands there twice")


def sort_flags(args):
    """Whose the other flags are, in args.icu, args.knn, args.tasks, ...: as the programs' own parsers say."""
    try:
        import knn

        parsers = {"knn": knn.make_parser()}
        if args.preset.make:
            demo = Path(shlex.split(args.preset.make)[0]).with_suffix("")
            parsers["demo"] = importlib.import_module(".".join(demo.parts)).make_parser()
        asked = {"audit"} if args.audited else set()
        for name in ("tasks", "judge", "audit"):
            if name in asked or any(flag == f"--{name}" for flag, *_ in args.others):
                parsers[name] = importlib.import_module(f"evals.{name}").make_parser()
    except ModuleNotFoundError as error:
        way_out = "start with bash run.sh, which makes the environment"
        raise ValueError(f"{error.name} is missing in {sys.executable}: {way_out}") from None
    known = {program: set(parser._option_string_actions) for program, parser in parsers.items()}
    args.icu, args.knn, args.tasks, args.judge, args.audit, args.demo = [], [], [], [], [], []
    for flag, *values in args.others:
        program, own = owner(flag, known)
        getattr(args, program).extend([own, *values])
        if flag in ("--data", "--after"):
            args.knn += [flag, *values]
        if flag in FOR_ALL & known.get("demo", set()):
            args.demo += [flag, *values]
    if args.sets and not on_pile(args):
        raise ValueError(f"--sets: {args.name} has texts of its own and no sets of the Pile")
    args.sets = args.sets or [last(args.knn, "--set", "0")]
    args.seeds = args.seeds or [last(args.icu, "--seed", "0")]
    for number in args.sets:  # wrong values for knn.py are told before the model is looked for
        parsers["knn"].parse_args(
            [*source_flags(args), *args.knn, *(["--set", number] if on_pile(args) else [])]
        )


def owner(flag, known):
    """(program, the flag as that program calls it); known: {program: its flags} but icu.py's."""
    program, own = "icu", flag
    for name, flags in reversed(known.items()):  # knn.py's before evals/tasks.py's
        if flag in flags - COMMON - (RUN_FLAGS if name in ("demo", "audit") else set()):
            program = name
    if flag == "--set" and flag in known.get(
        "demo", ()
    ):  # then the rows are the demo's, and knn.py reads its files
        program = "demo"
    for name, flags in known.items():
        if flag.startswith(f"--{name}-") and "--" + flag.removeprefix(f"--{name}-") in flags:
            program, own = name, "--" + flag.removeprefix(f"--{name}-")
    if program != "icu" and own in TOLD:
        raise ValueError(
            f"{flag}: {program}.py is told this for each run; to choose it, call {program}.py itself"
        )
    return program, own


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    os.chdir(ROOT)
    if words[:1] == ["help"] or {"-h", "--help"} & set(words):
        return make_parser().print_help()
    only_check = words[:1] == ["--check"]  # for run.sh, before there is an environment
    args = read_flags(words[only_check:])
    if not only_check:
        sort_flags(args)
        (several if args.command else single)(args)


if __name__ == "__main__":
    run_cli(main)
