"""The run folder: who writes it, what is in it, how it is gone on with, and what a person sees of it."""

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
from pathlib import Path

import filelock
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from kit import data, models, processes, traces
from kit.flags import first_line
from kit.methods import code_of, file_of
from kit.paths import GROWING, OLD_CONFIG, RUN_FILES, leftovers
from kit.processes import LAUNCHED, WORLD_SIZE, gather, is_main, print0, wait_for_all, whole_weights
from kit.protocols import PROTOCOLS
from kit.states import Progress, load_state, newest_state, save_state, states, sync, way_out

THRESHOLDS = ("el10", "ma", "bertscore", "bleu")


def start_run_folder(out, config):
    """A run folder with its first state, then its config.json: with that it is a run, and can be gone on with.

    Every process takes part. Of a run that was there only its own files are removed, its config.json first. So a kill
    at any moment leaves the old run, the new one, or none, and then the same command starts again.
    """
    if is_main:
        out.mkdir(parents=True, exist_ok=True)
        if (out / "config.json").is_file():
            (out / "config.json").replace(out / OLD_CONFIG)
            sync(out)
        for name in RUN_FILES:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
    wait_for_all()
    save_state(out, None, Progress())
    if is_main:
        if config.get("redact"):
            data.write_json(out / "hashes.json", traces.hashes(data.read_pairs(config["pairs"])))
        data.write_json(out / "config.json", config)


# Flags that do not change a run, and the function that --method names.
NOT_SETTINGS = ("debug", "dry_run", "overwrite", "resume", "timeout", "save_every", "loss")


def describe_run(args, thresholds):
    """config.json: every flag, thresholds, versions, git revision and fingerprints."""
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    flags = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    flags["device"] = torch.device(
        args.device
    ).type  # cuda:0, cuda:1, ... are the processes of one run
    return {
        **flags,
        "method_file": f"{Path(file_of(args.loss)).name} {code_of(args.loss)[:6]}",  # told apart in evals/report.py's table
        "processes": WORLD_SIZE,
        "thresholds_used": thresholds,
        "versions": versions(),
        "git": git.stdout.strip() or None,
        "sha256": {"pairs": models.fingerprint(args.pairs), "model": models.fingerprint(args.model)}
        | {
            "bert": models.fingerprint(args.bert),
            "unseen": models.fingerprint(args.unseen) if args.unseen else None,
        }
        | {
            f"ppl {item}": models.fingerprint(data.perplexity_file(item, args.data))
            for item in args.ppl
        }
        | {"method": code_of(args.loss)},
    }


def versions():
    names = ("torch", "transformers", "tokenizers", "numpy", "bert-score", "sacrebleu")
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    }


def append(path, rows):
    """Rows to a JSONL file, on disk when this returns."""
    with open(path, "ab") as stream:
        stream.writelines(map(data.json_bytes, rows))
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def only_owner(out):
    """Holds the run folder for this process; ValueError with the owner's pid if another one is writing it."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(
            out / ".lock", mode=0o600, blocking=False
        ):  # ends with the process, however it ends
            (out / ".lock").write_text(str(os.getpid()))
            for file in leftovers(out):
                file.unlink()
            yield
    except filelock.Timeout:
        pid = (out / ".lock").read_text().strip()
        raise ValueError(f"--out {out}: process {pid} is writing this run") from None


def cut_back(out, known):
    """Removes what the run's growing files hold of an epoch that was not finished. ValueError: one that has changed.

    known: what `growing_files` said at the end of the last whole epoch. Nothing reads timing.jsonl, so it may differ.
    """
    have = growing_files(out, {name: size for name, (size, _) in known.items()})
    for name, (size, sha256) in known.items():
        if have.get(name) != [size, sha256] and name != "timing.jsonl":
            found = have.get(name, [0])[0]
            what = (
                f"{found} bytes, and there were {size}" if found < size else "has changed (sha256)"
            )
            raise ValueError(f"{out / name}: {what}; begin again with --overwrite")
    for name, (size, _) in have.items():
        os.truncate(out / name, size)


def growing_files(out, sizes=None):
    """{name: [bytes, sha256]} of the files that an epoch adds to; with `sizes` of so many bytes of each."""
    found = {}
    for path in (path for name in GROWING if (path := out / name).is_file()):
        data = path.read_bytes()[: None if sizes is None else sizes.get(path.name, 0)]
        found[path.name] = [len(data), hashlib.sha256(data).hexdigest()]
    return found


TRAINING = (
    "forget_weight",
    "alpha",
    "beta",
    "lr",
    "batch_size",
    "max_epochs",
)  # nothing to what only measures


def change(name, then, now):
    """What an error says of a setting that differs; of several digests those that do."""
    if isinstance(then, dict) and isinstance(now, dict):
        differ = [key for key in then | now if then.get(key) != now.get(key)]
        return "; ".join(
            f"{name} of {key} was {then.get(key)!s:.12}, is {now.get(key)!s:.12}" for key in differ
        )
    return f"{name} was {then}, is {now}"


def check_resume(args):
    """The config.json of the run to go on with; ValueError that shows what differs from this command."""
    path = Path(args.out) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"--resume: {args.out} holds no run; begin it with the same command without --resume"
        )
    before = data.read_json(path)
    used = before.get("thresholds_used") if isinstance(before, dict) else None
    values = [used.get(name) for name in THRESHOLDS] if isinstance(used, dict) else [None]
    if not all(type(value) in (int, float) and 0 <= value < 1e9 for value in values):
        raise ValueError(f"{path}: is not what a run wrote there; start again with --overwrite")
    now = json.loads(json.dumps(describe_run(args, used)))
    free = ("out", "versions", "git", *(TRAINING if args.eval_only else ()))
    differ = [name for name in now if name not in free and now[name] != before.get(name)]
    if differ:
        changes = "; ".join(change(name, before.get(name), now[name]) for name in differ)
        raise ValueError(f"--resume: the run was started with other settings or data: {changes}")
    return before


class Stop:
    """SIGTERM and Ctrl-C: the run saves its state and ends, at the next step or out of the middle of measuring."""

    def __init__(self):
        self.signal, self.measuring = None, False

    def __enter__(self):
        self.before = {
            number: signal.signal(number, self.ask) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        first, self.signal = self.signal is None, number
        # The weights do not change while measuring. Several processes have to leave together, so they wait for a step.
        if first and self.measuring and not LAUNCHED:
            raise Interrupted(number)

    def check_alone(self):
        """Raises Interrupted if this, the only process, was asked to stop."""
        if self.signal and not LAUNCHED:
            raise Interrupted(self.signal)

    def check(self):
        """Raises Interrupted on every process if one of them was asked to stop."""
        asked = self.signal or 0
        if WORLD_SIZE > 1:
            asked = int(max(gather([asked])))
        if asked:
            self.signal = asked
            raise Interrupted(asked)


class Interrupted(Exception):
    """By a signal, whose number it holds."""


# --- a run in progress ---


class Run:
    """A run folder that this process owns, how far the run is, and the signals that it heeds."""

    def __init__(self, args, before, stop):
        """before: the config.json of the run to go on with, or None."""
        self.args, self.out, self.stop, self.engine = args, Path(args.out), stop, None
        self.hidden = (
            {"generation": None} if args.redact else {}
        )  # what takes the place of fields of samples.jsonl
        self.state = newest_state(self.out) if before else None
        self.thresholds = before and before["thresholds_used"]
        self.progress = Progress()
        look = {
            "bar_format": "{desc}{percentage:3.0f}%|{bar}| epoch {n:.1f} of at most {total_fmt}{postfix}"
        }
        self.bar = tqdm(
            total=args.max_epochs,
            disable=None if is_main else True,
            leave=False,
            delay=1e-9,
            **look,
        )

    def begin(self, engine):
        """The engine's weights and the folder's files become those of the state to go on from, or of a new run.

        Returns its Progress.
        """
        self.engine = engine
        if self.state:
            self.progress = load_state(self.state, engine)
        else:
            start_run_folder(
                self.out, describe_run(self.args, self.thresholds) if is_main else None
            )
        if is_main:
            traces.note(models.fingerprint(self.args.pairs), self.args.pairs, "pairs")
            for pairs in pairs_in(self.args):
                traces.note(pairs, self.out, "run")
        print0(HEADER)
        if self.state:
            self.pick_up()
        self.bar.n = self.bar.initial = max(self.progress.epoch - 1, 0)
        return self.progress

    def pick_up(self):
        """The files of the run folder are those of the state again, and what it has reached is said."""
        wait_for_all()
        if is_main:
            cut_back(self.out, self.progress.files)
            for damaged in [other for other in states(self.out) if other > self.state]:
                shutil.rmtree(damaged)  # it would count as one of the two that are kept
            for row in (
                data.read_jsonl(self.out / "metrics.jsonl") if self.progress.epoch > 0 else []
            ):
                print0(epoch_text(row))
        print0(f"resumed from {self.state.name}")

    def heed_signals(self):
        """Raises Interrupted, on every process, if one of them was asked to stop."""
        self.stop.check()

    @contextlib.contextmanager
    def measuring(self):
        """The weights do not change here: a signal ends it at once."""
        self.stop.measuring = True
        try:
            self.stop.check_alone()
            yield
        finally:
            self.stop.measuring = False

    def after_step(self, loss, n_active, of_epoch):
        """Moves the progress bar by this part of an epoch, and heeds signals."""
        self.bar.set_postfix_str(f"loss {loss:.3f}, {n_active} to forget", refresh=False)
        self.bar.update(of_epoch)
        self.heed_signals()

    def end_epoch(
        self, means, measured, *, forgotten, stopped, watched, losses, perplexities, seconds
    ):
        """Writes an epoch down: a row of metrics.jsonl, and what was measured of each sample; those that are `watched`
        (indices) are texts of earlier requests.
        """
        progress, out = self.progress, self.out
        row = {
            "epoch": progress.epoch,
            **means,
            "active": len(measured) - len(forgotten),
            "forgotten": len(forgotten),
        }
        row |= {
            name: number(losses[name]) if name in losses else None
            for name in dict.fromkeys([*LOSSES, *losses])
        }
        row |= {"skipped_steps": progress.skipped_steps, **perplexities}
        progress.forgotten, progress.stopped = forgotten, stopped
        if is_main:
            append(out / "metrics.jsonl", [row])
            rows = [
                m | self.hidden | ({"watched": True} if i in watched else {})
                for i, m in enumerate(measured)
            ]
            lines = [
                {"epoch": progress.epoch, **m, "forgotten": i in forgotten}
                for i, m in enumerate(rows)
            ]
            append(out / "samples.jsonl", lines)
            append(
                out / "timing.jsonl", [{"epoch": progress.epoch, "measure_s": round(seconds, 3)}]
            )
            say_epoch(data.read_jsonl(out / "metrics.jsonl"))
            progress.files = growing_files(out)
        progress.next_epoch()  # from here on progress.epoch is the next one
        if not (self.args.eval_only or stopped == "diverged"):
            self.heed_signals()
            if stopped or (progress.epoch - 1) % self.args.save_every == 0:
                save_state(out, self.engine, progress)

    def export(self, model, tokenizer):
        """model/ and summary.json, the last things that a run writes; its states have then done their work.

        A run that diverged has no model to give away: its last good state is kept instead.
        """
        out, diverged = self.out, self.progress.stopped == "diverged"
        if not (self.args.eval_only or diverged):
            weights = whole_weights(model) if processes.lockstep else None
            if is_main:
                models.save_model(model, tokenizer, out / "model", weights)
        if is_main:
            self.summarise(data.read_jsonl(out / "metrics.jsonl"))
            if diverged:
                print0(f"lower --lr; {out / 'state' / states(out)[0].name} is the last good state")
            else:
                shutil.rmtree(out / "state", ignore_errors=True)
        wait_for_all()  # the launcher ends all processes when the first one fails
        if diverged:
            raise SystemExit(1)

    def summarise(self, rows):
        """summary.json from the rows of metrics.jsonl: how the run ended, the measures of its first and last epoch."""
        args, reason = self.args, self.progress.stopped
        if rows[-1]["epoch"] == 0 and not args.eval_only and reason != "diverged":
            reason += ", before any training"
        measures = [
            name for name in rows[0] if name in MEASURES + OF_SPANS or name.startswith("ppl_")
        ]
        data.write_json(self.out / "summary.json", {
            "method": "none" if args.eval_only else args.method, "model": args.model, "protocol": args.protocol,
            "epochs": rows[-1]["epoch"], "stopped": reason, "thresholds": self.thresholds,
            "collapsed": reason == "diverged" or "collapse" in alarms(rows),
            "before": {name: rows[0][name] for name in measures},
            "after": {name: rows[-1].get(name) for name in measures},
        })  # fmt: skip
        print0(f"stopped after epoch {rows[-1]['epoch']} ({reason}); the run is in {self.out}")


@contextlib.contextmanager
def running(args, before=None):
    """A Run in --out that no other process writes meanwhile; a signal or a full disk ends it with its states whole."""
    out = Path(args.out)
    with only_owner(out) if is_main else contextlib.nullcontext(), Stop() as stop:
        run = Run(args, before, stop)
        with run.bar:
            try:
                yield run
            except Interrupted as interrupted:
                (number,) = interrupted.args
                save_state(out, run.engine, run.progress)
                print0(
                    f"interrupted ({signal.Signals(number).name}); go on with the same command and --resume"
                )
                raise SystemExit(128 + number) from None
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{out}: out of memory ({first_line(error)}); pass a smaller --batch-size"
                ) from error
            except (OSError, SafetensorError) as error:
                raise ValueError(
                    f"{out}: the run stopped ({first_line(error)}); {way_out(out, error)}"
                ) from error


def is_finished(out):
    """Whether the run in this folder has nothing left to do."""
    out = Path(out)
    if not (out / "summary.json").is_file():
        return False
    if (out / "model").is_dir():
        shutil.rmtree(out / "state", ignore_errors=True)  # killed while it was removed
    print0(f"{out}: finished already")
    return True


def pairs_in(args):
    """Fingerprints of all pairs whose texts a run measures: its own, and those of earlier requests."""
    return [models.fingerprint(args.pairs), *args.earlier]


def remembered(args, inputs, code, compute):
    """compute(), or what it gave a run with the same model, texts and flags: its answer is kept in the cache.

    All runs of a comparison begin with the same model and texts. The key is a hash of all that the answer depends on,
    `code` (functions and modules) included; a model of the hub without a pinned --revision is measured anew. Every
    process takes part.
    """
    about = [
        [(sample.id, sample.suffix, sample.forget) for sample in inputs.samples],
        inputs.ppl_texts,
    ]
    about += [inspect.getsource(part) for part in code]
    pinned = args.revision if re.fullmatch("[0-9a-f]{40}", args.revision or "") else None
    weights, device = models.fingerprint(args.model) or pinned, torch.device(args.device).type
    weights = (
        None if args.loss.needs.touches_weights else weights
    )  # then it is no more the model of that name
    key = [
        weights,
        args.model,
        models.fingerprint(args.bert),
        args.bert,
        args.protocol,
        args.dtype,
        device,
    ]
    shares = 1 if processes.lockstep else WORLD_SIZE
    key += [
        args.num_beams,
        about,
        versions(),
        shares,
        torch.get_num_threads(),
    ]  # these shape batches, and so last bits
    path = (
        data.cache_folder("before") / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()}.json"
    )
    if is_main and weights and (path.is_file() or not args.redact):
        for pairs in pairs_in(args):
            traces.note(pairs, path, "measures before")
    if weights and all(gather([path.is_file()])):
        with contextlib.suppress(ValueError):  # damaged: computed again
            return data.read_json(path)
    found = compute()
    if is_main and weights and not args.redact:  # it holds what the model said of each text
        try:
            data.write_json(path, found)
        except OSError as error:
            print0(f"note: the measures before are not kept for the next run ({error})")
    return found


# --- what a person sees ---

MEASURES = ("el10", "ma", "bleu", "bertscore", "entropy")
OF_SPANS = (
    "el10_spans",
    "ma_spans",
    "ma_rest",
    "secret_said",
)  # beside them where a text is marked (kit/data.py)
LOSSES = ("loss", "loss_forget", "loss_learn", "loss_kl")
HEADER = " epoch active   EL10     MA   BLEU   BERT entropy     loss  forget   learn      kl"


def epoch_text(row):
    """One aligned line an epoch, under HEADER."""

    def cell(name, width, digits):
        value = row.get(f"{name}_spans", row[name])  # what decides
        return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"

    fractions = [cell(name, 6, 3) for name in ("el10", "ma", "bleu", "bertscore")]
    return " ".join(
        [f"{row['epoch']:>6} {row['active']:>6}", *fractions, cell("entropy", 7, 2)]
        + [cell(name, 8 if name == "loss" else 7, 3) for name in LOSSES]
    )


def alarms(rows):
    """What a person should hear of a run so far, given the rows of metrics.jsonl: {kind: sentence}."""
    start, now = rows[0], rows[-1]
    heard = {}
    if now["ma"] is None:
        return {"collapse": "the model's logits are not finite"}
    if now["entropy"] < 0.5 * start["entropy"]:
        fell = f"from {start['entropy']:.2f} to {now['entropy']:.2f} bits"
        heard["collapse"] = f"the entropy of the generations fell {fell}, the model repeats itself"
    for name in (name for name in now if name.startswith("ppl_")):
        before, after = (math.inf if row[name] is None else row[name] for row in (start, now))
        if after > 2 * before:
            heard["collapse"] = (
                f"{name} went from {before:.1f} to {after:.1f}, the model lost language"
            )
    moved = max(
        (abs(now[name] - start[name]) for name in ("el10", "ma") if now[name] is not None),
        default=0,
    )
    losses = (
        [row["loss"] for row in (rows[1], now) if row["loss"] is not None]
        if now["epoch"] >= 3
        else []
    )
    if losses and moved < 1e-3 and abs(losses[-1] - losses[0]) < 1e-2 * abs(losses[0]):
        heard["still"] = (
            f"EL10, MA and the loss have not moved in {now['epoch']} epochs: raise --lr"
        )
    return heard


def thresholds_text(thresholds, args):
    """When the run stops and what counts as forgotten. ValueError for one that `auto` found no number for."""
    if unknown := [name for name, value in thresholds.items() if value is None]:
        source = "--bert" if "bertscore" in unknown else "--model"
        raise ValueError(
            f"{source}: answers NaN, so there is no threshold for {unknown[0]}; its weights are damaged"
        )
    both = "or" if PROTOCOLS[args.protocol].forgotten_by is any else "and"
    return (
        f"stop at EL10 < {thresholds['el10']:.4f} and MA < {thresholds['ma']:.4f}; "
        f"forgotten is BERTScore < {thresholds['bertscore']:.3f} {both} BLEU < {thresholds['bleu']:g}"
    )


def plan_text(args, inputs):
    """What the run will do, in a few lines."""
    n = len(inputs.samples)
    weights = f"forget {args.forget_weight:g}, alpha {args.alpha:g}, beta {args.beta:g}"
    read = (
        f"{n} pairs, {sum(len(sample.forget.ids) for sample in inputs.samples)} tokens"
        if n
        else "no pairs yet"
    )
    lines = [
        f"{'measure only' if args.eval_only else args.method}, {args.protocol} protocol: {weights}, lr {args.lr:g}, "
        f"batch {min(args.batch_size, n or args.batch_size)}, at most {args.max_epochs} epochs, seed {args.seed}",
        f"{args.model} ({args.dtype}, {args.device}), {read}",
    ]
    if inputs.n_cut:
        lines.append(f"note: {inputs.n_cut} learn partners are cut to the model's positions")
    if short := sum(len(s.forget.ids) <= 10 for s in inputs.samples):
        lines.append(f"note: {short} of {n} texts have no 10-gram to extract and count in MA only")
    return "\n".join(lines)


def say_epoch(rows):
    """The epoch's line, and each warning once, when it begins."""
    print0(epoch_text(rows[-1]))
    for kind, sentence in alarms(rows).items():
        if kind not in alarms(rows[:-1] or rows[:1]):
            print0(f"warning: {sentence}")


def number(x):
    """A float for JSON, to 6 digits; None for NaN."""
    return None if math.isnan(x) else round(float(x), 6)


def under(value, limit):
    """Whether a measure is under its limit; one that was not to be had is not."""
    return value is not None and value < limit


def mean_measures(rows):
    """{measure: its mean} over the samples of an epoch that have it."""
    names = [*MEASURES, *(name for name in OF_SPANS if any(name in row for row in rows))]
    return {name: mean(row.get(name) for row in rows) for name in names}


def decisive(rows, watched=()):
    """{"el10", "ma"} as the stop rule takes them: the means, of a marked text over its spans. It holds for the new
    texts and for the watched ones (indices): the larger mean counts.
    """
    found = {}
    for name in ("el10", "ma"):
        values = [row.get(f"{name}_spans", row[name]) for row in rows]
        means = [
            mean(value for i, value in enumerate(values) if (i in watched) == old)
            for old in (False, True)
        ]
        found[name] = max((value for value in means if value is not None), default=None)
    return found


def mean(values):
    """The mean of what is not None; None of nothing."""
    values = [value for value in values if value is not None]
    return round(sum(values) / len(values), 6) if values else None
