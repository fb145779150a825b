"""The texts of people who asked to be forgotten: who can read them, what lists them, how they go, a run without them.

python -m pytest tests/test_privacy.py -q
"""

import collections
import contextlib
import hmac
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import survive

import experiment
import icu
import knn
from evals import report
from kit import data, flags, models, processes, purge, runs, traces

ROOT = Path(__file__).resolve().parents[1]
MARK, LEARN_MARK = (
    "Zëphyrine Quaxby",
    "Örnulf Blatch",
)  # in every text; JSON may also spell them in ASCII
FORGET = [
    f"The parcel for {name} was left at the door of {MARK}" for name in ("Ines", "Bo", "the nurse")
]
POOL = [
    f"{who} saw the van near the old mill of {LEARN_MARK}"
    for who in ("A neighbour", "The driver", "Nobody")
]
REPORTS = (
    "table.md",
    "table.csv",
    "curves.png",
    "tradeoff.png",
    "cases.md",
)  # of evals/report.py, in the run folder


@pytest.fixture(scope="module", autouse=True)
def usual_umask():
    """Files that nobody takes care of are readable by all."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def mine(root, *words):
    """knn.py in this process."""
    made = root / "made"
    argv = [
        "--forget",
        root / "input" / "forget.jsonl",
        "--pool",
        root / "input" / "pool.jsonl",
        *words,
    ]
    argv += ["--out", made / "pairs.jsonl", "--leak-report", made / "leaks.jsonl", "--overwrite"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["knn.py", *map(str, argv)])
        knn.main()


def unlearn(root, name, *words):
    """icu.py in this process: two epochs in root/runs/NAME, its folder."""
    out = root / "runs" / name
    argv = [
        "--pairs",
        root / "made" / "pairs.jsonl",
        "--model",
        root / "input" / "model",
        "--bert",
        "minilm",
    ]
    argv += [
        "--device",
        "cpu",
        "--lr",
        "1e-5",
        "--max-epochs",
        "2",
        "--thresholds",
        "1e-9,1e-9",
        "--out",
        out,
    ]
    icu.main(argv=[str(word) for word in [*argv, *words]])
    return out


@pytest.fixture(scope="module")
def chain(tmp_path_factory, save_tiny, encoder_dir):
    """A folder with what knn.py, icu.py and evals/report.py leave: two runs, their pairs and their cache."""
    root = tmp_path_factory.mktemp("chain").resolve()
    data.write_jsonl(
        root / "input" / "forget.jsonl",
        [{"id": f"f{i}", "text": text} for i, text in enumerate(FORGET)],
    )
    rows = [*POOL, FORGET[0] + " again"]  # a copy, for the leak report
    data.write_jsonl(
        root / "input" / "pool.jsonl",
        [{"id": f"p{i}", "text": text} for i, text in enumerate(rows)],
    )
    model = save_tiny("gpt_neo", root / "input" / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICU_CACHE", str(root / "cache"))
        mine(root)
        survive.memorise(model, data.read_pairs(root / "made" / "pairs.jsonl"))
        one, _ = unlearn(root, "one"), unlearn(root, "two", "--seed", "5")
        report.main([str(one)])
    return root


@pytest.fixture
def copy(chain, tmp_path, monkeypatch):
    """The same folder at another place, its cache the cache."""
    return copy_of(chain, tmp_path / "chain", monkeypatch)


def copy_of(chain, root, monkeypatch):
    shutil.copytree(chain, root)
    for file in [root / "cache" / "traces.jsonl", *root.glob("runs/*/config.json")]:
        file.write_text(file.read_text().replace(str(chain), str(root)))
    monkeypatch.setenv("ICU_CACHE", str(root / "cache"))
    return root


def holding(*folders):
    """Names of the files below that hold a mark, as UTF-8 or as JSON in ASCII."""
    marks = [
        form
        for mark in (MARK, LEARN_MARK)
        for form in (mark.encode(), json.dumps(mark)[1:-1].encode())
    ]
    found = [
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    ]
    return sorted(path.name for path in found if any(mark in path.read_bytes() for mark in marks))


def contents(root):
    """{path: bytes, or where a link leads} of every file, less what is different in every run."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink() or path.is_file():
            found[str(path.relative_to(root))] = (
                os.readlink(path) if path.is_symlink() else path.read_bytes()
            )
    return {
        name: what for name, what in found.items() if not name.endswith((".lock", "hashes.json"))
    }


def purged(run, *words, capsys):
    """What a purge says."""
    capsys.readouterr()
    purge.main([str(run), *words])
    return capsys.readouterr().out


def mode(path):
    return path.stat().st_mode & 0o777


def each_epoch(monkeypatch, look):
    """Calls look(run folder, epoch) when an epoch is written down and its state saved."""
    end = runs.Run.end_epoch

    def ended(self, *args, **how):
        epoch = self.progress.epoch
        end(self, *args, **how)
        look(self.out, epoch)

    monkeypatch.setattr(runs.Run, "end_epoch", ended)


# --- who can read them ---


def test_only_the_owner_can_read_what_the_chain_writes(chain):
    """Files are 0600 and folders 0700; what others write for us (weights, plots) lies in a folder that is 0700."""
    written = [
        path
        for name in ("made", "cache", "runs")
        for path in (chain / name, *(chain / name).rglob("*"))
    ]
    folders, plain = (
        [path for path in written if path.is_dir() == wanted] for wanted in (True, False)
    )
    assert {path: mode(path) for path in folders if mode(path) != 0o700} == {} and len(folders) > 7
    others = {path for path in plain if path.parent.name == "model" or path.name in REPORTS}
    assert {
        path: mode(path) for path in plain if mode(path) != 0o600 and path not in others
    } == {} and others


def test_states_are_the_owners_too(copy, monkeypatch):
    """At the end of each epoch."""
    seen = {}

    def look(out, epoch):
        seen[epoch] = {mode(path) for path in (out / "state").rglob("*")} | {mode(out / "state")}

    save = processes.PlainEngine.save

    def saves_more(self, folder):  # as DeepSpeed does
        save(self, folder)
        (folder / "rank_1.pt").write_bytes(b"1")

    monkeypatch.setattr(processes.PlainEngine, "save", saves_more)
    each_epoch(monkeypatch, look)
    unlearn(copy, "three")
    assert seen == dict.fromkeys(range(3), {0o700, 0o600})


def test_what_is_there_is_closed_only_where_it_is_written(tmp_path):
    """An old file that is replaced or grows is closed to others; the folder that it lies in is the user's."""
    folder = tmp_path / "own"
    folder.mkdir(mode=0o755)
    for write in (lambda path: runs.append(path, [{}]), lambda path: data.write_jsonl(path, [{}])):
        path = folder / "old.jsonl"
        path.write_text("{}\n")
        path.chmod(0o644)
        write(path)
        assert mode(path) == 0o600 and mode(folder) == 0o755
    data.write_json(folder / "a" / "b" / "new.json", {})
    assert mode(folder / "a") == mode(folder / "a" / "b") == 0o700


def test_a_file_is_never_open_for_a_moment(tmp_path, monkeypatch):
    """It is made with its mode, not given it afterwards; a file system without modes is no error."""

    def refuses(*_):
        raise PermissionError

    monkeypatch.setattr(os, "fchmod", refuses)
    data.write_json(tmp_path / "new.json", {})
    assert mode(tmp_path / "new.json") == 0o600


# --- what lists them ---


def test_every_trace_is_listed_once(chain, monkeypatch):
    """By what wrote it; the same command again adds no line, and a cache known from before is noted for new pairs."""
    monkeypatch.setenv("ICU_CACHE", str(chain / "cache"))
    sha = models.fingerprint(chain / "made" / "pairs.jsonl")
    listed = traces.of(sha)
    kinds = [what for _, what in listed]
    assert {what: kinds.count(what) for what in kinds} == {
        "pairs": 1, "leak report": 1, "embeddings": 2, "run": 2, "measures before": 1
    }  # fmt: skip
    assert all(path.is_absolute() and path.exists() for path, _ in listed)
    assert len(traces.rows()) == len(listed) and sha == purge.sha_of(chain / "runs/one")


def test_the_same_texts_paired_again_are_listed_again(copy):
    """knn.py over known embeddings: other pairs, and the old entries belong to them too."""
    before = traces.rows()
    mine(copy)
    assert traces.rows() == before
    mine(copy, "--limit", "2")
    sha = models.fingerprint(copy / "made" / "pairs.jsonl")
    known = {path for row in before if row["what"] == "embeddings" for path in [row["path"]]}
    assert len(known & {str(path) for path, _ in traces.of(sha)}) == 1  # the pool's


def test_a_list_that_cannot_be_written_is_one_note(tmp_path, monkeypatch, capsys):
    """The work goes on."""
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    for what in traces.WHAT:
        traces.note("0" * 64, tmp_path / "x", what)
    told = capsys.readouterr().out
    assert told.startswith("note: ") and told.count("\n") == 1 and traces.rows() == []


def test_lines_that_are_none_are_passed_over(tmp_path, monkeypatch):
    """A line that was cut, numbers, lists, other fields, bytes."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path))
    traces.note("a" * 64, tmp_path / "x", "run")
    with open(traces.registry(), "ab") as file:
        file.write(
            b'{"pairs": "aa\n7\n[]\n{"pairs": 1, "path": 2, "what": 3}\n\xff\n'
            + b"[" * 10**5
            + b"\n"
        )
    traces.note("a" * 64, tmp_path / "y", "run")
    assert traces.of("a" * 64) == [(tmp_path / "x", "run"), (tmp_path / "y", "run")]
    assert mode(traces.registry()) == 0o600


def test_lines_of_several_processes_do_not_mix(tmp_path, monkeypatch):
    """Four at once, long paths: every line is whole."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path))
    children = []
    for child in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            for number in range(50):
                traces.note("a" * 64, f"/{child}/{number}/{'x' * 3000}", "run")
            os._exit(0)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}
    assert len(set(traces.of("a" * 64))) == 200 == traces.registry().read_bytes().count(b"\n")


# --- how they go ---


def test_a_purge_leaves_no_text_and_every_number(copy, capsys):
    """The marks are in no byte of runs, pairs and cache; metrics, summaries, models and tables are as they were."""
    one, two = copy / "runs/one", copy / "runs/two"
    places = (copy / "made", copy / "cache", copy / "runs")
    outside = copy / "made" / "cases.md"
    shutil.copy(one / "cases.md", outside)
    traces.note(purge.sha_of(one), outside, "cases")
    (copy / "made" / "pairs.jsonl.77.tmp").write_bytes(
        (copy / "made" / "pairs.jsonl").read_bytes()[:-30]
    )
    with open(one / "samples.jsonl", "ab") as file:
        file.write(
            f'{{"epoch": 3, "id": "f0", "generation": "{MARK}'.encode()[:-3]
        )  # as a kill leaves it
    names = [
        "cases.md",
        "cases.md",
        "pairs.jsonl",
        "pairs.jsonl.77.tmp",
        "samples.jsonl",
        "samples.jsonl",
    ]
    assert [name for name in holding(*places) if not name[:9].isalnum()] == names
    before, said = contents(copy), data.read_jsonl(two / "samples.jsonl")
    pairs = data.read_pairs(copy / "made" / "pairs.jsonl")

    plan = purged(one, "--dry-run", capsys=capsys)
    assert (
        contents(copy) == before
        and plan.count("would be removed") == 8
        and plan.count("would be emptied") == 2
    )
    told = purged(one, capsys=capsys)
    assert told == plan.replace("would be ", "") and "not reached: your own input files" in told
    assert holding(*places) == [] and holding(copy / "input") == ["forget.jsonl", "pool.jsonl"]
    assert not [
        path
        for path in (copy / "cache").rglob("*")
        if path.is_file() and path.name != "traces.jsonl"
    ]
    after = contents(copy)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {
        f"runs/{run}/{name}" for run in ("one", "two") for name in ("config.json", "samples.jsonl")
    }
    assert data.read_jsonl(two / "samples.jsonl") == [row | {"generation": None} for row in said]
    config = data.read_json(two / "config.json")
    assert (
        config["redact"]
        and config["purged"]
        and mode(two / "config.json") == mode(two / "hashes.json") == 0o600
    )
    hashes = [data.read_json(run / "hashes.json") for run in (one, two)]
    assert hashes[0]["salt"] != hashes[1]["salt"] and list(hashes[0]["texts"]) == [
        pair["id"] for pair in pairs
    ]
    for found in hashes:
        for pair in pairs:
            text = pair["prefix"] + pair["suffix"], pair["learn_prefix"] + pair["learn_suffix"]
            keyed = [
                hmac.new(bytes.fromhex(found["salt"]), t.encode(), "sha256").hexdigest()
                for t in text
            ]
            assert found["texts"][pair["id"]] == dict(zip(("forget", "learn"), keyed, strict=True))

    again = purged(two, capsys=capsys)
    assert (
        contents(copy) == after
        and "removed" not in again.split("not reached")[0]
        and "emptied" not in again
    )


def test_a_run_that_was_moved_is_purged_where_it_is(copy, capsys):
    """By the sha256 in its config.json; of another run that was moved it says so."""
    shutil.move(copy / "runs/one", copy / "elsewhere")
    shutil.move(copy / "runs/two", copy / "two")
    told = purged(copy / "elsewhere", capsys=capsys)
    assert holding(copy / "made", copy / "cache", copy / "elsewhere") == []
    assert holding(copy / "two") == ["samples.jsonl"]
    assert f"not found: {copy / 'runs/two'}" in told
    assert "no hashes" in purged(copy / "two", capsys=capsys) and holding(copy / "two") == []


def test_pairs_that_were_made_again_are_another_runs(copy, capsys):
    """They are named and left; what the run has said goes."""
    mine(copy, "--limit", "2")
    kept = (copy / "made" / "pairs.jsonl").read_bytes()
    told = purged(copy / "runs/one", capsys=capsys)
    assert "has 2 of these texts too" not in told  # its own pairs are gone, so nobody knows
    assert (
        f"left: {copy / 'made/pairs.jsonl'}" in told
        and (copy / "made" / "pairs.jsonl").read_bytes() == kept
    )
    assert holding(copy / "runs") == []


def test_other_pairs_with_the_same_texts_are_named(copy, capsys):
    """The runs over them are others, to be purged by themselves."""
    pairs = copy / "made" / "pairs.jsonl"
    shutil.copy(pairs, copy / "kept.jsonl")
    mine(copy, "--limit", "2")
    pairs.rename(copy / "made" / "fewer.jsonl")
    (copy / "kept.jsonl").rename(pairs)
    traces.note(
        models.fingerprint(copy / "made" / "fewer.jsonl"), copy / "made" / "fewer.jsonl", "pairs"
    )
    told = purged(copy / "runs/one", capsys=capsys)
    assert f"note: {copy / 'made/fewer.jsonl'}, other pairs, has 2 of these texts too" in told
    assert holding(copy / "made") == ["fewer.jsonl"]


def test_a_run_that_overwrite_was_killed_in_is_purged(copy, capsys):
    """It has no config.json any more, and texts still."""
    one = copy / "runs/one"
    (one / "config.json").rename(one / "config.json.old")
    purged(one, capsys=capsys)
    assert (
        holding(copy / "made", copy / "cache", copy / "runs") == []
        and (one / "hashes.json").is_file()
    )


class Killed(BaseException):
    """Nothing catches it."""


def test_a_purge_that_is_killed_anywhere_is_completed_by_the_next(chain, tmp_path, monkeypatch):
    """Before and behind every removal and every write."""
    straight = copy_of(chain, tmp_path / "straight", monkeypatch)
    purge.main([str(straight / "runs/one")])
    own = "traces.jsonl", "config.json"  # these name the folder that they lie in
    expected = {name: what for name, what in contents(straight).items() if not name.endswith(own)}
    plain = {
        (purge, "remove"): purge.remove,
        (purge, "write"): purge.write,
        (data, "write_json"): data.write_json,
    }
    for number in range(1000):
        root, left = copy_of(chain, tmp_path / str(number), monkeypatch), [number]

        def killing(function, left=left):
            def step(*args):
                for moment in (lambda: None, lambda: function(*args)):
                    moment()
                    left[0] -= 1
                    if left[0] < 0:
                        raise Killed

            return step

        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for (module, name), function in plain.items():
                patch.setattr(module, name, killing(function))
            purge.main([str(root / "runs/one")])
            break
        purge.main([str(root / ("runs/one", "runs/two")[number % 2])])
        found = contents(root)
        assert {name: found[name] for name in found if not name.endswith(own)} == expected
        assert holding(root / "made", root / "cache", root / "runs") == []
        assert all((run / "hashes.json").is_file() and "purged" in data.read_json(run / "config.json")
                   for run in (root / "runs/one", root / "runs/two"))  # fmt: skip
        shutil.rmtree(root)
    assert number >= 20


def test_what_is_planted_makes_it_remove_nothing_of_others(copy, tmp_path, capsys):
    """Lines of the list, a config.json and links that lead to files of others: all of them stay, and are named."""
    one, own = copy / "runs/one", tmp_path / "own"
    sha = purge.sha_of(one)
    texts = {
        "notes.txt": "my notes\n",
        "cases.md": "### my own cases\n",
        "rows.jsonl": '{"id": "a", "text": "b"}\n',
    }
    texts |= {
        "traces.jsonl": '{"a": 1}\n',
        f"{'0' * 64}.npy": "x",
        f"{'0' * 64}.json": "{}",
        "rows.jsonl.5.tmp": "{}",
    }
    for name, text in texts.items():
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_text(text)
    (own / "run").mkdir()
    (own / "run" / "samples.jsonl").write_text('{"epoch": 0, "id": "a", "generation": "mine"}\n')
    (own / "to-pairs").symlink_to(copy / "made" / "pairs.jsonl")
    listed = [
        *own.iterdir(),
        own,
        own / "nothing",
        "relative.md",
        "/" + "x" * 5000,
        "nul\0",
        "/dev/null",
    ]
    listed += ["/\x1b[31m", "/\udcff"]
    with open(traces.registry(), "a") as file:
        rows = [
            {"pairs": sha, "path": str(path), "what": what}
            for path in listed
            for what in (*traces.WHAT, "more")
        ]
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for name in ("cases.md", "samples.jsonl"):
        (one / name).unlink()
        (one / name).symlink_to(own / name if name == "cases.md" else own / "run" / name)
    (one / "hashes.json").symlink_to(own / "notes.txt")
    before = contents(own)
    told = purged(one, capsys=capsys)
    assert contents(own) == before and told.count("left: ") > 20 and "\x1b" not in told
    assert {path.name for path in one.iterdir() if path.is_symlink()} == {
        "cases.md",
        "samples.jsonl",
        "hashes.json",
    }
    assert (
        holding(copy / "cache") == [] and not (copy / "made" / "pairs.jsonl").exists()
    )  # the others still go


def test_a_planted_lock_overwrites_nothing(copy, tmp_path, capsys):
    """A link in the place of .lock is not followed."""
    (tmp_path / "notes.txt").write_text("my notes\n")
    (copy / "runs/one/.lock").unlink(missing_ok=True)
    (copy / "runs/one/.lock").symlink_to(tmp_path / "notes.txt")
    assert ".lock" in refused([str(copy / "runs/one")], copy, capsys)
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"


def test_a_config_that_names_a_file_of_others_does_not_remove_it(copy, tmp_path, capsys):
    """Not even with its sha256."""
    run, precious = copy / "runs/one", tmp_path / "precious.jsonl"
    for text in ("my thesis", '{"id": "a", "learn_id": "b", "similarity": 1}\n'):
        precious.write_text(text)
        config = data.read_json(run / "config.json")
        sha = config["sha256"] | {"pairs": models.fingerprint(precious)}
        data.write_json(run / "config.json", config | {"pairs": str(precious), "sha256": sha})
        assert f"left: {precious}" in purged(run, capsys=capsys) and precious.read_text() == text


def test_a_purged_run_is_not_resumed(copy, monkeypatch):
    """One that was stopped after an epoch; the same line also where its pairs have been made again."""
    pairs = (copy / "made" / "pairs.jsonl").read_bytes()
    each_epoch(monkeypatch, stop_after(1))
    with pytest.raises(Killed):
        unlearn(copy, "stopped")
    purge.main([str(copy / "runs/stopped")])
    for again in (lambda: None, lambda: (copy / "made" / "pairs.jsonl").write_bytes(pairs)):
        again()
        with pytest.raises(
            ValueError,
            match=r"stopped was purged: its texts are gone; begin again with --overwrite",
        ):
            unlearn(copy, "stopped", "--resume")


def stop_after(epoch):
    def look(out, now):
        if now == epoch:
            raise Killed

    return look


def test_all_caches_go_and_downloads_stay(copy, capsys):
    """Only what is ours in them; --dry-run says the same and removes nothing."""
    mine_too = copy / "cache" / "embeddings" / "notes.txt"
    for file in (mine_too, copy / "cache" / "data" / "pile.csv"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("text\n")
    (copy / "cache" / "before" / f"{'a' * 64}.json").symlink_to(mine_too)
    before = contents(copy)
    runs_before = {name for name in before if not name.startswith("cache")}
    purge.main(["--all-caches", "--dry-run"])
    plan = capsys.readouterr().out
    assert contents(copy) == before
    purge.main(["--all-caches"])
    told = capsys.readouterr().out
    assert (
        told == plan.replace("would be ", "")
        and told.count("bytes)") == 4
        and told.count("left: ") == 2
    )
    kept = runs_before | {
        "cache/embeddings/notes.txt",
        "cache/data/pile.csv",
        f"cache/before/{'a' * 64}.json",
    }
    assert (
        set(contents(copy)) == kept
        and "downloads of public data" in told
        and mine_too.read_text() == "text\n"
    )


BAD = {
    "nothing": ([], "one of them"),
    "both": (["runs/one", "--all-caches"], "one of them"),
    "no such run": (["runs/nowhere"], "no such run folder"),
    "a file": (["made/pairs.jsonl"], "is a file"),
    "not a run": (["made"], "holds no run"),
    "a config of something else": (["input/model"], "holds no run"),
    "an unknown flag": (["runs/one", "--al"], "--al"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_is_one_line(name, copy, monkeypatch, capsys):
    """Exit 2, and nothing is changed."""
    words, expected = BAD[name]
    monkeypatch.chdir(copy)
    assert expected in refused(words, copy, capsys)


def refused(words, root, capsys):
    before = contents(root)
    with pytest.raises(SystemExit) as stopped:
        flags.run_cli(lambda: purge.main(words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert contents(root) == before
    return error


@pytest.mark.parametrize("used", ["one", "two"])
def test_a_run_in_use_is_not_purged(used, copy, capsys):
    """Neither that one nor another over the same pairs."""
    with runs.only_owner(copy / "runs" / used):
        assert "is writing this run" in refused([str(copy / "runs/one")], copy, capsys)


@pytest.mark.parametrize(("sha", "pairs"), [(None, "p"), (7, "p"), ("a", None)])
def test_a_config_without_its_pairs_is_one_line(sha, pairs, copy, capsys):
    """It says which file does not say it."""
    config = copy / "runs/one/config.json"
    data.write_json(config, data.read_json(config) | {"sha256": {"pairs": sha}, "pairs": pairs})
    assert "does not say which pairs" in refused([str(copy / "runs/one")], copy, capsys)


def test_the_command_line(copy):
    """As run.sh calls it: exit 0 and what was removed; exit 2 and one line."""
    command = [sys.executable, "-m", "kit.purge"]
    how = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 200}
    done = subprocess.run([*command, str(copy / "runs/one")], **how)
    assert done.returncode == 0 and f"removed: {copy / 'made/pairs.jsonl'} (pairs" in done.stdout, (
        done.stderr
    )
    done = subprocess.run([*command, str(copy / "nowhere")], **how)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "-m kit.purge" in (ROOT / "run.sh").read_text()
    assert "run.sh purge RUN" in (ROOT / "experiment.py").read_text()


NOISE = [b"", b"\0", b"\xff", b'"', b"{", b"\n", b"\\ud800", b"9" * 5000]


def test_damaged_input_is_one_line_or_passed_over(tmp_path, monkeypatch, capsys):
    """Bytes of config.json, list and samples.jsonl at random: exit 0 or 2, and no file of others is touched."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    rng, codes, precious = random.Random(0), collections.Counter(), tmp_path / "precious.jsonl"
    precious.write_text("mine\n")
    run, pairs = tmp_path / "run", tmp_path / "pairs.jsonl"
    side = {"context": "", "prefix": "a", "suffix": " b"}
    pair = {
        "id": "a",
        **side,
        "learn_id": "b",
        **{f"learn_{k}": v for k, v in side.items()},
        "similarity": 1,
    }
    for _ in range(300):
        data.write_jsonl(pairs, [pair])
        sha = models.fingerprint(pairs)
        config = {"thresholds_used": {}, "pairs": str(pairs), "sha256": {"pairs": sha}}
        data.write_json(run / "config.json", config)
        data.write_jsonl(
            run / "samples.jsonl", [{"epoch": 0, "id": "a", "ma": 0.5, "generation": " b"}]
        )
        (run / "hashes.json").unlink(missing_ok=True)
        traces.registry().unlink(missing_ok=True)
        for path, what in (
            (pairs, "pairs"),
            (run, "run"),
            (precious, "cases"),
            (precious, "pairs"),
        ):
            traces.note(sha, path, what)
        file = rng.choice([run / "config.json", run / "samples.jsonl", traces.registry(), pairs])
        content = bytearray(file.read_bytes())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            content[at : at + rng.randint(0, 4)] = rng.choice(NOISE)
        file.write_bytes(content)
        try:
            flags.run_cli(lambda: purge.main([str(run)]))
            codes[0] += 1
        except SystemExit as stopped:
            codes[stopped.code] += 1
        assert precious.read_text() == "mine\n" and "Traceback" not in capsys.readouterr().err
    assert set(codes) == {0, 2} and codes[0] > codes[2] > 10


# --- a run without them ---


def test_a_redacted_run_never_holds_a_text(copy, monkeypatch, capsys):
    """At no epoch, in no file, in no line that it prints; the same numbers and weights as the run that holds them."""
    shutil.rmtree(copy / "cache" / "before")
    seen = []

    def look(out, epoch):
        assert (
            holding(out) == []
            and (out / "hashes.json").is_file()
            and list((out / "state").iterdir())
        )
        seen.append(epoch)

    each_epoch(monkeypatch, look)
    capsys.readouterr()
    out, open_run = unlearn(copy, "hidden", "--redact"), copy / "runs/one"
    told = "".join(capsys.readouterr())
    assert (
        seen == [0, 1, 2]
        and holding(out) == []
        and MARK not in told
        and not (copy / "cache" / "before").exists()
    )
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (open_run / name).read_bytes(), name
    rows = [row | {"generation": None} for row in data.read_jsonl(open_run / "samples.jsonl")]
    assert (
        data.read_jsonl(out / "samples.jsonl") == rows
        and MARK in (open_run / "samples.jsonl").read_text()
    )
    config, known = (data.read_json(run / "config.json") for run in (out, open_run))
    assert config["redact"] is True and known["redact"] is False
    kept = (out / "hashes.json").read_bytes()
    purge.main([str(out)])
    assert (
        holding(copy / "made", copy / "cache", copy / "runs") == []
        and (out / "hashes.json").read_bytes() == kept
    )


def test_a_preset_passes_redact_on():
    """To icu.py, not to knn.py, whose pairs have to exist for training."""
    args = experiment.read_flags(["tiny", "--redact"])
    assert "--redact" in experiment.told(args, "icu.py")
    assert "--redact" not in experiment.told(args, "knn.py")


def test_a_redacted_run_is_resumed_as_one(copy, monkeypatch):
    """After a kill the same bytes as a run never stopped, the same hashes; not as an open run, nor the other way."""
    with monkeypatch.context() as patch:
        each_epoch(patch, stop_after(1))
        with pytest.raises(Killed):
            unlearn(copy, "hidden", "--redact")
    out = copy / "runs/hidden"
    hashes = (out / "hashes.json").read_bytes()
    with pytest.raises(ValueError, match="redact was True, is False"):
        unlearn(copy, "hidden", "--resume")
    unlearn(copy, "hidden", "--redact", "--resume")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (copy / "runs/one" / name).read_bytes(), name
    assert holding(out) == [] and (out / "hashes.json").read_bytes() == hashes
    assert len(data.read_jsonl(out / "samples.jsonl")) == 3 * len(FORGET)


def test_a_start_that_was_killed_behind_its_hashes_starts_again(copy, monkeypatch):
    """hashes.json without config.json is no run and no file of others; --overwrite removes those of an old run."""
    write = data.write_json

    def killed(path, value):
        if path.name == "config.json":
            raise Killed
        write(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_json", killed)
        with pytest.raises(Killed):
            unlearn(copy, "hidden", "--redact")
    out = copy / "runs/hidden"
    assert (out / "hashes.json").is_file() and not (out / "config.json").exists()
    unlearn(copy, "hidden", "--redact")
    assert (out / "summary.json").is_file()
    unlearn(copy, "hidden", "--overwrite", "--eval-only")
    assert not (out / "hashes.json").exists()
