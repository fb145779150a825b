"""The certificate of a run and the ledger: what they say, that they say no text, and that every change is found.

python -m pytest tests/test_certificate.py -q
"""

import hashlib
import hmac
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import survive

import icu
from evals import report
from extras import certificate, ledger
from kit import data, flags, purge

needs_keys = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None, reason="no ssh-keygen: install OpenSSH's client"
)
FLAGS = [
    "--received",
    "2020-02-29",
    "--request-id",
    "R-17",
    "<b>R-18</b>",
    "--approved-by",
    "A. Name",
]


@pytest.fixture(scope="module")
def good(tmp_path_factory, encoder_dir):
    """A run over five texts beside one of a model that never saw them; nobody changes it."""
    root = tmp_path_factory.mktemp("certificate").resolve()
    words, texts = survive.make_inputs(root), root / "heldout.jsonl"
    data.write_jsonl(texts, [{"text": "The driver said that nothing was missing."}])
    words += ["--ppl", f"heldout={texts}"]
    never = root / "never"
    icu.main(argv=[*words, "--eval-only", "--out", str(never)])
    words[words.index("--thresholds") + 1] = "never-saw"
    words[words.index("--max-epochs") + 1] = "1"
    icu.main(argv=[*words, "--never-saw", str(never), "--out", str(root / "run")])
    return root / "run"


@pytest.fixture
def run(good, tmp_path):
    """A copy of it."""
    return shutil.copytree(good, tmp_path / "run")


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Two private keys of OpenSSH."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        command = [
            "ssh-keygen",
            "-q",
            "-t",
            "ed25519",
            "-N",
            "",
            "-C",
            "secret comment",
            "-f",
            folder / name,
        ]
        subprocess.run(command, check=True)
    return folder / "mine", folder / "other"


def certify(run, *words):
    """certificate.json of a run, as a dict."""
    report.main([str(run), "--certificate", *map(str, words)])
    return json.loads((run / "certificate.json").read_text())


def verify(path, capsys, *words):
    """(exit status, what --verify says differs)."""
    capsys.readouterr()
    status = 0
    try:
        report.main(["--verify", str(path), *map(str, words)])
    except SystemExit as stopped:
        status = stopped.code
    lines = capsys.readouterr().out.splitlines()
    return status, [
        line.removeprefix("differs: ") for line in lines if line.startswith("differs: ")
    ]


def edit(path, change):
    """A JSON document, changed."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --- what it says ---


def test_every_field(run):
    """Each field against the run's own files, read here without the code that wrote it."""
    found = certify(run, *FLAGS)
    config, summary = (
        json.loads((run / f"{name}.json").read_text()) for name in ("config", "summary")
    )
    done = subprocess.run(
        ["date", "-u", "-r", run / "summary.json", "+%F"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found["request"] == {
        "ids": ["R-17", "<b>R-18</b>"], "received": "2020-02-29", "approved_by": "A. Name",
        "done": done.stdout.strip(),
    }  # fmt: skip
    assert found["what"].startswith("Evidence of suppression")
    assert (
        found["model"]["name"] == "model"
        and found["model"]["sha256_before"] == config["sha256"]["model"]
    )
    assert found["model"]["sha256_after"] not in (None, found["model"]["sha256_before"])
    assert found["code"]["git"] == config["git"] and found["code"]["versions"] == config["versions"]
    assert found["code"]["method_sha256"] == config["sha256"]["method"]
    for name in ("method", "protocol", "stopped", "epochs", "collapsed", "thresholds"):
        assert found["method"][name] == summary[name]
    assert found["method"]["seed"] == 7 and found["configuration"]["lr"] == 2e-4
    for name in ("el10", "ma", "bleu", "bertscore", "entropy", "ppl_heldout"):
        for when in ("before", "after"):
            assert found["figures"][name][when]["value"] == pytest.approx(
                summary[when][name], abs=2e-6
            )
        assert found["figures"][name]["never_saw"]["value"] > 0 or name in ("el10", "bleu")
    assert found["never_saw"] is None and len(found["residual_risk"]) == 4
    assert all(
        "cannot be told with n = " in sentence for sentence in found["residual_risk"]
    )  # five texts
    assert found["audit"] == ["not audited"] and found["tasks"] == {}
    assert any("evals/audit.py" in line for line in found["not_tested"])
    assert (
        any("backups" in line for line in found["not_reached"]) and len(found["not_reached"]) == 4
    )
    for name in ("summary.json", "metrics.jsonl", "model/model.safetensors"):
        assert found["files"][name] == hashlib.sha256((run / name).read_bytes()).hexdigest()
    assert "deleted" not in (run / "certificate.html").read_text().lower()


def test_of_a_marked_text_the_marked_part_is_certified(run):
    """Its own figures beside the others; what is left is told of the part, since the rest of the text was to stay."""
    rows = data.read_jsonl(run / "samples.jsonl")
    marked = {"el10_spans": 0.25, "ma_spans": 0.5, "ma_rest": 1.0, "secret_said": 0.0}
    data.write_jsonl(
        run / "samples.jsonl", [row | (marked if row["id"] in "01" else {}) for row in rows]
    )
    for when in ("before", "after"):
        edit(run / "summary.json", lambda summary, when=when: summary[when].update(marked))
    report.main([str(run)])
    assert "| Spans (MA, %) ↓ | The rest (MA, %) ↑ |" in (run / "table.md").read_text()
    found = certify(run)
    for name, value in marked.items():
        assert found["figures"][name]["after"] == {
            "value": value,
            "low": None,
            "high": None,
            "n": 2,
        }
    assert "MA, marked parts" in (run / "certificate.html").read_text()


def test_a_text_can_be_found_by_one_who_has_it_and_by_nobody_else(run):
    """The salted hashes are those of the texts; no text, no part of it and no path stands in what is written."""
    found = certify(run, *FLAGS, "--ledger", run.parent / "ledger")
    salt = bytes.fromhex(found["scope"]["salt"])
    own = {hmac.new(salt, (a + b).encode(), "sha256").hexdigest() for a, b in survive.TEXTS}
    assert set(found["scope"]["hashes"]) == own and found["scope"]["texts"] == 5
    written = [*run.glob("certificate.*"), *(run.parent / "ledger").glob("ledger.*")]
    assert len(written) == 4
    said = [row["generation"] for row in data.read_jsonl(run / "samples.jsonl")]
    for path in written:
        content = path.read_text()
        assert path.stat().st_mode & 0o077 == 0, path
        for text in [
            part.strip() for pair in (*survive.TEXTS, survive.LEARN) for part in pair
        ] + said:
            assert not text.strip() or text.strip() not in content, (path, text)
        assert str(run.parent) not in content and str(Path.home()) not in content
    assert "<b>R-18" not in (run / "certificate.html").read_text()
    assert "&lt;b&gt;R-18" in (run / "certificate.html").read_text()


def test_the_same_run_gives_the_same_bytes(run):
    """Twice, and in a copy of the folder."""
    names = ("certificate.json", "certificate.html", "hashes.json")
    certify(run, *FLAGS)
    first = [(run / name).read_bytes() for name in names]
    certify(run, *FLAGS)
    assert [(run / name).read_bytes() for name in names] == first
    copy = shutil.copytree(run, run.parent / "copy")
    certify(copy, *FLAGS)
    assert [(copy / name).read_bytes() for name in names] == first


def test_the_interval_is_the_bootstraps():
    """Against a literal loop over the same drawing, the known error of a mean, and too few texts."""
    values = np.random.default_rng(3).normal(0.4, 0.1, 50)
    found, rng = certificate.interval([None, *values, None]), np.random.default_rng(0)
    means = []
    for draw in rng.integers(0, 50, (1000, 50)):
        means.append(sum(values[i] for i in draw) / 50)
    means.sort()
    assert found["n"] == 50 and found["value"] == pytest.approx(values.mean(), abs=1e-6)
    assert means[23] <= found["low"] <= means[26] and means[973] <= found["high"] <= means[976]
    width = 2 * 1.96 * values.std() / 50**0.5
    assert found["high"] - found["low"] == pytest.approx(width, rel=0.15)
    assert certificate.interval([0.5] * 7) == {"value": 0.5, "low": None, "high": None, "n": 7}
    assert certificate.interval([None]) is None


@pytest.mark.parametrize(
    "after, never, said",
    [
        ([0.5] * 20, [0.1, 0.2] * 10, "still more than that"),
        ([0.1] * 20, [0.4, 0.5] * 10, "less than that"),
        ([0.30, 0.32] * 10, [0.31, 0.31] * 10, "as a model that never saw them"),
        ([0.0, 1.0] * 10, [1.0, 0.0] * 10, "cannot be told with n = 20"),
        ([0.5] * 5, [0.1] * 5, "cannot be told with n = 5"),
    ],
)
def test_residual_risk_is_said_in_fixed_words(after, never, said):
    """By the paired difference: apart, alike, too noisy to tell, too few."""
    rows = lambda values: [{"epoch": 0, **dict.fromkeys(certificate.LEFT, x)} for x in values]  # noqa: E731
    sides = [{"samples": rows(values), "summary": {"epochs": 0}} for values in (after, never)]
    assert all(f": {said}" in sentence for sentence in certificate.risks(*sides))
    alone = certificate.risks(sides[0], None)
    assert all(f"cannot be told with n = {len(after)}, without" in sentence for sentence in alone)


def test_the_rest_of_a_marked_text_is_no_risk():
    """Whole texts and marked parts that point to opposite sides: the parts count, of other texts the whole."""
    n = 20

    def side(whole, part, texts):
        plain = [{"epoch": 0, **dict.fromkeys(certificate.LEFT, whole)} for _ in range(n)]
        marked = [row | dict.fromkeys(certificate.LEFT_OF_PARTS, part) for row in plain]
        return {
            "samples": {"marked": marked, "both": [*plain, *marked]}[texts],
            "summary": {"epochs": 0},
        }

    found = certificate.risks(side(0.9, 0.1, "marked"), side(0.1, 0.9, "marked"))
    assert len(found) == 3 and all(": less than that" in sentence for sentence in found)
    assert [sentence.partition(":")[0] for sentence in found][:2] == [
        "EL10, marked parts",
        "MA, marked parts",
    ]
    found = certificate.risks(side(0.9, 0.1, "both"), side(0.1, 0.9, "both"))
    assert len(found) == 7 and all(
        f"still more than that (n = {n}," in sentence for sentence in found[:4]
    )
    assert all("of texts without a mark" in sentence for sentence in found[:4])
    assert all("less than that" in sentence for sentence in found[4:])


SAID = ["Is it still inside? Still more than that, as it seems."] * 12


def test_audit_and_tasks_are_taken_in(run):
    """Sentences as a list or an object; anything else is no audit."""
    averages = {"cls": 0.5, "cls_missing": [], "dia": None, "dia_missing": []}
    for when in ("before", "after"):
        data.write_json(run / f"tasks-{when}" / "tasks.json", {"averages": averages})
    for sentences in (["It says more."], {"a": "It says more."}):
        data.write_json(run / "audit.json", {"sentences": sentences, "headline": {}, "models": {}})
        found = certify(run)
        assert found["audit"] == ["It says more."] and found["tasks"]["after"]["cls"] == 0.5
        assert found["not_tested"] == list(certificate.ALWAYS_UNTESTED)
    data.write_json(run / "audit.json", {"sentences": 3, "headline": {}, "models": {}})
    assert certify(run)["audit"] == ["not audited"]
    for other in ({"measures": []}, [1], {"sentences": ["It says more."]}):
        data.write_json(run / "audit.json", other)
        with pytest.raises(ValueError, match="not what a run wrote"):
            certify(run)


# --- purged runs ---


def test_a_certificate_outlives_its_texts(run, capsys, monkeypatch):
    """Before a purge and after it the same certificate; verify finds nothing."""
    monkeypatch.setenv("ICU_CACHE", str(run.parent / "cache"))  # no other run is listed there
    pairs = shutil.copy(
        json.loads((run / "config.json").read_text())["pairs"], run.parent / "pairs.jsonl"
    )
    edit(run / "config.json", lambda c: c.update(pairs=str(pairs)))
    first = certify(run, *FLAGS)
    purge.purge_run(run, dry_run=False)
    assert (
        not Path(pairs).exists() and data.read_jsonl(run / "samples.jsonl")[0]["generation"] is None
    )
    assert verify(run / "certificate.json", capsys) == (0, [])
    assert certify(run, *FLAGS) == first


def test_a_run_that_was_purged_first_gets_one_too(run, monkeypatch):
    """From the hashes.json that a purge keeps."""
    monkeypatch.setenv("ICU_CACHE", str(run.parent / "cache"))
    pairs = shutil.copy(
        json.loads((run / "config.json").read_text())["pairs"], run.parent / "pairs.jsonl"
    )
    edit(run / "config.json", lambda c: c.update(pairs=str(pairs)))
    purge.purge_run(run, dry_run=False)
    kept = json.loads((run / "hashes.json").read_text())
    scope = certify(run)["scope"]
    assert scope["salt"] == kept["salt"]
    assert scope["hashes"] == sorted(text["forget"] for text in kept["texts"].values())


def test_hashes_of_other_texts_are_not_certified(run):
    """Of a hashes.json that was changed, while the texts are there to compare with."""
    certify(run)
    edit(run / "hashes.json", lambda h: h["texts"]["0"].update(forget="0" * 64))
    with pytest.raises(ValueError, match="holds not the hashes of this run"):
        certify(run)


def test_a_run_with_neither_texts_nor_hashes_says_so(run):
    edit(
        run / "config.json",
        lambda c: c.update(pairs=str(run / "gone.jsonl"), sha256={"pairs": "0" * 64}),
    )
    found = certify(run)
    assert (
        found["scope"]["hashes"] == []
        and "neither its texts nor hashes" in found["scope"]["hashes_note"]
    )
    assert (
        not (run / "hashes.json").exists()
        and "neither its texts" in (run / "certificate.html").read_text()
    )


# --- verify ---


def change_digit(path):
    """Some digit of a file becomes another."""
    text = path.read_text()
    at = [m.start() for m in re.finditer(r"\d", text)][-1]
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


def flip_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


CHANGES = {
    "metrics.jsonl: changed": lambda run: change_digit(run / "metrics.jsonl"),
    "samples.jsonl: changed": lambda run: (run / "samples.jsonl").write_text(
        re.sub('"ma": 0.', '"ma": 0.1', (run / "samples.jsonl").read_text(), count=1)
    ),
    "config.json: changed": lambda run: edit(run / "config.json", lambda c: c.update(lr=1.0)),
    "model/model.safetensors: changed": lambda run: flip_byte(run / "model" / "model.safetensors"),
    "model/tokenizer.json: missing": lambda run: (run / "model" / "tokenizer.json").unlink(),
    "model/more.bin: was not there": lambda run: (run / "model" / "more.bin").write_bytes(b"x"),
    "certificate.json: changed": lambda run: edit(
        run / "certificate.json", lambda c: c["request"].update(ids=["R-9"])
    ),
    "certificate.html: not what certificate.json says": lambda run: change_digit(
        run / "certificate.html"
    ),
}


@pytest.mark.parametrize("line", CHANGES)
def test_a_change_is_found(run, line, capsys):
    """And without one nothing is."""
    certify(run, *FLAGS)
    assert verify(run / "certificate.json", capsys) == (0, [])
    CHANGES[line](run)
    status, said = verify(run / "certificate.json", capsys)
    assert status == 1 and any(each.startswith(line) for each in said), said


def test_a_figure_that_was_forged_with_its_hash_is_found(run, capsys):
    """The run's files give another certificate."""
    certify(run)

    def forge(found):
        found["figures"]["ma"]["after"]["value"] = 0.01
        del found["sha256"]
        found["sha256"] = certificate.digest(found)

    edit(run / "certificate.json", forge)
    status, said = verify(run / "certificate.json", capsys)
    assert status == 1 and "certificate.json: `figures` is not what the run's files give" in said


def test_a_certificate_elsewhere_is_checked_against_its_run(run, capsys):
    certify(run)
    shutil.move(run / "certificate.json", run.parent / "c.json")
    status, said = verify(run.parent / "c.json", capsys)
    assert status == 1 and len(said) == 1
    report.main([str(run), "--verify", str(run.parent / "c.json")])


def test_the_run_of_the_model_that_never_saw_them_may_go(run, capsys):
    """The certificate keeps its figures."""
    other = shutil.copytree(
        json.loads((run / "config.json").read_text())["never_saw"], run.parent / "never"
    )
    edit(run / "config.json", lambda c: c.update(never_saw=str(other)))
    certify(run)
    shutil.rmtree(other)
    assert verify(run / "certificate.json", capsys) == (0, [])


@needs_keys
def test_signatures(run, keys, capsys):
    """The right key is good; a wrong one, a changed certificate, a lost or foreign signature are found."""
    mine, other = keys
    path, signature = run / "certificate.json", run / "certificate.json.sig"
    assert "secret" not in json.dumps(certify(run, "--sign", mine))
    assert verify(path, capsys, "--key", f"{mine}.pub") == (0, [])
    assert verify(path, capsys, "--key", f"{other}.pub") == (
        1, [f"certificate.json: signed with another key than {other}.pub"],
    )  # fmt: skip
    data, good = path.read_bytes(), signature.read_bytes()
    path.write_bytes(data.replace(b'"ids": []', b'"ids": ["x"]'))
    assert any("not a signature" in line for line in verify(path, capsys)[1])
    path.write_bytes(data)
    certify(run, "--sign", other)
    foreign = signature.read_bytes()
    path.write_bytes(data)
    assert signature.read_bytes() == foreign and any(
        "not a signature" in line for line in verify(path, capsys)[1]
    )
    signature.unlink()
    assert any("missing" in line for line in verify(path, capsys)[1])
    signature.write_bytes(good)
    edit(path, lambda c: c.update(signed_by=None))
    assert any("says that it is not signed" in line for line in verify(path, capsys)[1])
    edit(path, lambda c: c.update(signed_by="ssh-ed25519 AAAA\nsigner ssh-ed25519 BBBB"))
    with pytest.raises(ValueError, match="not a public key"):
        verify(path, capsys)
    certify(run)  # not signed: the old signature would be a wrong one
    assert not signature.exists() and verify(path, capsys, "--key", f"{mine}.pub")[0] == 1


# --- bad input ---


@pytest.mark.parametrize(
    "words, said",
    [
        (["RUN", "--certificate", "--received", "29.2.2020"], "no date such as"),
        (["RUN", "--certificate", "--received", "2999-01-01"], "had ended before"),
        (["RUN", "--certificate", "--approved-by", " "], "is blank"),
        (["RUN", "--certificate", "--sign", "nokey"], "no such key"),
        (["RUN", "--certificate", "--sign", "RUN/summary.json"], "is no key of OpenSSH"),
        (["RUN", "--received", "2020-02-29"], "--certificate"),
        (["RUN", "RUN", "--certificate"], "one RUN"),
        (["NEVER", "--certificate"], "nothing to certify"),
        (["RUN", "--certificate", "--ledger", "RUN/book"], "lies in the run"),
        (["RUN", "--certificate", "--out", "elsewhere"], "do not go with"),
        (["RUN", "--verify", "BOOK"], "pass neither"),
        (["--verify", "nofile"], "no such file"),
        (["--verify", "RUN/summary.json"], "`what`"),
        (["--verify", "RUN/summary.json", "--sign", "k"], "--verify checks one file"),
    ],
)
def test_bad_input_is_one_line(run, good, words, said, capsys, monkeypatch):
    """Exit 2, one line on stderr, nothing written."""
    here = {
        "RUN": str(run),
        "NEVER": str(good.parent / "never"),
        "BOOK": str(run.parent / "ledger.jsonl"),
    }
    (run.parent / "ledger.jsonl").write_text("{}")
    monkeypatch.setattr(
        sys,
        "argv",
        ["evals/report.py", *(re.sub("RUN|NEVER|BOOK", lambda m: here[m[0]], w) for w in words)],
    )
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        flags.run_cli(report.main)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and said in error, error
    assert sorted(run.rglob("*")) == before


def test_no_ssh_keygen_is_one_clear_line(run, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="no ssh-keygen on this machine"):
        certify(run, "--sign", tmp_path / "key")


def test_summary_and_samples_that_disagree_are_not_certified(run):
    edit(run / "summary.json", lambda s: s["after"].update(ma=0.01))
    with pytest.raises(ValueError, match="samples.jsonl gives"):
        certify(run)


# --- the ledger ---


def add_many(folder, name):
    for number in range(5):
        ledger.add(folder, {"sha256": f"{name}{number}"})


@pytest.fixture
def book(tmp_path):
    """A ledger of four lines."""
    for name in "abcd":
        ledger.add(tmp_path / "ledger", {"sha256": name})
    return tmp_path / "ledger" / "ledger.jsonl"


def test_each_line_has_the_hash_of_the_line_before(book):
    lines = book.read_bytes().split(b"\n")[:-1]
    assert [json.loads(line)["line"] for line in lines] == [1, 2, 3, 4]
    assert [json.loads(line)["previous"] for line in lines[1:]] == [
        hashlib.sha256(line).hexdigest() for line in lines[:-1]
    ]
    assert (
        ledger.add(book.parent, {"sha256": "b"}) == 2 and len(book.read_text().splitlines()) == 4
    )  # one line a run


@pytest.mark.parametrize(
    "order, said",
    [
        ("0123", []),
        ("0x23", ["line 2: changed"]),
        ("012x", ["line 4: not as ledger.head has it"]),
        ("023", ["line 2: missing"]),
        ("123", ["line 1: missing"]),
        ("012", ["line 4: missing"]),
        ("0", ["lines 2 to 4: missing"]),
        ("0213", ["line 2: stands behind line 3"]),
        ("01123", ["line 2: stands behind line 2"]),
        ("01!3", ["line 3 of the file: damaged"]),
    ],
)
def test_a_changed_missing_or_reordered_line_is_found(book, order, said, capsys):
    """Each in words, and nothing is added to such a ledger."""
    lines = book.read_bytes().splitlines(keepends=True)
    changed = {"!": b"{}\n"}
    changed["x"] = re.sub(rb'"[a-d]"', b'"z"', lines[order.index("x")]) if "x" in order else b""
    book.write_bytes(b"".join(changed.get(c) or lines[int(c)] for c in order))
    status, found = verify(book, capsys)
    assert status == bool(said) and len(found) == len(said)
    assert all(line.startswith(words) for line, words in zip(found, said, strict=True)), found
    if said:
        with pytest.raises(ValueError, match="nothing is added"):
            ledger.add(book.parent, {"sha256": "e"})


def test_what_a_kill_leaves_is_gone_on_with(book, capsys):
    """A piece of a line that nobody was told of, and a head from before the last line."""
    head = (book.parent / "ledger.head").read_bytes()
    ledger.add(book.parent, {"sha256": "e"})
    (book.parent / "ledger.head").write_bytes(head)
    book.write_bytes(book.read_bytes() + b'{"line": 6, "prev')
    assert ledger.add(book.parent, {"sha256": "f"}) == 6
    assert verify(book, capsys) == (0, [])


def test_lines_of_several_processes_make_one_chain(tmp_path, capsys):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=add_many, args=(tmp_path, name)) for name in "abcd"]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert verify(tmp_path / "ledger.jsonl", capsys) == (0, [])
    rows = data.read_jsonl(tmp_path / "ledger.jsonl")
    assert sorted(row["sha256"] for row in rows) == sorted(
        f"{name}{i}" for name in "abcd" for i in range(5)
    )


def test_the_ledger_names_the_certificate(run, capsys):
    certify(run, *FLAGS, "--ledger", run.parent / "book")
    (row,) = data.read_jsonl(run.parent / "book" / "ledger.jsonl")
    assert row["sha256"] == hashlib.sha256((run / "certificate.json").read_bytes()).hexdigest()
    assert row["request"]["ids"] == ["R-17", "<b>R-18</b>"] and row["previous"] is None
    (run.parent / "book" / "ledger.jsonl").write_text("{}\n")
    before = (run / "certificate.json").read_bytes()
    with pytest.raises(ValueError, match="nothing is added"):
        certify(run, "--ledger", run.parent / "book")
    assert (run / "certificate.json").read_bytes() == before


# --- the page ---


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium, which prints the page")
def test_the_page_is_two_sides_of_a4(run, tmp_path):
    """Also with many requests and a long audit; and it loads nothing."""
    data.write_json(run / "audit.json", {"headline": {}, "models": {}, "sentences": SAID})
    certify(run, "--request-id", *(f"R-{i}" for i in range(30)))
    page = (run / "certificate.html").read_text()
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script", page)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={tmp_path / 'c.pdf'}"]
    subprocess.run([*command, (run / "certificate.html").as_uri()], check=True, capture_output=True)
    pdf = (tmp_path / "c.pdf").read_bytes()
    assert len(re.findall(rb"/Type ?/Page\b(?!s)", pdf)) == 2
