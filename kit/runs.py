"""The run folder: it is written by one process, resumed after a kill, and read when finished.

A state is the end of an epoch, complete when it has its progress.json. A run that was killed, at
any moment, repeats its epoch to the same bytes: each epoch draws from (seed, epoch). config.json
makes a folder a run's own; summary.json ends the run.
"""

import ast
import contextlib
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from kit import data, models, processes, requests
from kit.flags import first_line
from kit.processes import WORLD_SIZE, gather, is_main, print0, wait_for_all, whole_weights
from kit.protocols import PROTOCOLS

GROWING = "metrics.jsonl", "samples.jsonl", "timing.jsonl"  # an epoch adds lines to them
# What a run and the programs that evaluate it write into its folder: gone when it is begun again.
RUN_FILES = (
    "summary.json", "state", "best", "model", "model.part", "tasks-before", "tasks-after",
    "table.md", "table.csv", "cases.md", "explain.html", "curves.png", "tradeoff.png",
    "relearned.png", "tasks.md", "judge.json", "judge.jsonl", "people.json", "sheet.html",
    "sheet-key.json", "audit.json", "audit.md", "audit.png", "tofu.json", "speech.json",
    "certificate.json", "certificate.json.sig", "certificate.html", "certificate.key",
    "hashes.json", *GROWING,
)  # fmt: skip


# --- states ---


class Progress:
    """Where a run is."""

    def __init__(self):
        self.epoch = 0  # the next one; 0 is the measuring before any training
        self.forgotten = set()  # indices of samples left out of training (Eq. 5)
        self.skipped_steps = 0  # their loss or gradient was not finite
        self.stopped = None  # why, once it has
        self.best = None  # [over the thresholds, perplexity, epoch] of --keep-best
        self.files = {}  # bytes of each GROWING file at the end of the last epoch


def states(out):
    """The complete states, newest first."""
    return sorted((path.parent for path in out.glob("state/*/progress.json")), reverse=True)


def save_state(out, engine, progress, method):
    """All processes write the state of the epoch that ended. Two are kept."""
    folder = out / "state" / f"epoch{progress.epoch - 1:05d}"
    if is_main:
        folder.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    engine.save(folder)
    tensors = {
        name: tensor.detach().cpu().clone().contiguous() for name, tensor in method.state().items()
    }
    if is_main and tensors:
        save_file(tensors, folder / "method.safetensors")
    wait_for_all()
    if is_main:
        for path in filter(Path.is_file, folder.rglob("*")):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        now = vars(progress) | {"forgotten": sorted(progress.forgotten)}
        data.write_json(folder / "progress.json", now)
        kept, old = states(out)[:2], states(out)[2:]
        bests = [data.read_json(state / "progress.json").get("best") for state in kept]
        old += set(out.glob("best/*")) - {best_folder(out, best) for best in bests}
        for folder in old:
            shutil.rmtree(folder)
    wait_for_all()


def best_folder(out, best):
    """Where the weights of the best epoch are (Progress.best)."""
    return best and out / "best" / f"epoch{best[-1]:05d}"


def load_state(out, engine, method):
    """The Progress of the newest state, loaded into engine and method; no file is a pickle."""
    folder, progress = states(out)[0], Progress()
    way_out = "remove it to go on from the state before it, or begin again with --overwrite"
    with data.reading(f"{folder}: cannot be loaded; {way_out}"):
        vars(progress).update(data.read_json(folder / "progress.json"))
        progress.forgotten = set(progress.forgotten)
        engine.load(folder)
        if (tensors := folder / "method.safetensors").is_file():
            method.load_state(load_file(tensors, device=str(engine.model.device)))
    return progress


# --- the folder ---


def check_run_folder(args):
    """ValueError unless --out is new, empty or a run's own, and holds nothing that is read."""
    if not args.out:
        return
    out = Path(args.out)
    files = set(out.iterdir()) if out.exists() else set()
    config = data.read_json(out / "config.json") if out / "config.json" in files else None
    begun = {out / ".lock", out / "method", *half_written(out)}  # of a run killed at its start
    own = "thresholds_used" in config if config else files <= begun
    if not own or any(map(Path.is_symlink, files)):
        raise ValueError(f"--out {out}: holds files that are no run, or a link: choose another")
    if config and not (args.overwrite or args.resume):
        raise ValueError(f"--out {out}: holds a run; pass --overwrite, or --resume to go on")
    reads = [getattr(args, name) for name in ("model", "pairs", "bert", "unseen", "never_saw")]
    reads += [item.partition("=")[2] for item in args.ppl]
    reads += [folder for folder, _ in requests.chain_of(args.after)]
    for path in filter(None, reads):
        if Path(path).exists() and Path(path).resolve().is_relative_to(out.resolve()):
            raise ValueError(f"--out {out}: {path}, which is read, lies in it; choose another")


@contextlib.contextmanager
def only_owner(out):
    """No other process writes the run folder meanwhile."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(out / ".lock", blocking=False):  # however the process ends, it goes
            (out / ".lock").write_text(str(os.getpid()))
            for file in half_written(out):
                file.unlink()
            yield
    except filelock.Timeout:
        pid = (out / ".lock").read_text().strip()
        raise ValueError(f"--out {out}: process {pid} is writing this run") from None


def half_written(out):
    """What a killed process left of a JSON file that it was writing."""
    return list(out.glob("*.json.*.tmp"))


def start_run_folder(out, config):
    """The folder of a new run; config.json comes last."""
    out.mkdir(parents=True, exist_ok=True)
    for path in [*out.glob("state/*/progress.json"), *(out / name for name in RUN_FILES)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    data.write_json(out / "config.json", config)


def append(path, rows):
    """Adds rows to a JSON lines file, down to the disk."""
    with open(path, "ab") as file:
        file.writelines(map(data.json_bytes, rows))
        file.flush()
        os.fsync(file.fileno())


# --- config.json ---

# Flags that do not change a run.
NOT_SETTINGS = ("debug", "dry_run", "overwrite", "resume", "timeout", "save_every", "track")
# Nothing to a run that only measures.
TRAINING = (
    "forget_weight", "alpha", "beta", "lr", "batch_size", "micro_batch", "checkpointing",
    "min_epochs", "max_epochs", "keep_best", "el",
)  # fmt: skip
# Compared by what lies there (sha256): the same files at another place are the same run.
PLACES = (
    "out", "data", "model", "pairs", "bert", "unseen", "ppl", "never_saw", "after", "original",
    "cache",
)  # fmt: skip


def describe_run(args, method, thresholds):
    """The content of config.json."""
    command = ["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"]
    git = shutil.which("git") and subprocess.run(command, capture_output=True, text=True).stdout
    files = {name: getattr(args, name) for name in ("pairs", "model", "bert", "unseen")}
    files["never_saw"] = args.never_saw and Path(args.never_saw) / "summary.json"
    for item in args.ppl:
        files[f"ppl {item.partition('=')[0]}"] = data.perplexity_file(item, args.data)
    sha256 = {name: file and models.fingerprint(file) for name, file in files.items()}
    return {
        **{name: value for name, value in vars(args).items() if name not in NOT_SETTINGS},
        "device": torch.device(args.device).type,  # cuda:0 and cuda:1 are processes of one run
        # Tells edited methods apart in evals/report.py's table.
        "method_file": f"{method.file.name} {method.sha256()[:6]}",
        "processes": WORLD_SIZE,
        "cache": str(data.cache_folder("").absolute()),  # for kit/purge.py
        "thresholds_used": thresholds,
        "versions": versions(),
        "git": (git or "").strip() or None,
        "sha256": sha256 | {"method": method.sha256()},
    }


def code_sha256(*files):
    """sha256 of these files of Python and of those beside each that it imports."""
    pending, digests = [Path(file).resolve() for file in files], {}
    while pending:
        file = pending.pop()
        if file in digests or not file.is_file():
            continue
        digests[file] = data.sha256_of(file)
        for node in ast.walk(ast.parse(file.read_bytes())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and (node.module or "kit").split(".")[0] != "kit":
                names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            pending += [file.parent / f"{name.replace('.', '/')}.py" for name in names]
    ordered = sorted(digests, key=lambda file: file.name)
    return hashlib.sha256("".join(map(digests.get, ordered)).encode()).hexdigest()


def versions():
    names = ("torch", "transformers", "tokenizers", "numpy", "bert-score", "sacrebleu")
    installed = {name: importlib.metadata.version(name) for name in names}
    return {"python": platform.python_version(), **installed}


def check_resume(args, method):
    """The config.json of the run to go on with; ValueError for other settings or data."""
    with data.reading(f"{args.out} holds no run: begin it without --resume"):
        before = data.read_json(Path(args.out) / "config.json")
    now = json.loads(json.dumps(describe_run(args, method, before["thresholds_used"])))
    free = {"versions", "git", "method_file", *PLACES, *(TRAINING if args.eval_only else ())}
    free -= {name for name, digest in now["sha256"].items() if digest is None}  # names on the hub
    old, new = flat(before), flat(now)
    differ = [name for name in old | new if name not in free and old.get(name) != new.get(name)]
    changes = [f"{name} was {old.get(name)}, is {new.get(name)}" for name in differ]
    if changes:
        other = f"was made with other settings or data: {'; '.join(changes)}"
        raise ValueError(f"the run in {args.out} {other}; pass --overwrite or another --out")
    return before


def flat(config):
    """config.json with each digest under a name of its own."""
    digests = {f"sha256 of {name}": x and x[:12] for name, x in config["sha256"].items()}
    return {name: value for name, value in config.items() if name != "sha256"} | digests


# --- a run in progress ---


class Run:
    """A run in progress, and its folder (none without --out).

    before: the config.json of the run to go on with, or None. thresholds: {"el10", "ma",
    "bertscore", "bleu"}, once known; metrics: the rows so far; samples: those of the last epoch.
    """

    def __init__(self, args, method, before=None):
        self.args, self.method, self.engine, self.tracker = args, method, None, None
        self.out = Path(args.out) if args.out else None
        self.resumed, self.thresholds = bool(before), before and before["thresholds_used"]
        self.progress, self.metrics, self.samples = Progress(), [], []
        self.bar = tqdm(
            total=args.max_epochs,
            disable=None if is_main else True,
            leave=False,
            delay=1e-9,
            bar_format="{percentage:3.0f}%|{bar}| epoch {n:.1f} of at most {total_fmt}{postfix}",
        )

    @property
    def method_folder(self):
        """Where a method keeps what is costly to make, until the run ends."""
        return self.out and self.out / "method"

    def start(self, engine):
        """Loads the newest state, or begins a new folder; returns its Progress."""
        self.engine = engine
        print0(HEADER)
        if self.out and self.resumed:
            self.pick_up()
        elif self.out and is_main:
            start_run_folder(self.out, describe_run(self.args, self.method, self.thresholds))
        wait_for_all()
        self.tracker = tracker(self.args, self.out) if is_main else None
        for row in self.metrics:
            self.track(row)
        self.bar.n = self.bar.initial = max(self.progress.epoch - 1, 0)
        self.seed()
        return self.progress

    def pick_up(self):
        """Goes on from the newest state, or from the beginning."""
        saved = states(self.out)
        if saved:
            self.progress = load_state(self.out, self.engine, self.method)
        wait_for_all()
        if is_main:
            for path in filter(Path.exists, map(self.out.joinpath, GROWING)):
                os.truncate(path, self.progress.files.get(path.name, 0))  # an epoch without an end
            for half in set(self.out.glob("state/*")) - set(saved):
                shutil.rmtree(half)
        wait_for_all()
        if saved:
            self.metrics = data.read_jsonl(self.out / "metrics.jsonl")
            rows, last = data.read_jsonl(self.out / "samples.jsonl"), self.metrics[-1]["epoch"]
            self.samples = [row for row in rows if row["epoch"] == last]
        for row in self.metrics:
            print0(epoch_text(row))
        print0(f"resumed from {saved[0].name if saved else 'the beginning'}")

    def seed(self):
        processes.seed_everything((self.args.seed + self.progress.epoch) % 2**32)

    def show_step(self, loss, n_active, of_epoch):
        self.bar.set_postfix_str(f"loss {loss:.3f}, {n_active} to forget", refresh=False)
        self.bar.update(of_epoch)

    def write_epoch(
        self, means, measured, *, forgotten, stopped, watched, losses, perplexities, seconds
    ):
        """Writes an epoch down, prints its line and saves a state.

        measured: the measures of each sample, means: theirs; watched: indices of earlier texts;
        losses, perplexities: {name: mean}; seconds: what measuring took.
        """
        args, progress, epoch = self.args, self.progress, self.progress.epoch
        names = dict.fromkeys([*LOSSES, *losses])
        row = {"epoch": epoch, **means, "active": len(measured) - len(forgotten)}
        row |= {"forgotten": len(forgotten)}
        row |= {name: number(losses[name]) if name in losses else None for name in names}
        row |= {"skipped_steps": progress.skipped_steps, **perplexities}
        self.metrics.append(row)
        self.track(row)
        hidden = {"generation": None} if args.redact else {}
        marks = [{"watched": True} if i in watched else {} for i in range(len(measured))]
        self.samples = [
            {"epoch": epoch, **values, **hidden, **marks[i], "forgotten": i in forgotten}
            for i, values in enumerate(measured)
        ]
        progress.forgotten, progress.stopped, progress.epoch = forgotten, stopped, epoch + 1
        if self.out and is_main:
            timing = {"epoch": epoch, "measure_s": round(seconds, 3)}
            for name, rows in zip(GROWING, ([row], self.samples, [timing]), strict=True):
                append(self.out / name, rows)
                progress.files[name] = (self.out / name).stat().st_size
        say_epoch(self.metrics)
        saves = stopped or epoch % args.save_every == 0
        if self.out and saves and not (args.eval_only or stopped == "diverged"):
            save_state(self.out, self.engine, progress, self.method)
        self.seed()

    def track(self, row):
        """--track: the numbers of an epoch."""
        if self.tracker:
            self.tracker.log(numbers_of(row), step=row["epoch"])

    def keep_if_best(self, model, tokenizer, means, perplexities):
        """--keep-best: keeps the weights if no earlier epoch is as good.

        Best is where EL10 and MA exceed their thresholds least, by the larger excess; among equals,
        such as all that the stop rule holds for, the lowest perplexity. means: of `stop_means`.
        """
        progress, thresholds = self.progress, self.thresholds
        if not self.args.keep_best or self.args.eval_only or means["ma"] is None:
            return
        over = [means[name] - thresholds[name] for name in means if means[name] is not None]
        logs = [math.log(1e300 if x is None else min(x, 1e300)) for x in perplexities.values()]
        score = [max(0.0, *over), sum(logs)]
        if progress.best is None or score < progress.best[:-1]:
            progress.best = [*score, progress.epoch]
            self.save_model(model, tokenizer, best_folder(self.out, progress.best))

    def save_model(self, model, tokenizer, folder):
        """All processes call it, the first one writes."""
        weights = whole_weights(model) if processes.lockstep else None
        if is_main:
            folder.parent.mkdir(exist_ok=True)
            models.save_model(model, tokenizer, folder, weights)

    def export(self, model, tokenizer):
        """Writes model/ and summary.json, whose content it returns; the states go.

        A run that diverged keeps its last good state instead of a model, and ends with exit 1.
        """
        out, diverged, summary = self.out, self.progress.stopped == "diverged", self.summary()
        if out and not (self.args.eval_only or diverged):
            best = best_folder(out, self.progress.best)
            if not best:
                self.save_model(model, tokenizer, out / "model")
            elif is_main and best.is_dir():  # else a kill followed this
                shutil.rmtree(out / "model", ignore_errors=True)
                best.rename(out / "model")
        if out and is_main:
            data.write_json(out / "summary.json", summary)
            if not diverged:
                remove_states(out)
        where = f"; the run is in {out}" if out else ""
        kept = (
            f"; the model is that of epoch {summary['epochs']}"
            if self.progress.best and not diverged
            else ""
        )
        last = self.metrics[-1]["epoch"]
        print0(f"stopped after epoch {last} ({summary['stopped']}){kept}{where}")
        if self.tracker:
            self.tracker.finish()
        if diverged:
            kept = f"; {states(out)[0]} is the last good state" if out and states(out) else ""
            print0(f"lower --lr{kept}")
        wait_for_all()  # the launcher ends all processes when the first one fails
        if out and diverged:
            sys.exit(1)
        return summary

    def summary(self):
        """The content of summary.json."""
        args, reason, rows = self.args, self.progress.stopped, self.metrics
        if len(rows) == 1 and not args.eval_only and reason != "diverged":
            reason += ", before any training"
        epochs_run = {}
        if self.progress.best and reason != "diverged":
            epochs_run = {"epochs_run": rows[-1]["epoch"]}
            rows = rows[: self.progress.best[-1] + 1]  # up to the epoch of model/
        names = [*MEASURES, *OF_SPANS]
        names += [name for name in rows[0] if name.startswith(("ppl_", "own_"))]
        measures = [name for name in rows[0] if name in names]
        return {
            "method": "none" if args.eval_only else args.method,
            "model": args.model,
            "protocol": args.protocol,
            "epochs": rows[-1]["epoch"],
            **epochs_run,
            "stopped": reason,
            "thresholds": self.thresholds,
            "collapsed": reason == "diverged" or "collapse" in alarms(rows),
            "before": {name: rows[0][name] for name in measures},
            "after": {name: rows[-1].get(name) for name in measures},
        }


def numbers_of(row):
    """What a tracker may have of a dict: no text."""
    return {name: x for name, x in row.items() if isinstance(x, int | float)}


# What wandb sends unasked: git, code, the command with its paths, the machine.
UNASKED = "disable_git disable_code x_disable_meta x_disable_machine_info x_disable_stats".split()
NUMBERS_ONLY = dict.fromkeys(UNASKED, True) | {"console": "off", "x_save_requirements": False}


def tracker(args, out):
    """The module of --track, begun, or None."""
    if not args.track:
        return None
    module = importlib.import_module(args.track)
    name = out.name if out else args.method
    own = {"settings": NUMBERS_ONLY} if args.track == "wandb" else {}
    module.init(project="icu", name=name, config=numbers_of(vars(args)), **own)
    return module


@contextlib.contextmanager
def running(args, method, before=None):
    """A Run. Too little memory or disk is a ValueError that says how to go on."""
    run = Run(args, method, before)
    out, go_on = run.out, "go on with the same command and --resume"
    with only_owner(out) if out and is_main else contextlib.nullcontext(), run.bar:
        if out and is_main and not before:
            shutil.rmtree(run.method_folder, ignore_errors=True)  # of a run with other settings
        wait_for_all()
        try:
            yield run
        except KeyboardInterrupt:
            print0(f"interrupted; {go_on}" if out else "interrupted")
            raise
        except (torch.OutOfMemoryError, OSError, SafetensorError) as error:
            saved = states(out) if out else []
            kept = f"{saved[0]} is complete" if saved else "no state is there yet"
            if isinstance(error, torch.OutOfMemoryError):
                go_on = "begin again with --micro-batch 1 --checkpointing"
            raise ValueError(f"the run stopped ({first_line(error)}); {kept}: {go_on}") from error


def is_finished(out):
    if not (Path(out) / "summary.json").is_file():
        return False
    if (Path(out) / "model").is_dir():
        remove_states(Path(out))  # killed while they were removed
    print0(f"{out}: finished already")
    return True


def remove_states(out):
    for name in ("state", "best", "method"):
        shutil.rmtree(out / name, ignore_errors=True)


# --- the measures before, kept in the cache ---


def remembered(args, method, inputs, compute):
    """compute(), or what it gave a run with the same model, texts, flags and code, in the cache.

    Not of a model of the hub without a pinned --revision, one in a notebook, and one that the
    method changes before training.
    """
    pinned = args.revision if re.fullmatch("[0-9a-f]{40}", args.revision or "") else None
    weights = models.fingerprint(args.model) or (pinned and [args.model, pinned])
    if not args.out or not weights or method.touches_weights:
        return compute()
    kit = Path(__file__).parent
    code = [inspect.getsourcefile(compute), kit.parent / "metrics.py", *kit.glob("*.py")]
    key = [
        [weights, models.fingerprint(args.bert) or args.bert, inputs.ppl_texts],
        [(sample.id, sample.suffix, sample.forget) for sample in inputs.samples],
        [args.protocol, args.dtype, torch.device(args.device).type, args.num_beams],
        [versions(), code_sha256(*code)],
        # They shape batches, and so the last digits.
        [1 if processes.lockstep else WORLD_SIZE, torch.get_num_threads()],
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    path = data.cache_folder("before") / f"{digest}.json"
    if all(gather([path.is_file()])):
        return data.read_json(path)
    measures = compute()
    if is_main and not args.redact:  # it holds what the model said of each text
        with contextlib.suppress(OSError):  # of a cache that cannot be written
            data.write_json(path, measures)
    return measures


# --- what a person sees ---

MEASURES = ("el10", "ma", "bleu", "bertscore", "entropy")
OF_SPANS = ("el10_spans", "ma_spans", "ma_rest", "secret_said")  # of a text with spans
LOSSES = ("loss", "loss_forget", "loss_learn", "loss_kl")
HEADER = " epoch active   EL10     MA   BLEU   BERT entropy     loss  forget   learn      kl"


def epoch_text(row):
    """A line under HEADER."""

    def cell(name, width, digits):
        value = row.get(f"{name}_spans", row[name])  # what decides
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    fractions = [cell(name, 6, 3) for name in ("el10", "ma", "bleu", "bertscore")]
    losses = [cell(name, 8 if name == "loss" else 7, 3) for name in LOSSES]
    return " ".join(
        [f"{row['epoch']:>6} {row['active']:>6}", *fractions, cell("entropy", 7, 2), *losses]
    )


def alarms(rows):
    """{kind: warning} of the rows of metrics.jsonl."""
    start, now, warnings = rows[0], rows[-1], {}
    if now["ma"] is None:
        return {"collapse": "the model's logits are not finite"}
    if now["entropy"] < 0.5 * start["entropy"]:
        fell = f"entropy fell from {start['entropy']:.2f} to {now['entropy']:.2f} bits"
        warnings["collapse"] = f"the generations' {fell}, the model repeats itself"
    for name in (name for name in now if name.startswith("ppl_")):
        before, after = (math.inf if row[name] is None else row[name] for row in (start, now))
        if after > 2 * before:
            went = f"{name} went from {before:.1f} to {after:.1f}"
            warnings["collapse"] = f"{went}, the model lost language"
    moved = [abs(now[name] - start[name]) for name in ("el10", "ma") if now[name] is not None]
    losses = [row["loss"] for row in (rows[1:2] + [now]) if row["loss"] is not None]
    if now["epoch"] >= 3 and losses and max(moved, default=0) < 1e-3:
        if abs(losses[-1] - losses[0]) < 1e-2 * abs(losses[0]):
            still = f"EL10, MA and the loss have not moved in {now['epoch']} epochs"
            warnings["still"] = f"{still}: raise --lr"
    return warnings


def say_epoch(rows):
    """The epoch's line, and each warning when it begins."""
    print0(epoch_text(rows[-1]))
    for kind, sentence in alarms(rows).items():
        if kind not in alarms(rows[:-1] or rows[:1]):
            print0(f"warning: {sentence}")


def thresholds_text(thresholds, args):
    """When the run stops and what counts as forgotten."""
    if unknown := [name for name in thresholds if thresholds[name] is None]:
        source = "--bert" if "bertscore" in unknown else "--model"
        raise ValueError(f"{source}: answers NaN, so there is no threshold for {unknown[0]}")
    joined = "or" if PROTOCOLS[args.protocol].forgotten_by is any else "and"
    return (
        f"stop at EL10 < {thresholds['el10']:.4f} and MA < {thresholds['ma']:.4f}; forgotten is "
        f"BERTScore < {thresholds['bertscore']:.3f} {joined} BLEU < {thresholds['bleu']:g}"
    )


def plan_text(args, inputs):
    """What the run will do."""
    n, tokens = len(inputs.samples), sum(len(sample.forget.ids) for sample in inputs.samples)
    what = "measure only" if args.eval_only else args.method
    weights = f"forget {args.forget_weight:g}, alpha {args.alpha:g}, beta {args.beta:g}"
    batch = min(args.batch_size, n or args.batch_size)
    size = f"{n} pairs, {tokens} tokens" if n else "no pairs yet"
    lines = [
        f"{what}, {args.protocol} protocol: {weights}, lr {args.lr:g}, batch {batch}, "
        f"at most {args.max_epochs} epochs, seed {args.seed}",
        f"{args.model} ({args.dtype}, {args.device}), {size}",
    ]
    lines += [f"note: {note}" for note in inputs.notes]
    if short := sum(len(sample.forget.ids) <= 10 for sample in inputs.samples):
        lines.append(f"note: {short} of {n} texts have no 10-gram to extract and count in MA only")
    return "\n".join(lines)


# --- means over samples ---


def number(x):
    """A float for JSON, to 6 digits; None for NaN."""
    return None if math.isnan(x) else round(float(x), 6)


def is_below(value, limit):
    return value is not None and value < limit


def mean(values):
    """The mean of what is not None, or None."""
    values = [value for value in values if value is not None]
    return round(sum(values) / len(values), 6) if values else None


def mean_measures(rows):
    """{measure: its mean} over the samples of an epoch that have it."""
    names = [*MEASURES, *(name for name in OF_SPANS if any(name in row for row in rows))]
    return {name: mean(row.get(name) for row in rows) for name in names}


def stop_means(rows, watched=()):
    """{"el10", "ma"} for the stop rule, of a text with spans over them: the mean of the new texts
    or that of the watched ones (indices), whichever is larger."""
    means = {}
    for name in ("el10", "ma"):
        values = [row.get(f"{name}_spans", row[name]) for row in rows]
        new = mean(value for i, value in enumerate(values) if i not in watched)
        earlier = mean(value for i, value in enumerate(values) if i in watched)
        means[name] = max((x for x in (new, earlier) if x is not None), default=None)
    return means


# --- a finished run ---

# What the measures before depend on.
BEFORE_SETTINGS = ("model", "protocol", "context", "bert", "num_beams", "dtype")
# Flags that make two runs of one method different rows; others (seed, pairs) are averaged over.
SETTINGS = (
    *BEFORE_SETTINGS, "targets", "alpha", "beta", "forget_weight", "lr", "batch_size", "refine",
    "answer", "answers", "method_file", "dpo_beta", "thresholds", "bert_threshold",
    "bleu_threshold", "min_epochs", "max_epochs",
)  # fmt: skip


def read_run(folder):
    """A finished run: a dict of folder, config, summary, metrics, samples, tasks and redacted.

    audit, tofu, gpt, human: audit.json, tofu.json, judge.json, people.json, where they are; tasks:
    {when: tasks.json of tasks-WHEN}. Their figures also stand in summary["before"] and
    summary["after"], under the names of evals/report.py's columns. redacted: whether it has no text
    to show.
    """
    folder = Path(folder)
    if not (folder / "summary.json").exists():
        why = "so the run has not ended, or is none: wait, or go on with icu.py --resume"
        raise ValueError(f"{folder}: no summary.json, {why}")
    run = {"folder": folder, "tasks": {}}
    with data.reading(f"{folder}: not as a run wrote it, copy it again or leave it out"):
        for name in ("config", "summary"):
            run[name] = data.read_json(folder / f"{name}.json")
        for name in ("metrics", "samples"):
            run[name] = data.read_jsonl(folder / f"{name}.jsonl")
        summary = run["summary"]
        for file in filter(Path.is_file, map(folder.joinpath, EVALUATIONS)):
            with data.reading(file.name):
                for when, figures in read_evaluation(run, file).items():
                    summary[when] |= figures
        summary["after"]["epochs"] = summary["epochs"]
        run["redacted"] = run["config"].get("redact") or run["samples"][0]["generation"] is None
    return run


# Where the evals leave their figures.
EVALUATIONS = (
    "tasks-before/tasks.json", "tasks-after/tasks.json", "audit.json", "tofu.json", "judge.json",
    "people.json", "speech.json",
)  # fmt: skip


def read_evaluation(run, file):
    """Puts an eval's file into `run`; returns {"before", "after": {column: figure}}."""
    document, name = data.read_json(file), file.name
    if name == "tasks.json":
        when, averages = file.parent.name.removeprefix("tasks-"), document["averages"]
        run["tasks"][when] = {task: x for task, x in document.items() if task != "settings"}
        kinds = [kind for kind in ("cls", "dia") if averages[kind] is not None]
        return {when: {f"{kind}_avg": averages[kind] for kind in kinds}}
    if file.stem in ("audit", "tofu"):
        run[file.stem], figures = document, document["headline"]
        return {when: figures[when] for when in ("before", "after") if when in figures}
    if name == "speech.json":
        return document
    column = "gpt" if name == "judge.json" else "human"
    run[column], ends = document, [(when, document[when]) for when in ("before", "after")]
    return {when: {column: x["mean"], f"{column}_unread": x.get("unread")} for when, x in ends}


def read_never_saw(args):
    """The measures of --never-saw's run."""
    run, measured = read_run(args.never_saw), ("protocol", "context", "num_beams", "dtype")
    differ = requests.differences(run["config"], args, measured, ("bert", "pairs"))
    if run["summary"]["method"] != "none":
        differ.append("without --eval-only")
    if differ:
        raise ValueError(f"--never-saw {args.never_saw}: made otherwise ({', '.join(differ)})")
    return run["summary"]["before"]


def models_of(run):
    """{"before", "after"}: (folder or name, revision) of the models."""
    if not (run["folder"] / "model").is_dir():
        raise ValueError(f"{run['folder']}: no model of its own, it diverged or only measured")
    before = run["config"]["model"], run["config"].get("revision")
    return {"before": before, "after": (str(run["folder"] / "model"), None)}


def check_texts_left(run):
    """ValueError for a run whose texts are gone."""
    if run["redacted"] or not requests.has_pairs(run["config"]):
        pairs = run["config"].get("pairs")
        why = f"purged, or --redact, or {pairs} is not the file of the run"
        raise ValueError(f"{run['folder']}: its texts are gone ({why})")


def read_pairs_of(run):
    """{id: pair} of a run and of the requests before it."""
    config = run["config"]
    with data.reading(f"the pairs of {run['folder']} (--redact goes on without its texts)"):
        pairs = [*data.read_pairs(config["pairs"]), *requests.earlier_pairs(config.get("after"))]
    pairs = {pair["id"]: pair for pair in pairs}
    shown = (row["id"] for row in run["samples"] if row["generation"] is not None)
    if lost := next((id for id in shown if id not in pairs), None):
        raise ValueError(f"{config['pairs']}: no pair {lost}, made again after the run")
    return pairs
