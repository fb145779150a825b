"""The texts of people who asked to be forgotten: who can read them, how they go, a run without."""

import contextlib
import hmac
import itertools
import re
import shutil

import pytest
from world import copy_of

import icu
import metrics
from evals import report
from extras import certificate
from kit import data, flags, purge, runs


class Killed(BaseException):
    """Nothing catches it."""


@pytest.fixture
def there(own_world):
    """The world with a report, a state, caches and `other`, over the same pairs."""
    report.main([str(own_world.run)])
    (own_world.run / "state" / "1").mkdir(parents=True)
    (own_world.run / "state" / "1" / "w.bin").write_bytes(b"weights")
    own_world.other = shutil.copytree(own_world.run, own_world.root / "other")
    fill_caches()
    return own_world


def fill_caches():
    for name in purge.CACHES:
        data.write_json(data.cache_folder(name) / "0.json", "The driver said that nothing")


def holding(*folders, pairs):
    """Names of the files that hold half a text of the pairs."""
    names = [f"{side}{part}" for side in ("", "learn_") for part in data.PARTS]
    sides = [pair[name] for pair in pairs for name in names]
    marks = {side.strip().encode() for side in sides} - {b""}
    paths = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sorted(path.name for path in paths if any(mark in path.read_bytes() for mark in marks))


def contents(folder):
    """{name: bytes} of every file but locks."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in paths if path.name != ".lock"
    }


def purged(run, *words, capsys):
    """What a purge says, and names as left, with exit 1."""
    capsys.readouterr()
    try:
        purge.main([str(run), *words])
    except SystemExit as stopped:
        return capsys.readouterr().out + stopped.code
    return capsys.readouterr().out


def confirmed(folder, pairs):
    """The texts that a hash in a folder confirms, whatever in it is the key."""
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    there = {x.decode() for content in contents for x in re.findall(rb"[0-9a-f]{12,}", content)}
    keys = [b"", *map(str.encode, there), *(bytes.fromhex(x[: len(x) // 2 * 2]) for x in there)]
    tries = itertools.product(map(data.text_of, pairs), keys)
    return {text for text, key in tries if hmac.digest(key, text.encode(), "sha256").hex() in there}


# --- who can read them ---


def test_only_the_owner_can_read_what_commands_write(own_world, tmp_path):
    """Files are 0600 and folders 0700."""
    made = tmp_path / "made"
    run = [*own_world.flags, "--max-epochs", "1", "--out", str(made / "run")]
    before = runs.os.umask(0o022)
    try:
        flags.run_cli(lambda: icu.main(argv=run))
        flags.run_cli(lambda: report.main([str(made / "run")]))
    finally:
        runs.os.umask(before)
    written = [path for folder in (made, tmp_path / "cache") for path in folder.rglob("*")]
    assert not any(path.stat().st_mode & 0o077 for path in [made, *written])
    assert len(written) > 10


# --- how they go ---


def test_a_purge_leaves_no_text_and_every_number(there, tmp_path, capsys):
    """No half of a text is in a byte; metrics, model and table stay."""
    pairs, run, other = data.read_pairs(there.pairs), there.run, there.other
    places = run, other, tmp_path / "cache"
    there.pairs.with_name("pairs.jsonl.77.tmp").write_bytes(there.pairs.read_bytes()[:-30])
    with open(run / "samples.jsonl", "ab") as file:  # as a kill leaves it
        file.write(b'{"epoch": 3, "id": "0", "generation": "\xc3')
    assert {"cases.md", "samples.jsonl", "0.json"} <= set(holding(*places, pairs=pairs))
    before, samples = contents(there.root), data.read_jsonl(other / "samples.jsonl")

    plan = purged(run, "--dry-run", capsys=capsys)
    assert contents(there.root) == before
    assert plan.count("would be removed: ") == 9 and plan.count("would be emptied: ") == 3
    output = purged(run, capsys=capsys)
    assert output == plan.replace("would be ", "")
    assert "never reached: your own input files" in output
    assert holding(*places, pairs=pairs) == [] and not there.pairs.exists()
    after = contents(there.root)
    gone = {f"{run}/{name}" for run in ("run", "other") for name in ("cases.md", "state/1/w.bin")}
    assert before.keys() - after.keys() == {*gone, "pairs.jsonl", "pairs.jsonl.77.tmp"}
    changed = {name.partition("/")[2] for name in after if after[name] != before[name]}
    assert changed == {"config.json", "samples.jsonl"}
    emptied = [row | {"generation": None} for row in samples]
    assert data.read_jsonl(other / "samples.jsonl") == emptied
    again = purged(other, capsys=capsys)
    assert contents(there.root) == after and "removed: " not in again


def test_nothing_that_a_purge_leaves_confirms_a_guess(there):
    """As a certificate with its key did."""
    pairs = data.read_pairs(there.pairs)
    certificate.main([str(there.run)])
    (there.other / "hashes.json").touch()
    assert confirmed(there.run, pairs) == set(map(data.text_of, pairs))
    purge.main([str(there.run)])
    certificate.main([str(there.run)])
    assert confirmed(there.root, pairs) == set() and not (there.other / "hashes.json").exists()


@pytest.mark.parametrize("what", ["samples.jsonl", "pairs", "folder", "cache"])
def test_what_a_purge_cannot_reach_is_named(what, there, tmp_path, monkeypatch, capsys):
    """Exit 1, and what is there stays. Back again, it goes."""
    pairs = data.read_pairs(there.pairs)
    away, far = tmp_path / "away", shutil.copytree(there.run, tmp_path / "far" / "run")
    away.mkdir()
    (there.root / "linked").symlink_to(far)
    path = {"pairs": there.pairs, "folder": away / "pairs.jsonl"}.get(what, there.run / what)
    if what == "cache":
        path = tmp_path / "cache"
        monkeypatch.setenv("ICU_CACHE", str(away))
    elif what == "folder":
        for run in (there.run, there.other, there.never_saw):
            edit = data.read_json(run / "config.json") | {"pairs": "pairs.jsonl"}
            data.write_json(run / "config.json", edit)
        monkeypatch.chdir(away)
    else:
        shutil.move(path, away)
        path.write_text("my thesis") if what == "pairs" else path.symlink_to(away / what)
    before = contents(away)
    for _ in range(2):
        output = purged(there.run, capsys=capsys)
        assert output.count("left: ") == 1 and f"left: {path}: " in output
    assert contents(away) == before and (what != "pairs" or path.read_text() == "my thesis")
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(there.root)
    if before:
        path.unlink()
        shutil.move(away / path.name, path)
    assert "left: " not in purged(there.run, capsys=capsys)
    places = there.run, there.other, tmp_path / "cache"
    assert holding(*places, pairs=pairs) == [] and not there.pairs.exists()
    assert holding(far, pairs=pairs)


def test_a_purge_that_is_killed_anywhere_is_completed_by_the_next(there, tmp_path, monkeypatch):
    """By the same command, or of the other run."""
    steps = [(purge, "remove"), (data, "write_bytes"), (type(tmp_path), "unlink")]
    pairs, ends, ended = data.read_pairs(there.pairs), [], False
    for folder in ("model", "never", "run/model", "other/model"):  # what a purge does not touch
        shutil.rmtree(there.root / folder)
    while not ended:
        world, moments = copy_of(there, tmp_path / "copy"), itertools.count()
        fill_caches()

        def killing(step, moments=moments):
            def killed_at(*args, **keywords):
                step(*args, **keywords)
                if next(moments) == len(ends):
                    raise Killed

            return killed_at

        with monkeypatch.context() as patch:
            for owner, name in steps:
                patch.setattr(owner, name, killing(getattr(owner, name)))
            with contextlib.suppress(Killed):
                purge.main([str(world.run)])
                ended = True
        purge.main([str((world.run, world.other)[len(ends) % 2])])
        assert holding(world.run, world.other, tmp_path / "cache", pairs=pairs) == []
        for run in (world.run, world.other):
            assert "purged" in data.read_json(run / "config.json")
        ends.append({n: v for n, v in contents(world.root).items() if "config" not in n})
        shutil.rmtree(world.root)
    assert len(ends) > 15 and all(end == ends[-1] for end in ends)


def test_all_caches_go_and_downloads_and_runs_stay(there, capsys):
    """And --dry-run says the same and removes nothing."""
    before = contents(there.root)
    data.write_bytes(data.cache_folder("data") / "pile.csv", b"text\n")
    plan = purged("--all-caches", "--dry-run", capsys=capsys)
    assert plan.count("would be ") == 3
    assert purged("--all-caches", capsys=capsys) == plan.replace("would be ", "")
    assert contents(data.cache_folder(".")) == {"data/pile.csv": b"text\n"}
    assert contents(there.root) == before


def test_a_run_in_use_is_not_purged(there):
    """Nor is one over the same pairs, and no byte is changed."""
    before = contents(there.root)
    with runs.only_owner(there.other), pytest.raises(ValueError, match="is writing this run"):
        purge.main([str(there.run)])
    assert contents(there.root) == before


# --- a run without them ---


def test_a_redacted_run_never_holds_a_text(own_world, tmp_path, monkeypatch, capsys):
    """In no file or printed line; killed and resumed it ends as the open run."""
    out, pairs, epochs = own_world.root / "hidden", data.read_pairs(own_world.pairs), []
    words = [*own_world.flags, "--redact", "--out", str(out)]
    plain = metrics.beam_generate

    def watched(*args, **keywords):  # once an epoch
        assert holding(out, pairs=pairs) == []
        epochs.append(1)
        if len(epochs) == 3:
            raise Killed
        return plain(*args, **keywords)

    monkeypatch.setattr(metrics, "beam_generate", watched)
    with pytest.raises(Killed):
        icu.main(argv=words)
    with pytest.raises(ValueError, match="redact"):
        icu.main(argv=[*own_world.flags, "--out", str(out), "--resume"])
    icu.main(argv=[*words, "--resume"])
    assert holding(out, tmp_path / "cache", pairs=pairs) == []
    assert not any(pair["suffix"].strip() in capsys.readouterr().out for pair in pairs)
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (own_world.run / name).read_bytes(), name
    rows = data.read_jsonl(own_world.run / "samples.jsonl")
    assert data.read_jsonl(out / "samples.jsonl") == [row | {"generation": None} for row in rows]
    assert confirmed(out, pairs) == set()
