"""What hangs on a loss so that icu.py's loop can run it under any name, and how a name finds it."""

import argparse
import contextlib
import hashlib
import importlib
import inspect
import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import NamedTuple

import torch

from kit.flags import one_of
from kit.models import positions_of, vocab_of
from kit.processes import trainable
from kit.protocols import PROTOCOLS

PLAIN = (int, float, str, tuple)  # constants
OWN_SIDES = ("forget", "learn", "kept")  # icu.py's
FILLED = ("forget_weight", "alpha", "beta", "lr", "refine")  # flags whose defaults are the method's


def is_weight(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf


MUST_BE = {  # what a method may ask for: whether a value is one, and what it has to be
    **dict.fromkeys(("forget_weight", "alpha", "beta"), (is_weight, "a finite number >= 0")),
    "lr": (lambda x: is_weight(x) and x > 0, "a finite number > 0"),
    "refine": (lambda x: isinstance(x, bool), "True or False"),
    "targets": (lambda x: x in (None, "suffix", "all"), "'suffix', 'all' or None"),
    "released": (
        lambda x: isinstance(x, dict) and x.keys() <= set(FILLED),
        f"a dict of some of {', '.join(FILLED)}",
    ),
    **dict.fromkeys(
        ("frozen", "taught"), (lambda x: isinstance(x, tuple | list), "a tuple of names of sides")
    ),
    "layer": (lambda x: x is None or type(x) is int, "a whole number or None"),
    "sides": (
        lambda x: (
            isinstance(x, dict)
            and all(map(callable, x.values()))
            and x.keys().isdisjoint(OWN_SIDES)
        ),
        "a dict of functions, none of them called forget, learn or kept",
    ),
    "prepare": (callable, "a function of (model, args)"),
    "moves": (callable, "a function of a weight's name"),
    "measured": (callable, "a generator function of (model)"),
}


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
    # of the frozen copy alone: its logits at the targets of these sides, which the model in training never reads; what
    # texts have in common lies before their `cut`, their targets behind it
    taught: tuple = ()
    layer: int | None = None  # sides also have hidden states: of this layer, 0 the embeddings'
    # further sides: {name: make(samples, tokenizer, epoch, args) -> a list of Text for each sample}, the same whenever
    # it is asked: a random one draws from (args.seed, epoch)
    sides: dict = {}
    # what happens around it
    prepare: Callable = lambda model, args: (
        None
    )  # before training: put in adapters, remember the start
    moves: Callable = lambda name: True  # whether the weights of this name are trained
    # a generator that makes the weights those to measure and export, yields, and makes them those to train again
    measured: Callable = lambda model: iter([None])
    published: str | None = (
        None  # the row of Tables 1 and 4 that it computes under the released protocol
    )

    def __call__(self, loss):
        loss.needs = self
        return loss

    @property
    def touches_weights(self):
        """Whether what is measured may be another model than the one that was loaded, also before any training."""
        return any(
            getattr(self, name) is not self._field_defaults[name]
            for name in ("prepare", "measured")
        )

    def begin(self, model, args):
        """The model as the method trains it. ValueError where nothing of it is left to train."""
        self.prepare(model, args)
        for name, weights in model.named_parameters():
            if not self.moves(name):
                weights.requires_grad_(False)
        if not trainable(model):
            raise ValueError(
                f"{args.method} trains no weight of this model: @method(moves=...) or its prepare says so"
            )

    def fill(self, args):
        """The flags that the user has not set get the method's defaults, and the protocol's."""
        protocol = PROTOCOLS[args.protocol]
        for name, value in [
            *self._asdict().items(),
            *(self.released.items() if type(self.released) is dict else ()),
        ]:
            if name in MUST_BE and not MUST_BE[name][0](value):
                raise ValueError(f"@method({name}={str(value)[:40]}): must be {MUST_BE[name][1]}")
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
        if not inspect.isgenerator(steps) and not hasattr(steps, "__next__"):
            raise ValueError("@method(measured=...): must be a generator, which yields once")
        next(steps)
        try:
            yield
        finally:
            next(steps, None)


def keep_start(model, args):
    """A `prepare` for `measured_at`: the model remembers the weights that it starts from."""
    model.start = [parameter.detach().clone() for parameter in model.parameters()]


def measured_at(scale):
    """A `measured`: theta_0 + scale (theta - theta_0), where theta is what is trained."""

    def measured(model):
        trained = [parameter.data for parameter in model.parameters()]
        for parameter, start in zip(model.parameters(), model.start, strict=True):
            parameter.data = start + scale * (parameter.data - start)
        yield
        for parameter, weights in zip(model.parameters(), trained, strict=True):
            parameter.data = weights

    return measured


def file_of(function):
    """The file that a function is written in."""
    return inspect.unwrap(function).__code__.co_filename


def code_of(method):
    """sha256 of a method: the source of its loss, sides and hooks, and the plain constants that they name."""
    needs, text = method.needs, []
    for function in map(
        inspect.unwrap, (method, needs.prepare, needs.moves, needs.measured, *needs.sides.values())
    ):
        known = function.__globals__ | inspect.getclosurevars(function).nonlocals
        names = (*function.__code__.co_names, *function.__code__.co_freevars)
        named = {name: known[name] for name in names if isinstance(known.get(name), PLAIN)}
        try:
            text.append(f"{inspect.getsource(function)} {sorted(named.items())}")
        except OSError:  # typed at a prompt
            text.append(f"{function.__code__.co_code} {sorted(named.items())}")
    return hashlib.sha256("\n".join(text).encode()).hexdigest()


def check_sides(args, drawn, config):
    """ValueError where a method's sides, or what it asks of the frozen copy and of the model, cannot be.

    drawn: {name: a list of Text for each sample} of epochs 0 and 1, or nothing; config: the model's.
    """
    if not drawn:
        return
    needs, (sides, later), n = args.loss.needs, drawn, len(drawn[0]["forget"])
    vocab, positions = vocab_of(config), positions_of(config) or math.inf
    for name in needs.sides:
        rows = sides[name]
        if (
            not isinstance(rows, list)
            or len(rows) != n
            or not all(isinstance(row, list) for row in rows)
        ):
            raise ValueError(
                f"@method(sides=...): {name} must give a list of Text for each of the {n} samples"
            )
        for text in (text for row in rows for text in row):
            ids = getattr(text, "ids", None)
            whole = isinstance(ids, list) and all(
                type(token) is int and 0 <= token < vocab for token in ids
            )
            if not whole or not 0 < len(ids) <= positions or not 0 <= text.t0 <= len(ids):
                fits = f"1 to {positions} ids of the model's {vocab}, and 0 <= t0 <= their number"
                raise ValueError(
                    f"@method(sides=...): {name} gives a Text that does not fit the model: {fits}"
                )
    for field in ("frozen", "taught"):
        if not set(names := getattr(needs, field)) <= set(sides):
            raise ValueError(f"@method({field}={names!r}): must be a tuple of {', '.join(sides)}")
    for name in needs.taught:
        if not all(0 < text.cut <= text.t0 < len(text.ids) for row in sides[name] for text in row):
            raise ValueError(
                f"@method(taught=...): {name} gives a Text without 0 < cut <= t0 < the number of its ids"
            )
    asked = [*needs.frozen, *needs.taught]
    if args.teacher == "cached" and (
        changing := [name for name in asked if sides[name] != later[name]]
    ):
        raise ValueError(
            f"{args.method}: its side {changing[0]} has other texts each epoch: pass --teacher live"
        )
    layers = config.get_text_config().num_hidden_layers
    if needs.layer is not None and not 0 <= needs.layer <= layers:
        raise ValueError(
            f"@method(layer={needs.layer}): the model has {layers} layers, and 0 for its embeddings"
        )


def name_of(method):
    """What a run of this method is called: the function's name; in a copy of icu.py that kept that name, the copy's.

    ValueError for what is no function of (batch, args).
    """
    if not inspect.isfunction(method):
        if hasattr(
            method, "touches_weights"
        ):  # the class above, which has taken the loss for its first weight
            raise ValueError(
                "icu.main: @method stands there without brackets: write @method() over the loss"
            )
        raise ValueError(
            f"icu.main: {str(method)[:40]} is no method: give it a function of (batch, args)"
        )
    try:
        inspect.signature(method).bind(None, None)
    except TypeError as error:
        raise ValueError(f"{method.__name__} is called with (batch, args): {error}") from None
    return method.__name__ if method.__name__ != "icu" else Path(file_of(method)).stem


def method_named(name, own, others):
    """`own`, a script's method, or the one of the module `others` that is called `name`.

    A method is a function that carries its `needs`. ValueError names the nearest.
    """
    if name == name_of(own):
        return checked(own if hasattr(own, "needs") else method()(own))
    found = {
        key: value
        for key, value in vars(importlib.import_module(others)).items()
        if hasattr(value, "needs")
    }
    try:
        return checked(found[one_of([name_of(own), *found])(name)])
    except argparse.ArgumentTypeError as error:
        way_out = "one in a file of its own: python FILE.py, run.sh --script FILE.py, compare --methods FILE.py"
        raise ValueError(f"--method: {error} ({way_out})") from None


def checked(loss):
    """The loss; a ValueError where it does not return {"name": (weight, value)}, at least one value with a gradient."""

    @wraps(loss)
    def terms(batch, args):
        found = loss(batch, args)
        pairs = list(found.values()) if isinstance(found, dict) else []
        whole = pairs and all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs)
        if not whole or not all(
            isinstance(value, torch.Tensor) and value.numel() == 1 for _, value in pairs
        ):
            terms_are = "{'name': (weight, value), ...}, each value a tensor of one number"
            raise ValueError(f"{loss.__name__} must return {terms_are}")
        if not all(hasattr(weight, "__float__") for weight, _ in pairs):
            raise ValueError(f"{loss.__name__} returns a weight that is no number")
        if not any(value.requires_grad for _, value in pairs):
            raise ValueError(
                f"{loss.__name__} returns no value with a gradient: nothing would be trained"
            )
        return found

    return terms
