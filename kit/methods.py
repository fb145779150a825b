"""What hangs on a loss so that icu.py's loop can run it under any name, and how a name finds it."""

import argparse
import contextlib
import hashlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kit.flags import one_of
from kit.protocols import PROTOCOLS

PLAIN = (int, float, str, tuple)  # constants
FILLED = ("forget_weight", "alpha", "beta", "lr", "refine")  # flags whose defaults are the method's


class method(NamedTuple):
    """What a loss needs from the rest: `@method(...)` hangs it on the loss, whose name then means nothing.

    A loss is a function of a Batch and the flags; it returns its terms, {"name": (weight, value)}, and their weighted
    sum is minimised. With several processes a value is this process's part of it: what a Side gives means over (`mean`,
    `mean_rows`, the `global_count` of icu.py's losses), and `batch.once` for what comes of no text.
    """

    # defaults of the flags of these names
    forget_weight: float = 1.0
    alpha: float = 1.0
    beta: float = 1.0
    lr: float = 5e-6
    refine: bool = False  # Eq. 5's filter
    targets: str | None = None  # "suffix": the prompt is no target, whatever --targets says
    released: dict = {}  # the defaults that the released code has instead
    # what is asked
    frozen: tuple = ()  # of the frozen copy, once, before training: its logits on these sides
    # of the frozen copy alone: its logits at the targets of these sides, which the model in training never reads
    taught: tuple = ()
    layer: int | None = None  # sides also have hidden states: of this layer, 0 the embeddings'
    # further sides: {name: make(samples, tokenizer, epoch, args) -> a list of Text for each sample}, the same whenever
    # it is asked: a random one draws from (args.seed, epoch)
    sides: dict = {}
    # what happens around it
    prepare: Callable = lambda model, args: None  # before training: freeze weights, put in adapters
    # a generator that makes the weights those to measure and export, yields, and makes them those to train again
    measured: Callable = lambda model: iter([None])
    published: str | None = None  # the row of Tables 1 and 4 that it computes under the released protocol

    def __call__(self, loss):
        loss.needs = self
        return loss

    @property
    def touches_weights(self):
        """Whether what is measured may be another model than the one that was loaded, also before any training."""
        return any(getattr(self, name) is not self._field_defaults[name] for name in ("prepare", "measured"))

    def fill(self, args):
        """The flags that the user has not set get the method's defaults, and the protocol's."""
        protocol = PROTOCOLS[args.protocol]
        if unknown := set(self.released) - set(FILLED):
            raise ValueError(f"@method(released=...): {unknown.pop()} is none of {', '.join(FILLED)}")
        defaults = self._asdict() | (self.released if protocol.own_defaults else {})
        for name in FILLED:
            if getattr(args, name) is None:
                setattr(args, name, defaults[name])
        args.targets = self.targets or args.targets or protocol.targets
        args.published = self.published if protocol.published else None

    @contextlib.contextmanager
    def measuring(self, model):
        """A context in which the weights are those to measure; behind it, whatever happened, those to train."""
        steps = self.measured(model)
        next(steps)
        try:
            yield
        finally:
            next(steps, None)


def file_of(function):
    """The file that a function is written in."""
    return inspect.unwrap(function).__code__.co_filename


def code_of(method):
    """sha256 of a method: the source of its loss, sides and hooks, and the plain constants that they name."""
    needs, text = method.needs, []
    for function in map(inspect.unwrap, (method, needs.prepare, needs.measured, *needs.sides.values())):
        known = function.__globals__
        named = {name: known[name] for name in function.__code__.co_names if isinstance(known.get(name), PLAIN)}
        try:
            text.append(f"{inspect.getsource(function)} {sorted(named.items())}")
        except OSError:  # typed at a prompt
            text.append(f"{function.__code__.co_code} {sorted(named.items())}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def check_sides(args, drawn, layers):
    """ValueError where a method's sides, or what it asks of the frozen copy and of the model, cannot be.

    drawn: {name: a list of Text for each sample} of epochs 0 and 1, or nothing; layers: how many the model has.
    """
    if not drawn:
        return
    needs, (sides, later), n = args.loss.needs, drawn, len(drawn[0]["forget"])
    for name, rows in sides.items():
        if len(rows) != n or not all(isinstance(row, list) and all(hasattr(t, "ids") for t in row) for row in rows):
            raise ValueError(f"@method(sides=...): {name} must give a list of Text for each of the {n} samples")
    for field in ("frozen", "taught"):
        if isinstance(names := getattr(needs, field), str) or not set(names) <= set(sides):
            raise ValueError(f"@method({field}={names!r}): must be a tuple of {', '.join(sides)}")
    asked = [*needs.frozen, *needs.taught]
    if args.teacher == "cached" and (changing := [name for name in asked if sides[name] != later[name]]):
        raise ValueError(f"{args.method}: its side {changing[0]} has other texts each epoch: pass --teacher live")
    if needs.layer is not None and not 0 <= needs.layer <= layers:
        raise ValueError(f"@method(layer={needs.layer}): the model has {layers} layers, and 0 for its embeddings")


def name_of(method):
    """What a run of this method is called: the function's name; in a copy of icu.py that kept that name, the copy's."""
    return method.__name__ if method.__name__ != "icu" else Path(file_of(method)).stem


def method_named(name, own, others):
    """`own`, a script's method, or the one of the module `others` that is called `name`.

    A method is a function that carries its `needs`. ValueError names the nearest.
    """
    if name == name_of(own):
        return own if hasattr(own, "needs") else method()(own)
    found = {key: value for key, value in vars(importlib.import_module(others)).items() if hasattr(value, "needs")}
    try:
        return found[one_of([name_of(own), *found])(name)]
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"--method: {error}") from None
