"""What hangs on a loss so that icu.py's loop can run it under any name, and how a name finds it."""

import argparse
import contextlib
import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kit.flags import one_of
from kit.protocols import PROTOCOLS


class method(NamedTuple):
    """What a loss needs from the rest: `@method(...)` hangs it on the loss, whose name then means nothing.

    A loss is a function of a Batch and the flags; it returns its terms, {"name": (weight, value)}, and their weighted
    sum is minimised.
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
    layer: int | None = None  # sides also have hidden states: of this layer, 0 the embeddings'
    sides: dict = {}  # further sides: {name: make(samples, tokenizer, epoch, args) -> a list of Text for each sample}
    # what happens around it
    prepare: Callable = lambda model, args: None  # before training: freeze weights, put in adapters
    # a generator that makes the weights those to measure and export, yields, and makes them those to train again
    measured: Callable = lambda model: iter([None])
    published: str | None = None  # the row of Tables 1 and 4 that it computes under the released protocol

    def __call__(self, loss):
        loss.needs = self
        return loss

    def fill(self, args):
        """The flags that the user has not set get the method's defaults, and the protocol's."""
        protocol = PROTOCOLS[args.protocol]
        defaults = self._asdict() | (self.released if protocol.own_defaults else {})
        for name in ("forget_weight", "alpha", "beta", "lr", "refine"):
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
