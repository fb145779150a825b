"""The certificate and the ledger: what they say, without a text, and what they find changed."""

import hashlib
import hmac
import json
import re
import shutil
import subprocess
import time

import pytest

from extras import certificate
from kit import data, models, purge

FLAGS = "--received 2020-02-29 --approved-by A.N. --request-id R-17 <b>R-18</b>".split()


@pytest.fixture
def run(own_world):
    """A run that names that of a model that never saw its texts."""
    edit(own_world.run / "config.json", lambda c: c.update(never_saw=str(own_world.never_saw)))
    return own_world.run


def edit(path, change):
    """Changes a JSON document."""
    value = data.read_json(path)
    change(value)
    data.write_json(path, value)


def certify(run, *words):
    """certificate.json of a run, as a dict."""
    certificate.main([str(run), *map(str, words)])
    return data.read_json(run / "certificate.json")


def verify(path, capsys, *words):
    """(exit status, what --verify says differs)."""
    capsys.readouterr()
    status = 0
    try:
        certificate.main(["--verify", str(path), *map(str, words)])
    except SystemExit as stopped:
        status = stopped.code
    lines = capsys.readouterr().out.splitlines()
    return status, [line[9:] for line in lines if line.startswith("differs: ")]


# --- what it says ---


def test_every_field_is_that_of_the_runs_files(run):
    """Read here without the code that wrote it."""
    made = certify(run, *FLAGS)
    config, summary = (data.read_json(run / f"{name}.json") for name in ("config", "summary"))
    never = data.read_json(run.parent / "never-saw" / "summary.json")["before"]
    done = time.strftime("%Y-%m-%d", time.gmtime((run / "summary.json").stat().st_mtime))
    ids = ["R-17", "<b>R-18</b>"]
    request = {"ids": ids, "received": "2020-02-29", "approved_by": "A.N.", "done": done}
    assert made["request"] == request and made["what"].startswith("Evidence of suppression")
    shas = models.fingerprint(run.parent / "model"), models.fingerprint(run / "model")
    model = {"name": "model", "revision": None, "sha256_before": shas[0], "sha256_after": shas[1]}
    assert made["model"] == model and shas[0] != shas[1]
    assert made["code"]["git"] == config["git"] and made["code"]["versions"] == config["versions"]
    for name in ("method", "protocol", "stopped", "epochs", "collapsed", "thresholds"):
        assert made["method"][name] == summary[name]
    assert made["method"]["seed"] == 7 and made["configuration"]["lr"] == 2e-4
    for name in ("el10", "ma", "bleu", "bertscore", "entropy", "ppl_heldout"):
        figures = made["figures"][name]
        for when in ("before", "after"):
            assert figures[when]["value"] == pytest.approx(summary[when][name], abs=2e-6)
        assert figures["never_saw"]["value"] == pytest.approx(never[name], abs=2e-6)
    assert made["never_saw"] is None and len(made["residual_risk"]) == 4
    assert all("cannot be told with n = " in sentence for sentence in made["residual_risk"])
    assert made["audit"] == ["not audited"] and made["tasks"] == {}
    for name in ("summary.json", "metrics.jsonl", "model/model.safetensors"):
        assert made["files"][name] == hashlib.sha256((run / name).read_bytes()).hexdigest()


def test_a_text_can_be_found_by_one_who_has_it_and_by_nobody_else(run):
    """By keyed hashes; no part of a text, no key and no path is written."""
    made = certify(run, *FLAGS, "--ledger", run.parent / "ledger")
    key, pairs = (run / "certificate.key").read_text(), data.read_pairs(run.parent / "pairs.jsonl")
    texts = [(pair["prefix"] + pair["suffix"]).encode() for pair in pairs]
    hashes = {hmac.new(bytes.fromhex(key), text, "sha256").hexdigest() for text in texts}
    assert set(made["scope"]["hashes"]) == hashes and made["scope"]["texts"] == 5
    halves = [pair[side] for pair in pairs for side in ("prefix", "suffix", "learn_suffix")]
    halves += [row["generation"] for row in data.read_jsonl(run / "samples.jsonl")]
    written = [*run.glob("certificate.[!k]*"), *(run.parent / "ledger").glob("ledger.*")]
    assert len(written) == 4
    for content in (path.read_text() for path in written):
        assert not any(half.strip() in content for half in halves if half.strip())
        assert str(run.parent) not in content and key not in content
    page = (run / "certificate.html").read_text()
    order = ["Result", "Request", "What it cost the language", "Model", "How to verify"]
    assert re.findall("<h2>(.*?)<", page)[:5] == order
    after = made["figures"]["ma"]["after"]["value"]
    assert f"<b>model recites {after:.0%} of the tokens of 5 texts" in page
    assert "&lt;b&gt;R-18" in page and not re.search(r"<b>R|https?:|src=|url\(|<script", page)


def side(**measures):
    """A run of 20 texts: two values of each measure in turn."""
    samples = [
        {"epoch": 0, **{name: values[i % 2] for name, values in measures.items()}}
        for i in range(20)
    ]
    return {"samples": samples, "summary": {"epochs": 0}}


def test_residual_risk_is_said_in_the_audits_words():
    """By the rule of `figures.verdict`; also with none to compare."""
    sides = [side(**dict.fromkeys(certificate.LEFT, ends)) for ends in ((0.3, 0.36), (0.3, 0.32))]
    words = "MA: recites 33.0% of the tokens, a model that never saw them 31.0%: as a model that"
    assert certificate.risks(*sides)[1].startswith(words)
    alone = certificate.risks(sides[0], None)
    assert all("cannot be told with n = 20, without" in sentence for sentence in alone)


def test_the_rest_of_a_marked_text_is_no_risk():
    """The marked part counts, and the whole of a text without a mark."""
    sides = []
    for high, low in ((0.9, 0.1), (0.1, 0.9)):  # whole texts and parts point to opposite sides
        measures = dict.fromkeys(certificate.LEFT, (high, high))
        parts = side(**measures, **dict.fromkeys(certificate.LEFT_OF_PARTS, (low, low)))
        sides.append(side(**measures))
        sides[-1]["samples"] += parts["samples"]
    risks = certificate.risks(*sides)
    assert len(risks) == 7 and all("mark: " in r and ": still more" in r for r in risks[:4])
    assert all(": less" in r for r in risks[4:])


def test_audit_tasks_and_marked_parts_are_taken_in(run):
    """From audit.json, tasks.json and samples.jsonl."""
    tasks = {"averages": {"cls": 0.5, "dia": None}}
    for when in ("before", "after"):
        data.write_json(run / f"tasks-{when}" / "tasks.json", tasks)
    audit = {"sentences": {"a": "It says more."}, "headline": {}}
    data.write_json(run / "audit.json", audit)
    marked = {"el10_spans": 0.25, "ma_spans": 0.5, "ma_rest": 1.0, "secret_said": 0.0}
    rows = data.read_jsonl(run / "samples.jsonl")
    rows = [row | (marked if row["id"] in "01" else {}) for row in rows]
    data.write_jsonl(run / "samples.jsonl", rows)
    made = certify(run)
    assert made["audit"] == ["It says more."] and made["tasks"]["after"]["cls"] == 0.5
    assert made["not_tested"] == list(certificate.ALWAYS_UNTESTED)
    for name, value in marked.items():
        figure = {"value": value, "low": None, "high": None, "n": 2}
        assert made["figures"][name]["after"] == figure
    assert "MA, marked parts" in (run / "certificate.html").read_text()


# --- purged runs ---


def test_a_certificate_outlives_its_texts(run, capsys):
    """It holds after a purge and without the run never-saw. Made anew, it says what is missing."""
    first = certify(run, *FLAGS)
    content, copy = (run / "certificate.json").read_bytes(), run.parent / "copy"
    certify(shutil.copytree(run, copy), *FLAGS)
    assert (copy / "certificate.json").read_bytes() == content
    (copy / "certificate.key").write_text("00" * 32)
    assert "scope hashes: changed" in str(verify(copy / "certificate.json", capsys))
    purge.main([str(run)])
    assert verify(run / "certificate.json", capsys) == (0, [])
    assert data.read_json(run / "certificate.json") == first
    shutil.rmtree(run.parent / "never-saw")  # its figures stay in the certificate
    assert verify(run / "certificate.json", capsys) == (0, [])
    made = certify(run)
    assert made["figures"]["ma"]["never_saw"] is None and "is gone" in made["never_saw"]
    assert made["scope"]["hashes"] == [] and "are gone" in made["scope"]["hashes_note"]
    assert made["scope"]["texts"] == 5 and not (run / "certificate.key").exists()


# --- verify ---


def change_byte(path):
    """The first a of a file becomes a b."""
    path.write_bytes(path.read_bytes().replace(b"a", b"b", 1))


CHANGES = {
    "files samples.jsonl: changed": lambda run: data.write_jsonl(
        run / "samples.jsonl",
        [row | {"ma": 0.125} for row in data.read_jsonl(run / "samples.jsonl")],
    ),
    "files config.json: changed": lambda run: edit(run / "config.json", lambda c: c.update(lr=1.0)),
    "files model/model.safetensors: changed": lambda run: change_byte(
        run / "model/model.safetensors"
    ),
    "files model/tokenizer.json: missing": lambda run: (run / "model/tokenizer.json").unlink(),
    "files model/more.bin: was not there": lambda run: (run / "model/more.bin").write_bytes(b"x"),
    "certificate.json: changed": lambda run: change_byte(run / "certificate.json"),
    "certificate.html: not what": lambda run: change_byte(run / "certificate.html"),
}


def test_a_change_is_found(run, capsys):
    """And without one nothing is."""
    certify(run, *FLAGS)
    assert verify(run / "certificate.json", capsys) == (0, [])
    for number, (line, change) in enumerate(CHANGES.items()):
        copy = shutil.copytree(run, run.parent / str(number))
        change(copy)
        status, unlike = verify(copy / "certificate.json", capsys)
        assert status == 1 and any(each.startswith(line) for each in unlike), (line, unlike)


def test_no_figure_is_taken_from_the_certificate(run, capsys):
    """What was forged with its hash is found."""
    made, forged = certify(run), run.parent / "forged.json"
    del made["sha256"]
    made["note"] = "approved"  # a field of one's own
    made["figures"]["ma"]["after"]["value"] = made["figures"]["ma"]["never_saw"]["value"] = 0.01
    shutil.rmtree(run.parent / "never-saw")
    data.write_json(forged, made | {"sha256": data.digest(made)})
    unlike = ["figures ma after value: changed", "note: missing"]
    assert verify(forged, capsys, run) == (1, unlike)
    twice = (run / "certificate.json").read_text().replace("{", '{"what": "proof",', 1)
    forged.write_text(twice)  # other readers take the first of two equal fields
    assert verify(forged, capsys, run)[0] == 1
    certificate.main(["--verify", str(run / "certificate.json")])
    certificate.main(["--verify", str(shutil.move(run / "certificate.json", forged))])
    said = capsys.readouterr().out
    assert "made of what is not here: never_saw, not_tested, residual_risk" in said
    assert "not in it: .lock, certificate.key, timing.jsonl" in said
    assert "any file or figure, without its RUN" in said  # as it comes to somebody else


def test_a_certificate_made_with_another_model_is_found_by_measuring(run, capsys):
    """The models alone say that they have other figures."""
    words = run / "certificate.json", capsys, "--measure"
    certify(run)
    assert verify(*words) == (0, [])
    rows = data.read_jsonl(run / "samples.jsonl")
    rows[-1]["ma"] += 0.25
    data.write_jsonl(run / "samples.jsonl", rows)
    certified = certify(run)["figures"]["ma"]["after"]["value"]
    assert verify(*words[:2]) == (0, [])
    measured = round(certified - 0.05, 6)  # one of five texts
    assert verify(*words) == (1, [f"MA after {measured}, certified {certified}"])


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="no ssh-keygen")
def test_signatures(run, tmp_path, capsys):
    """Another key, a changed certificate, a lost signature are named."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for key in (mine, other):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "my secret comment", "-f"]
        subprocess.run([*command, key], check=True)
    path, signature = run / "certificate.json", run / "certificate.json.sig"
    assert "secret" not in json.dumps(certify(run, "--sign", mine))
    content, good = path.read_bytes(), signature.read_bytes()
    assert verify(path, capsys, "--key", f"{mine}.pub") == (0, [])
    unlike = verify(path, capsys, "--key", f"{other}.pub")[1]
    assert f"signed with another key than {other}.pub" in str(unlike)
    path.write_bytes(content.replace(b'"ids": []', b'"ids": ["x"]'))
    assert "not a signature" in str(verify(path, capsys))
    path.write_bytes(content)
    signature.unlink()
    assert "missing" in str(verify(path, capsys))
    signature.write_bytes(good)
    edit(path, lambda c: c.update(signed_by=None))
    assert "the certificate is not signed" in str(verify(path, capsys))
    certify(run)  # not signed: the old signature would be a wrong one
    assert not signature.exists() and verify(path, capsys, "--key", f"{mine}.pub")[0] == 1


# --- the ledger ---


@pytest.fixture
def book(tmp_path):
    """A ledger of four lines."""
    for name in "abcd":
        certificate.add_line(tmp_path / "ledger", {"sha256": name})
    return tmp_path / "ledger" / "ledger.jsonl"


def test_each_line_has_the_hash_of_the_line_before(book, capsys):
    """No row twice; a kill before the new head is gone on with."""
    assert certificate.add_line(book.parent, {"sha256": "b"}) == 2
    rows = data.read_jsonl(book)
    hashes = [hashlib.sha256(line).hexdigest() for line in book.read_bytes().splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert [row["previous"] for row in rows] == [None, *hashes[:-1]]
    head = (book.parent / "ledger.head").read_bytes()
    certificate.add_line(book.parent, {"sha256": "e"})
    (book.parent / "ledger.head").write_bytes(head)
    assert certificate.add_line(book.parent, {"sha256": "f"}) == 6
    assert verify(book, capsys) == (0, [])


@pytest.mark.parametrize(
    "order, line",
    [
        ("0x23", 3),  # its hash is in the line after
        ("012x", 4),  # or in ledger.head
        ("012", 4),
        ("023", 2),
        ("0213", 2),
    ],
)
def test_a_changed_missing_or_reordered_line_is_found(book, order, line, capsys):
    """The first such line is named, and nothing is added to such a ledger."""
    lines = dict(zip("0123", book.read_bytes().splitlines(keepends=True), strict=True))
    lines["x"] = lines[str(order.find("x") % 4)].replace(b"sha", b"SHA")
    book.write_bytes(b"".join(map(lines.get, order)))
    status, unlike = verify(book, capsys)
    assert status == 1 and len(unlike) == 1 and unlike[0].startswith(f"line {line}: ")
    with pytest.raises(ValueError, match="nothing is added"):
        certificate.add_line(book.parent, {"sha256": "e"})


def test_the_ledger_names_the_certificate(run, capsys):
    """By its sha256 and request, and --verify finds it there."""
    book = run.parent / "book"
    made, content = certify(run, *FLAGS, "--ledger", book), (run / "certificate.json").read_bytes()
    (row,) = data.read_jsonl(book / "ledger.jsonl")
    assert row["sha256"] == hashlib.sha256(content).hexdigest()
    assert row["request"] == made["request"] and row["run"] == "run"
    words = run / "certificate.json", capsys, "--ledger", book
    assert verify(*words) == (0, [])
    certify(run)  # another one: without its request
    assert verify(*words) == (1, [f"{book / 'ledger.jsonl'}: no line of this certificate"])
    content = (run / "certificate.json").read_bytes()
    (book / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="nothing is added"):
        certify(run, "--ledger", book)
    assert (run / "certificate.json").read_bytes() == content
