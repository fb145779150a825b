"""The certificate of a run: what was done, with figures and hashes and without a text.

    bash run.sh certificate RUN --received 2026-03-09 --request-id R-17 --sign KEY
    bash run.sh certificate --verify RUN/certificate.json --key KEY.pub  # what differs; exit 0 or 1
    bash run.sh certificate --verify RUN/certificate.json --measure      # asks its models again

docs/certificate.md explains every line. All but the request comes from the run folder, so --verify
makes it again, and names what it cannot check. It outlives its texts: config.json and samples.jsonl
are hashed without what kit/purge.py changes in them.
"""

import argparse
import contextlib
import datetime
import hashlib
import hmac
import html
import json
import re
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock

from kit import data, flags, models, processes, requests
from kit.figures import bootstrap, verdict
from kit.runs import OF_SPANS, SETTINGS, mean, models_of, read_run
from kit.text import visible

WHAT = (
    "Evidence of suppression: the figures below say how much less of these texts this model gives "
    "away than before its training. They are no proof that nothing of them is left in its weights."
)
FILE, SIGNATURE, PAGE = "certificate.json", "certificate.json.sig", "certificate.html"
KEY = "certificate.key"  # of the hashes in `scope`: for whom the certificate is for
LEDGER, HEAD = "ledger.jsonl", "ledger.head"
# Higher = more is left, in the words of `verdict`.
LEFT = {
    "el10": "gives back {:.1%} of the 10-grams",
    "ma": "recites {:.1%} of the tokens",
    "bleu": "scores {:.3f}",
    "bertscore": "scores {:.3f}",
}
LEFT_OF_PARTS = {  # of a marked text, whose rest is to stay
    "el10_spans": LEFT["el10"],
    "ma_spans": LEFT["ma"],
    "secret_said": "says {:.1%} of them",
}
ONE_DAY = datetime.timedelta(days=1)  # between time zones
NEAR = 0.01  # by which the rounding of another machine may move a mean
ALWAYS_UNTESTED = (
    "paraphrases, translations and other prompts than each text's own beginning",
    "other languages",
)
NOT_REACHED = (
    "backups and other copies, of the model before and of the texts",
    "adapters, fine-tuned and merged models that were made of the model before",
    "quantised models and other exports that were made earlier",
    "the training data, its copies, caches and logs",
)


# --- what it says ---


def build(folder, request, signed_by=None):
    """The certificate of a finished run, for a request {"ids", "received", "approved_by"}."""
    run = read_run(folder)
    models_of(run)  # fails where it has none of its own
    folder, config, summary = run["folder"], run["config"], run["summary"]
    ended = (folder / "summary.json").stat().st_mtime
    sha, path = config["sha256"].get("model"), Path(config["model"])
    never, why = never_saw(run)
    method = ("method", "protocol", "stopped", "epochs", "collapsed", "thresholds")
    settings = [name for name in SETTINGS if name not in ("model", "bert")]
    audit = run.get("audit", {}).get("sentences", {})
    code = {name: config.get(name) for name in ("git", "method_file", "versions")}
    done = datetime.datetime.fromtimestamp(ended, datetime.UTC).date().isoformat()
    certificate = {
        "what": WHAT,
        "request": {"done": done, **request},
        "scope": scope_of(run),
        "model": {
            "name": path.name if sha or path.is_absolute() else config["model"],
            "revision": config.get("revision"),
            "sha256_before": sha,
            "sha256_after": models.fingerprint(folder / "model"),
        },
        "code": code | {"method_sha256": config["sha256"].get("method")},
        "method": {name: summary[name] for name in method} | {"seed": config.get("seed")},
        "configuration": {name: config.get(name) for name in settings},
        "figures": figures_of(run, never),
        "never_saw": why,
        "residual_risk": risks(run, never),
        "tasks": {when: tasks["averages"] for when, tasks in run["tasks"].items()},
        "audit": list(audit.values()) or ["not audited"],
        "not_reached": list(NOT_REACHED),
        "files": hashes_of(folder),
        "signed_by": signed_by,
    }
    certificate["not_tested"] = untested(certificate)
    return certificate | {"sha256": data.digest(certificate)}


def scope_of(run):
    """How many texts, and while they and the key are there the HMAC-SHA256 of each."""
    config, key = run["config"], run["folder"] / KEY
    scope = {"texts": len(own_rows(run, 0))}
    if watched := sum(row["epoch"] == 0 for row in run["samples"]) - scope["texts"]:
        scope["watched"] = watched  # of earlier requests: measured too, in none of these figures
    if not requests.has_pairs(config) or not key.exists():
        return scope | {"hashes": [], "hashes_note": f"none: the texts or {KEY} are gone"}
    secret = bytes.fromhex(data.read_text(key))
    texts = [data.text_of(pair).encode() for pair in data.read_pairs(config["pairs"])]
    hashes = sorted(hmac.digest(secret, text, "sha256").hex() for text in texts)
    return scope | {"hashes": hashes, "hashes_note": None}


def never_saw(run):
    """(the run of a model that never saw the texts, why there is none): one is None."""
    folder = run["config"].get("never_saw")
    if not folder:
        return None, "the run names no model that never saw the texts (--never-saw)"
    with contextlib.suppress(ValueError):
        other = read_run(folder)
        pairs = [each["config"]["sha256"]["pairs"] for each in (run, other)]
        if other["summary"]["method"] == "none" and pairs[0] == pairs[1]:
            return other, None
    return None, "the run of the model that never saw the texts is gone, or another one by now"


def figures_of(run, never):
    """{measure: {"before", "after", "never_saw", "unseen"}}: each an `interval`, or None.

    A perplexity is {"value"} alone: it is of one corpus.
    """
    summary, figures = run["summary"], {}
    sides = {"before": own_rows(run, 0), "after": own_rows(run, summary["epochs"])}
    sides["never_saw"] = own_rows(never, 0) if never else []
    for name in (*LEFT, "entropy", *OF_SPANS):
        if name not in OF_SPANS or any(name in row for row in sides["before"]):
            figures[name] = {
                when: interval([row.get(name) for row in rows]) for when, rows in sides.items()
            }
            figures[name]["unseen"] = None
    if run["config"].get("thresholds") == "auto":  # then MA's is the mean over unseen texts
        figures["ma"]["unseen"] = {"value": summary["thresholds"]["ma"]}
    sides = {"before": summary["before"], "after": summary["after"]}
    sides["never_saw"] = never["summary"]["before"] if never else {}
    for name in (name for name in summary["before"] if name.startswith("ppl_")):
        figures[name] = {
            when: {"value": side[name]} if side.get(name) else None for when, side in sides.items()
        }
    return figures


def own_rows(run, epoch):
    """The rows of an epoch, without the texts of earlier requests (--after)."""
    return [row for row in run["samples"] if row["epoch"] == epoch and not row.get("watched")]


def interval(values):
    """{"value", "low", "high", "n"}: the mean over n texts and its 95 % bootstrap interval.

    low and high are None for too few texts.
    """
    figure = bootstrap(values) | {"value": mean(values)}
    if not figure["n"]:
        return None
    names = ("value", "low", "high", "n")
    return {name: round(figure[name], 6) if name in figure else None for name in names}


def risks(run, never):
    """A sentence for each measure of memory."""
    rows = own_rows(run, run["summary"]["epochs"])
    marked = any("ma_spans" in row for row in rows)
    sentences = []
    for name, says in (LEFT | LEFT_OF_PARTS if marked else LEFT).items():
        after = [left_of(row, name) for row in rows]
        if marked and set(after) == {None}:
            continue
        other = [left_of(row, name) for row in own_rows(never, 0)] if never else None
        part = " of texts without a mark" if marked and name in LEFT else ""
        sentences.append(f"{LABELS[name]}{part}: {verdict(after, other, says)}")
    return sentences


def left_of(row, name):
    """A measure of a row; None of a marked text as a whole, whose rest is to stay."""
    return None if "ma_spans" in row and name in LEFT else row.get(name)


def untested(certificate):
    """What the certificate cannot speak of."""
    missing = []
    if certificate["audit"] == ["not audited"]:
        missing += ["sampling, membership inference, relearning, quantised copies (evals/audit.py)"]
    if len(certificate["tasks"]) < 2:
        missing += ["abilities on tasks (evals/tasks.py)"]
    if not any(name.startswith("ppl_") for name in certificate["figures"]):
        missing += ["perplexity on other texts (--ppl)"]
    if certificate["never_saw"] is not None:
        missing += [f"a model that never saw the texts: {certificate['never_saw']}"]
    return [*missing, *ALWAYS_UNTESTED]


def hashes_of(folder):
    """{name: sha256} of the run's files, without what a purge changes, and of its model's."""
    config = data.read_json(folder / "config.json")
    kept = {name: value for name, value in config.items() if name not in ("redact", "purged")}
    rows = [row | {"generation": None} for row in data.read_jsonl(folder / "samples.jsonl")]
    hashes = {"config.json": data.digest(kept), "samples.jsonl": data.digest(rows)}
    files = [folder / name for name in ("summary.json", "metrics.jsonl", "audit.json")]
    files += [folder / f"tasks-{when}" / "tasks.json" for when in ("before", "after")]
    for path in filter(Path.is_file, [*files, *sorted((folder / "model").rglob("*"))]):
        hashes[str(path.relative_to(folder))] = data.sha256_of(path)
    return hashes


# --- the page: two sides of A4 to print, which load nothing ---

LABELS = {
    "el10": "EL10",
    "ma": "MA",
    "bleu": "BLEU",
    "bertscore": "BERTScore F1",
    "entropy": "Entropy (bits)",
    "el10_spans": "EL10, marked parts",
    "ma_spans": "MA, marked parts",
    "ma_rest": "MA, the rest of their texts",
    "secret_said": "Secrets said",
}
GLOSSARY = {
    "EL10": "share of the next ten tokens, from any place of a text on, that come out as they are",
    "MA": "share of its tokens that are the model's first choice: it recites them",
    "BLEU, F1": "likeness of its ending to the true one, in words and in meaning",
    "Entropy": "variety of that ending; near 0 it repeats itself",
    "Perplexity": "how unlikely other texts seem to it; lower is better",
    "Marked parts": "what was to be forgotten, if not all of a text",
}
SHOWN, LENGTH = 6, 1200  # of a list, and of a text that may be long: certificate.json has all
TOP = """<title>Certificate</title><meta charset=utf-8>
<meta name=viewport content="width=device-width"><style>
@page { size: A4; margin: 11mm 13mm } body { font: 8.5pt/1.25 sans-serif; max-width: 184mm }
h1 { font-size: 16pt; margin: 0 } h2 { font-size: 10.5pt; margin: 2mm 0 1mm }
code { font-size: 7pt } ul { margin: 0; padding-left: 5mm } section { break-inside: avoid }
body { overflow-wrap: anywhere } td, th { text-align: left; font-weight: 400; vertical-align: top }
p { margin: 1mm 0 } th { width: 38mm; color: #555; overflow-wrap: normal }
@media screen and (max-width: 600px) { body, code { font-size: 11pt } th { width: auto } }
</style><h1>Certificate of a run</h1>"""
VERIFY = [
    f"bash run.sh certificate --verify {FILE} --key PUB: who signed this",
    f"bash run.sh certificate RUN --verify {FILE} --measure: the run gives it",
]


def result(certificate):
    figures, shares = certificate["figures"], []
    sides = figures.get("ma_spans") or figures["ma"]
    for when in ("after", "before", "never_saw"):
        shares.append(f"{sides[when]['value']:.0%}" if sides[when] else "not known")
    line = (
        "{} recites {} of the tokens of {} texts to forget, before {}; one that never saw them {}."
    )
    name, texts = certificate["model"]["name"], certificate["scope"]["texts"]
    return line.format(name, shares[0], texts, *shares[1:])


def render(certificate):
    """The page of a certificate as bytes."""
    figures, of_language = dict(certificate["figures"]), {}
    for name in [name for name in figures if name.startswith(("entropy", "ppl_"))]:
        of_language[name] = figures.pop(name)
    done = {name: certificate[name] for name in ("method", "code", "configuration")}
    files = [f"{name} {sha}" for name, sha in certificate["files"].items()]
    sections = {
        "Result": f"<p><b>{shown(result(certificate))}</b>"
        + bullets([*certificate["residual_risk"], certificate["what"]]),
        "Request": table(certificate["request"]),
        "What it cost the language": figure_table(of_language) + table(certificate["tasks"]),
        "Model": table(certificate["model"]),
        "How to verify": table({"command": VERIFY, "signed by": certificate["signed_by"]}),
        "Figures: means over the texts [with 95% bootstrap intervals]": figure_table(figures),
        "Glossary": table(GLOSSARY),
        "Audit": bullets(certificate["audit"]),
        "Not tested": bullets(certificate["not_tested"]),
        "Copies that this does not reach": bullets(certificate["not_reached"]),
        "Scope": table(certificate["scope"]),
        "What was done": table(done | {"files": files, "sha256": certificate["sha256"]}),
    }
    body = "".join(f"<section><h2>{name}</h2>{part}</section>\n" for name, part in sections.items())
    return f"<!doctype html><html lang=en>{TOP}\n{body}</html>\n".encode()


def shown(value):
    if isinstance(value, list) and value:
        more = [f"and {len(value) - SHOWN} more, in {FILE}"] if len(value) > SHOWN else []
        return "<br>".join(map(shown, value[:SHOWN] + more))
    if isinstance(value, dict):
        known = {name: item for name, item in value.items() if item not in (None, [])}
        value = re.sub('[{}"]', "", json.dumps(known, ensure_ascii=False))
    value = (str(value).strip() if value not in (None, []) else "") or "not given"
    value = html.escape(visible(value if len(value) <= LENGTH else value[:LENGTH] + " ..."))
    return re.sub(r"\b[0-9a-f]{32,}\b", r"<code>\g<0></code>", value)  # hashes


def table(rows):
    lines = [f"<tr><th>{shown(name)}<td>{shown(value)}" for name, value in rows.items()]
    return f"<table>{''.join(lines)}</table>"


def bullets(values):
    return f"<ul>{''.join(f'<li>{shown(value)}' for value in values[: 2 * SHOWN])}</ul>"


def figure_table(figures):
    """A row a measure: 0.123 [0.101, 0.140] a side, or a dash."""
    rows = "<tr><th><th>before<th>after<th>never saw<th>unseen"
    for name, sides in figures.items():
        rows += f"<tr><th>{shown(LABELS.get(name, name.replace('ppl_', 'perplexity ')))}"
        for figure in map(sides.get, ("before", "after", "never_saw", "unseen")):
            rows += f"<td>{figure['value']:.3f}" if figure else "<td>-"
            if figure and figure.get("low") is not None:
                rows += f" [{figure['low']:.3f}, {figure['high']:.3f}]"
    return f"<table>{rows}</table>"


# --- signatures by ssh-keygen ---

NAMESPACE = "icu-certificate"


def ssh_keygen(*words, stdin=b""):
    """What `ssh-keygen WORDS` prints."""
    command = ["ssh-keygen", *map(str, words)]
    done = subprocess.run(command, input=stdin, capture_output=True, check=False)
    if done.returncode:
        complaint = (done.stderr + done.stdout).decode().strip()
        raise ValueError(f"ssh-keygen {words[0]}: {complaint.splitlines()[-1].strip()}")
    return done.stdout


def public_key(path):
    """`TYPE BASE64` of a key file, without the comment, often a name."""
    content = data.read_text(path)
    if "PRIVATE KEY" in content:
        content = ssh_keygen("-y", "-f", path).decode()
    return " ".join(content.split()[:2])


def trouble(content, signature, key):
    """Why the file `signature` is not one of these bytes by `key`, or None."""
    with tempfile.TemporaryDirectory() as folder:
        signers = Path(folder, "signers")
        signers.write_text(f'signer namespaces="{NAMESPACE}" {key}\n')
        words = ["-Y", "verify", "-f", signers, "-I", "signer", "-n", NAMESPACE, "-s", signature]
        try:
            ssh_keygen(*words, stdin=content)
        except ValueError as error:
            return str(error)


# --- the ledger: a line a certificate, each with the sha256 of the line before ---
# ledger.head names the last line.


def add_line(folder, row):
    """Adds the dict `row` as the next line, unless it stands there already; returns its number."""
    path, head = Path(folder, LEDGER), Path(folder, HEAD)
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(path.with_name(".lock"), timeout=60):
        if not path.exists() and not head.exists():
            data.write_json(head, {"line": 0, "sha256": None})
        path.touch()
        if damage := ledger_differences(path):
            raise ValueError(f"{path}: nothing is added to a damaged ledger ({damage[0]})")
        lines = data.read_jsonl(path)
        for old in lines:
            if row.items() <= old.items():
                return old["line"]
        number = len(lines) + 1
        line = {"line": number, "previous": line_hashes(path)[-1], **row}
        data.write_bytes(path, path.read_bytes() + data.json_bytes(line))
        data.write_json(head, {"line": number, "sha256": line_hashes(path)[-1]})
        return number


def line_hashes(path):
    """The sha256 of each line of a ledger, with None before the first."""
    lines = path.read_bytes().splitlines()
    return [None, *(hashlib.sha256(line).hexdigest() for line in lines)]


def ledger_differences(path):
    """What is wrong with a ledger: [], or a sentence on the first such line."""
    hashes, last = line_hashes(path), data.read_json(path.with_name(HEAD))
    for number, row in enumerate(data.read_jsonl(path), start=1):
        if (row.get("line"), row.get("previous")) != (number, hashes[number - 1]):
            return [f"line {number}: changed, moved or missing, or the line before was changed"]
    as_head = hashes[last["line"] : last["line"] + 1] == [last["sha256"]]
    return [] if as_head else [f"line {last['line']}: changed or missing, by {HEAD}"]


# --- whether a certificate still holds ---


def check(path, args):
    """Yields ("differs", "not checked" or "measured", what) of a certificate."""
    certificate, content = data.read_json(path), path.read_bytes()
    fields = {name: value for name, value in certificate.items() if name != "sha256"}
    unlike = signature_differences(path, certificate.get("signed_by"), args.key)
    # In other bytes a field could stand twice, and a reader take the first.
    as_written = content == data.json_bytes(certificate, indent=2)
    if not as_written or data.digest(fields) != certificate.get("sha256"):
        unlike.append(f"{path.name}: changed (not its own sha256), or no certificate")
    page, ledger = path.with_name(PAGE), args.ledger and Path(args.ledger, LEDGER)
    if not unlike and page.is_file() and page.read_bytes() != render(certificate):
        unlike.append(f"{PAGE}: not what {path.name} says")
    if ledger:
        sha, unlike = hashlib.sha256(content).hexdigest(), unlike + ledger_differences(ledger)
        if sha not in [row.get("sha256") for row in data.read_jsonl(ledger)]:
            unlike.append(f"{ledger}: no line of this certificate")
    yield from (("differs", sentence) for sentence in unlike)
    if unlike:
        return
    given = {PAGE: page.is_file(), "ledger (--ledger)": ledger, "who signed (--key)": args.key}
    yield from (("not checked", name) for name, value in given.items() if not value)
    folder = Path(args.run or path.parent)
    if args.run or (folder / "samples.jsonl").exists():
        yield from run_findings(certificate, folder, args.measure)
    else:
        proven = "who signed it, no more" if args.key else "nothing"
        yield "not checked", f"any file or figure, without its RUN: this proves {proven}"


def signature_differences(path, signer, key):
    signature, unlike = Path(f"{path}.sig"), []
    if bool(signer) != signature.is_file():
        there = "missing, but the certificate is" if signer else "there, but the certificate is not"
        unlike.append(f"{signature.name}: {there} signed")
    elif signer and (why := trouble(path.read_bytes(), signature, signer)):
        unlike.append(f"{signature.name}: not a signature of {path.name} by its key ({why})")
    if key and signer != public_key(key):
        other = f"signed with another key than {key}" if signer else "not signed"
        unlike.append(f"{path.name}: {other}")
    return unlike


def run_findings(certificate, folder, measure):
    """What of a run folder is as certified: no figure is taken from the certificate."""
    old, new, gone = {"files": certificate["files"]}, {"files": hashes_of(folder)}, set()
    if same := old == new:  # then they must give the same certificate
        old, new = certificate, build(folder, certificate["request"], certificate["signed_by"])
        if not new["scope"]["hashes"]:
            gone |= {"hashes", "hashes_note"}
        if new["never_saw"] and not old["never_saw"]:
            gone |= {"never_saw", "residual_risk", "not_tested"}
    old, new = spread(old), spread(new)
    for name in sorted(name for name in {*old, *new} if not gone.intersection(name)):
        if name != ("sha256",) and old.get(name) != new.get(name):
            what = "changed" if name in old else "was not there"
            yield "differs", f"{' '.join(name)}: {what if name in new else 'missing'}"
    if not same:
        return
    if gone:
        yield "not checked", f"made of what is not here: {', '.join(sorted(gone))}"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    names = ", ".join(sorted(names - {*certificate["files"], FILE, SIGNATURE, PAGE}))
    yield "not checked", f"request and code, which are as given; not in it: {names}"
    if measure:
        yield from measured_again(certificate, read_run(folder))
    else:
        yield "not checked", "the pairs, and whether its models have these figures (--measure)"


def spread(value, *names):
    """{(name, name, ...): value} of nested dicts."""
    if not isinstance(value, dict):
        return {names: value}
    return {k: v for name, each in value.items() for k, v in spread(each, *names, name).items()}


def measured_again(certificate, run):
    """MA and EL10 of the run's models, as far as they are there. ValueError: the pairs are not."""
    import icu  # a second

    args = argparse.Namespace(**run["config"] | {"device": processes.device_of(None)})
    pairs = requests.pairs_of(run["folder"], run["config"])
    for when, (name, _) in models_of(run).items():
        sha = models.fingerprint(name)
        if not sha or sha != certificate["model"][f"sha256_{when}"]:
            yield "not checked", f"the model {when}: gone, or another by now"
            continue
        model, tokenizer = models.load_model(name, dtype=args.dtype, device=args.device)
        samples, _ = icu.samples_of(pairs, tokenizer, model.config, args)
        with processes.autocast(args):
            rows = icu.memorisation(model, tokenizer, samples, args)
        for measure in ("ma", "el10"):
            value = mean(row[measure] for row in rows)
            figure = certificate["figures"][measure][when] or {"value": None}
            near = figure["value"] == value or abs(figure["value"] - value) <= NEAR
            sentence = f"{LABELS[measure]} {when} {value}, certified {figure['value']}"
            yield "measured" if near else "differs", sentence


# --- commands ---


def date(value):
    """An argparse type: 2026-03-09."""
    return datetime.date.fromisoformat(value)


def verify(args):
    """Prints what differs, and exits 1, and what is not checked."""
    path, kinds = Path(args.verify), set()
    if path.name == LEDGER:
        findings = [("differs", sentence) for sentence in ledger_differences(path)]
    else:
        findings = check(path, args)
        signer = data.read_json(path).get("signed_by")
        print(visible(f"says that it is signed by {signer}" if signer else "not signed"))
    for kind, sentence in findings:
        kinds.add(kind)
        print(visible(f"{kind}: {sentence}"))
    if "differs" in kinds:
        sys.exit(1)
    print(visible(f"as it was: {path}"))


def certify(args):
    """Writes certificate.json, its page, the signature and the ledger's line."""
    folder = Path(args.run)
    received = args.received and args.received.isoformat()
    request = {"ids": args.request_id, "received": received, "approved_by": args.approved_by}
    key = folder / KEY
    if not key.exists() and requests.has_pairs(data.read_json(folder / "config.json")):
        data.write_bytes(key, secrets.token_hex(32).encode())
    certificate = build(folder, request, args.sign and public_key(args.sign))
    done = certificate["request"]["done"]
    if args.received and args.received > datetime.date.fromisoformat(done) + ONE_DAY:
        raise ValueError(f"--received {args.received}: the run had ended before, on {done}")
    content = data.json_bytes(certificate, indent=2)
    contents = {FILE: content, PAGE: render(certificate)}
    if args.sign:
        words = ["-Y", "sign", "-q", "-f", args.sign, "-n", NAMESPACE]
        contents[SIGNATURE] = ssh_keygen(*words, stdin=content)
    if args.ledger:
        row = {"run": folder.resolve().name, "request": certificate["request"]}
        number = add_line(args.ledger, row | {"sha256": hashlib.sha256(content).hexdigest()})
        print(visible(f"ledger: line {number} of {Path(args.ledger, LEDGER)}"))
    (folder / SIGNATURE).unlink(missing_ok=True)  # of the certificate that was here before
    for name, content in contents.items():
        data.write_bytes(folder / name, content)
    written = f"certificate: {folder / FILE}; to print: {folder / PAGE}"
    print(visible(f"{WHAT}\n{written}", keep="\n"))


# fmt: off
def make_parser():
    parser = flags.command_parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", metavar="RUN", help="a finished run folder")
    add("--received", type=date, metavar="2026-03-09", help="when the request came")
    add("--request-id", nargs="+", default=[], metavar="ID", help="the requests answered")
    add("--approved-by", metavar="NAME", help="who says that this may go out")
    add("--sign", metavar="KEY", help="a private key of OpenSSH: sign certificate.json")
    add("--ledger", metavar="DIR", help="add a line to DIR/ledger.jsonl; --verify: find it")
    add("--verify", metavar="FILE", help="say what has changed since it was written")
    add("--key", metavar="PUB", help="--verify: the public key that must have signed")
    add("--measure", action="store_true", help="--verify: also measure the models' MA and EL again")
    return parser
# fmt: on


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if not (args.run or args.verify):
        parser.error("name a RUN, or --verify FILE")
    (verify if args.verify else certify)(args)


if __name__ == "__main__":
    flags.run_cli(main)
