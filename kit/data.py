"""Files: JSON and JSON lines written whole or not at all, the records and pairs that people bring, and downloads.

Everything a user gives is checked here; a ValueError names the file and the line or row.
"""

import contextlib
import csv
import hashlib
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kit import spans
from kit.text import is_break, nearest_break, unspaced_cuts


def cache_folder(name):
    """Where downloads and embeddings are kept between runs: $ICU_CACHE, or ~/.cache/icu."""
    return Path(os.environ.get("ICU_CACHE") or Path.home() / ".cache" / "icu") / name


def make_folder(path):
    """A folder, and those above it, that only their owner can enter (0700); what is there is left as it is."""
    for folder in (*reversed(Path(path).absolute().parents), Path(path)):
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)


def private(path, flags):
    """For `open(..., opener=private)`: a file that only its owner can read (0600), also one that is there already."""
    handle = os.open(path, flags, 0o600)
    with contextlib.suppress(
        OSError
    ):  # a file system without modes, or somebody else's file that we may write
        os.fchmod(handle, 0o600)
    return handle


def check_outputs(paths, *, overwrite=False, reads=()):
    """ValueError where one of these files must not be written.

    It is there already (`overwrite` replaces a plain file, never a folder or a link), or this command reads it.
    """
    read = {Path(path).resolve() for path in reads if path}
    for path in map(Path, paths):
        if path.is_dir() or path.is_symlink():
            raise ValueError(f"{path} is a folder or a link: name a file")
        if path.resolve() in read:
            raise ValueError(f"{path} is read by this command: name another file")
        if path.exists() and not overwrite:
            raise ValueError(f"{path} exists already: pass --overwrite to replace it")


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path` and rename it: a reader never sees half a file.

    It may hold the texts of people, so only its owner can read it, and enter a folder that is made for it.
    """
    path = Path(path)
    path = path.resolve() if path.is_symlink() else path  # the link stays
    make_folder(path.parent)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=private) as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path, data):
    """Write bytes, whole or not at all."""
    write_atomically(path, lambda file: file.write(data))


def write_jsonl(path, rows):
    """Write dicts as JSON lines, UTF-8, characters as they are."""
    write_atomically(path, lambda file: file.writelines(json_bytes(row) for row in rows))


def json_bytes(value, **how):
    """A value as JSON in UTF-8, with a line break. Half a surrogate pair (a path of other bytes) is \\udc.. there."""
    return (json.dumps(value, ensure_ascii=False, **how) + "\n").encode("utf-8", "backslashreplace")


def read_text(path):
    """The whole file as text, without a byte order mark. ValueError for a missing, empty or non-UTF-8 file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: " + ("is not a file" if path.exists() else "no such file"))
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def numbered_jsonl(path):
    """Yield (line number from 1, dict) of a JSON lines file; blank lines are skipped."""
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a RecursionError: brackets nested too deep
            raise ValueError(f"{path} line {number}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path} line {number}: expected an object {{...}}, found {type(row).__name__}"
            )
        yield number, row


def read_jsonl(path):
    """All objects of a JSON lines file. ValueError names the file and the line."""
    return [row for _, row in numbered_jsonl(path)]


def read_json(path):
    """One JSON document; ValueError names the file."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (
        ValueError,
        RecursionError,
    ) as error:  # ValueError also: a whole number of over 4300 digits
        raise ValueError(f"{path}: not JSON: {error}") from None


def write_json(path, value):
    """One JSON document, indented for people."""
    write_bytes(path, json_bytes(value, indent=2))


def chunks(items, size):
    """A list in pieces of `size`, the last one shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- records ---

PARTS = ("context", "prefix", "suffix")  # of a record; prefix + suffix is its text
SIDES = "", "learn_"  # of a pair: what its fields begin with


def split_in_half(text):
    """Split at the word boundary nearest the middle; the whitespace goes to the suffix, so prefix + suffix == text.

    In scripts without spaces (Chinese, Thai, ...) every character ends a word. A text of one word is split at its
    middle character; no cut falls inside a visible one (a letter and its accents, a joined emoji). ValueError for a
    text of fewer than two visible characters.
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    middle = (first + last) / 2
    gaps = [match.start() for match in re.compile(r"\s+").finditer(text, first, last)]
    gaps = [gap for gap in gaps + unspaced_cuts(text) if first < gap < last and is_break(text, gap)]
    at = min(gaps, key=lambda gap: (abs(gap - middle), gap), default=None) or nearest_break(
        text, first, last
    )
    if at is None:
        raise ValueError(
            "the text is blank" if last <= first else f"{text!r} is one character: nothing to split"
        )
    return text[:at], text[at:]


def make_record(row, number, where):
    """A record {id, context, prefix, suffix} from one row of the user's; `number` is its default id."""
    own_split = row.get("prefix") is not None and row.get("suffix") is not None
    fields = ["prefix", "suffix"] if own_split else ["text"]
    if not own_split and row.get("text") is None:
        raise ValueError(
            f"{where}: needs a `text`, or a `prefix` and a `suffix`; found {', '.join(row) or 'nothing'}"
        )
    id = row.get("id", number)
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    context = "" if row.get("context") is None else row["context"]
    values = {"id": id, "context": context, **{name: row[name] for name in fields}}
    for name, value in values.items():
        check_string(value, f"{where}: `{name}`", blank_ok=name == "context")
    if not own_split:
        try:
            values["prefix"], values["suffix"] = split_in_half(values.pop("text"))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return values | spans.read_spans(row, values["prefix"] + values["suffix"], where)


def check_string(value, what, *, blank_ok=False):
    """ValueError unless `value` is a string that UTF-8 can hold and, by default, not blank."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {type(value).__name__}, not a string")
    if not blank_ok and not value.strip():
        raise ValueError(f"{what} is blank")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair: "\ud800"
        raise ValueError(f"{what} holds half a surrogate pair at character {error.start}") from None


def numbered_csv(path):
    """Yield (number of its first line, dict) of a CSV file with a header; blank lines are skipped."""
    text = read_text(path)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path} line {line}: holds a NUL byte")
    csv.field_size_limit(2**31 - 1)  # the default stops at a field of 128 kB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header, line = None, 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{path} line {line}: not CSV: {error}") from None
        if row is None:
            return
        if row and header is None:
            header = row
            if "text" not in header and not {"prefix", "suffix"} <= set(header):
                raise ValueError(
                    f"{path}: needs a column `text`, or `prefix` and `suffix`; found {', '.join(header)}"
                )
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: a column name stands twice in: {', '.join(header)}")
        elif row:
            if len(row) != len(header):
                raise ValueError(
                    f"{path} line {line}: {len(row)} columns where the header has {len(header)}"
                )
            yield line, dict(zip(header, row, strict=True))
        line = reader.line_num + 1


def load_ids(path):
    """A 2-D array (N, T) of integers from a .npy file, not yet checked against a vocabulary."""
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle can run code
        shape, kind = ids.shape, ids.dtype.kind
    except Exception as error:  # numpy answers a broken header with a dozen types of exception
        raise ValueError(f"{path}: not a .npy file of integers: {error}") from None
    if kind not in "iu" or len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise ValueError(
            f"{path}: expected integers of shape (rows, tokens >= 2), found {ids.dtype} {shape}"
        )
    return ids


def ids_records(context, prefix, suffix, *, tokenizer, where):
    """Records of token ids, three arrays of N rows; the id is the row number. ValueError: a token id out of range."""
    records = [{"id": str(number)} for number in range(len(prefix))]
    for part, ids in zip(PARTS, (context, prefix, suffix), strict=True):
        rows, columns = np.nonzero((ids < 0) | (ids >= len(tokenizer)))
        if len(rows):
            value = ids[rows[0], columns[0]]
            raise ValueError(
                f"{where} row {rows[0]}: token id {value} is outside the vocabulary of {len(tokenizer)}"
            )
        for record, row in zip(records, ids.tolist(), strict=True):
            record[part] = tokenizer.decode(row, clean_up_tokenization_spaces=False)
            record[f"{part}_ids"] = row
    return records


def read_records(path, *, tokenizer=None):
    """Records {id, context, prefix, suffix} of a .csv, .jsonl or .npy file; prefix + suffix is the text, unchanged.

    CSV and JSONL rows have a `text` (split in half) or a `prefix` and a `suffix`, and may have `id` (default: the
    row number from 0) and `context`. A .npy holds token ids (N, T) of `tokenizer`, and its records also have
    context_ids, prefix_ids and suffix_ids. ValueError names the file and the line or row.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (".csv", ".jsonl", ".npy"):
        raise ValueError(f"{path}: unknown kind of file {kind!r}: use .csv, .jsonl or .npy")
    if kind == ".npy":
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        if tokenizer is None:
            raise ValueError(f"{path}: token ids need a tokenizer: pass --tokenizer")
        ids = load_ids(path)  # (N, T)
        context, prefix, suffix = np.split(ids, [0, ids.shape[1] // 2], axis=1)
        return ids_records(context, prefix, suffix, tokenizer=tokenizer, where=path)
    records, line_of = [], {}
    for line, row in numbered_csv(path) if kind == ".csv" else numbered_jsonl(path):
        record = make_record(row, len(records), f"{path} line {line}")
        if record["id"] in line_of:
            raise ValueError(
                f"{path} line {line}: id {record['id']!r} stands on line {line_of[record['id']]} already"
            )
        line_of[record["id"]] = line
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no rows")
    return records


def read_texts(path):
    """The `text` column of a CSV or JSONL file, blank ones left out: what perplexity is measured on."""
    numbered = numbered_csv if Path(path).suffix.lower() == ".csv" else numbered_jsonl
    texts = []
    for line, row in numbered(path):
        if isinstance(row.get("text"), str) and row["text"].strip():
            check_string(row["text"], f"{path} line {line}: `text`")
            texts.append(row["text"])
    if not texts:
        raise ValueError(f"{path}: no `text` column with text in it")
    return texts


def read_unseen(path):
    """The records of a CSV or JSONL file as pairs, each its own learn partner: texts that are only measured."""
    if Path(path).suffix.lower() == ".npy":
        raise ValueError(f"--unseen {path}: token ids; pass the texts as .csv or .jsonl")
    return [
        {**record, **{f"learn_{key}": value for key, value in record.items()}}
        for record in read_records(path)
    ]


# --- pairs.jsonl ---


def read_pairs(path):
    """The lines of a pairs.jsonl as dicts, every field checked. ValueError names the file and the line."""
    pairs, line_of = [], {}
    for line, pair in numbered_jsonl(path):
        where = f"{path} line {line}"
        with_ids = any(f"{side}{part}_ids" in pair for side in SIDES for part in PARTS)
        check_sides(pair, SIDES, where, with_ids=with_ids)
        further = pair.get("further", [])
        if not isinstance(further, list) or not all(isinstance(row, dict) for row in further):
            raise ValueError(f"{where}: `further` is no list of neighbours")
        for number, row in enumerate(further, start=2):
            check_sides(row, ["learn_"], f"{where}: neighbour {number}", with_ids=with_ids)
        if "spans" in pair:
            spans.check_spans(pair["spans"], pair["prefix"] + pair["suffix"], where)
        if pair["id"] in line_of:
            raise ValueError(
                f"{where}: id {pair['id']!r} stands on line {line_of[pair['id']]} already"
            )
        line_of[pair["id"]] = line
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no pairs")
    return pairs


def check_sides(pair, sides, where, *, with_ids):
    """ValueError, which names `where`, unless all fields of these sides of a pair are there and as they should be."""
    names = [f"{side}id" for side in sides] + [f"{side}{part}" for side in sides for part in PARTS]
    missing = [name for name in [*names, "similarity"] if name not in pair]
    if missing:
        raise ValueError(f"{where}: no {', '.join(missing)}: not a line of pairs.jsonl")
    for name in names:
        check_string(
            pair[name], f"{where}: `{name}`", blank_ok=with_ids or name.endswith("context")
        )
    similarity = pair["similarity"]
    if type(similarity) not in (int, float) or not -1.01 <= similarity <= 1.01:
        raise ValueError(
            f"{where}: `similarity` is {str(similarity)[:40]}, not a number from -1 to 1"
        )
    for name in [f"{name}_ids" for name in names[len(sides) :]] if with_ids else []:
        check_ids(pair.get(name), f"{where}: `{name}`", empty_ok=name.endswith("context_ids"))


def check_ids(ids, what, *, empty_ok):
    """ValueError unless `ids` is a list of whole numbers >= 0, by default not empty."""
    if not isinstance(ids, list) or any(type(id) is not int or id < 0 for id in ids):
        raise ValueError(f"{what} is not a list of token ids (whole numbers >= 0)")
    if not ids and not empty_ok:
        raise ValueError(f"{what} holds no token")


# --- downloads ---

PILE_URL = os.environ.get(
    "ICU_PILE_URL",
    "https://raw.githubusercontent.com/ethz-spylab/lm-extraction-benchmark-data/main/datasets",
)
EVAL_URL = os.environ.get(
    "ICU_EVAL_URL",
    "https://raw.githubusercontent.com/joeljang/knowledge-unlearning/main/validation_data",
)
PILE_FILES = {
    "train_preprefix.npy": "a9c3ed1dc735d4b93183b47a3c08e9613d1d36da0a7f26790e19a8f87e10a70d",
    "train_prefix.npy": "a2f69009df399132937f028e73b4a37783ee27704a01ca74e3f9e6ece0807aa9",
    "train_suffix.npy": "5934e2007eeb42efd057646da5094716aa0bb1cac386f898b075a58299162c39",
}
EVAL_FILES = {
    "pile.csv": "c5339507c8d8478f78f59a248f67d86b5e91e126d74949cdc8d8293e6a742b94",
    "wikitext.csv": "cb85284acc5ce7e23706d69fc75da183c591da5a207c25c66490659dd88fcb0f",
    "blended_skill_talk.json": "60c938c0f2f2f15d00a962a2df2163a9ce2d1511a90baacc68cb713d3b686766",
    "empathetic_dialogues.json": "337ebfe6171f8732f114ea618febde30bb05bf2fa3aff259f452c9c5bbac65de",
    "wizard_of_internet.json": "8347706b3d7c33816c9b53851ec34e11015fa0632c067a69d44b4d754cc60bd9",
    "wizard_of_wikipedia.json": "e8d2d3332fe6abf59a567fa4a6cc9d7d8bfbebf0d38291519ef7a3df0df2e978",
    "lambada.csv": "4059051c8cddaef9577f37dc0fb7399ecfdeac19712e831f09b9e75ca534ff27",
    "pubmed_qa.csv": "f2b0fb465b7cf1e1c3dce47a0b51baea35aa8bc67705682aaddf70f36b041519",
}
FILES = {name: (f"{PILE_URL.rstrip('/')}/{name}", sha256) for name, sha256 in PILE_FILES.items()}
FILES |= {name: (f"{EVAL_URL.rstrip('/')}/{name}", sha256) for name, sha256 in EVAL_FILES.items()}

SUBFOLDERS = ("", "pile-extraction", "validation", "tasks")  # of --data DIR


def data_file(name, data_dir=None):
    """Path of a known data file: in `data_dir` or its usual subfolders, else in the cache, else fetched into it."""
    url, sha256 = FILES[name]
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise ValueError(f"--data {data_dir}: no such folder")
        for folder in SUBFOLDERS:
            path = Path(data_dir, folder, name)
            if path.is_file():
                if sha256_of(path) != sha256:
                    raise ValueError(
                        f"{path}: not the file that is expected (sha256 differs): replace or remove it"
                    )
                return path
    path = cache_folder("data") / name
    if not path.is_file() or sha256_of(path) != sha256:
        fetch(url, path, sha256)
    return path


def fetch(url, path, sha256, *, tries=5, timeout=30):
    """Download `url` to `path`, whose content must have this sha256; a broken download is taken up where it ended.

    What has arrived is kept in `path`.part. ValueError: no connection, a refusal, a wrong checksum (file deleted).
    """
    path = Path(path)
    make_folder(path.parent)
    part = path.with_name(path.name + ".part")
    complete = (
        part.is_file() and sha256_of(part) == sha256
    )  # stopped between the last byte and the renaming
    trouble = None
    for attempt in range(tries):
        if complete:
            break
        time.sleep(0.5 * attempt)
        try:
            complete = receive(url, part, timeout)
            trouble = "the connection broke off"
        except urllib.error.HTTPError as error:
            if (
                error.code == 416
            ):  # the part is as long as the file or longer, and not the file: start over
                part.unlink(missing_ok=True)
            elif error.code < 500:
                raise ValueError(f"{url}: the server answers {error.code} {error.reason}") from None
            trouble = error
        except urllib.error.URLError as error:  # no connection at all: asking again would not help
            host = urllib.parse.urlsplit(url).netloc
            raise ValueError(
                f"cannot reach {host} for {path.name}: pass --data DIR with {path.name} in it ({error.reason})"
            ) from None
        except (http.client.HTTPException, OSError) as error:
            trouble = error
        except ValueError as error:
            raise ValueError(
                f"{url}: is no address ({error}): pass --data DIR with {path.name} in it"
            ) from None
    if not complete:
        raise ValueError(
            f"{url}: gave up after {tries} tries ({trouble}): run again to go on where it ended"
        )
    if sha256_of(part) != sha256:
        part.unlink()
        raise ValueError(
            f"{url}: the download has a wrong sha256 and was deleted: pass --data DIR with {path.name}"
        )
    os.replace(part, path)
    return path


def receive(url, part, timeout):
    """Append to the file `part` what it lacks of `url`; whether everything the server promised has arrived."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if have and response.status != 206:
            have = 0  # this server sends the file from its beginning
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        bar = tqdm(
            desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, disable=None
        )
        with bar, open(part, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    return total is None or have == total


def perplexity_file(item, data_dir):
    """The file of a --ppl NAME=FILE, or NAME for one that is fetched."""
    name, equals, file = item.partition("=")
    if not equals and f"{name}.csv" not in FILES:
        raise ValueError(f"--ppl {item}: say NAME=FILE; only pile and wikitext are known by name")
    return file if equals else data_file(f"{name}.csv", data_dir)
