"""Damages good input files at random and reads them: a reader returns, or raises ValueError or OSError, nothing else.

    python tests/fuzz.py --inputs 100000 --seed 0

Those two are what flags.run_cli turns into one line and exit 2. A reader must not change or leave a file either. Files
are damaged as bytes (flipped, cut out, put in, doubled, cut off) and, where they are JSON, also as values, so that what
is odd still parses. test_fuzz.py drives the same `attempt` with hypothesis.
"""

import argparse
import collections
import contextlib
import hashlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
import traceback
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import conftest  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

import icu  # noqa: E402
import knn  # noqa: E402
from evals import report  # noqa: E402
from kit import data, models, processes, runs, states  # noqa: E402
from kit.text import visible  # noqa: E402

CLEAN = (ValueError, OSError)

# --- damage ---

TOKENS = [
    b"\0",
    b"\n",
    b"\r",
    b'"',
    b",",
    b"{",
    b"}",
    b"[",
    b"]",
    b":",
    b"\\",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\\ud800",
]
TOKENS += [
    b"null",
    b"true",
    b"NaN",
    b"1e999",
    b"-1",
    b"9" * 30,
    b"9" * 5000,
    b"[" * 3000,
    b"\xe2\x80\xa8",
    b"'|O'",
]
TOKENS += [
    b"'<i8'",
    b"'<f4'",
    b"(4, 10)",
    b"(-1, 4)",
    b"(99999999999, 9)",
    b"True",
    b"../",
    b'{"a": 1}\n',
]
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    2**63,
    10**400,
    1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "x",
    "\ud800",
]
VALUES += [
    "\0",
    "\n",
    "y" * 300,
    "../x",
    [],
    {},
    [[]],
    {"a": 1},
    [1, "a"],
    [None],
    [-1],
    [2**40],
    [0.5],
]


def damage_bytes(data, rng):
    """One change of the bytes."""
    at, length = rng.randrange(len(data) + 1), rng.randrange(9)
    end, how = min(at + length, len(data)), rng.randrange(6)
    if how == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if how == 1:
        return data[:at] + data[end:]
    if how == 2:
        return data[:at] + rng.choice(TOKENS) + data[at:]
    if how == 3:
        return data[:at] + rng.choice(TOKENS) + data[end:]
    if how == 4:
        return data[:end] + data[at:]
    return data[:at]


def damage_value(data, rng):
    """One change of a value in a JSON document, or in one line of JSON lines; the bytes as they are if it is none."""
    lines = (
        data.split(b"\n")
        if data.count(b"\n") and data.lstrip()[:1] == b"{" and b"}\n{" in data
        else [data]
    )
    number = rng.randrange(len(lines))
    try:
        document = [json.loads(lines[number])]
    except (ValueError, RecursionError):
        return data
    places = []

    def walk(value):
        for key in value if isinstance(value, dict) else range(len(value)):
            places.append((value, key))
            if isinstance(value[key], dict | list) and len(places) < 300:
                walk(value[key])

    walk(document)
    holder, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0 and holder is not document:
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[rng.choice(["", "x", "\ud800", *holder])] = holder.pop(key)
    elif how == 2 and isinstance(holder[key], str) and holder[key]:
        at = rng.randrange(len(holder[key]))
        holder[key] = (
            holder[key][:at]
            + rng.choice(["\0", "\ud800", "\u2028", " ", "é", ""])
            + holder[key][at + 1 :]
        )
    else:
        holder[key] = rng.choice(VALUES)
    lines[number] = json.dumps(document[0] if document else None).encode()
    return b"\n".join(lines)


def damage(data, rng):
    """One to three changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = rng.choice([damage_bytes, damage_value, damage_value])(data, rng)
    return data


# --- hostile Unicode ---

PIECES = [
    *"aZ  7.\n\t\0\x1f\x85",
    "\r\n",
    "\x1b[2J",
    "&amp;",
    "&#x41;",
    *"ßİﬁé𝔘京𠮷",
    "e\u0301",
    "o\u0308\u0323",
]
PIECES += [
    "か\u3099",
    "한",
    "\u1112\u1161\u11ab",
    "ที่",
    "ກໍາ",
    "क्षि",
    "عربي\u064b",
    "שלום",
    "👩\u200d👩\u200d👧",
]
PIECES += [
    "🇩🇪",
    "🇩",
    "👍🏽",
    "☁\ufe0f",
    *"\u0301\u0345\u202e\u200f\u2066\u2028\u2029\u00a0\u3000\u00ad\u200b\u200d",
]
PIECES += [*"\ufeff\ufffd\uffff\U000e0067\U0010ffff"]
HALVES = ["\ud800", "\udfff", "\udc80"]


def hostile(rng):
    """A text of such pieces; now and then one that is no text: half a surrogate pair in it, or blank."""
    pieces = rng.choices(
        PIECES if rng.random() < 0.5 else rng.sample(PIECES, 4), k=rng.choice([2, 5, 12, 40, 90])
    )
    if rng.random() < 0.03:
        pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(HALVES))
    return "".join(pieces)


def torn(before, after):
    """Whether a cut parts a letter from its marks, a joined emoji, a line break of two or a Hangul syllable."""
    if unicodedata.category(before[-1]) in ("Cc", "Zl", "Zp"):
        return before[-1] + after[0] == "\r\n"
    marks = (
        unicodedata.category(after[0]) in ("Mn", "Me")
        or after[0] in "\u200d\ufe0f\U000e0067\U0001f3fd"
    )
    return marks or "\u1100" <= before[-1] <= "\u11a7" and "\u1160" <= after[0] <= "\u11ff"


# --- what is damaged and who reads it ---


class Small(torch.nn.Linear):
    """The least that an engine can train."""

    device = torch.device("cpu")


class Kinds:
    """Good files in a folder of their own, and a method a kind that damages one of them and reads it."""

    NAMES = (
        "pairs",
        "jsonl",
        "csv",
        "npy",
        "unicode",
        "config",
        "model",
        "folder",
        "state",
        "signed",
        "run",
    )

    def __init__(self, folder):
        self.folder, self.tokenizer = folder, conftest._make_tokenizer("gpt_neo")
        self.pairs = [self.make_pairs(with_ids) for with_ids in (False, True)]
        self.make_files()
        self.make_run()

    def make_pairs(self, with_ids):
        """The bytes of a pairs.jsonl."""
        texts = [
            ("The van near", " the old mill."),
            ("Call the clinic", " on Tuesday morning at 7731."),
        ]
        rows = []
        for number, (prefix, suffix) in enumerate(texts):
            record = {"id": f"r{number}", "context": "", "prefix": prefix, "suffix": suffix}
            record |= {
                f"{part}_ids": models.encode(self.tokenizer, record[part]) for part in data.PARTS
            }
            rows.append(knn.make_pair(record, [record] * 2, [0.5, 0.4], with_ids=with_ids))
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    def make_files(self):
        records = b'{"id": 7, "text": "a b c"}\n{"prefix": "c", "suffix": " d", "context": ""}\n'
        table = b'id,context,text\n1,,"a ""quoted"" b"\n2,x,c d\n'
        arrays = [np.arange(40).reshape(4, 10), np.arange(40, dtype=np.uint16).reshape(4, 10)]
        files = [io.BytesIO() for _ in arrays]
        for file, array in zip(files, arrays, strict=True):
            np.save(file, array)
        self.good = {"jsonl": [records], "csv": [table], "npy": [file.getvalue() for file in files]}

    def make_run(self):
        """A run folder with a config.json and two states, and the model folder that its settings name."""
        model = conftest._save_tiny("gpt_neo", self.folder / "model")
        self.model_files = {path: path.read_bytes() for path in model.iterdir()}
        (self.folder / "pairs.jsonl").write_bytes(self.pairs[0])
        flags = [
            "--pairs",
            self.folder / "pairs.jsonl",
            "--model",
            model,
            "--out",
            self.folder / "run",
        ]
        self.args = icu.parse_args(
            [str(flag) for flag in [*flags, "--bert", "minilm", "--device", "cpu"]]
        )
        thresholds = {"bleu": 0.01, "el10": 0.05, "ma": 0.6, "bertscore": 0.3}
        runs.start_run_folder(self.folder / "run", runs.describe_run(self.args, thresholds))
        progress, engine = states.Progress(), self.engine()
        progress.next_epoch()  # the states of epoch 0 hold no weights
        for _ in range(2):
            engine.step(engine.model(torch.ones(1, 3)).sum())
            progress.count_step({"loss": 0.5})
            states.save_state(self.folder / "run", engine, progress)
        self.newest, self.older = states.states(self.folder / "run")[:2]
        self.make_finished()
        self.files = {path: path.read_bytes() for path in self.in_runs()}

    def make_finished(self):
        """A finished run folder with all that evals/report.py reads of one."""
        folder, means = self.folder / "finished", dict.fromkeys(runs.MEASURES, 0.5)
        ends = {when: means | {"ppl_heldout": 9.5} for when in ("before", "after")}
        summary = {
            "method": "icu",
            "protocol": "paper",
            "epochs": 2,
            "stopped": "max epochs",
            "collapsed": False,
        }
        thresholds = {"bleu": 0.01, "el10": 0.05, "ma": 0.6, "bertscore": 0.3}
        shutil.copytree(self.folder / "run", folder, ignore=lambda *_: ["state"])
        data.write_json(folder / "summary.json", summary | ends | {"thresholds": thresholds})
        rows = [{"epoch": epoch, "active": 2 - epoch} | means for epoch in range(3)]
        said = [row | {"id": id, "generation": " a mill"} for row in rows for id in ("r0", "r1")]
        data.write_jsonl(folder / "metrics.jsonl", rows)
        data.write_jsonl(folder / "samples.jsonl", said)
        averages = {"cls": 0.5, "cls_missing": ["piqa"], "dia": None, "dia_missing": []}
        sets = {
            "copa": {"value": 0.5, "bad_rows": 1, "bad": ["row 3: odd"]},
            "piqa": {"missing": "no file"},
        }
        for when in ends:
            data.write_json(folder / f"tasks-{when}" / "tasks.json", sets | {"averages": averages})

    def in_runs(self):
        """The files of both run folders."""
        return [
            path
            for name in ("run", "finished")
            for path in (self.folder / name).rglob("*")
            if path.is_file()
        ]

    def engine(self):
        return processes.PlainEngine(Small(3, 2), self.args)

    def damaged(self, name, good, rng):
        path = self.folder / name
        path.write_bytes(damage(rng.choice(good), rng))
        return path

    def read_pairs(self, rng):
        pairs = data.read_pairs(self.damaged("damaged.jsonl", self.pairs, rng))
        protocol, targets = rng.choice(["paper", "released"]), rng.choice(["all", "suffix", None])
        samples, _ = icu.build_samples(
            pairs, self.tokenizer, protocol=protocol, positions=64, targets=targets
        )
        assert all(0 < s.forget.t0 < len(s.forget.ids) <= 64 for s in samples)
        icu.collate([side for s in samples for side in (s.forget, s.learn)])

    def read_jsonl(self, rng):
        path = self.damaged("damaged.jsonl", self.good["jsonl"], rng)
        assert all(record["suffix"] for record in data.read_records(path))
        data.read_texts(path)

    def read_csv(self, rng):
        path = self.damaged("damaged.csv", self.good["csv"], rng)
        assert all(record["suffix"] for record in data.read_records(path))
        data.read_texts(path)

    def read_npy(self, rng):
        path = self.damaged("damaged.npy", self.good["npy"], rng)
        assert data.load_ids(path).ndim == 2
        data.read_records(path, tokenizer=self.tokenizer)

    def read_config(self, rng):
        """The config.json of a run, by --resume."""
        path = self.folder / "run" / "config.json"
        path.write_bytes(damage(self.files[path], rng))
        before = runs.check_resume(self.args)
        runs.thresholds_text(before["thresholds_used"], self.args)

    def read_model(self, rng):
        """The config.json of a model folder, by all that icu.py reads before the weights."""
        path = self.folder / "model" / "config.json"
        path.write_bytes(damage(self.model_files[path], rng))
        args = argparse.Namespace(**vars(self.args) | {"out": str(self.folder / "new")})
        assert len(icu.read_inputs(args).samples) == 2 and not (self.folder / "new").exists()

    def read_folder(self, rng):
        """One file of a model folder, by all who load it; of the weights mostly the header."""
        path = rng.choice(sorted(self.model_files))
        data = self.model_files[path]
        if path.suffix == ".safetensors" and rng.random() < 0.9:
            length = int.from_bytes(data[:8], "little")
            header = damage(data[8 : 8 + length], rng)
            data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        else:
            data = damage(data, rng)
        path.write_bytes(data)
        model, tokenizer = models.load_model(str(path.parent))  # by check_model first
        models.eos_ids(model), models.encode(tokenizer, "The van near the mill", inside=True)

    def read_unicode(self, rng):
        """Records and pairs of hostile Unicode: nothing is lost, no visible character is torn, a copy is dropped."""
        texts = [hostile(rng) for _ in range(3)]
        path = self.folder / "hostile.jsonl"
        path.write_bytes(
            rng.choice(["\n", "\r\n"]).join(json.dumps({"text": text}) for text in texts).encode()
        )
        records = data.read_records(path)
        try:
            self.use_unicode(path, texts, records)
        except ValueError as error:
            raise AssertionError("what was read is refused further on") from error

    def use_unicode(self, path, texts, records):
        passages = [passage for record in records for passage in knn.cut_passages([record], 10)]
        assert [knn.text_of(record) for record in records] == texts == data.read_texts(path)
        assert "".join(map(knn.text_of, passages)) == "".join(texts)
        assert not any(torn(part["prefix"], part["suffix"]) for part in [*records, *passages])
        keep, _ = knn.leak_guard(
            records[:1], [{**record, "id": f"p{record['id']}"} for record in records]
        )
        assert not keep[0], "a copy of the text to forget is kept"
        data.write_jsonl(
            path, (knn.make_pair(record, records[-1:], [0.5], with_ids=False) for record in records)
        )
        pairs = data.read_pairs(path)
        samples, _ = icu.build_samples(pairs, self.tokenizer, protocol="paper", positions=10**6)
        assert models.decode(self.tokenizer, [sample.forget.ids for sample in samples]) == texts
        assert models.true_suffixes(self.tokenizer, samples) == [pair["suffix"] for pair in pairs]

    def read_state(self, rng):
        """One file of the newest of two states: the older one is used, or the newest if no byte of it has changed."""
        path = rng.choice(sorted(path for path in self.files if self.newest in path.parents))
        path.write_bytes(damage(self.files[path], rng))
        state = states.newest_state(self.folder / "run")
        same = path.read_bytes() == self.files[path]
        # A manifest may be spelt otherwise and say the same.
        assert state == (self.newest if same else self.older) or path.name == "manifest.json"
        states.load_state(state, self.engine())
        if state != self.newest:
            raise ValueError("passed over")

    def read_signed(self, rng):
        """The same with a manifest that fits: no checksum helps, and the loader has to be clean by itself."""
        names = [
            self.newest / name
            for name in ("training.safetensors", "progress.json", "random-0.json")
        ]
        path, manifest = rng.choice(names), self.newest / "manifest.json"
        path.write_bytes(damage(self.files[path], rng))
        data = path.read_bytes()
        signed = json.loads(self.files[manifest])
        signed[path.name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest.write_text(json.dumps(signed))
        states.load_state(states.newest_state(self.folder / "run"), self.engine())

    def read_run(self, rng):
        """One file of a finished run, by evals/report.py up to its plots; alone, or beside one that is whole."""
        path = rng.choice(
            sorted(path for path in self.files if self.folder / "finished" in path.parents)
        )
        beside = [report.read_run(self.folder / "finished")] if rng.random() < 0.5 else []
        path.write_bytes(damage(self.files[path], rng))
        found = [report.read_run(self.folder / "finished"), *beside]
        texts, said = report.texts_of(found, [run for run in found if not run["redacted"]], 4)
        for text in [*texts.values(), said]:
            assert visible(text, keep="\r\n") == text

    def attempt(self, kind, rng):
        """Damages a file of this kind and reads it: "read" or "refused". Any other end is an exception."""
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                getattr(self, f"read_{kind}")(rng)
            return "read"
        except CLEAN as error:
            assert str(error), "an error without a message"
            return "refused"
        finally:
            self.put_back(kind)

    def put_back(self, kind):
        """Restores what was damaged; AssertionError if the reader has left or changed another file."""
        if kind in ("model", "folder"):
            assert {*(self.folder / "model").iterdir()} == set(self.model_files), (
                "a reader made or removed a file"
            )
            for path, data in self.model_files.items():
                path.write_bytes(data)
        if kind not in ("config", "state", "signed", "run"):
            return
        assert set(self.in_runs()) == set(self.files), "a reader made or removed a file"
        changed = [path for path, data in self.files.items() if path.read_bytes() != data]
        assert len(changed) <= (2 if kind == "signed" else 1), "a reader changed a file"
        for path in changed:
            path.write_bytes(self.files[path])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--inputs", type=int, default=100_000, help="damaged files in all (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=Kinds.NAMES, choices=Kinds.NAMES)
    args = parser.parse_args()
    counts, failures, begin = collections.Counter(), [], time.time()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        kinds = Kinds(folder)
        for number in range(args.inputs):
            kind = args.kinds[number % len(args.kinds)]
            try:
                ending = kinds.attempt(kind, random.Random(f"{args.seed} {number}"))
            except Exception:
                ending = "failed"
                failures.append(f"--- {kind}, input {number}\n{traceback.format_exc()}")
            counts[kind, ending] += 1
    finally:
        shutil.rmtree(folder)
    print(f"{'kind':<8}{'inputs':>9}{'read':>9}{'refused':>9}{'failed':>9}")
    for kind in args.kinds:
        row = [counts[kind, ending] for ending in ("read", "refused", "failed")]
        print(f"{kind:<8}{sum(row):>9}" + "".join(f"{count:>9}" for count in row))
    print(f"{args.inputs} inputs in {time.time() - begin:.0f} s, {len(failures)} failures")
    print("\n".join(failures[:5]))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
