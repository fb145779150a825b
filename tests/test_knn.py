"""knn.py: records in, the exact nearest neighbour, downloads, pairs out.

The search is compared with a brute force in float64, the downloads come from a server on 127.0.0.1,
and the command line runs as a user types it. The leak guard has a file of its own: test_guard.py.
"""

import csv
import functools
import gzip
import hashlib
import json
import re
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import knn
from kit import data
from kit.text import breaks, unspaced

ROOT = Path(__file__).resolve().parents[1]

# --- the search ---


def brute_force(queries, pool, k, excluded=()):
    """Eq. 2 by definition."""
    q, p = np.asarray(queries, np.float64), np.asarray(pool, np.float64)
    lengths = (q * q).sum(axis=1)[:, None] * (p * p).sum(axis=1)[None, :]
    cosines = (q @ p.T / np.sqrt(np.where(lengths > 0, lengths, 1))).astype(np.float32)
    cosines[:, list(excluded)] = -np.inf
    indices = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    similarities = np.take_along_axis(cosines, indices, axis=1)
    indices[np.isneginf(similarities)] = -1
    short = ((0, 0), (0, k - indices.shape[1]))
    similarities = np.pad(similarities, short, constant_values=-np.inf)
    return np.pad(indices, short, constant_values=-1), similarities


def assert_same(result, expected):
    assert result[0].dtype == np.int64 and result[1].dtype == np.float32
    np.testing.assert_array_equal(result[0], expected[0])
    np.testing.assert_array_equal(result[1], expected[1])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 6), block=st.integers(1, 40))
def test_both_searches_are_brute_force_with_ties_zeros_and_exclusions(seed, k, block):
    """Small whole numbers make ties and zero vectors."""
    rng = np.random.default_rng(seed)
    dim, rows, count = rng.integers(1, 6), rng.integers(0, 30), rng.integers(0, 5)
    queries, pool = rng.integers(-2, 3, (count, dim)), rng.integers(-2, 3, (rows, dim))
    mask = rng.random(rows) < 0.2
    expected = brute_force(queries, pool, k, np.flatnonzero(mask))
    for exclude in (mask, np.flatnonzero(mask)):
        assert_same(knn.cosine_knn(queries, pool, k, exclude=exclude, block=block), expected)
    indices, cosines = knn.literal_knn(queries, pool, k, np.flatnonzero(mask))
    there = np.isfinite(cosines)
    assert (indices[there] == expected[0][:, :rows][there]).all()
    np.testing.assert_allclose(cosines[there], expected[1][:, :rows][there], atol=1e-7)


@pytest.mark.parametrize("k", [1, 10])
def test_cosine_knn_does_not_depend_on_the_block(k):
    """With near ties of one bit, brute force's rows."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((700, 48)).astype(np.float32)
    # In float32 a product may fall on either side of its twin.
    pool[300:400] = pool[:100] * np.float32(1 + 2e-7)
    pool[[3, 255, 699]] = pool[200]
    queries = np.concatenate([rng.standard_normal((1020, 48)), pool[200:310]])  # in two parts
    queries = queries.astype(np.float32)
    expected = brute_force(queries, pool, k)
    assert expected[0][1020, :4].tolist() == ([3] if k == 1 else [3, 200, 255, 699])
    for block in (1, 64, 333, 5000):
        assert_same(knn.cosine_knn(queries, pool, k, block=block), expected)


def test_zero_tiny_and_huge_vectors_have_a_direction_or_none():
    """float32 cannot square 1e-40 and 1e30; NaN is an error with its row."""
    pool = np.array([[0, 0], [1e-40, 0], [0, 1e30], [3, 4]], np.float32)
    indices, similarities = knn.cosine_knn(np.array([[0, 0], [1e30, 0]], np.float32), pool, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [1, 3, 0, 2]]
    np.testing.assert_allclose(similarities, [[0, 0, 0, 0], [1, 0.6, 0, 0]], atol=1e-6)
    pool[3, 1] = np.nan
    with pytest.raises(ValueError, match="pool row 3 holds NaN or inf"):
        knn.cosine_knn(pool[:2], pool, block=2)


# --- reading ---


@settings(max_examples=100, deadline=None)
@given(st.text())
@example(" \u2003ab \n")
@example("👨\u200d👩\u200d👧")
@example(" ที่\n")
def test_a_text_is_split_without_losing_a_character(text):
    """Between visible characters, at white space where there is some."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    if not any(first < at < last for at in breaks(text)):
        with pytest.raises(ValueError, match="two characters at least"):
            data.split_in_half(text)
        return
    prefix, suffix = data.split_in_half(text)
    assert prefix + suffix == text and prefix.strip() and suffix.strip()
    assert len(prefix) in breaks(text)
    if len(text.split()) > 1 and not unspaced.search(text) and text.isprintable():
        assert suffix[0].isspace() and not prefix[-1].isspace()


def test_csv_and_jsonl_give_the_same_records(tmp_path):
    """Quotes, line breaks, a BOM, CRLF, numbers as ids."""
    rows = [
        {"id": "7", "context": "", "prefix": 'She said "no",\nthen', "suffix": " left.\u2028"},
        {"id": "b", "context": "before ", "prefix": "naïve", "suffix": " 北京"},
    ]
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["suffix", "id", "prefix", "context", "ignored"], restval="x")
        writer.writeheader()
        writer.writerows(rows)
    lines = [json.dumps(rows[0] | {"id": 7}), json.dumps(rows[1], ensure_ascii=False)]
    text = "\ufeff" + "\r\n\r\n".join(lines)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8", newline="")
    assert data.read_records(tmp_path / "a.csv") == rows == data.read_records(tmp_path / "a.jsonl")
    page = "word " * 60_000 + "end"  # over the csv module's limit
    (tmp_path / "b.csv").write_text(f"text\n{page}\none two\n")
    records = data.read_records(tmp_path / "b.csv")
    assert knn.text_of(records[0]) == page
    assert list(records[1].values()) == ["1", "", "one", " two"]


class WordTokenizer:
    """Ids are numbers of words."""

    def __len__(self):
        return 100

    def decode(self, ids, **_):
        return "".join(f" w{id}" for id in ids)


def test_token_ids_are_split_in_half_and_kept(tmp_path):
    """Of T ids the first T // 2 are the prefix; of any layout."""
    ids = np.array([[1, 2, 3, 4, 5], [0, 99, 0, 99, 0]], ">i2")
    np.save(tmp_path / "a.npy", np.asfortranarray(ids))
    records = data.read_records(tmp_path / "a.npy", tokenizer=WordTokenizer())
    assert records[0] == {
        "id": "0", "context": "", "context_ids": [], "prefix": " w1 w2", "prefix_ids": [1, 2],
        "suffix": " w3 w4 w5", "suffix_ids": [3, 4, 5],
    }  # fmt: skip
    assert records[1]["suffix_ids"] == [0, 99, 0] and type(records[1]["suffix_ids"][1]) is int


def test_a_gzip_is_read_as_the_file_in_it(tmp_path):
    """JSON lines, and CSV as Excel writes it."""
    for name, rows in (("a.csv", "text;;\na b;;\n;;\n"), ("a.jsonl", '{"text": "a b"}')):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(rows.encode()))
        assert knn.text_of(data.read_records(tmp_path / f"{name}.gz")[0]) == "a b"


# --- passages ---


def record(id, text, context=""):
    prefix, suffix = data.split_in_half(text)
    return {"id": id, "context": context, "prefix": prefix, "suffix": suffix}


def test_passages_join_to_the_text_and_keep_to_the_limit(capsys):
    """Short texts, ids and texts to forget stay whole."""
    text = "  " + " \n".join(f"w{i}" for i in range(450)) + " "
    forget = record("w", "x " * 300)
    uncut = [record("s", "a short text"), forget, record("i", "y " * 300) | {"suffix_ids": [1]}]
    keep = np.array([False, True, True, True])
    pool, kept = knn.passages_of([record("p", text, "before"), *uncut], keep, [forget], 200)
    passages = pool[:3]
    assert [p["id"] for p in passages] == ["p#0", "p#1", "p#2"] and pool[3:] == uncut
    assert kept.tolist() == [False] * 3 + [True] * 3
    assert "4 pool rows cut into 6 passages" in capsys.readouterr().out
    assert "".join(map(knn.text_of, passages)) == text
    assert [len(knn.text_of(p).split()) for p in passages] == [150, 150, 150]
    assert [p["context"] for p in passages] == ["before", "", ""]


# --- downloads ---

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(monkeypatch, tmp_path):
    """Where a server has CONTENT, which is called pile.csv."""
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "f.npy").write_bytes(CONTENT)
    handler = functools.partial(SimpleHTTPRequestHandler, directory=tmp_path / "server")
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/f.npy"
    monkeypatch.setitem(data.FILES, "pile.csv", (url, SHA256))
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    yield url
    httpd.shutdown()
    httpd.server_close()


def test_a_file_is_taken_from_the_folder_then_the_cache_then_fetched(url, tmp_path):
    """Where its sha256 is right."""
    folder = tmp_path / "data"
    (folder / "validation").mkdir(parents=True)
    cached = data.data_file("pile.csv", folder)
    assert cached == tmp_path / "cache" / "data" / "pile.csv" and cached.read_bytes() == CONTENT
    assert [*cached.parent.iterdir()] == [cached]
    cached.write_bytes(b"broken")
    assert data.data_file("pile.csv").read_bytes() == CONTENT
    (tmp_path / "server" / "f.npy").unlink()
    assert data.data_file("pile.csv") == cached
    (folder / "validation" / "pile.csv").write_bytes(CONTENT)
    assert data.data_file("pile.csv", folder) == folder / "validation" / "pile.csv"
    (folder / "pile.csv").write_bytes(b"other")
    with pytest.raises(ValueError, match="another file is expected"):
        data.data_file("pile.csv", folder)


# --- pairs ---

PAIR = {
    "id": "a", "context": "", "prefix": "one", "suffix": " two", "learn_id": "b",
    "learn_context": "", "learn_prefix": "three", "learn_suffix": " four", "similarity": 0.5,
}  # fmt: skip
IDS = {f"{side}{part}_ids": [1, 2] for side in ("", "learn_") for part in data.PARTS}


def test_pairs_are_read_as_they_were_written(tmp_path):
    """With and without ids, any character."""
    with_ids = PAIR | IDS | {"id": "c", "suffix": "\n", "context_ids": []}
    further = [
        {name: row[name] for name in row if name.startswith(("learn_", "sim"))}
        for row in (PAIR, PAIR | IDS)
    ]
    pairs = [
        PAIR,
        with_ids | {"further": further[1:]},
        PAIR | {"id": "d", "prefix": "北\u2028京", "further": further[:1], "spans": [[1, 3]]},
    ]
    data.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert data.read_pairs(tmp_path / "pairs.jsonl") == pairs


def test_a_file_is_replaced_only_with_overwrite_and_never_one_that_is_read(tmp_path):
    """Nor a folder, a link, or a file that is named twice."""
    there, link, new = tmp_path / "there", tmp_path / "link", tmp_path / "new"
    there.write_text("x")
    link.symlink_to(there)
    data.check_outputs([new, None], reads=[there])
    data.check_outputs([there], overwrite=True)
    with pytest.raises(ValueError, match="exists already: pass --overwrite"):
        data.check_outputs([new, there])
    for paths in ([link], [tmp_path], [there], [new, new]):
        with pytest.raises(ValueError, match="a folder or a link|read or written"):
            data.check_outputs(paths, overwrite=True, reads=[there])


# --- embeddings ---


def test_embeddings_are_cached(tmp_path, encoder_dir, monkeypatch, capsys):
    """Equal texts get equal vectors; a cache that cannot be written is a note."""
    from sentence_transformers import SentenceTransformer

    monkeypatch.setenv("ICU_CACHE", str(tmp_path))
    texts = ["The cat sat on the mat.", "Rates rose by a quarter point.", "The cat sat on the mat."]
    first = knn.embed(texts, encoder_dir)
    assert first.dtype == np.float32 and first.shape == (3, 384) and (first[0] == first[2]).all()
    reference = SentenceTransformer(str(encoder_dir), device="cpu").encode(texts)
    np.testing.assert_allclose(first, reference, atol=1e-5)
    monkeypatch.setattr(knn, "encode", lambda *_: first + 1)
    assert (knn.embed(texts, encoder_dir) == first).all()
    (file,) = (tmp_path / "embeddings").iterdir()
    monkeypatch.setenv("ICU_CACHE", str(file))
    assert (knn.embed(texts, encoder_dir) == first + 1).all()
    assert "note: the embeddings are not kept" in capsys.readouterr().out


# --- the command ---


ARGS = ("--forget", "mine.csv", "--pool", "wiki.jsonl")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """What `python knn.py` prints of two records to forget and six rows: two copies, a page."""
    forget = "Bob Jones was treated for asthma at St Mary's Hospital in"
    (tmp_path / "mine.csv").write_text(f'id,text\nanna,"Anna Smith, 555-1234"\nbob,{forget} May\n')
    rows = [
        "The stock market closed higher today",
        "Call Anna Smith, 555-1234 after six in the evening",
        "Clara Weiss, 555-8876",
        "Dan Hill was treated for diabetes at Mercy Hospital in June",
        f"{forget} April",
        "The history of the harbour is long and has many chapters. " * 50,
    ]
    data.write_jsonl(tmp_path / "wiki.jsonl", [{"text": row} for row in rows])
    monkeypatch.chdir(tmp_path)

    def knn_main(*words):
        monkeypatch.setattr(sys, "argv", ["knn.py", *map(str, words)])
        knn.main()
        return capsys.readouterr().out

    return knn_main


def test_the_command_pairs_csv_with_jsonl(run, encoder_dir):
    """Leaks are reported, none is a neighbour."""
    printed = run(*ARGS, "--leak-report", "leaks.jsonl")
    assert "6 pool rows cut into 8 passages" in printed and "2 of 6 pool rows dropped" in printed
    summary = r"wrote pairs.jsonl: 2 pairs, similarity min 0\.\d+, median 0\.\d+, max 0\.\d+"
    assert re.search(summary, printed)
    pairs = data.read_pairs("pairs.jsonl")
    assert [(pair["id"], pair["learn_id"]) for pair in pairs] == [("anna", "2"), ("bob", "3")]
    assert list(pairs[0]) == list(PAIR) and knn.text_of(pairs[0]) == "Anna Smith, 555-1234"
    assert [row["id"] for row in data.read_jsonl("leaks.jsonl")] == ["1", "4"]

    with pytest.raises(ValueError, match="pairs.jsonl exists already: pass --overwrite"):
        run(*ARGS)
    assert run(*ARGS, "--neighbours", "9", "--overwrite") == printed
    for pair, more in zip(pairs, data.read_pairs("pairs.jsonl"), strict=True):
        rows = [pair, *more.pop("further")]
        assert more == pair and len(rows) == 6
        assert not {"1", "4"} & {row["learn_id"] for row in rows}  # no further one gives it away
        cosines = [row["similarity"] for row in rows]
        assert cosines == sorted(cosines, reverse=True)
    run(*ARGS, "--allow-copies", "--overwrite")
    assert [pair["learn_id"] for pair in data.read_pairs("pairs.jsonl")] == ["1", "4"]


# --- the Pile's rows ---


@pytest.fixture(scope="module")
def pile(shared):
    """The 15,000 rows and forget set 0."""
    tokenizer = knn.load_tokenizer(str(shared / "models" / "gpt2-tokenizer"))
    return knn.read_pile("0", shared / "data", tokenizer)


def test_set_0_of_the_pile_has_copies_and_the_guard_drops_them(pile):
    """23 of 128 targets have an identical copy; 6,592 rows go."""
    records, forget = pile
    assert len(records) == 15000 and [r["id"] for r in forget[:2]] == ["1670", "13379"]
    numbers = {r["id"] for r in forget}
    rest = {(*r["prefix_ids"], *r["suffix_ids"]) for r in records if r["id"] not in numbers}
    assert sum((*r["prefix_ids"], *r["suffix_ids"]) in rest for r in forget) == 23
    keep, reasons = knn.leak_guard(forget, records)
    assert sum(reason["reason"] == "forget row" for reason in reasons) == 128
    assert (len(reasons), keep.sum()) == (6720, 8280)


def test_pairs_from_token_ids_carry_the_ids(pile, shared, run, encoder_dir):
    """With GPT-2's tokenizer the six *_ids fields are there."""
    rows = np.array([r["prefix_ids"] + r["suffix_ids"] for r in pile[1][:2] + pile[0][:20]])
    args = ("--forget", "f.npy", "--pool", "p.npy", "--overwrite", "--tokenizer")
    np.save("f.npy", rows[:2])
    np.save("p.npy", rows[2:])
    run(*args, shared / "models" / "gpt2-tokenizer")
    for pair, row in zip(data.read_pairs("pairs.jsonl"), rows, strict=False):
        assert pair["prefix_ids"] + pair["suffix_ids"] == row.tolist()
        learn = pair["learn_prefix_ids"] + pair["learn_suffix_ids"]
        assert learn == rows[2 + int(pair["learn_id"])].tolist()
    rows[rows >= 4096] = 7
    np.save("f.npy", rows[:2])
    np.save("p.npy", rows[2:])
    run(*args, shared / "models" / "pile-neo-6m")
    assert list(data.read_pairs("pairs.jsonl")[0]) == list(PAIR)
