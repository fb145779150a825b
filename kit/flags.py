"""The command line: argparse types that explain themselves, and errors of one line and exit 2."""

import argparse
import contextlib
import difflib
import importlib.util
import math
import os
import sys
import traceback

from kit.text import visible


def run_cli(main, own_file=None):
    """Runs `main()` as a command: whatever goes wrong is one line on stderr and exit 2.

    What it writes only its owner can read. --debug shows the traceback; so does a slip in
    `own_file`, a user's method.
    """
    os.umask(0o077)
    with contextlib.suppress(AttributeError):  # names that are no UTF-8, an ASCII terminal
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if sys.flags.optimize > 1:
            raise ValueError("transformers reads docstrings: run python without -OO")
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        foreseen = isinstance(error, ValueError | OSError)
        frames = traceback.extract_tb(error.__traceback__)
        slip = any(f.filename == str(own_file) and f.name != "<module>" for f in frames)
        if "--debug" in sys.argv or (slip and not foreseen):
            raise
        kind = type(error).__name__
        message = visible(" ".join(str(error).split())) or kind
        if not foreseen:
            message = f"{kind}: {message} (not foreseen: --debug shows where)"
        rank = os.environ["RANK"] if launched() else "0"
        print("error:" if rank == "0" else f"rank {rank}: error:", message, file=sys.stderr)
        sys.exit(2)


def launched():
    """Whether a launcher (torchrun, DeepSpeed's) has started this process: it sets all of these.

    Many a container has a WORLD_SIZE of its own.
    """
    numbers = [os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")]
    return all(map(str.isdecimal, numbers)) and {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def flag_error(message):
    """`parser.error` for argparse: a bad flag is an error like every other."""
    raise ValueError(message)


def command_parser(description, *, debug=True, **settings):
    """The parser of a command; debug: --debug is its own, not for the commands that it runs."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=description, formatter_class=form, allow_abbrev=False, **settings
    )
    parser.error = flag_error
    if debug:
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def one_of(names):
    """An argparse type: one of `names`; an error names the nearest."""

    def check(value):
        if value not in names:
            nearest = difflib.get_close_matches(value, names, 1)
            near = f", did you mean {nearest[0]}?" if nearest else ""
            raise argparse.ArgumentTypeError(f"{value!r} is not one of {', '.join(names)}{near}")
        return value

    return check


def above(low, kind=float, *, equal=False):
    """An argparse type: a finite number above `low` (or equal to it)."""

    def check(value):
        try:
            x = kind(value)
        except ValueError:
            x = math.nan
        if not (math.isfinite(x) and (x >= low if equal else x > low)):
            what = "whole number" if kind is int else "finite number"
            sign = ">=" if equal else ">"
            raise argparse.ArgumentTypeError(f"{value!r} is not a {what} {sign} {low}")
        return x

    return check


positive = above(0, int)
weight = above(0, equal=True)
natural = above(0, int, equal=True)  # also a seed


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


# fmt: off
def add_model_flags(add, dtypes):
    """Those of a program that loads models."""
    add("--device", help="cpu, cuda, mps, ... (default: cuda where there is one)")
    add("--dtype", default="float32", type=one_of(dtypes),
        help=f"{', '.join(dtypes)}; bf16: autocast (%(default)s)")
    add("--allow-pickle", action="store_true", help="also load pickles, which can run code")
# fmt: on


def first_line(error):
    """The first line of an exception's message, or its name."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- flags of a run that go together ---


def check_samples(args, samples):
    """ValueError for flags that these samples do not go with."""
    if args.bert_threshold == "auto" and len(samples) == 1:
        raise ValueError("--bert-threshold auto compares suffixes of rows: it needs two pairs")


def check_together(args):
    """ValueError for flags that do not go together."""
    if args.thresholds == "auto" and not args.unseen:
        raise ValueError("--thresholds auto needs --unseen FILE: like records, never trained on")
    if args.pairs and args.thresholds == "never-saw" and not args.never_saw:
        way_out = "a run of a model that never saw the texts"
        raise ValueError(f"--thresholds never-saw needs --never-saw RUN: {way_out}")
    if args.keep_best and not args.ppl:
        raise ValueError("--keep-best needs --ppl NAME=FILE: held-out texts, to compare epochs by")
    if args.track and importlib.util.find_spec(args.track) is None:
        raise ValueError(f"--track {args.track}: not installed: pip install {args.track}")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite begins again: pass one of them")
