"""Damaged input files: every reader returns or raises a clean error, and leaves nothing behind.

    python -m pytest tests/test_fuzz.py -q

A few seconds a kind, the same inputs every time; `python tests/fuzz.py --inputs 100000` reads many more.
"""

import random

import fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import icu
from kit import data, runs

INPUTS = {"pairs": 250, "jsonl": 250, "csv": 250, "npy": 250, "unicode": 250, "run": 250}
INPUTS |= {"config": 150, "model": 60, "folder": 60, "state": 100, "signed": 100}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Good files of every kind."""
    return fuzz.Kinds(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("kind", fuzz.Kinds.NAMES)
def test_a_damaged_file_is_read_or_refused(kind, kinds):
    """ValueError or OSError with a message, or a result; no other exception, and no file made or changed."""
    ends = set()

    @settings(
        max_examples=INPUTS[kind],
        deadline=None,
        derandomize=True,
        suppress_health_check=HealthCheck,
    )
    @given(rng=st.randoms(use_true_random=False))
    def read(rng):
        ends.add(kinds.attempt(kind, rng))

    read()
    assert ends == {"read", "refused"}  # damage that is never seen, or always, would prove nothing


def test_good_files_are_read(kinds, monkeypatch):
    """Without damage every reader returns."""
    monkeypatch.setattr(fuzz, "damage", lambda data, rng: data)
    assert {kind: kinds.attempt(kind, random.Random(0)) for kind in kinds.NAMES} == dict.fromkeys(
        kinds.NAMES, "read"
    )


def test_the_fuzzer_notices_a_reader_that_is_not_clean(kinds, monkeypatch):
    """A reader that raises KeyError, and one that leaves a file, are failures."""
    monkeypatch.setattr(data, "read_records", lambda path: {}["x"])
    with pytest.raises(KeyError):
        kinds.attempt("csv", random.Random(0))
    monkeypatch.setattr(runs, "check_resume", lambda args: (kinds.folder / "run" / "half").touch())
    with pytest.raises(AssertionError, match="made or removed a file"), monkeypatch.context():
        kinds.attempt("config", random.Random(0))
    (kinds.folder / "run" / "half").unlink()


def test_a_refused_file_leaves_no_run(kinds):
    """icu.py itself with damaged pairs: ValueError before a weight is loaded or a folder made."""
    rng, refused, out = random.Random(0), 0, kinds.folder / "never"
    while refused < 5:
        path = kinds.damaged("damaged.jsonl", kinds.pairs, rng)
        try:
            data.read_pairs(path)
        except fuzz.CLEAN as expected:
            refused += 1
            with pytest.raises(type(expected)) as raised:
                flags = [
                    "--pairs",
                    str(path),
                    "--model",
                    kinds.args.model,
                    "--bert",
                    "minilm",
                    "--out",
                    str(out),
                ]
                icu.main(argv=flags)
            assert str(raised.value) == str(expected) and not out.exists()
