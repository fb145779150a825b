"""The command line: argparse types that explain themselves, and errors that are one line on stderr and exit 2."""

import argparse
import contextlib
import difflib
import math
import os
import sys

from kit.text import visible


def run_cli(main):
    """Runs `main()` as a command: whatever goes wrong is one line on stderr and exit 2 (--debug: the traceback).

    What it writes only its owner can read. An error of another kind than ours says so, and names --debug.
    """
    os.umask(0o077)
    with contextlib.suppress(AttributeError):  # a name of bytes that are no UTF-8, a terminal that knows ASCII only
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        kind = type(error).__name__
        message = visible(" ".join(str(error).split())) or kind
        if not isinstance(error, (ValueError, OSError)):
            message = f"{kind}: {message} (not foreseen: --debug shows where)"
        rank = os.environ["RANK"] if launched() else "0"
        print("error:" if rank == "0" else f"rank {rank}: error:", message, file=sys.stderr)
        sys.exit(2)


def launched():
    """Whether a launcher of several processes (torchrun, DeepSpeed's) has started this one.

    It sets all of these. One alone says nothing: many a container has WORLD_SIZE where nothing was launched.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return all(map(str.isdecimal, numbers)) and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def flag_error(message):
    """`parser.error` for argparse: a bad flag is one line and exit 2 like every other error."""
    raise ValueError(message)


def command_parser(description, **how):
    """The parser of a command: its description as it is written, no abbreviations, and errors of one line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, formatter_class=form, allow_abbrev=False, **how
    )
    parser.error = flag_error
    return parser


def one_of(names):
    """An argparse type: one of `names`, or an error that names the nearest."""

    def check(value):
        if value not in names:
            near = "".join(
                f", did you mean {name}?" for name in difflib.get_close_matches(value, names, 1)
            )
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(names)}{near}")
        return value

    return check


def positive(text):
    """An argparse type: a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def above(low, kind=float, *, equal=False):
    """An argparse type: a finite number above `low` (or equal to it)."""

    def check(value):
        try:
            x = kind(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{value!r} is not a number ({kind.__name__})"
            ) from None
        if not (math.isfinite(x) and (x >= low if equal else x > low)):
            raise argparse.ArgumentTypeError(
                f"{value} is not a finite number {'>=' if equal else '>'} {low}"
            )
        return x

    return check


def seed_number(text):
    """An argparse type: a whole number that numpy takes for a seed."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} is not a whole number from 0 to {2**32 - 1}"
        )
    return int(text)


def thresholds_flag(value):
    """An argparse type: 'paper', 'auto', 'never-saw' or 'EL,MA'."""
    if value in ("paper", "auto", "never-saw"):
        return value
    try:
        el, ma = (above(0)(x) for x in value.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        what = "'paper', 'auto', 'never-saw' or two numbers > 0, 0.05,0.6"
        raise argparse.ArgumentTypeError(f"{value!r} is not {what}") from None
    return [el, ma]


def auto_or_number(value):
    """An argparse type: 'auto' or a number above 0."""
    return value if value == "auto" else above(0)(value)


def first_line(error):
    """The first line of an exception's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


weight = above(0, equal=True)


# --- the flags of every run ---


# fmt: off
def run_parser(doc):
    """A parser with the flags of a run that say nothing of its method, one a line; doc: the script's docstring."""
    parser = command_parser(doc.split("\n\n")[0])

    g = parser.add_argument_group("data and models")
    g.add_argument("--pairs", metavar="FILE", help="pairs.jsonl from knn.py")
    g.add_argument("--model", metavar="DIR", help="the causal LM: a folder, or a name on the hub")
    g.add_argument("--bert", default="bert-base-uncased", metavar="DIR", help="BERTScore's encoder: a folder, a hub name, or minilm (%(default)s)")
    g.add_argument("--ppl", nargs="+", default=[], metavar="NAME[=FILE]", help="texts to measure perplexity on before and after; pile and wikitext are known")
    g.add_argument("--unseen", metavar="FILE", help="for --thresholds auto: records the model was not trained on")
    g.add_argument("--never-saw", metavar="RUN", help="for --thresholds never-saw: a finished --eval-only run of a model that never saw the texts")
    g.add_argument("--data", metavar="DIR", help="where the known perplexity files lie (default: fetched and cached)")
    g.add_argument("--out", metavar="DIR", help="the run folder to write")
    g.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    g.add_argument("--resume", action="store_true", help="go on with the interrupted run in --out; give the same flags again")
    g.add_argument("--revision", metavar="SHA", help="hub revision of --model")
    g.add_argument("--allow-pickle", action="store_true", help="also load pickled weights, which can run code: only if you trust them")

    g = parser.add_argument_group("after earlier requests")
    g.add_argument("--after", metavar="RUN", help="go on from the model of a finished run, whose texts, and those of the runs before it, are watched")
    g.add_argument("--anchor", default="original", type=one_of(["original", "previous"]), help="the frozen copy of Eq. 4: the model before the first request, or that of --after (%(default)s)")
    g.add_argument("--watch", action=argparse.BooleanOptionalAction, default=True, help="measure earlier texts too; one that comes back is trained on again (%(default)s)")

    g = parser.add_argument_group("training")
    g.add_argument("--lr", type=above(0), help="Adam's learning rate (the method's own: 5e-6 for icu)")
    g.add_argument("--batch-size", default=8, type=positive, help="forget rows a step (%(default)s)")
    g.add_argument("--max-epochs", default=100, type=positive, help="epoch cap (%(default)s)")
    g.add_argument("--seed", default=0, type=seed_number, help="seed of the data order and of llmu's answers (%(default)s)")

    g = parser.add_argument_group("what some methods ask for (baselines.py says which)")
    g.add_argument("--dpo-beta", default=0.1, type=above(0), help="inverse temperature of a preference loss (%(default)s)")
    g.add_argument("--answers", default=5, type=positive, help="random other answers a row and epoch (%(default)s)")
    g.add_argument("--answer", default="neighbour", type=one_of(["neighbour", "refusal"]), help="the one other answer to prefer (%(default)s)")

    g = parser.add_argument_group("several processes (started by the deepspeed launcher; bash run.sh PRESET --gpus N)")
    g.add_argument("--zero", default=2, type=int, choices=(2, 3), help="ZeRO stage: 2 shards gradients and Adam, 3 the weights too, for a model that is too large for one device; it measures more slowly (%(default)s)")
    g.add_argument("--offload", action="store_true", help="keep Adam's state in the CPU's memory")
    g.add_argument("--timeout", default=30, type=above(0), metavar="MINUTES", help="how long a process waits for the others (%(default)s)")

    g = parser.add_argument_group("running")
    g.add_argument("--dtype", default="float32", type=one_of(["float32", "bf16", "float64"]), help="bf16: autocast over float32 weights (%(default)s)")
    g.add_argument("--device", help="cpu, cuda, mps, ... (default: cuda where there is one)")
    g.add_argument("--lazy-el", dest="el", action="store_const", const="lazy", help="the same as --el lazy")
    g.add_argument("--save-every", default=1, type=positive, metavar="EPOCHS", help="how often a state is saved for --resume (%(default)s)")
    g.add_argument("--eval-only", action="store_true", help="measure the model on the pairs, train nothing")
    g.add_argument("--dry-run", action="store_true", help="check everything, print the plan, load and write nothing; without --pairs, check the rest")
    g.add_argument("--redact", action="store_true", help="the run folder and the cache get ids, hashes and numbers, never a text; the pairs are needed to train: bash run.sh purge RUN removes them afterwards")
    g.add_argument("--preset", help="the preset's name, for the published row in evals/report.py")
    g.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
# fmt: on


def check_samples(args, samples):
    """ValueError for flags that these samples do not go with."""
    if args.bert_threshold == "auto" and len(samples) == 1:
        raise ValueError(
            "--bert-threshold auto compares suffixes of different rows: it needs two pairs at least"
        )


def check_together(args):
    """ValueError for flags that do not go together."""
    if args.thresholds == "auto" and not args.unseen:
        raise ValueError(
            "--thresholds auto needs --unseen FILE: records of the same kind, never trained on"
        )
    if args.pairs and args.thresholds == "never-saw" and not args.never_saw:
        raise ValueError(
            "--thresholds never-saw needs --never-saw RUN: measures of a model that never saw the texts"
        )
    names = [item.partition("=")[0] for item in args.ppl]
    for item, name in zip(args.ppl, names, strict=True):
        if not name or item == f"{name}=" or names.count(name) > 1:
            raise ValueError(f"--ppl {item}: say NAME=FILE, and no NAME twice")
    if args.resume and args.overwrite:
        raise ValueError(
            "--resume goes on with a run, --overwrite begins it again: pass one of them"
        )
    if not args.dry_run and not (args.out and args.pairs):
        raise ValueError(f"{'--pairs FILE' if args.out else '--out DIR'} is missing")
