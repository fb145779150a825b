"""Pair every text to be forgotten with its nearest neighbour in a pool: pairs.jsonl for icu.py.

    python knn.py --forget mine.csv --pool wiki.jsonl --out pairs.jsonl
    python knn.py --forget qa.csv --pool others.csv --model DIR    # questions and answers
    python knn.py --pile --set 0 --out pairs.jsonl    # the paper's data, fetched and checked
    python knn.py --fetch all                         # fetch the Pile rows and evaluation files

Section 4.3.1-4.3.2 and Eq. 2 of "Learn while Unlearn" (ICU), arXiv 2407.20271. It departs from the
paper in this:
1. Leak guard. The nearest neighbour of a target is often a copy of it: training on it would teach
   the secret back. Pool rows that repeat a target or a piece of one are dropped whole and reported.
   --allow-copies gives the published behaviour.
2. A pool text longer than --passage-words is cut into passages: the encoder reads only about 256
   word pieces.
3. The search is exact, in float64; ties go to the lower row (dev/BENCHMARKS.md: time and memory).
"""

import functools
import hashlib
import itertools
import math
from collections import defaultdict
from pathlib import Path

import huggingface_hub
import numpy as np
from tqdm import tqdm

from kit import data, flags, models, processes, requests
from kit import text as texts
from kit.data import PARTS, said_of, text_of

# --- nearest neighbours (Eq. 2): as the paper writes it, then exactly the same for large pools ---


def literal_knn(queries, pool, k=1, exclude=()):
    """Eq. (2) as it stands: the k rows of `pool` (M, D) most similar to each of `queries` (Q, D).

    exclude: the numbers of rows never returned. Returns indices (Q, k) int64 and cosines (Q, k)
    float32, best first. Equal cosines go to the lower row; a zero vector has cosine 0.
    """
    queries, pool = np.asarray(queries, dtype=np.float64), np.asarray(pool, dtype=np.float64)
    lengths = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(pool, axis=1)  # (Q, M)
    cosines = queries @ pool.T / np.where(lengths > 0, lengths, 1)  # Eq. (2): (Q, M)
    cosines = cosines.astype(np.float32)
    cosines[:, list(exclude)] = -np.inf
    indices = np.argsort(-cosines, axis=1, kind="stable")[:, :k]  # (Q, k)
    return indices, np.take_along_axis(cosines, indices, axis=1)


def cosine_knn(queries, pool, k=1, exclude=None, block=4096):
    """`literal_knn` for large pools, exactly, in blocks of the pool.

    exclude: also a mask (M,). Where fewer than k rows are left: index -1, similarity -inf (as
    faiss). The result depends on neither `block` nor the BLAS. ValueError: NaN or inf.
    """
    queries, pool = np.asarray(queries, dtype=np.float32), np.asarray(pool)
    excluded = np.asarray([] if exclude is None else exclude)
    if excluded.dtype != bool:  # numbers of rows
        excluded = np.isin(np.arange(len(pool)), excluded)
    # 1024 queries at a time: memory is one matrix of 1024 x block cosines.
    starts = range(0, max(len(queries), 1), 1024)
    results = [
        search_pool(queries[i : i + 1024], pool, excluded, k, block=block, first=i) for i in starts
    ]
    return tuple(np.concatenate(parts) for parts in zip(*results, strict=True))


def search_pool(queries, pool, excluded, k, *, block, first):
    """indices and similarities (Q, k) for queries (Q, D); `first` is the number of the first one.

    A float32 product finds the few pairs that can enter the top k; those are computed in float64.
    `slack` bounds the error of a float32 product of two unit vectors: no pair is missed.
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
        unit_pool = unit_rows(rows, "pool", start)
        np.matmul(unit_queries, unit_pool.T, out=cosines)  # (Q, D) @ (D, b) -> (Q, b)
        cosines[:, excluded[start : start + block]] = -np.inf
        # The exact k-th best so far must be beaten; -2: below a cosine, above the excluded.
        floor = np.maximum(similarities[:, -1] - slack, np.float32(-2))
        hot = np.flatnonzero(cosines.max(axis=1) >= floor)  # queries that this block may change
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
    """Rows (n, D) float32 scaled to length 1; zero rows stay zero. ValueError names NaN or inf."""
    squares = np.einsum("nd,nd->n", rows, rows, dtype=np.float64)  # float32 cannot square 1e-30
    if not np.isfinite(squares).all():
        number = first + np.argmin(np.isfinite(squares))
        raise ValueError(f"{what} row {number} holds NaN or inf")
    lengths = np.sqrt(np.where(squares > 0, squares, 1))
    return (rows / lengths[:, None]).astype(np.float32)


def exact_cosines(queries, rows, query, row):
    """Cosines (n,) float32 of pairs (query[i], row[i]), summed in float64 in a fixed order."""
    cosines = np.empty(len(query), dtype=np.float32)
    for start in range(0, len(query), 8192):  # pieces bound memory
        part = slice(start, start + 8192)
        q, p = queries[query[part]].astype(np.float64), rows[row[part]].astype(np.float64)  # (n, D)
        dot, qq, pp = (np.einsum("nd,nd->n", a, b) for a, b in ((q, p), (q, q), (p, p)))
        cosines[part] = dot / np.where(qq * pp > 0, np.sqrt(qq * pp), 1)
    return cosines


def keep_best(indices, similarities, hot, candidates):
    """Merges candidates (positions in hot, pool rows, cosines) into the top k of queries `hot`."""
    k = indices.shape[1]
    query = np.concatenate([np.repeat(np.arange(len(hot)), k), candidates[0]])
    row = np.concatenate([indices[hot].ravel(), candidates[1]])
    cosine = np.concatenate([similarities[hot].ravel(), candidates[2]])
    order = np.lexsort((row, -cosine, query))  # by query, the highest cosine, the lowest row
    first = np.searchsorted(query[order], np.arange(len(hot)))
    best = order[first[:, None] + np.arange(k)]  # (hot, k); every query has at least its old k
    indices[hot], similarities[hot] = row[best], cosine[best]


# --- embeddings ---

# What of an encoder is downloaded, and what a cached result depends on.
ENCODER_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]


def encoder_folder(encoder):
    """The local folder of an encoder, a folder or a name on the hub."""
    folder = Path(encoder)
    if not folder.is_dir():
        with data.reading(f"--encoder {encoder}: no folder, nor on the hub: pass --encoder DIR"):
            fetched = huggingface_hub.snapshot_download(encoder, allow_patterns=ENCODER_FILES)
        folder = Path(fetched)
    weights = any(folder.rglob("*.safetensors"))  # others are pickles, which can run code
    if not (weights and any(any(folder.rglob(name)) for name in models.TOKENIZERS)):
        names = ", ".join(models.TOKENIZERS)
        raise ValueError(f"--encoder {folder}: needs *.safetensors and a tokenizer ({names})")
    return folder


def embedding_file(texts, folder):
    """Where the embeddings of these texts are kept."""
    digest = hashlib.sha256()
    for file in sorted({file for pattern in ENCODER_FILES for file in folder.rglob(pattern)}):
        digest.update(f"{file.relative_to(folder)} {data.sha256_of(file)}\n".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return data.cache_folder("embeddings") / f"{digest.hexdigest()}.npy"


def embed(texts, encoder, *, batch_size=64, device="cpu"):
    """Sentence embeddings (N, D) float32 of the texts, kept in the cache."""
    folder = encoder_folder(encoder)
    cached = embedding_file(texts, folder)
    if cached.is_file():
        return np.load(cached)
    vectors = encode(texts, folder, batch_size, device)
    try:
        data.write_atomically(cached, lambda file: np.save(file, vectors))
    except OSError as error:
        print(f"note: the embeddings are not kept for the next time ({error})")
    return vectors


def encode(texts, folder, batch_size, device):
    """`embed` without the cache."""
    from sentence_transformers import SentenceTransformer  # slow, and not needed when all is cached

    with data.reading(f"the encoder in {folder} cannot be loaded"), models.quiet():
        model = SentenceTransformer(str(folder), device=device, local_files_only=True)
    if room := models.room_of(model):
        model.max_seq_length = min(model.max_seq_length or room, room)
    # Each different text once, like lengths together: little padding.
    different = sorted(dict.fromkeys(texts), key=len, reverse=True)
    vectors = []
    with tqdm(total=len(different), desc="embedding", unit="text", disable=None) as bar:
        for batch in data.chunks(different, batch_size):
            vectors.append(model.encode(batch, batch_size=batch_size, show_progress_bar=False))
            bar.update(len(batch))
    row_of = {text: row for row, text in enumerate(different)}
    vectors = np.concatenate(vectors).astype(np.float32)
    return vectors[[row_of[text] for text in texts]]  # (different, D) -> (N, D)


# --- leak guard ---


def leak_finder(forget, pool, max_overlap):
    """A function of a pool row that yields (share 0-1, number of a target) for each rule met."""
    plain = [texts.plain(said_of(target)) for target in forget]
    spelt = [texts.letters(text) for text in plain]
    grams = texts.TargetGrams([texts.weighed(letters) for letters in spelt])

    def spellings(row):  # (plain text, its letters, those as they are compared) of a pool row
        text = texts.plain(row["context"] + said_of(row))
        letters = texts.letters(text)
        return text, letters, texts.weighed(letters)

    some = pool[:: len(pool) // 1000 + 1]
    if shared := grams.leave_out_frame([spellings(row)[2] for row in some]):
        print(
            f"note: {shared} n-grams of several texts stand in over half of the pool (a system "
            "prompt?): not compared"
        )
    phrases = [(spelt[n], n) for n in range(len(forget)) if not grams.grams[n]]
    for n, target in enumerate(forget):
        marked = [texts.letters(texts.plain(part)) for part in data.marked(target)]
        phrases += [(part, n) for part in marked if any(map(str.isalnum, part))]
    holders = defaultdict(set)  # word -> numbers of the targets that hold it
    for n, text in enumerate(plain):
        for word in texts.words(text):
            holders[word].add(n)
    longest = max(map(len, spelt))

    def leaks(row):
        text, letters, weighed = spellings(row)
        # 1. Over max_overlap of a target's n-grams, or of 3n n-grams in a row, are in both.
        yield from grams.worst(weighed, max_overlap)
        # 2. It says a target too short for an n-gram, or what is marked in one, as whole words.
        parts = ((part, n) for part, n in phrases if texts.stands_in(part, text, letters))
        yield from ((len(part) / len(spelt[n]), n) for part, n in parts)
        # 3. It is nothing but words of a target.
        if len(letters) <= longest:
            of_words = [holders.get(word, set()) for word in texts.words(text)] or [set()]
            yield from ((1.0, n) for n in sorted(set.intersection(*of_words)))
        # 4. It is a piece of a target, spelt with other spaces.
        if len(letters) < 4 * texts.LETTERS:
            pieces = (n for n in range(len(forget)) if texts.stands_in(letters, plain[n], spelt[n]))
            yield from ((1.0, n) for n in pieces)

    return leaks


def leak_guard(forget, pool, max_overlap=0.2, *, allow_copies=False):
    """Which pool rows may serve as neighbours: keep (M,) bool, and one dict for each row dropped,
    {id, target_id, share (of the first rule that holds), reason: "forget row" or "copy"}.

    Dropped are a forget row itself (same id and text) and, unless `allow_copies`, a row for which a
    rule of `leak_finder` holds. With 0.2 a run of 33 letters goes; a common phrase is shorter.
    `pool` holds complete documents: passages would each hold less.
    """
    leaks = None if allow_copies else leak_finder(forget, pool, max_overlap)
    own_rows = {(target["id"], text_of(target)) for target in forget}
    keep, reasons = np.ones(len(pool), dtype=bool), []
    for number, row in enumerate(tqdm(pool, desc="leak guard", unit="row", disable=None)):
        reason = {"id": row["id"], "target_id": row["id"], "share": 1.0, "reason": "forget row"}
        if (row["id"], text_of(row)) not in own_rows:
            share, target = next(leaks(row), (0, None)) if leaks else (0, None)
            if target is None:
                continue
            reason |= {"target_id": forget[target]["id"], "share": round(share, 4)}
            reason["reason"] = "copy"
        keep[number] = False
        reasons.append(reason)
    return keep, reasons


def print_leaks(keep, reasons, max_overlap):
    """Prints what the leak guard dropped and the worst three."""
    copies = [reason for reason in reasons if reason["reason"] == "copy"]
    print(
        f"leak guard: {len(reasons)} of {len(keep)} pool rows dropped, "
        f"{len(reasons) - len(copies)} forget rows and {len(copies)} that hold over "
        f"{max_overlap:.0%} of a target, a piece of one or what is marked in it"
    )
    worst = sorted(copies, key=lambda reason: -reason["share"])[:3]
    if worst:
        shares = (f"{row['id']} holds {row['share']:.0%} of {row['target_id']}" for row in worst)
        print("  the worst:", texts.visible(", ".join(shares)))
    if not keep.any():
        way_out = "give a larger pool, or see --max-overlap"
        raise ValueError(f"the leak guard left no row of the pool: {way_out}")


# --- passages ---


def cut_passages(record, words):
    """The record cut into even passages of at most `words` words, with ids `id#0`, `id#1`, ...

    The context stays with the first. A row of token ids or messages is not cut.
    """
    text = text_of(record)
    starts = [] if {"suffix_ids", "template"} & {*record} else texts.word_starts(text)
    count = math.ceil(len(starts) / words)
    if count < 2:
        return [record]
    cuts = [0, *(starts[len(starts) * i // count] for i in range(1, count)), len(text)]
    passages = []
    for i, (start, end) in enumerate(itertools.pairwise(cuts)):
        prefix, suffix = data.split_in_half(text[start:end])
        context = "" if i else record["context"]
        id = f"{record['id']}#{i}"
        passages.append({"id": id, "context": context, "prefix": prefix, "suffix": suffix})
    return passages


def passages_of(pool, keep, forget, words):
    """The pool, but what is to be forgotten, cut into passages, and keep for each."""
    uncut = {text_of(record) for record in forget}
    passages = [
        cut_passages(row, words) if words and text_of(row) not in uncut else [row] for row in pool
    ]
    keep = np.repeat(keep, [len(cut) for cut in passages])
    if len(keep) > len(pool):
        size = f"{len(keep)} passages of at most {words} words"
        print(f"{len(pool)} pool rows cut into {size}; {keep.sum()} are kept")
    return [passage for cut in passages for passage in cut], keep


# --- the Pile's rows, and pairs ---


def load_tokenizer(name):
    """A tokenizer; one with only vocab.json and merges.txt is GPT-2's."""
    from transformers import AutoTokenizer, GPT2Tokenizer

    bare = Path(name, "vocab.json").is_file() and not Path(name, "tokenizer_config.json").is_file()
    kind = GPT2Tokenizer if bare else AutoTokenizer
    with data.reading(f"--tokenizer {name} cannot be loaded, pass --tokenizer DIR"):
        return kind.from_pretrained(name, trust_remote_code=False)


def is_gpt2(tokenizer):
    """Whether the ids of two words are GPT-2's."""
    return len(tokenizer) > 50256 and tokenizer.decode([15496, 995]) == "Hello world"


def read_pile(set_name, data_dir, tokenizer):
    """The 15,000 Pile rows as records, and those of a forget set."""
    if not is_gpt2(tokenizer):
        raise ValueError("the Pile rows are GPT-2 token ids: pass GPT-2's tokenizer as --tokenizer")
    arrays = [data.load_ids(data.data_file(name, data_dir)) for name in data.PILE_FILES]
    records = data.ids_records(*arrays, tokenizer=tokenizer, where="the Pile rows,")
    sets = data.read_json(Path(__file__).with_name("kit") / "forget_sets.json")
    return records, [records[number] for number in sets[set_name]]


def make_pair(forget, near, similarities, *, with_ids):
    """One line of pairs.jsonl; `with_ids` adds the *_ids fields, which must be GPT-2's.

    near, similarities: its neighbours (records) and their cosines, best first; all but the paper's
    one are `further`.
    """
    fields = ["id", *PARTS, *(f"{part}_ids" for part in PARTS if with_ids), "template"]
    first, *further = [
        {f"learn_{name}": record[name] for name in fields if name in record}
        | {"similarity": round(float(cosine), 6)}
        for record, cosine in zip(near, similarities, strict=True)
    ]
    pair = {name: forget[name] for name in fields if name in forget} | first
    if "spans" in forget:
        pair["spans"] = forget["spans"]
    if further:
        pair["further"] = further
    return pair


# --- flags ---


# fmt: off
def make_parser():
    parser = flags.command_parser(__doc__)
    add = parser.add_argument_group("data").add_argument
    add("--forget", metavar="FILE", help="texts to forget: .csv, .jsonl or .npy of token ids")
    add("--pool", metavar="FILE", help="texts to find neighbours in, same kinds of file")
    add("--after", metavar="RUN", help="no partner holds a text of RUN, an earlier request")
    add("--pile", action="store_true", help="instead: the paper's rows of the Pile")
    add("--set", choices=list("01234"), default="0", help="the paper's forget set (%(default)s)")
    add("--data", metavar="DIR", help="folder with the Pile rows (default: fetched and cached)")
    add("--tokenizer", default="gpt2", help="folder or hub name, for token ids (%(default)s)")
    add("--model", metavar="DIR", help="whose chat template renders questions and messages")
    add("--template", default="chat", type=flags.one_of(data.TEMPLATES),
        help="chat, or plain: Question: ... Answer: ... (%(default)s)")
    add("--limit", type=flags.positive, metavar="N", help="only the first N texts to forget")
    add("--fetch", nargs="+", metavar="NAME", type=flags.one_of(["all", *data.FILES]),
        help=f"only fetch: all, or of {', '.join(data.FILES)}")

    add = parser.add_argument_group("neighbours").add_argument
    add("--encoder", help="sentence encoder, folder or hub name (all-MiniLM-L6-v2)")
    add("--neighbours", default=1, type=flags.positive, metavar="K",
        help="of each text (%(default)s, as the paper); some methods read another one each epoch")
    add("--max-overlap", default=0.2, type=flags.above(0, equal=True),
        help="drop pool rows above this share (%(default)s)")
    add("--allow-copies", action="store_true", help="drop only the forget rows, as published")
    add("--leak-report", metavar="FILE", help="write each dropped pool row there, as JSON lines")
    add("--passage-words", default=200, type=flags.above(0, int, equal=True),
        help="cut longer pool texts; 0: never (%(default)s)")

    add = parser.add_argument_group("run").add_argument
    add("--out", metavar="FILE", default="pairs.jsonl", help="where the pairs go (%(default)s)")
    add("--overwrite", action="store_true", help="replace files that exist")
    add("--embed-batch", default=64, type=flags.positive, help="texts at once (%(default)s)")
    add("--device", default="cpu", help="where the encoder runs: cpu, cuda, mps (%(default)s)")
    add("--dry-run", action="store_true", help="check all input, print the plan, write nothing")
    return parser
# fmt: on


def read_input(args):
    """(forget records, pool records, whether both have GPT-2 ids)."""
    files = [] if args.pile else [args.forget, args.pool]
    needs_tokenizer = args.pile or any(file.lower().endswith(".npy") for file in files)
    tokenizer = load_tokenizer(args.tokenizer) if needs_tokenizer else None
    model = args.model or (args.after and str(Path(args.after, "model")))

    @functools.cache
    def reader():
        return model and models.check_model(model, allow_pickle=True)[1]  # loads no weights

    def render(messages):
        return data.render(reader(), messages, args.template)

    if args.pile:
        pool, forget = read_pile(args.set, args.data, tokenizer)
    else:
        forget, pool = (
            data.read_records(file, tokenizer=tokenizer, render=render) for file in files
        )
    forget = forget[: args.limit]
    with_ids = all("suffix_ids" in record for record in (forget[0], pool[0])) and is_gpt2(tokenizer)
    return forget, pool, with_ids


def main():
    parser = make_parser()
    args = parser.parse_args()
    if args.fetch:
        for name in data.FILES if "all" in args.fetch else args.fetch:
            print(data.data_file(name, args.data))
        return
    if {bool(args.forget), bool(args.pool)} != {not args.pile}:
        parser.error("give either --pile, or --forget FILE and --pool FILE")
    device = processes.device_of(args.device)
    encoder = encoder_folder(args.encoder or models.default_encoder())
    outputs = [args.out, args.leak_report]
    data.check_outputs(outputs, overwrite=args.overwrite, reads=[args.forget, args.pool])
    forget, pool, with_ids = read_input(args)
    models.check_readable(encoder, [said_of(record) for record in forget], "--encoder")
    targets = [*forget, *requests.earlier_pairs(args.after)]
    keep, reasons = leak_guard(targets, pool, args.max_overlap, allow_copies=args.allow_copies)
    print_leaks(keep, reasons, args.max_overlap)
    pool, keep = passages_of(pool, keep, forget, args.passage_words)
    if args.dry_run:
        rows = f"{len(forget)} texts with {keep.sum()} pool rows"
        print(f"dry run: would pair {rows} by {encoder} into {args.out}")
        return
    # The dropped rows, too: the cached result then serves every forget set.
    pool_vectors, vectors = (
        embed([said_of(row) for row in rows], encoder, batch_size=args.embed_batch, device=device)
        for rows in (pool, forget)
    )
    k = min(args.neighbours, keep.sum())  # 1, section 4.3.2
    indices, similarities = cosine_knn(vectors, pool_vectors, k=k, exclude=~keep)
    rows = zip(forget, indices, similarities, strict=True)
    pairs = (make_pair(row, [pool[i] for i in near], s, with_ids=with_ids) for row, near, s in rows)
    data.write_jsonl(args.out, pairs)
    if args.leak_report:
        data.write_jsonl(args.leak_report, reasons)
    low, middle, high = np.quantile(similarities[:, 0], [0, 0.5, 1])
    cosines = f"similarity min {low:.3f}, median {middle:.3f}, max {high:.3f}"
    print(f"wrote {args.out}: {len(forget)} pairs, {cosines}")


if __name__ == "__main__":
    flags.run_cli(main)
