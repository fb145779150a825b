"""Pair every text to be forgotten with its nearest neighbour in a pool: forget set + pool -> pairs.jsonl.

    python knn.py --forget mine.csv --pool wiki.jsonl --out pairs.jsonl
    python knn.py --pile --set 0 --out pairs.jsonl       # the paper's data, fetched and checked
    python knn.py --fetch all                            # fetch the Pile rows and the evaluation files, no more

Section 4.3.1-4.3.2 and Eq. 2 of "Learn while Unlearn" (ICU), arXiv 2407.20271. The pairs feed icu.py; this file
knows no language model. It departs from the paper in this:
1. Leak guard. The Pile rows are full of copies, and the nearest neighbour of a target is often the target itself:
   training on it would teach the secret back. Pool rows that repeat a target or a piece of one are dropped whole
   (--max-overlap) and reported. --allow-copies gives the published behaviour.
2. A pool text longer than --passage-words is cut into passages, because the encoder reads only about 256 word
   pieces and a neighbour should be of the size of a record.
3. The search is exact: cosines are ranked in float64, rounded to float32, and ties go to the lower row.
Measured: 1,000 queries in 500,000 rows of 384 (random, seed 0) cost 1.0 times (k = 1) and 1.16 times (k = 10) the CPU
time of faiss-cpu 1.15.1's IndexFlatIP on one thread (numpy 2.4.6), and 97 MB of memory beside the pool's 732 MB.
"""

import functools
import hashlib
import math
from collections import defaultdict
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from kit import data, flags, models, paths, processes, requests, spans
from kit import text as texts
from kit.data import PARTS
from kit.text import LETTERS, WORDS

# --- nearest neighbours (Eq. 2): as the paper writes it, then exactly the same for large pools ---


def literal_knn(queries, pool, k=1, exclude=()):
    """Eq. (2) as it stands: the k rows of `pool` (M, D) most similar to each of `queries` (Q, D), best first.

    exclude: the numbers of rows never returned. Returns indices (Q, k) and cosines (Q, k) float32. Equal cosines go to
    the lower row; a zero vector has cosine 0 to everything; k is at most the number of rows left.
    """
    queries, pool = np.asarray(queries, dtype=np.float64), np.asarray(pool, dtype=np.float64)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(pool, axis=1)  # (Q, M)
    cosines = (queries @ pool.T / np.where(lengths > 0, lengths, 1)).astype(
        np.float32
    )  # Eq. (2): (Q, M)
    cosines[:, list(exclude)] = -np.inf
    indices = np.argsort(-cosines, axis=1, kind="stable")[:, :k]  # (Q, k)
    return indices, np.take_along_axis(cosines, indices, axis=1)


def cosine_knn(queries, pool, k=1, exclude=None, block=4096):
    """The k rows of `pool` with the highest cosine similarity to each query, exactly.  # Eq. (2)

    queries (Q, D), pool (M, D), any real dtype; `exclude` is a mask (M,) or the numbers of rows never returned.
    Returns indices (Q, k) int64 and similarities (Q, k) float32, best first. Cosines are computed in float64 and
    rounded to float32; equal ones go to the lower row, so the result depends on neither `block` nor the BLAS.
    A zero vector has similarity 0 to everything. Fewer than k rows: index -1, similarity -inf (faiss's convention).
    ValueError names a row with NaN or inf, and shapes that do not fit. `literal_knn`'s result, in blocks of the pool.
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
        raise ValueError(
            f"the mask `exclude` has shape {excluded.shape}, the pool {len(pool)} rows"
        )
    # 1024 queries at a time: memory is one matrix of 1024 x block cosines, whatever Q and M are.
    starts = range(0, max(len(queries), 1), 1024)
    found = [
        search_pool(queries[i : i + 1024], pool, excluded, k, block=block, first=i) for i in starts
    ]
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
        np.matmul(
            unit_queries, unit_rows(rows, "pool", start).T, out=cosines
        )  # (Q, D) @ (D, b) -> (Q, b)
        cosines[:, excluded[start : start + block]] = -np.inf
        # The exact k-th best so far must be beaten; -2 is below every cosine and above the excluded.
        floor = np.maximum(similarities[:, -1] - slack, np.float32(-2))
        hot = np.flatnonzero(
            cosines.max(axis=1) >= floor
        )  # queries that this block may change: fewer and fewer
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
    odd = np.flatnonzero(
        ~((squares > 1e-30) & (squares < 1e30))
    )  # NaN, or zero, or beyond what float32 can square
    squares[odd] = 1
    unit = rows / np.sqrt(squares)[:, None]
    if len(odd):
        wide = rows[odd].astype(np.float64)
        length = np.sqrt(np.einsum("nd,nd->n", wide, wide))
        if not np.isfinite(length).all():
            raise ValueError(
                f"{what} row {first + odd[np.argmin(np.isfinite(length))]} holds NaN or inf"
            )
        unit[odd] = wide / np.where(length > 0, length, 1)[:, None]
    return unit


def exact_cosines(queries, rows, query, row, *, chunk=8192):
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
    order = np.lexsort(
        (row, -cosine, query)
    )  # by query, then the highest cosine, then the lowest row
    first = np.searchsorted(query[order], np.arange(len(hot)))
    best = order[first[:, None] + np.arange(k)]  # (hot, k); every query has at least the k it had
    indices[hot], similarities[hot] = row[best], cosine[best]


# --- embeddings ---

ENCODER_FILES = [
    "*.json",
    "*.txt",
    "*.model",
    "*.safetensors",
]  # what is downloaded, and what a cached result hangs on


def encoder_folder(encoder):
    """The local folder of an encoder given as a folder or as a hub name (fetched). ValueError says what to pass."""
    folder = Path(encoder)
    if not folder.is_dir():
        import huggingface_hub

        try:
            folder = Path(
                huggingface_hub.snapshot_download(str(encoder), allow_patterns=ENCODER_FILES)
            )
        except Exception as error:  # offline, refused, unknown, misspelt: the way out is the same
            raise ValueError(
                f"encoder {encoder!r} is no folder, and the model hub did not give it ({type(error).__name__}): "
                "pass --encoder DIR"
            ) from None
    if not list(folder.rglob("*.safetensors")):
        raise ValueError(
            f"encoder {encoder}: no *.safetensors in {folder}: pass --encoder DIR with a complete model"
        )
    if not any(next(folder.rglob(name), None) for name in models.TOKENIZERS):
        raise ValueError(f"--encoder {folder}: no tokenizer ({', '.join(models.TOKENIZERS)})")
    for file in folder.rglob("*.json"):  # what its loader would stumble over behind all other work
        if not isinstance(data.read_json(file), dict) and file.name == "config.json":
            raise ValueError(f"--encoder {folder}: {file} is no configuration")
    return folder


@functools.cache
def encoder_fingerprint(folder):
    """sha256 over the files of an encoder that its answers depend on."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in ENCODER_FILES for file in folder.rglob(pattern)}):
        digest.update(f"{file.relative_to(folder)} {data.sha256_of(file)}\n".encode())
    return digest.hexdigest()


def embedding_file(texts, folder):
    """Where the embeddings of these texts by this encoder are kept: the name is a hash of both."""
    digest = hashlib.sha256(encoder_fingerprint(folder).encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return data.cache_folder("embeddings") / f"{digest.hexdigest()}.npy"


def embed(texts, encoder, *, batch_size=64, device="cpu", cache_dir=None):
    """Sentence embeddings (N, D) float32 of the texts, kept as .npy under a hash of the encoder and the texts.

    Equal texts get equal vectors. An unreadable cache file is made again. ValueError if the encoder does not load.
    """
    folder = encoder_folder(encoder)
    cached = embedding_file(texts, folder)
    cached = Path(cache_dir, cached.name) if cache_dir else cached
    try:
        vectors = np.load(cached, allow_pickle=False)
        if vectors.dtype == np.float32 and vectors.ndim == 2 and len(vectors) == len(texts):
            return vectors
    except Exception:  # not there, or broken in any of numpy's ways
        pass
    vectors = encode(texts, folder, batch_size, device)
    try:
        data.write_atomically(cached, lambda file: np.save(file, vectors))
    except OSError as error:
        print(f"note: the embeddings are not kept for the next time ({error})")
    return vectors


def encode(texts, folder, batch_size, device):
    """Embeddings (N, D) float32 from the sentence encoder in `folder`, each different text encoded once."""
    from sentence_transformers import (
        SentenceTransformer,  # slow to import, and not needed when all is cached
    )

    try:
        with models.quiet():
            model = SentenceTransformer(str(folder), device=device, local_files_only=True)
    except Exception as error:
        raise ValueError(f"cannot load the encoder in {folder}: {error}") from error
    different = sorted(
        dict.fromkeys(texts), key=len, reverse=True
    )  # like lengths together: little padding
    vectors = []
    with tqdm(total=len(different), desc="embedding", unit="text", disable=None) as bar:
        for start in range(0, len(different), batch_size):
            batch = different[start : start + batch_size]
            vectors.append(model.encode(batch, batch_size=batch_size, show_progress_bar=False))
            bar.update(len(batch))
    row_of = {text: row for row, text in enumerate(different)}
    return np.concatenate(vectors).astype(np.float32)[
        [row_of[text] for text in texts]
    ]  # (different, D) -> (N, D)


# --- records ---


def text_of(record):
    """What is embedded and compared: the text without its context."""
    return record["prefix"] + record["suffix"]


def cut_passages(records, words, whole=()):
    """Cut each text of more than `words` words into even passages with ids `id#0`, `id#1`, ...

    Their texts join to the original. Token-id rows and texts in `whole` are never cut; the context stays with the
    first passage. In scripts without spaces each visible character counts as a word.
    """
    passages = []
    for record in records:
        text = text_of(record)
        starts = texts.word_starts(text)
        count = math.ceil(len(starts) / words)
        if count < 2 or "suffix_ids" in record or text in whole:
            passages.append(record)
            continue
        cuts = [0, *(starts[len(starts) * i // count] for i in range(1, count)), len(text)]
        for i in range(count):
            prefix, suffix = data.split_in_half(text[cuts[i] : cuts[i + 1]])
            context = "" if i else record["context"]
            passages.append(
                {
                    "id": f"{record['id']}#{i}",
                    "context": context,
                    "prefix": prefix,
                    "suffix": suffix,
                }
            )
    return passages


# --- leak guard ---

IDS = 10  # how long an n-gram of token ids is


def plain_text(record, parts=PARTS):
    """What the guard compares of a record: these parts as one plain text."""
    return texts.plain("".join(record[part] for part in parts))


def leak_finder(forget, max_overlap, by_ids):
    """A function of a pool row: yields (share, number of a target) for each way in which the row leaks.

    By token ids or else words, by letters, and, for what is too short for these, as a whole: a target of fewer than 21
    letters, or a part that is marked in one, that stands in the row; a row that is nothing but pieces of a target.
    """
    ids_of = lambda record, parts: tuple(  # noqa: E731
        chain.from_iterable(record[f"{part}_ids"] for part in parts)
    )  # noqa: E731
    same = {
        text_of(target): number for number, target in enumerate(forget)
    }  # whatever it is made of
    plain = [plain_text(target, PARTS[1:]) for target in forget]
    letters = [texts.letters(text) for text in plain]
    units = (
        [ids_of(target, PARTS[1:]) for target in forget]
        if by_ids
        else list(map(texts.words, plain))
    )
    by_units = texts.TargetGrams(units, IDS if by_ids else WORDS)
    by_letters = texts.TargetGrams([texts.weighed(target) for target in letters], LETTERS)
    whole = [
        (letters[number], number) for number, grams in enumerate(by_letters.grams) if not grams
    ]
    marked = [
        (texts.letters(texts.plain(s)), n)
        for n, target in enumerate(forget)
        for s in spans.marked(target)
    ]
    whole += [(part, number) for part, number in marked if any(map(str.isalnum, part))]
    longest = max(map(len, letters))
    holders = defaultdict(
        set
    )  # word, or character of a script without spaces -> numbers of the targets that hold it
    for number, text in enumerate(plain):
        for word in texts.words(texts.spaced(text)):
            holders[word].add(number)

    def leaks(row):
        if text_of(row) in same:
            yield 1.0, same[text_of(row)]
        if by_ids:
            yield by_units.worst(ids_of(row, PARTS), max_overlap)
        text = plain_text(row)
        if not by_ids:
            yield by_units.worst(texts.words(text), max_overlap)
        row_letters = texts.letters(text)
        yield by_letters.worst(texts.weighed(row_letters), max_overlap)
        held = (
            (part, number) for part, number in whole if texts.stands_in(part, text, row_letters)
        )
        yield from ((len(part) / len(letters[number]), number) for part, number in held)
        if len(row_letters) <= longest:
            row_words = set(texts.words(texts.spaced(text)))
            yield from ((1.0, number) for number in texts.holders_of_all(row_words, holders))
            for number in (
                range(len(forget)) if len(row_letters) < 4 * LETTERS else ()
            ):  # spelt with other spaces
                if texts.stands_in(row_letters, plain[number], letters[number]):
                    yield 1.0, number

    return leaks


def purged_finder(hashes, max_overlap):
    """`leak_finder` of targets whose texts are gone: hashes.json of their run is left (requests.hashes), so that n-grams
    of words and letters are found again, a text of fewer than 21 letters is not.
    """
    salt, grams = bytes.fromhex(hashes["salt"]), hashes["grams"]
    by_words, by_letters = (
        texts.HashedGrams(grams[k], n, salt) for k, n in (("words", WORDS), ("letters", LETTERS))
    )

    def leaks(row):
        text = plain_text(row)
        yield by_words.worst(texts.words(text), max_overlap)
        yield by_letters.worst(texts.weighed(texts.letters(text)), max_overlap)

    return leaks


def leak_guard(forget, pool, max_overlap=0.2, *, allow_copies=False, purged=()):
    """Which pool rows may serve as neighbours: keep (M,) bool, and one dict for each row dropped.

    Dropped are a forget row itself (same id and text) and, unless `allow_copies`, a row whose context + prefix +
    suffix holds too much of any target. Compared are n-grams of 10 token ids (where every record has ids), else of 5
    words, and of 21 letters (an ideograph counts as three), without regard to what `kit.text.plain` takes out: case,
    accents, signs, kinds of spaces and letters. A row goes where
    - it holds more than `max_overlap` of the n-grams of a target, or
    - any 3n consecutive n-grams of it are the target's by more than that: with 0.2 a run of 16 ids, 8 words or 33
      letters, whatever stands around it. A common phrase ("at the end of the day") is shorter, and a row keeps it; or
    - it holds all of a target of fewer than 21 letters, or of what is marked in a target (`spans`), as whole words; or
    - it is nothing but pieces of a target, however short: each of its words is one of the target's.
    The more of a secret a row holds, the surer it goes, whatever else it says. One exception: a row that goes by the
    last rule alone (fewer than 8 words and 33 letters in a run) stays once there are other words in it.
    `forget` may hold texts of earlier requests; `purged` are hashes.json of those whose texts are gone. Give whole
    documents: passages would each hold less. The dict is {id, target_id, share (0-1, the first of the above
    over max_overlap: of the target or of the densest stretch of the row), reason: "forget row" or "copy"}.
    """
    by_ids = all("suffix_ids" in record for record in [*forget, *pool])
    finders = []  # (a finder, ids of its targets)
    if not allow_copies:
        finders.append(
            (leak_finder(forget, max_overlap, by_ids), [target["id"] for target in forget])
        )
        finders += [(purged_finder(hashes, max_overlap), [*hashes["texts"]]) for hashes in purged]
    own_rows = {(target["id"], text_of(target)) for target in forget}
    keep, reasons = np.ones(len(pool), dtype=bool), []
    for number, row in enumerate(tqdm(pool, desc="leak guard", unit="row", disable=None)):
        reason = {"id": row["id"], "target_id": row["id"], "share": 1.0, "reason": "forget row"}
        if (row["id"], text_of(row)) not in own_rows:
            found = (
                (share, ids[n])
                for leaks, ids in finders
                for share, n in leaks(row)
                if n is not None
            )
            share, target = next(found, (0, None))
            if target is None:
                continue
            reason |= {"target_id": target, "share": round(share, 4), "reason": "copy"}
        keep[number] = False
        reasons.append(reason)
    return keep, reasons


def passages_of(pool, keep, forget, words):
    """The pool cut into passages of at most `words` words (0: not cut), and keep for each, as its document was judged.

    Texts to be forgotten are not cut. Passages of dropped documents stay in the pool: see main().
    """
    whole = {text_of(record) for record in forget}
    passages = [cut_passages([row], words, whole) if words else [row] for row in pool]
    keep = np.repeat(keep, [len(cut) for cut in passages])
    if len(keep) > len(pool):
        print(
            f"{len(pool)} pool rows cut into {len(keep)} passages of at most {words} words; {keep.sum()} are kept"
        )
    return [passage for cut in passages for passage in cut], keep


def print_leaks(keep, reasons, max_overlap):
    """The leak guard's report: what it dropped, and the worst three."""
    copies = sorted(
        (reason for reason in reasons if reason["reason"] == "copy"), key=lambda r: -r["share"]
    )
    print(
        f"leak guard: {len(reasons)} of {len(keep)} pool rows dropped, {len(reasons) - len(copies)} forget rows and "
        f"{len(copies)} that hold over {max_overlap:.0%} of a target, a piece of one or what is marked in it"
    )
    if copies:
        worst = (f"{r['id']} holds {r['share']:.0%} of {r['target_id']}" for r in copies[:3])
        processes.print0(f"  the worst: {', '.join(worst)}")
    if not keep.any():
        raise ValueError(
            "the leak guard left no row of the pool: give a larger pool, or see --max-overlap"
        )


# --- the Pile's rows, and pairs ---


def load_tokenizer(name):
    """A tokenizer from a folder or the hub; a folder with only vocab.json and merges.txt is a GPT-2 one."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    bare = Path(name, "vocab.json").is_file() and not Path(name, "tokenizer_config.json").is_file()
    try:
        return (GPT2Tokenizer if bare else AutoTokenizer).from_pretrained(
            name, trust_remote_code=False
        )
    except Exception as error:  # offline, unknown, incomplete: the way out is the same
        raise ValueError(
            f"cannot load tokenizer {name!r} ({type(error).__name__}): pass --tokenizer DIR"
        ) from None


def is_gpt2(tokenizer):
    """Whether ids mean what they mean to GPT-2, by the ids of two words."""
    return len(tokenizer) > 50256 and tokenizer.decode([15496, 995]) == "Hello world"


def read_pile(set_name, data_dir, tokenizer):
    """The 15,000 Pile rows as records, and which of them are forget set `set_name`, in the paper's order."""
    if not is_gpt2(tokenizer):
        raise ValueError(
            "the Pile rows are GPT-2 token ids: pass GPT-2's tokenizer with --tokenizer"
        )
    context, prefix, suffix = (
        data.load_ids(data.data_file(name, data_dir)) for name in data.PILE_FILES
    )
    records = data.ids_records(context, prefix, suffix, tokenizer=tokenizer, where="the Pile rows,")
    sets = data.read_json(Path(__file__).with_name("kit") / "forget_sets.json")
    numbers = sets.get(set_name) if isinstance(sets, dict) else None
    whole = isinstance(numbers, list) and all(
        type(i) is int and 0 <= i < len(records) for i in numbers
    )
    if not whole or not numbers:
        raise ValueError(
            f"forget_sets.json: set {set_name} is no list of row numbers from 0 to {len(records) - 1}"
        )
    return records, [records[number] for number in numbers]


def make_pair(forget, near, similarities, *, with_ids):
    """One line of pairs.jsonl; `with_ids` adds the *_ids fields, which must be GPT-2's.

    near, similarities: its neighbours (records) and their cosines, best first; those behind the paper's one are
    `further`.
    """

    def side_of(record, side):
        return {f"{side}id": record["id"], **{f"{side}{part}": record[part] for part in PARTS}}

    def ids(record, side):
        return {f"{side}{part}_ids": record[f"{part}_ids"] for part in PARTS} if with_ids else {}

    cosines = [{"similarity": round(float(cosine), 6)} for cosine in similarities]
    pair = side_of(forget, "") | side_of(near[0], "learn_") | cosines[0]
    pair |= {"spans": forget["spans"]} if "spans" in forget else {}
    pair |= ids(forget, "") | ids(near[0], "learn_")
    rest = zip(near[1:], cosines[1:], strict=True)
    further = [
        side_of(record, "learn_") | cosine | ids(record, "learn_") for record, cosine in rest
    ]
    return pair | ({"further": further} if further else {})


# --- flags ---


def make_parser():
    """The flags; experiment.py asks it which of a run's flags are this file's."""
    parser = flags.command_parser(__doc__)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--forget", metavar="FILE", help="texts to forget: .csv, .jsonl or .npy of token ids"
    )
    group.add_argument(
        "--pool", metavar="FILE", help="texts to find neighbours in, same kinds of file"
    )
    group.add_argument(
        "--after", metavar="RUN", help="as icu.py's: no partner holds a text of an earlier request"
    )
    group.add_argument("--pile", action="store_true", help="instead: the paper's rows of the Pile")
    group.add_argument(
        "--set", choices=list("01234"), default="0", help="the paper's forget set (%(default)s)"
    )
    group.add_argument(
        "--data",
        metavar="DIR",
        help="folder with the Pile rows; without it they are fetched and cached",
    )
    group.add_argument(
        "--tokenizer", default="gpt2", help="folder or hub name, for token ids (%(default)s)"
    )
    group.add_argument("--limit", type=int, metavar="N", help="only the first N texts to forget")
    group.add_argument(
        "--fetch", nargs="+", metavar="NAME", help=f"only fetch: all, or of {', '.join(data.FILES)}"
    )
    search = parser.add_argument_group("neighbours")
    search.add_argument("--encoder", help="sentence encoder, folder or hub name (all-MiniLM-L6-v2)")
    search.add_argument(
        "--neighbours", default=1, type=flags.positive, metavar="K",
        help="of each text (%(default)s, as the paper); more are for methods that read another one each epoch",
    )  # fmt: skip
    search.add_argument(
        "--max-overlap",
        type=float,
        default=0.2,
        help="drop pool rows above this share (%(default)s)",
    )
    search.add_argument(
        "--allow-copies",
        action="store_true",
        help="drop only the forget rows (published behaviour)",
    )
    search.add_argument(
        "--leak-report", metavar="FILE", help="write every dropped pool row there, as JSON lines"
    )
    search.add_argument(
        "--passage-words",
        type=int,
        default=200,
        help="cut longer pool texts; 0: never (%(default)s)",
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--out", metavar="FILE", default="pairs.jsonl", help="where the pairs go (%(default)s)"
    )
    run.add_argument("--overwrite", action="store_true", help="replace files that exist")
    run.add_argument(
        "--batch-size", type=int, default=64, help="texts embedded at once (%(default)s)"
    )
    run.add_argument(
        "--device", default="cpu", help="where the encoder runs: cpu, cuda, mps (%(default)s)"
    )
    run.add_argument(
        "--dry-run", action="store_true", help="check all input, print the plan, write nothing"
    )
    run.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def parse_args():
    return make_parser().parse_args()


def check_args(args):
    """ValueError for flags that do not fit together or are out of range."""
    unknown = [name for name in args.fetch or [] if name not in data.FILES and name != "all"]
    if unknown:
        raise ValueError(
            f"--fetch {unknown[0]}: unknown file: use all, or of {', '.join(data.FILES)}"
        )
    if not args.fetch and args.pile == bool(args.forget or args.pool):
        raise ValueError("give either --pile, or --forget FILE and --pool FILE")
    if not args.fetch and not args.pile and not (args.forget and args.pool):
        raise ValueError("--forget FILE and --pool FILE go together")
    if args.limit is not None and args.limit < 1:
        raise ValueError(f"--limit {args.limit}: must be at least 1")
    if not 0 <= args.max_overlap <= 1:
        raise ValueError(f"--max-overlap {args.max_overlap}: must be between 0 and 1")
    if args.passage_words != 0 and args.passage_words < 10:
        raise ValueError(
            f"--passage-words {args.passage_words}: must be at least 10, or 0 for no cutting"
        )
    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: must be at least 1")


def check_outputs(args, encoder):
    """ValueError unless --out and --leak-report are free, or hold what this command writes there."""
    outputs = [
        (args.out, ("id", "learn_id", "similarity")),
        (args.leak_report, ("id", "target_id", "share")),
    ]
    group = [
        Path(args.data, folder, name)
        for name in data.FILES
        for folder in data.SUBFOLDERS
        if args.data
    ]
    reads = [args.forget, args.pool, args.tokenizer, encoder, *group]
    outputs = [(path, paths.holds(*fields, lines=True)) for path, fields in outputs if path]
    paths.check_outputs(outputs, reads=reads, overwrite=args.overwrite)


def read_input(args):
    """(forget records, pool records, whether both have GPT-2 ids) for the flags."""
    given = [] if args.pile else [args.forget, args.pool]
    needs_tokenizer = args.pile or any(file.lower().endswith(".npy") for file in given)
    tokenizer = load_tokenizer(args.tokenizer) if needs_tokenizer else None
    if args.pile:
        pool, forget = read_pile(args.set, args.data, tokenizer)
    else:
        forget, pool = (data.read_records(file, tokenizer=tokenizer) for file in given)
    forget = forget[: args.limit]
    with_ids = all("suffix_ids" in record for record in (forget[0], pool[0])) and is_gpt2(tokenizer)
    return forget, pool, with_ids


def main():
    args = parse_args()
    check_args(args)
    if args.fetch:
        for name in data.FILES if "all" in args.fetch else args.fetch:
            print(data.data_file(name, args.data))
        return
    args.device = processes.device_of(args.device)
    encoder = encoder_folder(args.encoder or models.default_encoder())
    check_outputs(args, encoder)
    forget, pool, with_ids = read_input(args)
    models.check_readable(encoder, [text_of(record) for record in forget], "--encoder")
    earlier, purged = requests.targets(args.after)
    how = {"allow_copies": args.allow_copies, "purged": purged}
    keep, reasons = leak_guard([*forget, *earlier], pool, args.max_overlap, **how)
    print_leaks(keep, reasons, args.max_overlap)
    pool, keep = passages_of(pool, keep, forget, args.passage_words)
    if args.dry_run:
        print(
            f"dry run: would pair {len(forget)} texts with {keep.sum()} pool rows by {encoder} into {args.out}"
        )
        return
    # All pool rows are embedded, the dropped ones too: the cached result then serves every forget set.
    sides = [[text_of(record) for record in records] for records in (pool, forget)]
    pool_vectors, vectors = (
        embed(s, encoder, batch_size=args.batch_size, device=args.device) for s in sides
    )
    # K = 1, section 4.3.2
    indices, similarities = cosine_knn(
        vectors, pool_vectors, k=min(args.neighbours, keep.sum()), exclude=~keep
    )
    found = zip(forget, [[pool[i] for i in row] for row in indices], similarities, strict=True)
    data.write_jsonl(args.out, (make_pair(*row, with_ids=with_ids) for row in found))
    if args.leak_report:
        data.write_jsonl(args.leak_report, reasons)
    low, middle, high = np.quantile(similarities[:, 0], [0, 0.5, 1])
    print(
        f"wrote {args.out}: {len(forget)} pairs, similarity min {low:.3f}, median {middle:.3f}, max {high:.3f}"
    )


if __name__ == "__main__":
    flags.run_cli(main)
