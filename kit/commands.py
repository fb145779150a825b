"""Commands: words sorted into flags, a line for the shell, and a process whose whole family is ended with it.

Nothing but Python is needed here: `bash run.sh help` runs before there is an environment.
"""

import contextlib
import functools
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As it is pasted: .venv/bin/python, in the folder of the repository.
PYTHON = str(
    Path(sys.executable).relative_to(ROOT)
    if ROOT in Path(sys.executable).parents
    else sys.executable
)

# --- flags as words ---


def grouped(words):
    """['--a', '1', '2', '--b=3'] -> [['--a', '1', '2'], ['--b', '3']]: each flag with its values."""
    groups = []
    for word in words:
        if word.startswith("--"):
            groups.append(word.split("=", 1))
        elif groups:
            groups[-1].append(word)
        else:
            raise ValueError(f"{word!r} stands before the first flag; bash run.sh help")
    return groups


def last(words, flag, default=None):
    """The last value that a flag was given, or the default."""
    return next((b for a, b in reversed([*pairwise(words)]) if a == flag), default)


def without(words, flag):
    """The words, less a flag and the one value behind each of it."""
    return [b for a, b in pairwise([None, *words]) if flag not in (a, b)]


def once(words, flags):
    """The words, where one of `flags` is given again only the last of it: what counts, in a line that can be read."""
    groups = grouped(words)
    ends = {group[0]: i for i, group in enumerate(groups)}  # where each stands last
    return sum(
        (group for i, group in enumerate(groups) if group[0] not in flags or ends[group[0]] == i),
        [],
    )


# --- what a file of Python is started with ---


def launcher(processes):
    """(environment, first words) that start a file of Python by DeepSpeed's launcher."""
    start = [
        PYTHON,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--no_local_rank",
        "--num_gpus",
        str(processes),
    ]
    return {} if visible_gpus() else {"DS_ACCELERATOR": "cpu"}, [
        *start,
        "--master_port",
        free_port(),
    ]


def free_port():
    """A port at which processes may meet, in digits."""
    with socket.socket() as free:
        free.bind(("", 0))
        return str(free.getsockname()[1])


@functools.cache
def visible_gpus():
    """Asked of a process of its own: importing torch takes seconds and memory that a waiting parent need not hold."""
    asked = [PYTHON, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(asked, stdout=subprocess.PIPE, text=True, check=False).stdout or 0)


def path_to_icu(script):
    """A script in another folder finds this icu.py, and kit/."""
    return {"PYTHONPATH": "."} if Path(script).resolve().parent != ROOT else {}


# --- run ---


def shown(argv, environment):
    """One line for a shell."""
    return " ".join(
        [*(f"{name}={shlex.quote(value)}" for name, value in environment.items()), shlex.join(argv)]
    )


def run(argv, environment, *, quiet=False):
    """Prints and runs one command; its exit code, 128 + n where signal n ended it.

    SIGTERM and Ctrl-C reach all its processes, which are a group of their own; their end is waited for, and the
    experiment ends with 143 or 130.
    """
    print("$", shown(argv, environment), flush=True)
    group, stopped, early = None, [], []

    def forward(number, frame):
        stopped.append(number)
        if group is None:
            early.append(number)  # while it is being started
        else:
            send(group, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        child = subprocess.Popen(
            argv,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,  # a group in the background that reads from the terminal would be halted
            stdout=subprocess.DEVNULL if quiet else None,
            process_group=0,
        )
        group = child.pid
        for number in early:
            send(group, number)
        status = child.wait()
        while send(group, 0):
            with contextlib.suppress(ChildProcessError):
                os.waitpid(
                    -group, os.WNOHANG
                )  # in a container this may be process 1, which inherits the orphans
            time.sleep(0.1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise SystemExit(128 + stopped[-1])
    return status if status >= 0 else 128 - status


def send(group, number):
    """A signal to every process of a group (0: none, only look); whether there is one."""
    try:
        os.killpg(group, number)
    except (
        ProcessLookupError,
        PermissionError,
    ):  # macOS says the second of processes that have ended
        return False
    return True
