"""The commands of evidence: a certificate of a run is written, signed and put on a ledger, or checked.

python evals/report.py RUN --certificate --received 2026-03-09 --request-id R-17 --approved-by "A. Name" --sign KEY
python evals/report.py RUN --certificate --ledger DIR
python evals/report.py --verify RUN/certificate.json --key KEY.pub
python evals/report.py --verify DIR/ledger.jsonl
"""

import argparse
import datetime
import hashlib
from pathlib import Path

from extras import certificate, certificate_page, ledger, signatures
from extras.certificate import FILE, PAGE, SIGNATURE
from kit import data, paths
from kit.text import visible


def add_flags(parser):
    """The flags of --certificate and --verify."""
    g = parser.add_argument_group("evidence (docs/certificate.md)")
    g.add_argument(
        "--certificate",
        action="store_true",
        help="write certificate.json and .html into the run folder",
    )
    g.add_argument("--received", type=day, metavar="DATE", help="when the request came, 2026-03-09")
    g.add_argument(
        "--request-id", nargs="+", default=[], metavar="ID", help="the requests that were answered"
    )
    g.add_argument("--approved-by", metavar="NAME", help="who says that this may go out")
    g.add_argument("--sign", metavar="KEY", help="a private key of OpenSSH: sign certificate.json")
    g.add_argument("--ledger", metavar="DIR", help="add a line to DIR/ledger.jsonl")
    g.add_argument(
        "--verify",
        metavar="FILE",
        help="say what of a certificate.json or ledger.jsonl has changed",
    )
    g.add_argument("--key", metavar="PUB", help="--verify: the public key that must have signed")


def day(text):
    """An argparse type: a date, 2026-03-09."""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no date such as 2026-03-09") from None


def asked(args):
    """Whether one of these flags was given."""
    one = args.certificate, args.received, args.request_id, args.approved_by, args.sign, args.ledger
    return any((*one, args.verify, args.key))


def main(args):
    """evals/report.py --certificate or --verify."""
    of_certificate = args.received, args.request_id, args.approved_by, args.sign, args.ledger
    if args.verify and (args.certificate or any(of_certificate) or len(args.runs) > 1):
        raise ValueError(
            "--verify checks one file, against its own folder or one RUN: pass nothing else but --key"
        )
    if not args.verify and (not args.certificate or args.key or len(args.runs) != 1):
        raise ValueError(
            "--certificate is of one RUN; --received, --request-id and their like go with it, --key with --verify"
        )
    if args.out or args.redact or args.ask:
        raise ValueError("--out, --redact and --ask do not go with --certificate and --verify")
    return verify(args) if args.verify else certify(args)


def verify(args):
    """Prints what differs, a line each, and exits 1; or that nothing does."""
    path = Path(args.verify)
    if not path.is_file():
        raise ValueError(
            f"--verify {path}: no such file; name a certificate.json or a ledger.jsonl"
        )
    if path.name == ledger.NAME:
        if args.key or args.runs:
            raise ValueError(
                f"--verify {path}: a ledger has no key and no run of its own; pass neither"
            )
        found = ledger.differences(path)
    else:
        found = certificate.differences(
            path, Path(args.runs[0]) if args.runs else path.parent, args.key
        )
        signer = data.read_json(path)["signed_by"]
        print(visible(f"says that it is signed by {signer}" if signer else "not signed"))
    print(
        "\n".join(visible(f"differs: {line}") for line in found)
        or f"as it was: {visible(str(path))}"
    )
    if found:
        raise SystemExit(1)


def certify(args):
    """Writes certificate.json, certificate.html, the signature and the ledger's line, all computed before."""
    folder = Path(args.runs[0])
    for flag, words in (
        ("--request-id", args.request_id),
        ("--approved-by", [args.approved_by or "nobody"]),
    ):
        for word in words:
            data.check_string(word, flag)
    if args.ledger and Path(args.ledger).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"--ledger {args.ledger}: lies in the run, and is of many; choose a folder outside"
        )
    request = {"ids": args.request_id, "received": args.received, "approved_by": args.approved_by}
    found, hashes = certificate.build(
        folder, request, args.sign and signatures.public_key(args.sign)
    )
    done = datetime.date.fromisoformat(found["request"]["done"])
    if args.received and datetime.date.fromisoformat(args.received) > done + datetime.timedelta(
        days=1
    ):  # time zones
        raise ValueError(f"--received {args.received}: the run had ended before, on {done}")
    content_ = data.json_bytes(found, indent=2)
    contents = {"hashes.json": hashes and data.json_bytes(hashes, indent=2), FILE: content_}
    contents |= {
        SIGNATURE: args.sign
        and signatures.sign(content_, args.sign, certificate.NAMESPACE).encode()
    }
    contents |= {PAGE: certificate_page.render(found)}
    own = {FILE: paths.holds(*certificate.FORM), PAGE: paths.begins_with(certificate_page.BEGIN)}
    own |= {
        SIGNATURE: paths.begins_with(signatures.BEGIN),
        "hashes.json": paths.holds("salt", "texts"),
    }
    paths.check_outputs([(folder / name, own[name]) for name in contents], overwrite=True)
    if args.ledger:
        row = {
            "run": folder.resolve().name,
            "request": found["request"],
            "sha256": hashlib.sha256(content_).hexdigest(),
        }
        print(
            f"ledger: line {ledger.add(args.ledger, row)} of {visible(str(Path(args.ledger, ledger.NAME)))}"
        )
    for name, content in contents.items():
        if content:
            data.write_bytes(folder / name, content)
        elif name == SIGNATURE:  # of the certificate that was here before
            (folder / name).unlink(missing_ok=True)
    print(
        visible(
            f"{found['what']}\ncertificate: {folder / FILE}; to print: {folder / PAGE}", keep="\n"
        )
    )
