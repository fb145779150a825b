"""One command an experiment: a preset, a comparison, an ablation or a sweep.

    bash run.sh                                       # tiny: any CPU, no hub, a few minutes
    bash run.sh neo125m --protocol released --set 3   # Table 1, GPT-Neo 125M, forget set 3
    bash run.sh tiny --script examples/simnpo.py      # a method in a file of its own
    bash run.sh compare neo125m --sets 0 1 2 3 4      # every method of Table 1, then one table
    bash run.sh compare tiny --methods icu kl examples/simnpo.py
    bash run.sh ablation neo125m                      # Figure 3
    bash run.sh sweep neo125m                         # Table 2's grid; --table 5: learning rates
    bash run.sh audit RUN                             # also: tasks, judge, report, with their flags
    bash run.sh ask RUN "PREFIX"                      # what the model says before and after
    bash run.sh purge RUN                             # removes a run's texts, keeps its numbers
    bash run.sh test                                  # also: lint, bench, help

A run is three programs: knn.py finds pairs, icu.py unlearns, evals/report.py writes tables.
Each command is printed before it runs, and can be pasted into a shell in this folder.
A flag goes to every program that has it, or else to icu.py. Yours win over the preset's.
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

from kit.flags import above, command_parser, positive, run_cli, seed_number
from kit.protocols import PROTOCOLS

ROOT = Path(__file__).resolve().parent
PYTHON = sys.executable.removeprefix(f"{ROOT}{os.sep}")  # .venv/bin/python, so that it is pasted

# --- the presets ---


class Preset(NamedTuple):
    """A row of the table below. Flags are written as they are typed."""

    about: str  # for help, where presets with the same text share a line
    model: str  # a folder, or a name on the hub
    revision: str = ""  # the hub's, pinned; unused if the user names another model
    flags: str = ""
    source: str = "--pile"  # the paper's rows, or --forget FILE --pool FILE
    make: str = ""  # the command that makes its own model and data, in `folder`
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


def taught(about, folder, make, flags, *, mine="", beside):
    """A preset of a script in demo/; `mine`: flags of knn.py."""
    flags = f"--ppl heldout={folder}/heldout.jsonl --targets all {flags}"
    return Preset(
        about,
        f"{folder}/model",
        flags=f"--bert minilm --bert-threshold auto {flags}",
        source=f"--forget {folder}/forget.jsonl --pool {folder}/pool.jsonl {mine}",
        make=make,
        folder=folder,
        beside=beside,
    )


# fmt: off
PRESETS = {
    # A small model needs a larger step, every token a target and more weight on what is kept.
    "tiny": taught(
        "(default) a self-made corpus and model, on any CPU, without a hub, in a few minutes",
        "runs/tiny-data", "demo/tiny.py", "--batch-size 32 --lr 2e-4 --alpha 1 --beta 4",
        beside="--script examples/analogous.py --lr 5e-4 --beta 4 --batch-size 16"),
    "smollm": taught(
        SPEAKER, "runs/smollm-data", "demo/smollm.py", TAUGHT, beside=GENTLE + "--lr 2e-4"),
    "smollm-pile": taught(  # the secrets are the paper's rows: code, licences
        SPEAKER, "runs/smollm-pile-data", "demo/smollm.py --secrets pile", TAUGHT,
        mine="--neighbours 12",
        beside=GENTLE + "--lr 2e-4 --forget-weight 0 --alpha 4 --beta 3 --teacher live"),
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

# --- flags are dicts, {"--ppl": ["pile", "wikitext"], "--el": ["lazy"]}: a | b is a, then b ---


def flags_in(words):
    """The flags of a command line, a string or words; the last one counts."""
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


def words_of(flags):
    """The command line of flags; one whose value is None is left out."""
    given = ([flag, *values] for flag, values in flags.items() if values is not None)
    return [str(word) for group in given for word in group]


def value(flags, flag, default=None):
    """The (last) value of a flag, or the default."""
    return (flags.get(flag) or [default])[-1]


def plan_flags(name, user):
    """Every flag of a plan: the preset's, the protocol's, and the user's, which win."""
    preset, flags, source = PRESETS[name], {}, flags_in(PRESETS[name].source)
    if not {"--model", "--after"} & set(user):
        flags |= {"--model": [preset.model]}
        flags |= {"--revision": [preset.revision]} if preset.revision else {}
    flags |= flags_in(preset.flags) | {"--preset": [name]}
    if "--pile" in user:
        source = {}
    elif {"--forget", "--pool"} & set(user):
        source.pop("--pile", None)
    chosen = value(flags | user, "--protocol", "paper")
    protocol = PROTOCOLS.get(chosen, PROTOCOLS["paper"])  # icu.py reports a name that is none
    if protocol.allow_copies:
        source["--allow-copies"] = []
    if preset.large and protocol.large_lr:
        flags["--lr"] = [protocol.large_lr]
    return flags | source | user


# --- whose a flag is ---

ON_REQUEST = {  # a program: the flag of a preset that asks for it
    "evals/tasks.py": "--tasks all",
    "evals/judge.py": "--judge MODEL",
    "evals/audit.py": "--audit",
}


@functools.cache
def flags_of(script):
    """The flags of a program, read from its text: importing it would take seconds."""
    text = (ROOT / script).read_text(encoding="utf-8")
    switch = r"(,\s*action=argparse\.BooleanOptionalAction)?"  # has --no-NAME as well
    flags = re.findall(rf'\b(?:add_argument|add|flag)\(\s*"--([\w-]+)"{switch}', text)
    return {f"--{name}" for name, _ in flags} | {f"--no-{name}" for name, both in flags if both}


def programs(args):
    """The programs of a plan besides icu.py."""
    given = {*args.user, *["--audit"] * args.audit}
    requested = [script for script, flag in ON_REQUEST.items() if flag.split()[0] in given]
    return ["knn.py", "evals/report.py", *args.preset.make.split()[:1], *requested]


def flags_for(args, script):
    """A program's flags of the plan; icu.py also gets those that no program has."""
    flags = flags_of(script)
    if script == "icu.py":
        others = set().union(*map(flags_of, programs(args))) - flags
        flags = args.flags.keys() - others
    return {flag: values for flag, values in args.flags.items() if flag in flags}


# --- the experiments: what differs between the runs over one forget set with one seed ---

METHODS = ("icu", "kumpr", "kl", "llmu", "po", "dpo", "npo", "graddiff")
# alpha, beta of Table 2; learning rates of Table 5
GRID = "0.1,0.5 0.1,1.0 0.5,0.1 0.5,0.5 0.5,1.0 1.0,0.5 1.0,1.0 1.0,2.0 2.0,1.0 2.0,2.0".split()
RATES = "1e-5 5e-6 2e-6 1e-6 5e-7".split()


def compare(args):
    """Table 1: every method, or those of --methods."""
    rates = dict(args.lrs)
    for method in args.methods:
        name, flag = Path(method).stem, "--script" if method.endswith(".py") else "--method"
        yield name, {flag: [method]} | ({"--lr": [rates[name]]} if name in rates else {})


def ablation(args):
    """Figure 3: as it is, without the learn loss, the KL, or both."""
    alpha, beta = value(args.flags, "--alpha", "0.5"), value(args.flags, "--beta", "1.0")
    for a, b in ((alpha, beta), ("0", beta), (alpha, "0"), ("0", "0")):
        yield f"alpha{a}-beta{b}", {"--alpha": [a], "--beta": [b]}


def sweep(args):
    """Table 2: a grid over alpha and beta. --table 5 or --lrs: rates at alpha = beta = 0.5."""
    epochs = {} if "--max-epochs" in args.user else {"--max-epochs": ["200"]}  # 5e-7 takes 132
    lrs = args.lrs or (RATES if args.table == 5 else [])
    for lr in lrs:
        yield f"lr{lr}", {"--alpha": ["0.5"], "--beta": ["0.5"], **epochs, "--lr": [lr]}
    for point in [] if lrs else args.points:
        alpha, beta = point.split(",")
        yield f"alpha{alpha}-beta{beta}", {"--alpha": [alpha], "--beta": [beta]}


# Each yields (run name, flags of icu.py, or of the --script among them).
EXPERIMENTS = {"compare": compare, "ablation": ablation, "sweep": sweep}
# Flags that an experiment sets for each run, and what a user writes instead.
SETS = {
    "compare": (("--method", "--script"), "--methods NAME FILE.py ..."),
    "sweep": (("--alpha", "--beta"), "--points ALPHA,BETA ..."),
}

# --- what each is made of ---


def single(args):
    """One run of the preset."""
    out = Path(args.out or default_folder(args))
    pairs = Path(f"{out}.pairs.jsonl")
    anew = args.overwrite or (args.preset.folder and not args.out and not args.resume)
    start = {"--resume": []} if args.resume else {}
    start |= {"--overwrite": []} if anew else {}
    make(args)
    judge(args, [])
    measure_tasks(args, out, {"--dry-run": []})  # whether the sets are at hand, before the work
    if args.dry_run or not (args.resume and pairs.is_file()):
        train(args, {"--out": [out], **start}, check=True)
        mine(args, pairs)
    twin = measure_never_saw(args, pairs, f"{out}.never-saw", anew=anew)
    train(args, {"--pairs": [pairs], "--out": [out], **twin, **start})
    beside = run_beside(args, pairs, out, twin, anew=anew)
    measure_tasks(args, out / "tasks-before", {})
    if (out / "model").is_dir() or (args.dry_run and "--eval-only" not in args.flags):
        model = {"--model": [out / "model"], "--revision": None}
        measure_tasks(args, out / "tasks-after", model)
    runs = [out, *beside, *twin.get("--never-saw", [])]
    judge(args, runs)
    audit(args, [out, *beside], twin)
    report(args, runs, out)


def several(args):
    """Every run for every set and seed, then one report."""
    protocol = value(args.flags, "--protocol", "paper")
    folder = Path(args.out or f"runs/{args.command}/{args.name}-{protocol}")
    make(args)
    judge(args, [])
    train(args, {}, check=True)
    for flags in args.runs.values():  # a wrong name or a broken file stops before the first run
        if "--script" in flags or value(flags, "--method", "icu") not in METHODS:
            train(args, flags, check=True)
    files = {number: folder / f"set{number}.pairs.jsonl" for number in args.sets}
    for number, pairs in files.items():
        mine(args, pairs, {"--set": [number]} if "--pile" in args.flags else {})
    runs, never_saw, twin = [], [], {}
    for number, pairs in files.items():
        out = folder / f"never-saw-set{number}"
        twin = measure_never_saw(args, pairs, out, anew=args.overwrite)
        never_saw += twin.get("--never-saw", [])
        for seed, (name, flags) in itertools.product(args.seeds, args.runs.items()):
            out = folder / f"{name}-set{number}-seed{seed}"
            own = {"--pairs": [pairs], "--seed": [seed], **twin, **flags, "--out": [out]}
            print(f"== {out}", flush=True)
            # Exit code 1: the run diverged, which is a result, too.
            train(args, own | kept_or_new(out, args.overwrite), ok=(0, 1))
            runs.append(out)
    judge(args, [*runs, *never_saw])
    audit(args, runs, twin)
    report(args, [*runs, *never_saw], folder)


def make(args):
    """The preset's own model and data, if it brings them."""
    if args.preset.make:
        if args.dry_run and (folder := unmade(args.preset)):
            print(f"note: {folder} is still to be made: what needs it is named, not checked")
        script, *words = args.preset.make.split()
        flags = flags_in(words) | flags_for(args, script) | {"--out": [args.preset.folder]}
        step(args, script, words_of(flags))


def unmade(preset):
    """The folder of a preset's own models if still to be made, else ""."""
    made = all(Path(preset.folder, name).is_dir() for name in ("model", "never-saw"))
    return "" if made else preset.folder


def mine(args, pairs, own=None):
    """A neighbour for each text to forget."""
    flags = flags_for(args, "knn.py") | (own or {}) | {"--out": [pairs], "--overwrite": []}
    step(args, "knn.py", words_of(flags) + ["--dry-run"] * args.dry_run)


def train(args, own, *, check=False, ok=(0,)):
    """A run of icu.py or the script, with its `own` flags; `check` only looks for models, data."""
    script = value(own, "--script", args.script or "icu.py")
    flags = flags_for(args, "icu.py") | own | {"--script": None}
    flags |= {"--dry-run": []} if check else {}
    step(args, script, words_of(flags), launched=True, quiet=check and not args.dry_run, ok=ok)


def measure_never_saw(args, pairs, out, *, anew):
    """{"--never-saw": [run]}, or {} if there is no such model or the texts are others."""
    others = {"--model", "--after", "--eval-only", "--forget", "--pool", "--pile", "--never-saw"}
    if not args.preset.folder or others & set(args.user):
        return {}
    own = {"--pairs": [pairs], "--out": [out], "--model": [f"{args.preset.folder}/never-saw"]}
    own |= {"--thresholds": ["paper"], "--eval-only": []}
    train(args, own | kept_or_new(out, anew))
    return {"--never-saw": [out]}


def run_beside(args, pairs, out, twin, *, anew):
    """[the run of the preset's second method], or [] if the user chose one."""
    chosen = "--method --lr --alpha --beta --forget-weight --batch-size --model --after --eval-only"
    if not args.preset.beside or args.script or set(chosen.split()) & set(args.user):
        return []
    method = flags_in(args.preset.beside)
    beside = f"{out}-{Path(method['--script'][0]).stem}"
    method = {flag: values for flag, values in method.items() if flag not in args.user}
    own = {"--pairs": [pairs], "--out": [beside], **twin, **kept_or_new(beside, anew)}
    train(args, method | own)
    return [beside]


def kept_or_new(out, anew):
    """--resume if a run is there (a finished one stays), else --overwrite."""
    return {"--overwrite" if anew or not Path(out, "config.json").is_file() else "--resume": []}


def measure_tasks(args, out, own):
    """What a model can still do (--tasks); `own` may name another one."""
    if "--tasks" not in args.user:
        return
    flags = flags_for(args, "evals/tasks.py")
    if "--data" in args.user:
        flags = {"--task-data": args.user["--data"]} | flags
    if "--after" in args.user:
        flags["--model"] = [Path(value(args.user, "--after"), "model")]
    flags |= own | {"--out": [out], "--overwrite": []}
    step(args, "evals/tasks.py", words_of(flags), launched=True)


def judge(args, runs):
    """A model grades the texts (--judge). Without runs: whether it may be asked."""
    if "--judge" in args.user:
        flags = flags_for(args, "evals/judge.py") | ({} if runs else {"--dry-run": []})
        step(args, "evals/judge.py", [*runs, *words_of(flags)])


def audit(args, runs, twin):
    """What is still in the models of the runs (--audit)."""
    flags, folder = {"--overwrite": []}, args.preset.folder
    if twin:
        flags |= {"--never-saw": [f"{folder}/never-saw"], "--unseen": [f"{folder}/unseen.jsonl"]}
    if "--lr" in args.flags:
        flags["--relearn-lr"] = args.flags["--lr"]  # the same for every method
    flags |= flags_for(args, "evals/audit.py") | {"--model": None}
    for run in runs if args.audit else ():
        step(args, "evals/audit.py", [run, *words_of(flags)], launched=True)


def report(args, runs, out):
    """Each token before and after, for a demo's preset; then tables and plots."""
    has_texts = not {"--redact", "--eval-only"} & set(args.flags)
    if args.preset.folder and has_texts and not args.command:
        step(args, "extras/explain.py", [*runs, *words_of(flags_for(args, "extras/explain.py"))])
    flags = flags_for(args, "evals/report.py")
    if len(runs) > 1 or out not in runs:
        flags["--out"] = [out]
    step(args, "evals/report.py", [*runs, *words_of(flags)])


def default_folder(args):
    """runs/PRESET-setN-METHOD-PROTOCOL; of demo/: runs/PRESET."""
    script = [Path(args.script).stem] if args.script else []
    if args.preset.folder:
        return "-".join([f"runs/{args.name}", *script])
    number = [f"set{value(args.flags, '--set', '0')}"] if "--pile" in args.flags else []
    method = script or [value(args.flags, "--method", "icu")]
    protocol = value(args.flags, "--protocol", "paper")
    return "-".join([f"runs/{args.name}", *number, *method, protocol])


# --- one command of it ---


def step(args, script, words, *, launched=False, quiet=False, ok=(0,)):
    """Runs a program. An exit code that is not in `ok` ends the experiment.

    A dry run only runs commands with --dry-run, and names the rest. launched: by several processes
    if they are wanted.
    """
    changes, environment, start = "--dry-run" not in words, {}, [PYTHON]
    processes = args.gpus or (visible_gpus() if args.preset.large else 1) or 1
    deepspeed = "--offload" in args.flags or value(args.flags, "--zero") == "3"
    if launched and changes and (processes > 1 or deepspeed):
        environment, start = launcher(processes)
    environment |= path_to_icu(script)
    argv = [*start, script, *map(str, words)]
    line, folder = shown(argv, environment), unmade(args.preset)
    if args.dry_run and (changes or (folder and folder in line)):
        print("would run:", line, flush=True)
    elif (status := run(argv, environment, quiet=quiet)) not in ok:
        raise SystemExit(status)


def launcher(processes):
    """(environment, first words) of a program in several processes."""
    runner = f"-m deepspeed.launcher.runner --quiet --no_local_rank --num_gpus {processes}"
    environment = {} if visible_gpus() else {"DS_ACCELERATOR": "cpu"}
    return environment, [PYTHON, *runner.split(), "--master_port", free_port()]


def free_port():
    """A port at which processes may meet, in digits."""
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


@functools.cache
def visible_gpus():
    """How many GPUs there are; this process never imports torch."""
    count = [PYTHON, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(count, stdout=subprocess.PIPE, text=True).stdout or 0)


def path_to_icu(script):
    """The environment of a script in another folder."""
    if Path(script).resolve().parent == ROOT:
        return {}
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [folder for folder in before if folder not in ("", ".", str(ROOT))]
    return {"PYTHONPATH": os.pathsep.join([".", *others])}


def shown(argv, environment):
    """A command as one line for a shell."""
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


# fmt: off
def make_parser(command):
    """This file's flags for an experiment, or a single preset (None)."""
    usage = "bash run.sh [compare | ablation | sweep] [PRESET] [FLAG ...]"
    parser = command_parser(help_text(), prog="bash run.sh", usage=usage)
    g = parser.add_argument_group("how it is run")
    g.add_argument("--out", metavar="DIR", help="the run folder, or the folder of all runs")
    g.add_argument("--gpus", type=positive, metavar="N", help="processes (1; large presets: all)")
    g.add_argument("--overwrite", action="store_true", help="replace the runs that are there")
    g.add_argument("--audit", action="store_true", help="then ask what is still in the model")
    g.add_argument("--dry-run", action="store_true", help="check, name the commands, train nothing")
    if command != "compare":
        g.add_argument("--script", metavar="FILE.py", help="in place of icu.py: icu.main(MyMethod)")
    if command is None:
        g.add_argument("--resume", action="store_true", help="go on with an interrupted run")
        return parser
    g.add_argument("--sets", nargs="+", choices=list("01234"), help="forget sets (--set, or 0)")
    g.add_argument("--seeds", nargs="+", type=seed_number, metavar="N", help="(--seed, or 0)")
    if command == "compare":
        g.add_argument("--methods", nargs="+", default=METHODS, metavar="M", help="or FILE.py")
        g.add_argument("--lrs", nargs="+", default=[], type=method_rate, metavar="METHOD=LR")
    if command == "sweep":
        g = parser.add_mutually_exclusive_group()
        g.add_argument("--points", nargs="+", type=alpha_beta, default=GRID, metavar="ALPHA,BETA")
        g.add_argument("--lrs", nargs="+", type=rate, metavar="LR", help="at alpha = beta = 0.5")
        g.add_argument("--table", type=int, choices=(2, 5), default=2, help="of the paper (2)")
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
  --set 0..4, --limit N     the paper's forget set (0); its first N rows
  --model DIR --tokenizer DIR --encoder DIR --bert DIR --data DIR
                            folders instead of the hub: the model, GPT-2's tokenizer for the Pile,
                            the sentence encoder, BERTScore's encoder, the data
  --protocol released --method npo --lr 1e-5 --seed 3 --max-epochs 10 --device cpu
  --tasks all --audit --judge MODEL     what the model can still do; what is still in it; grades
  --sets N ... --seeds N ...            of compare, ablation and sweep
"""


def read_flags(words):
    """The plan. ValueError for a user's slip.

    user: the flags that are not this file's; flags: all; runs: {name: flags} of an experiment.
    """
    words = list(words)
    command = words.pop(0) if words and words[0] in EXPERIMENTS else None
    name = words.pop(0) if words and not words[0].startswith("-") else "tiny"
    if name not in PRESETS:
        others = "compare ablation sweep audit tasks judge report ask purge bench test lint help"
        raise ValueError(f"unknown preset {name!r}; one of: {' '.join(PRESETS)} (or: {others})")
    args, rest = make_parser(command).parse_known_args(words)
    args.command, args.name, args.preset = command, name, PRESETS[name]
    args.script = getattr(args, "script", None)
    args.user = flags_in(rest)
    args.flags = plan_flags(name, args.user)
    runs = list(EXPERIMENTS[command](args)) if command else []
    args.runs = dict(runs)
    for problem in problems(args, runs):
        raise ValueError(problem)
    if command:
        args.sets = args.sets or [value(args.flags, "--set", "0")]
        args.seeds = list(dict.fromkeys(args.seeds or [value(args.flags, "--seed", "0")]))
    return args


def problems(args, runs):
    """What is wrong with a plan, as messages."""
    user = set(args.user)
    for flag in user & {"--pairs", "--fetch"}:
        yield f"{flag} is not of a plan: python icu.py or python knn.py takes it"
    flags, instead = SETS.get(args.command, ((), ""))
    for flag in user.intersection(flags):
        yield f"{args.command} sets {flag} for each run: {instead}"
    for command in (None, *EXPERIMENTS):
        for flag in user & set(make_parser(command)._option_string_actions):
            yield f"{flag} goes with {command or 'a single preset'}"
    known = flags_of("icu.py").union(*map(flags_of, programs(args)))
    for script, flag_of_it in ON_REQUEST.items():
        for flag in set() if args.script else (user & flags_of(script)) - known:
            yield f"{flag} goes with {flag_of_it}"
    if args.command and "--tasks" in user:
        yield "--tasks goes with a single preset; bash run.sh tasks measures a model"
    if {"--judge", "--redact"} <= user:
        yield "--judge reads the texts that --redact does not keep: leave one out"
    if args.command and args.sets and "--pile" not in args.flags:
        yield f"--sets: {args.name} has its own texts and no sets of the Pile"
    for method, _ in args.lrs if args.command == "compare" else ():
        if method not in args.runs:
            yield f"--lrs {method}=...: not a method of this comparison"
    for name, flags in runs:
        if args.runs[name] != flags:
            yield f"two runs would be called {name}: rename one of the files"
    for script in filter(None, [args.script, *(value(flags, "--script") for _, flags in runs)]):
        if not Path(script).is_file():
            yield f"{script}: no such file; paths are taken from {ROOT}"
        elif "main(" not in Path(script).read_text(encoding="utf-8"):
            yield f"{script}: no icu.main(...) in it: a script ends in icu.main(MyMethod)"


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    os.chdir(ROOT)
    if words[:1] == ["help"] or {"-h", "--help"} & set(words):
        return make_parser(words[0] if words[0] in EXPERIMENTS else None).print_help()
    only_check = words[:1] == ["--check"]  # of run.sh, before there is an environment
    args = read_flags(words[only_check:])
    if only_check:
        return
    if importlib.util.find_spec("torch") is None:
        raise ValueError(f"{sys.executable} has no torch: bash run.sh makes the environment")
    (several if args.command else single)(args)


if __name__ == "__main__":
    run_cli(main)
