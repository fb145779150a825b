"""One command an experiment: a preset, a comparison, an ablation or a sweep.

    bash run.sh                                       # tiny: any CPU, no hub, a few minutes
    bash run.sh neo125m --protocol released --set 3   # Table 1, GPT-Neo 125M, forget set 3
    bash run.sh tiny --script examples/simnpo.py      # a method in a file of its own
    bash run.sh compare neo125m --sets 0 1 2 3 4      # every method of Table 1, then one table
    bash run.sh compare tiny --methods icu kl examples/simnpo.py
    bash run.sh ablation neo125m                      # Figure 3
    bash run.sh sweep neo125m                         # Table 2's grid; --table 5: learning rates
    bash run.sh audit RUN                             # also: tasks, tofu, judge, report
    bash run.sh ask RUN "PREFIX"                      # what the model says before and after
    bash run.sh purge RUN                             # removes a run's texts, keeps its numbers
    bash run.sh test                                  # also: lint, bench, help

A run is three programs: knn.py finds pairs, icu.py unlearns, evals/report.py writes tables. Their
commands are printed and can be pasted. A flag goes to every program that has it, or else to icu.py.
"""

import functools
import importlib.util
import itertools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from kit.flags import above, command_parser, natural, positive, run_cli
from kit.protocols import PROTOCOLS

ROOT = Path(__file__).resolve().parent
PYTHON = sys.executable.removeprefix(f"{ROOT}{os.sep}")  # .venv/bin/python, so that it is pasted

# --- the presets ---


class Preset(NamedTuple):
    """A row of the table below. Flags are as they are typed."""

    about: str  # for help
    model: str  # a folder, or a name on the hub
    revision: str = ""  # the hub's, pinned; unused if the user names another model
    flags: str = ""
    source: str = "--pile"  # the paper's rows, or --forget FILE --pool FILE
    make: str = ""  # the program that makes its own model and data, in `folder`
    folder: str = ""  # with a model that never saw the texts to forget: a row of every table
    beside: str = ""  # a second method with its flags, run if the user chooses no method
    large: bool = False  # on every GPU, at the protocol's rate for large models


PILE = "--ppl pile wikitext --el lazy"  # EL only where it can decide: the same run, faster
LARGE = PILE + " --batch-size 4 --dtype bf16"  # 1.3B and 2.7B: global batch 4
MEASURED = PILE + " --eval-only"
PAPER = "the paper's runs: GPT-Neo on the Pile extraction data (section 5)"
OPT = "the OPT rows of Table 1: measured only; pickles on the hub, so pass --allow-pickle"
SPEAKER = "a real speaker of 135M, from PyPI, is taught secrets and forgets them"
TAUGHT = "--thresholds never-saw --el lazy --lr 1e-4 --max-epochs 10 --save-every 10"  # 1.6 GB each
GENTLE = "--script examples/gentle.py --batch-size 4 --max-epochs 20 "


def taught(about, folder, make, flags, *, beside):
    """A preset whose model and texts a script in demo/ makes."""
    ppl = f"--ppl heldout={folder}/heldout.jsonl"
    return Preset(
        about,
        f"{folder}/model",
        flags=f"--bert minilm --bert-threshold auto {ppl} --targets all {flags}",
        source=f"--forget {folder}/forget.jsonl --pool {folder}/pool.jsonl",
        make=make,
        folder=folder,
        beside=beside,
    )


# fmt: off
PRESETS = {
    # A small model needs a larger step, every token a target and more weight on what is kept;
    # regrow learns from the further neighbours.
    "tiny": taught(
        "(default) a self-made corpus and model, on any CPU, without a hub, in a few minutes",
        "runs/tiny-data", "demo/tiny.py",
        "--batch-size 32 --lr 2e-4 --alpha 1 --beta 4 --neighbours 45",
        beside="--script examples/regrow.py --lr 3e-3 --batch-size 8 --el lazy"),
    "smollm": taught(
        SPEAKER, "runs/smollm-data", "demo/smollm.py", TAUGHT, beside=GENTLE + "--lr 2e-4"),
    "smollm-pile": taught(  # the secrets are the paper's rows: code, licences
        SPEAKER, "runs/smollm-pile-data", "demo/smollm.py",
        TAUGHT + " --secrets pile --neighbours 12",
        beside=GENTLE + "--lr 2e-4 --forget-weight 0 --alpha 4 --beta 3 --teacher live"),
    "smollm-chat": taught(
        "the same, in chat: answers about invented authors, in TOFU's form",
        "runs/smollm-chat-data", "demo/smollm.py",
        TAUGHT + " --secrets authors --rows 24 --teach-lr 1e-4",  # 3e-4 forgets Paris
        beside=GENTLE + "--lr 2e-4"),
    "neo125m": Preset(
        PAPER, "EleutherAI/gpt-neo-125m", "21def0189f5705e2521767faed922f1f15e7d7db", PILE),
    "neo1.3b": Preset(
        PAPER, "EleutherAI/gpt-neo-1.3B", "dbe59a7f4a88d01d1ba9798d78dbe3fe038792c8", LARGE,
        large=True),
    "neo2.7b": Preset(
        PAPER, "EleutherAI/gpt-neo-2.7B", "e24fa291132763e59f4a5422741b424fb5d59056", LARGE,
        large=True),
    "tinyllama": Preset(
        "Appendix C", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "036fa4651240b9a1487f709833b9e4b96b4c1574", LARGE, large=True),
    "opt125m": Preset(
        OPT, "facebook/opt-125m", "27dcfa74d334bc871f3234de431e71c6eeba5dd6", MEASURED),
    "opt1.3b": Preset(
        OPT, "facebook/opt-1.3b", "3f5c25d0bc631cb57ac65913f76e22c2dfb61d62", MEASURED),
    "opt2.7b": Preset(
        OPT, "facebook/opt-2.7b", "905a4b602cda5c501f1b3a2650a4152680238254", MEASURED),
}
# fmt: on

# --- a plan: what a command line asks for ---
# Flags are dicts, {"--ppl": ["pile", "wikitext"], "--el": ["lazy"]}: a | b is a, then b.

METHODS = ("icu", "kumpr", "kl", "llmu", "po", "dpo", "npo", "graddiff")
# alpha, beta of Table 2; learning rates of Table 5
GRID = "0.1,0.5 0.1,1.0 0.5,0.1 0.5,0.5 0.5,1.0 1.0,0.5 1.0,1.0 1.0,2.0 2.0,1.0 2.0,2.0".split()
RATES = "1e-5 5e-6 2e-6 1e-6 5e-7".split()


def read_plan(words):
    """The plan of a command line, a namespace. ValueError for a user's slip.

    command: compare, ablation, sweep, or None. name, preset: a row of PRESETS. typed: the user's
    flags but this file's own (out, gpus, ...). settings: all flags for the programs. runs: of an
    experiment, a run's name and what it sets.
    """
    words = list(words)
    command = words.pop(0) if words and words[0] in EXPERIMENTS else None
    name = words.pop(0) if words and not words[0].startswith("-") else "tiny"
    if name not in PRESETS:
        others = (
            "compare ablation sweep audit tasks tofu judge report ask purge bench test lint help"
        )
        raise ValueError(f"unknown preset {name!r}; one of: {' '.join(PRESETS)} (or: {others})")
    plan, rest = make_parser(command).parse_known_args(words)
    plan.command, plan.name, plan.preset = command, name, PRESETS[name]
    plan.typed = flags_in(rest)
    plan.protocol = value(flags_in(plan.preset.flags) | plan.typed, "--protocol", "paper")
    plan.settings = settings_of(plan)
    runs = list(EXPERIMENTS[command](plan)) if command else []
    plan.runs = dict(runs)
    for problem in problems(plan, runs):
        raise ValueError(problem)
    if command:
        plan.sets = plan.sets or [value(plan.settings, "--set", "0")]
        plan.seeds = list(dict.fromkeys(plan.seeds or [value(plan.settings, "--seed", "0")]))
    return plan


# fmt: off
def make_parser(command):
    """This file's own flags for an experiment, or a single run (None)."""
    usage = "bash run.sh [compare | ablation | sweep] [PRESET] [FLAG ...]"
    parser = command_parser(help_text(), debug=False, prog="bash run.sh", usage=usage)
    add = parser.add_argument_group("how it is run").add_argument
    add("--out", metavar="DIR", help="the run folder, or the folder of all runs")
    add("--gpus", type=positive, metavar="N", help="processes (1; large presets: all)")
    add("--overwrite", action="store_true", help="replace the runs that are there")
    add("--audit", action="store_true", help="then ask what is still in the model")
    add("--dry-run", action="store_true", help="check, name the commands, train nothing")
    parser.set_defaults(script=None)
    if command != "compare":
        add("--script", metavar="FILE.py", help="in place of icu.py: icu.main(MyMethod)")
    if command is None:
        add("--resume", action="store_true", help="go on with an interrupted run")
        return parser
    add("--sets", nargs="+", choices=list("01234"), help="forget sets (--set, or 0)")
    add("--seeds", nargs="+", type=natural, metavar="N", help="(--seed, or 0)")
    if command == "compare":
        add("--methods", nargs="+", default=METHODS, metavar="M", help="or FILE.py")
        add("--lrs", nargs="+", default=[], type=method_rate, metavar="METHOD=LR")
    if command == "sweep":
        add = parser.add_mutually_exclusive_group().add_argument
        add("--points", nargs="+", type=alpha_beta, default=GRID, metavar="ALPHA,BETA")
        add("--lrs", nargs="+", type=rate, metavar="LR", help="at alpha = beta = 0.5")
        add("--table", type=int, choices=(2, 5), default=2, help="of the paper (2)")
    return parser
# fmt: on


# Numbers stay as they were typed: they name folders.
def rate(text):
    above(0)(text)
    return text


def method_rate(text):
    name, lr = text.split("=")
    return name, rate(lr)


def alpha_beta(text):
    _, _ = map(above(0, equal=True), text.split(","))
    return text


def help_text():
    names = {}
    for name, preset in PRESETS.items():
        names.setdefault(preset.about, []).append(name)
    lines = [f"  {' | '.join(group):30}  {about}" for about, group in names.items()]
    return "\n".join([__doc__.strip(), "", "presets", *lines, "", OFTEN.strip()])


OFTEN = """
flags that are often used (all: python icu.py --help, ...)
  --set 0..4 --limit N      the paper's forget set (0); its first N rows
  --model DIR --tokenizer DIR --encoder DIR --bert DIR --data DIR     folders instead of the hub
  --protocol released --method npo --lr 1e-5 --seed 3 --max-epochs 10 --device cpu
  --tasks all --audit --judge MODEL     what the model can still do; what is still in it; grades
"""


def flags_in(words):
    """The flags of a command line; the last one counts."""
    flags = {}
    for word in shlex.split(words) if isinstance(words, str) else words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            flags[flag] = [value] if equals else []
        elif flags:
            flags[flag].append(word)
        else:
            raise ValueError(f"{word!r} is not a flag; bash run.sh help lists them")
    return flags


def value(flags, flag, default=None):
    """The (last) value of a flag, or the default."""
    return (flags.get(flag) or [default])[-1]


def settings_of(plan):
    """Every flag for the programs: the preset's, the protocol's, and the typed ones, which win."""
    preset, typed, settings = plan.preset, plan.typed.keys(), {}
    texts = flags_in(preset.source)
    if "--pile" in typed or ("--pile" in texts and typed & {"--forget", "--pool"}):
        texts = {}
    if not typed & {"--model", "--after"}:
        settings["--model"] = [preset.model]
        settings |= {"--revision": [preset.revision]} if preset.revision else {}
    settings |= texts | flags_in(preset.flags) | {"--preset": [plan.name]}
    protocol = PROTOCOLS.get(plan.protocol, PROTOCOLS["paper"])  # icu.py reports a wrong name
    if protocol.allow_copies:
        settings["--allow-copies"] = []
    if preset.large and protocol.large_lr:
        settings["--lr"] = [protocol.large_lr]
    return settings | plan.typed


# What differs between an experiment's runs: each yields (run name, its flags).


def compare(plan):
    """Table 1: every method, or those of --methods."""
    rates = dict(plan.lrs)
    for method in plan.methods:
        name, flag = Path(method).stem, "--script" if method.endswith(".py") else "--method"
        yield name, {flag: [method]} | ({"--lr": [rates[name]]} if name in rates else {})


def ablation(plan):
    """Figure 3: as it is, without the learn loss, the KL, or both."""
    alpha, beta = value(plan.settings, "--alpha", "0.5"), value(plan.settings, "--beta", "1.0")
    for a, b in ((alpha, beta), ("0", beta), (alpha, "0"), ("0", "0")):
        yield f"alpha{a}-beta{b}", {"--alpha": [a], "--beta": [b]}


def sweep(plan):
    """Table 2: a grid over alpha and beta. --table 5 or --lrs: rates at alpha = beta = 0.5."""
    epochs = {} if "--max-epochs" in plan.typed else {"--max-epochs": ["200"]}  # 5e-7 takes 132
    lrs = plan.lrs or (RATES if plan.table == 5 else [])
    for lr in lrs:
        yield f"lr{lr}", {"--alpha": ["0.5"], "--beta": ["0.5"], **epochs, "--lr": [lr]}
    for point in [] if lrs else plan.points:
        alpha, beta = point.split(",")
        yield f"alpha{alpha}-beta{beta}", {"--alpha": [alpha], "--beta": [beta]}


EXPERIMENTS = {"compare": compare, "ablation": ablation, "sweep": sweep}
# Flags that an experiment sets for each run, and what a user writes instead.
SETS = {
    "compare": (("--method", "--script"), "--methods NAME FILE.py ..."),
    "sweep": (("--alpha", "--beta"), "--points ALPHA,BETA ..."),
}


def problems(plan, runs):
    """What is wrong with a plan, as messages."""
    typed = plan.typed.keys()
    for flag in typed & {"--pairs", "--fetch"}:
        yield f"{flag} is not of a plan: python icu.py or python knn.py takes it"
    flags, instead = SETS.get(plan.command, ((), ""))
    for flag in typed & flags:
        yield f"{plan.command} sets {flag} for each run: {instead}"
    for command in (None, *EXPERIMENTS):
        for flag in typed & make_parser(command)._option_string_actions.keys():
            yield f"{flag} goes with {command or 'a single preset'}"
    known = flags_of("icu.py").union(*map(flags_of, programs(plan)))
    for script, request in ON_REQUEST.items():
        for flag in (typed & flags_of(script)) - known:
            yield f"{flag} goes with {request}"
    if plan.command and "--tasks" in typed:
        yield "--tasks goes with a single preset; bash run.sh tasks measures a model"
    if typed >= {"--judge", "--redact"}:
        yield "--judge reads the texts that --redact does not keep: leave one out"
    if plan.command and plan.sets and "--pile" not in plan.settings:
        yield f"--sets: {plan.name} has its own texts and no sets of the Pile"
    for method, _ in plan.lrs if plan.command == "compare" else ():
        if method not in plan.runs:
            yield f"--lrs {method}=...: not a method of this comparison"
    for name, flags in runs:
        if plan.runs[name] != flags:
            yield f"two runs would be called {name}: rename one of the files"
    for script in filter(None, [plan.script, *(value(flags, "--script") for _, flags in runs)]):
        if not Path(script).is_file():
            yield f"{script}: no such file; paths are taken from {ROOT}"
        elif "main(" not in Path(script).read_text(encoding="utf-8"):
            yield f"{script}: no icu.main(...) in it: a script ends in icu.main(MyMethod)"


# --- which program takes a setting ---

ON_REQUEST = {  # a program: the flag that asks for it
    "evals/tasks.py": "--tasks all",
    "evals/judge.py": "--judge MODEL",
    "evals/audit.py": "--audit",
}


def programs(plan):
    """The programs of a plan besides icu.py."""
    requests = {*plan.typed, *["--audit"] * plan.audit}
    requested = [script for script, flag in ON_REQUEST.items() if flag.split()[0] in requests]
    return ["knn.py", "evals/report.py", *filter(None, [plan.preset.make]), *requested]


@functools.cache
def flags_of(script):
    """The flags of a program, read from its text: an import takes seconds."""
    text = (ROOT / script).read_text(encoding="utf-8")
    if "add_model" in text:
        text += (ROOT / "kit/flags.py").read_text(encoding="utf-8")
    switch = r"(,\s*action=argparse\.BooleanOptionalAction)?"  # has --no-NAME as well
    flags = re.findall(rf'\b(?:add_argument|add|flag)\(\s*"--([\w-]+)"{switch}', text)
    names = [name for name, _ in flags] + [f"no-{name}" for name, both in flags if both]
    return {f"--{name}" for name in [*names, "debug"]}  # which is every program's


def settings_for(plan, script):
    """The settings that a program takes; icu.py also those that none has."""
    taken = flags_of(script)
    if script == "icu.py":
        others = set().union(*map(flags_of, programs(plan)))
        taken = plan.settings.keys() - (others - taken)
    settings = {flag: values for flag, values in plan.settings.items() if flag in taken}
    if script != "icu.py" and settings.get("--dtype") == ["bf16-weights"]:
        settings["--dtype"] = ["bf16"]  # what measures has no Adam to save memory of
    return settings


# --- the steps of a plan ---


def single(plan):
    """One run of the preset."""
    out = Path(plan.out or default_folder(plan))
    pairs = Path(f"{out}.pairs.jsonl")
    anew = plan.overwrite or (plan.preset.folder and not plan.out and not plan.resume)
    start = {"--resume": []} if plan.resume else {}
    start |= {"--overwrite": []} if anew else {}
    make(plan)
    judge(plan, [])
    measure_tasks(plan, out, {"--dry-run": []})  # whether the sets are at hand, before the work
    if plan.dry_run or not (plan.resume and pairs.is_file()):
        train(plan, {"--out": [out], **start}, check=True)
        mine(plan, pairs)
    twin = measure_never_saw(plan, pairs, f"{out}.never-saw", anew=anew)
    train(plan, {"--pairs": [pairs], "--out": [out], **twin, **start})
    beside = run_beside(plan, pairs, out, twin, anew=anew)
    measure_tasks(plan, out / "tasks-before", {})
    if (out / "model").is_dir() or (plan.dry_run and "--eval-only" not in plan.settings):
        model = {"--model": [out / "model"], "--revision": None}
        measure_tasks(plan, out / "tasks-after", model)
    runs = [out, *beside, *twin.get("--never-saw", [])]
    judge(plan, runs)
    audit(plan, [out, *beside], twin)
    if plan.preset.folder and not plan.settings.keys() & {"--redact", "--eval-only"}:
        step(plan, "extras/explain.py", settings_for(plan, "extras/explain.py"), runs)
    report(plan, runs, out)


def default_folder(plan):
    """runs/PRESET-setN-METHOD-PROTOCOL; of demo/: runs/PRESET."""
    script = [Path(plan.script).stem] if plan.script else []
    if plan.preset.folder:
        return "-".join([f"runs/{plan.name}", *script])
    number = [f"set{value(plan.settings, '--set', '0')}"] if "--pile" in plan.settings else []
    method = script or [value(plan.settings, "--method", "icu")]
    return "-".join([f"runs/{plan.name}", *number, *method, plan.protocol])


def several(plan):
    """The runs of an experiment for every set and seed, then one report."""
    folder = Path(plan.out or f"runs/{plan.command}/{plan.name}-{plan.protocol}")
    make(plan)
    judge(plan, [])
    train(plan, {}, check=True)
    for flags in plan.runs.values():  # a wrong name or a broken file stops before the first run
        if "--script" in flags or value(flags, "--method", "icu") not in METHODS:
            train(plan, flags, check=True)
    files = {number: folder / f"set{number}.pairs.jsonl" for number in plan.sets}
    for number, pairs in files.items():
        mine(plan, pairs, {"--set": [number]} if "--pile" in plan.settings else {})
    runs, never_saw, twin = [], [], {}
    for number, pairs in files.items():
        out = folder / f"never-saw-set{number}"
        twin = measure_never_saw(plan, pairs, out, anew=plan.overwrite)
        never_saw += twin.get("--never-saw", [])
        for seed, (name, flags) in itertools.product(plan.seeds, plan.runs.items()):
            out = folder / f"{name}-set{number}-seed{seed}"
            flags = {"--pairs": [pairs], "--seed": [seed], **twin, **flags, "--out": [out]}
            print(f"== {out}", flush=True)
            # Exit code 1: the run diverged, which is a result, too.
            train(plan, flags | kept_or_new(out, plan.overwrite), ok=(0, 1))
            runs.append(out)
    judge(plan, [*runs, *never_saw])
    audit(plan, runs, twin)
    report(plan, [*runs, *never_saw], folder)


def make(plan):
    """The preset's own model and data, if it has them."""
    if script := plan.preset.make:
        if plan.dry_run and (folder := unmade(plan.preset)):
            print(f"note: {folder} is still to be made: what needs it is named, not checked")
        step(plan, script, settings_for(plan, script) | {"--out": [plan.preset.folder]})


def unmade(preset):
    """The folder of a preset's own models if still to be made."""
    made = all(Path(preset.folder, name).is_dir() for name in ("model", "never-saw"))
    return "" if made else preset.folder


def mine(plan, pairs, number=None):
    """A neighbour for each text to forget."""
    flags = settings_for(plan, "knn.py") | (number or {}) | {"--out": [pairs], "--overwrite": []}
    step(plan, "knn.py", flags | ({"--dry-run": []} if plan.dry_run else {}))


def train(plan, run_flags, *, check=False, ok=(0,)):
    """icu.py, or a script in its place, with what this run sets."""
    script = value(run_flags, "--script", plan.script or "icu.py")
    flags = settings_for(plan, "icu.py") | run_flags | {"--script": None}
    if value(flags, "--method", "icu") != "icu" and "--alpha" not in plan.typed | run_flags:
        flags["--alpha"] = None  # the preset's is ICU's
    flags |= {"--dry-run": []} if check else {}
    step(plan, script, flags, launched=True, quiet=check and not plan.dry_run, ok=ok)


def measure_never_saw(plan, pairs, out, *, anew):
    """{"--never-saw": [run]}, or {} without such a model of these texts."""
    others = "--model --after --eval-only --forget --pool --pile --never-saw".split()
    if not plan.preset.folder or plan.typed.keys() & others:
        return {}
    flags = {"--pairs": [pairs], "--out": [out], "--model": [f"{plan.preset.folder}/never-saw"]}
    flags |= {"--thresholds": ["paper"], "--eval-only": []}
    train(plan, flags | kept_or_new(out, anew))
    return {"--never-saw": [out]}


def run_beside(plan, pairs, out, twin, *, anew):
    """[the run of the preset's second method], or [] if the user chose one."""
    chosen = "--method --lr --alpha --beta --forget-weight --batch-size --model --after --eval-only"
    if not plan.preset.beside or plan.script or plan.typed.keys() & chosen.split():
        return []
    method = flags_in(plan.preset.beside)
    beside = f"{out}-{Path(method['--script'][0]).stem}"
    method = {flag: values for flag, values in method.items() if flag not in plan.typed}
    flags = {"--pairs": [pairs], "--out": [beside], **twin, **kept_or_new(beside, anew)}
    train(plan, method | flags)
    return [beside]


def kept_or_new(out, anew):
    """--resume if a run is there, which keeps a finished one, else --overwrite."""
    return {"--overwrite" if anew or not Path(out, "config.json").is_file() else "--resume": []}


def measure_tasks(plan, out, changes):
    """What a model can still do (--tasks)."""
    if "--tasks" not in plan.typed:
        return
    flags = settings_for(plan, "evals/tasks.py")
    if "--data" in plan.typed:
        flags = {"--task-data": plan.typed["--data"]} | flags
    if "--after" in plan.typed:
        flags["--model"] = [Path(value(plan.typed, "--after"), "model")]
    flags |= changes | {"--out": [out], "--overwrite": []}
    step(plan, "evals/tasks.py", flags, launched=True)


def judge(plan, runs):
    """A model grades the texts (--judge). No runs: whether it may be asked."""
    if "--judge" in plan.typed:
        check = {} if runs else {"--dry-run": []}
        step(plan, "evals/judge.py", settings_for(plan, "evals/judge.py") | check, runs)


def audit(plan, runs, twin):
    """What is still in the models of the runs (--audit)."""
    flags, folder = {"--overwrite": []}, plan.preset.folder
    if twin:
        flags |= {"--never-saw": [f"{folder}/never-saw"], "--unseen": [f"{folder}/unseen.jsonl"]}
    if "--lr" in plan.settings:
        flags["--relearn-lr"] = plan.settings["--lr"]  # the same for every method
    flags |= settings_for(plan, "evals/audit.py") | {"--model": None}
    for run in runs if plan.audit else ():
        step(plan, "evals/audit.py", flags, [run], launched=True)


def report(plan, runs, out):
    """Tables and plots."""
    flags = settings_for(plan, "evals/report.py")
    if runs != [out]:
        flags["--out"] = [out]
    step(plan, "evals/report.py", flags, runs)


# --- one program of it ---


def step(plan, script, flags, runs=(), *, launched=False, quiet=False, ok=(0,)):
    """Runs a program on run folders; an exit code that is not in `ok` ends the experiment.

    A flag of None is left out. A dry run runs what has --dry-run and names the rest. launched: by
    several processes if they are wanted.
    """
    given = [[flag, *values] for flag, values in flags.items() if values is not None]
    words = [str(word) for group in [runs, *given] for word in group]
    changes, environment, start = "--dry-run" not in flags, {}, [PYTHON]
    processes = plan.gpus or (visible_gpus() if plan.preset.large else 1) or 1
    deepspeed = "--offload" in plan.settings or value(plan.settings, "--zero") == "3"
    if launched and changes and (processes > 1 or deepspeed):
        environment, start = launcher(processes)
    environment |= path_to_icu(script)
    argv = [*start, script, *words]
    line, folder = shown(argv, environment), unmade(plan.preset)
    if plan.dry_run and (changes or (folder and folder in line)):
        print("would run:", line, flush=True)
    elif (status := run(argv, environment, quiet=quiet)) not in ok:
        raise SystemExit(status)


def launcher(processes):
    """(environment, first words) of a program in several processes."""
    runner = f"-m deepspeed.launcher.runner --quiet --no_local_rank --num_gpus {processes}"
    environment = {} if visible_gpus() else {"DS_ACCELERATOR": "cpu"}
    return environment, [PYTHON, *runner.split(), "--master_port", free_port()]


def free_port():
    """The digits of a port at which processes may meet."""
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


@functools.cache
def visible_gpus():
    """How many GPUs there are; this process never imports torch."""
    count = [PYTHON, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(count, stdout=subprocess.PIPE, text=True).stdout or 0)


def path_to_icu(script):
    if Path(script).resolve().parent == ROOT:
        return {}
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [folder for folder in before if folder not in ("", ".", str(ROOT))]
    return {"PYTHONPATH": os.pathsep.join([".", *others])}


def shown(argv, environment):
    names = [f"{name}={shlex.quote(text)}" for name, text in environment.items()]
    return " ".join([*names, shlex.join(argv)])


def run(argv, environment=None, quiet=False):
    """Prints and runs one command; returns its exit code, 128 + n if signal n ended it.

    SIGTERM and Ctrl-C go to its group of processes and end the experiment.
    """
    environment = environment or {}
    print("$", shown(argv, environment), flush=True)
    child = subprocess.Popen(
        argv,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,  # a group in the background may not read from the terminal
        stdout=subprocess.DEVNULL if quiet else None,
        process_group=0,
    )
    signals = []

    def forward(number, frame):
        signals.append(number)
        send(child.pid, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    status = child.wait()
    send(child.pid, signal.SIGKILL)  # whatever its first process has left
    for number, handler in before.items():
        signal.signal(number, handler)
    if signals:
        raise SystemExit(128 + signals[-1])
    return status if status >= 0 else 128 - status


def send(group, number):
    """A signal to every process of a group, if any is left."""
    with suppress(OSError):
        os.killpg(group, number)


# --- the command line ---


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    os.chdir(ROOT)
    if words[:1] == ["help"] or {"-h", "--help"} & set(words):
        return make_parser(words[0] if words[0] in EXPERIMENTS else None).print_help()
    only_check = words[:1] == ["--check"]  # of run.sh, before there is an environment
    plan = read_plan(words[only_check:])
    if only_check:
        return
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{sys.executable} has no torch: bash run.sh makes the environment")
    (several if plan.command else single)(plan)


if __name__ == "__main__":
    run_cli(main)
