"""The leak guard against disguises and pieces of a secret, and cuts between visible characters.

What the guard lets through is asserted as exactly as what it catches; `-s` prints the list.
"""

import base64
import codecs

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import knn
from kit import data, text

SECRET = (
    "Rosalind Vane of 14 Harbour Lane was admitted to the Linden clinic on the third of March "
    "after a fall from the office ladder; doctor Flynn keeps the file in the blue cabinet and her "
    "passphrase is violet harbour seven."
)
PAGE = (
    "The ferry to the island leaves twice a day in summer and once in winter, when the sea "
    "allows it. " * 8
)
WORDS = SECRET.split()


def record(id, words):
    prefix, suffix = data.split_in_half(words)
    return {"id": id, "context": "", "prefix": prefix, "suffix": suffix}


def dropped(target, *rows, **kwargs):
    """Whether the guard drops each of these texts."""
    pool = [record(str(number), row) for number, row in enumerate(rows)]
    keep, reasons = knn.leak_guard([record("f", target)], pool, **kwargs)
    assert [r["id"] for r in reasons] == [str(i) for i in np.flatnonzero(~keep)]
    assert all(
        set(r) == {"id", "target_id", "share", "reason"} and 0 < r["share"] <= 1 for r in reasons
    )
    return (~keep).tolist()


def swap(table):
    return "".join(table.get(c, c) for c in SECRET)


def typos(every):
    """In every n-th word, two letters change places."""
    out = list(WORDS)
    for i in range(0, len(out), every):
        middle = len(out[i]) // 2
        out[i] = out[i][: middle - 1] + out[i][middle - 1 : middle + 1][::-1] + out[i][middle + 1 :]
    return " ".join(out)


def in_order(size):
    """The words in chunks, in another order."""
    chunks = [" ".join(WORDS[i : i + size]) for i in range(0, len(WORDS), size)]
    return " ".join(chunks[1::2] + chunks[::2])


SYNONYMS = (
    "Ms Vane of 14 Harbour Lane was taken into the Linden hospital in early March following a "
    "tumble off an office ladder; physician Flynn stores her records inside a blue cupboard, and "
    "the password is purple port seven."
)
GERMAN = (
    "Rosalind Vane aus der Hafengasse 14 wurde am dritten März nach einem Sturz von der Büroleiter "
    "in die Lindenklinik gebracht; Doktor Flynn verwahrt die Akte im blauen Schrank, und ihr "
    "Kennwort ist veilchenblauer Hafen sieben."
)
DISGUISES = {  # kind -> (text, caught)
    "exact": (SECRET, True),
    "upper case": (SECRET.upper(), True),
    "doubled spaces": (SECRET.replace(" ", "  "), True),
    "no spaces": (SECRET.replace(" ", ""), True),
    "no-break spaces": (SECRET.replace(" ", "\u00a0"), True),
    "&nbsp;": (SECRET.replace(" ", "&nbsp;"), True),
    "HTML entities": ("".join(f"&#{ord(c)};" for c in SECRET), True),
    "zero-width spaces": ("\u200b".join(SECRET), True),
    "soft hyphens": (SECRET.replace("ar", "a\u00adr").replace("in", "i\u00adn"), True),
    "underscores": (SECRET.replace(" ", "_"), True),
    "letter-spacing": (" ".join(SECRET), True),
    "full-width letters": (swap({chr(i): chr(i + 0xFEE0) for i in range(33, 127)}), True),
    "ligatures": (
        SECRET.replace("ffi", "\ufb03").replace("fi", "\ufb01").replace("Fl", "\ufb02"),
        True,
    ),
    "mathematical bold": (swap({chr(97 + i): chr(0x1D41A + i) for i in range(26)}), True),
    "accents, decomposed": ("".join(c + "\u0301" if c in "aeiou" else c for c in SECRET), True),
    "punctuation changed": (
        SECRET.replace(";", " --").replace(".", "!").replace(" and", ", and"),
        True,
    ),
    "line-wrapped": ("-\n".join(SECRET[i : i + 37] for i in range(0, len(SECRET), 37)), True),
    'quoted with ">"': (
        "\n".join("> " + " ".join(WORDS[i : i + 5]) for i in range(0, len(WORDS), 5)),
        True,
    ),
    "Markdown bold per word": (" ".join(f"**{word}**" for word in WORDS), True),
    "half of it": (" ".join(WORDS[: len(WORDS) // 2]), True),
    "8 words of it": (" ".join(WORDS[10:18]), True),
    "its last 6 words": (" ".join(WORDS[-6:]), True),
    "inside a long document": (PAGE + SECRET + PAGE, True),
    "6 words of 33 letters in a document": (PAGE + " ".join(WORDS[-6:]) + " " + PAGE, True),
    "number written otherwise": (SECRET.replace("14", "fourteen").replace("seven", "7"), True),
    "one typo in 8 words": (typos(8), True),
    "word order changed by tens": (in_order(10), True),
    "words sorted": (" ".join(sorted(WORDS)), True),
    "one typo in 3 words": (typos(3), False),
    "synonyms": (SYNONYMS, False),
    "translated": (GERMAN, False),
    "letters reversed": (SECRET[::-1], False),
    "ROT13": (codecs.encode(SECRET, "rot13"), False),
    "base64": (base64.b64encode(SECRET.encode()).decode(), False),
    "leetspeak": (swap(dict(zip("aeiost", "431057", strict=True))), False),
    "homoglyphs": (swap(dict(zip("aeopcx", "аеорсх", strict=True))), False),
    "HTML tags per word": (" ".join(f"<b>{word}</b>" for word in WORDS), False),
    "words sorted, in a document": (PAGE + " ".join(sorted(WORDS)), False),
    "4 words in a document": (PAGE + " ".join(WORDS[-4:]), False),
}


def test_what_a_disguise_does_to_the_guard_is_known():
    """39 kinds: 28 are caught, 11 pass."""
    caught = dropped(SECRET, *(row for row, _ in DISGUISES.values()))
    for kind, was_caught in zip(DISGUISES, caught, strict=True):
        print(f"{'caught' if was_caught else 'passed':8}{kind}")
    assert dict(zip(DISGUISES, caught, strict=True)) == {
        kind: expected for kind, (_, expected) in DISGUISES.items()
    }
    assert (len(caught), sum(caught)) == (39, 28)


@pytest.mark.parametrize("copied", [98, 34, 33, 32, 20])
def test_rows_above_the_allowed_overlap_are_dropped(copied):
    """By 20% of a target's n-grams, or of 3n of its own."""
    target = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(100))
    row = f"{PAGE}{target[1 : 1 + copied]} {PAGE}"
    shared = max(0, copied - 20)  # 21-grams; the target has 80, all different
    share = shared / 80 if shared / 80 > 0.2 else min(shared, 63) / 63
    other = record("f0", "Nothing of this is in the row")
    keep, reasons = knn.leak_guard([other, record("f1", target)], [record("p", row)])
    assert keep.tolist() == [share <= 0.2]
    expected = {"id": "p", "target_id": "f1", "share": round(share, 4), "reason": "copy"}
    assert reasons == ([] if share <= 0.2 else [expected])


def test_texts_are_compared_across_the_split():
    """The context counts, too."""
    row = {"context": SECRET[:10], "prefix": SECRET[10:17], "suffix": SECRET[17:]}
    keep, reasons = knn.leak_guard([record("f", SECRET)], [{"id": "p", **row}])
    assert keep.tolist() == [False] and reasons[0]["share"] == 1.0


def test_allow_copies_drops_only_the_forget_rows_themselves():
    """As published: a copy under another id stays."""
    pool = [record("4", SECRET), record("5", SECRET), record("5", PAGE)]
    keep, reasons = knn.leak_guard([record("5", SECRET)], pool, allow_copies=True)
    assert keep.tolist() == [True, False, True]
    assert reasons == [{"id": "5", "target_id": "5", "share": 1.0, "reason": "forget row"}]
    keep, reasons = knn.leak_guard([record("5", SECRET)], pool)
    assert keep.tolist() == [False, False, True]
    assert [reason["reason"] for reason in reasons] == ["copy", "forget row"]


def test_a_target_too_short_for_an_ngram_is_seen_in_a_row():
    """As whole words, or a piece of them as the whole row."""
    target = "Anna Smith, 555-1234"
    leaks = [
        "anna  smith,\n555-1234",
        "You can call Anna Smith, 555-1234, at any time of the day or night",
        "Smith, 555-1234",
    ]
    innocent = ["Anna Smith, 555-12345", "Joanna Smith, 555-1234", "Anna Smith lives in Oxford"]
    assert all(dropped(target, *leaks)) and not any(dropped(target, *innocent))


def test_innocent_rows_that_share_common_phrases_stay():
    """Common phrases, a shared frame with other facts."""
    target = "At the end of the day one of the most important things is the code in the red box."
    innocent = [
        "In the end one of the most important battles was lost at the end of the summer.",
        "It was late at the end of the day.",
        "He keeps it in the red box.",
        PAGE + "At the end of the day the harbour is quiet.",
        "Dan Hill was admitted to the Mercy clinic in June after a stroke.",
    ]
    assert not any(dropped(target, *innocent)) and not any(dropped(SECRET, *innocent))


def test_max_overlap_1_keeps_copies_and_0_keeps_no_shared_ngram():
    """The flag's ends."""
    row = "She was admitted to the Linden hospital in May"
    # Nothing but the target is not a question of shares.
    assert dropped(SECRET, SECRET, SECRET + " " + PAGE, row, max_overlap=1) == [True, False, False]
    assert dropped(SECRET, row, max_overlap=0) == [True] and dropped(SECRET, row) == [False]


def test_what_most_rows_share_is_no_leak():
    """As a system prompt; a piece of a target is."""
    targets = [record("a", PAGE + SECRET), record("b", PAGE + SYNONYMS)]
    rows = [GERMAN, ZH, "Copper is for pots.", " ".join(WORDS[-6:])]
    keep, _ = knn.leak_guard(targets, [record(row, PAGE + row) for row in rows])
    assert keep.tolist() == [True, True, True, False]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u06a9\u062a\u0627\u06c1\u06cc", "\u0643\u062a\u0640\u0627\u0629\u064a"),  # Arabic
        ("\u06f1\u0664 k\u0131r\u0131k \u0141\u00f3d\u017a", "14 kirik Lodz"),
        (r"one\ntwo\tC", "one\ntwo\tC"),
    ],
)
def test_letters_that_readers_take_for_equal_are_equal(one, other):
    """So a copy that is spelt with the others is one."""
    assert text.words(text.plain(one)) == text.words(text.plain(other)) and data.says(other, one)


# --- monotonic: more of the secret is never treated more gently ---

VOCABULARY = "the of violet harbour seven Rosalind a in ferry Zoë clinic 14 was kept blue".split()
VOCABULARY += "her 林 晓 ไทย é".split()
sentences = st.lists(st.sampled_from(VOCABULARY), min_size=2, max_size=30).map(" ".join)


@st.composite
def secret_and_row(draw):
    """A target, and a row made of its pieces and other words."""
    target = draw(st.lists(st.sampled_from(VOCABULARY), min_size=2, max_size=45))
    row = []
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(target) - 1))
        row += target[start : start + draw(st.integers(1, 20))]
        row += draw(st.lists(st.sampled_from([*VOCABULARY, "x", "other"]), max_size=4))
    return " ".join(target), " ".join(row)


def only_a_piece(target, row):
    """Whether the row's words are all a target's."""
    target, plain = text.plain(target), text.plain(row)
    all_its = set(text.words(plain)) <= set(text.words(target))
    return all_its or text.stands_in(text.letters(plain), target, text.letters(target))


@settings(max_examples=60, deadline=None)
@given(case=secret_and_row(), before=sentences, after=sentences)
def test_text_around_a_dropped_row_never_keeps_it(case, before, after):
    """Also inside a page."""
    target, row = case
    if len(row) < 2 or dropped(target, row) == [False] or only_a_piece(target, row):
        return
    rows = [f"{before} {row}", f"{row} {after}", f"{before} {row} {after}", f"{PAGE} {row} {PAGE}"]
    assert dropped(target, *rows) == [True] * 4


# --- scripts without spaces ---

ZH = "患者林晓雨住在青石镇柳河路十四号，她的账户尾号是七七三一，每周二上午到诊所取药。"
THAI = "คนไข้ชื่อมาลีอยู่บ้านเลขที่สิบสี่ถนนริมน้ำและรหัสผ่านของเธอคือท่าเรือสีม่วงเจ็ด"
JAPANESE = "患者の鈴木さくらさんは青葉町の十四番地に住んでいて、合言葉は紫の港の七です。"
AROUND = {
    ZH: "今天天气很好。图书馆下午五点关门，",
    THAI: "วันนี้อากาศดีมากและห้องสมุดปิดตอนเย็น",
    JAPANESE: "図書館は午後五時に閉まります。",
}


@pytest.mark.parametrize("secret", [ZH, THAI, JAPANESE])
def test_scripts_without_spaces_are_guarded(secret):
    """The whole, half, a piece; other text stays."""
    half, around = secret[len(secret) // 4 : -len(secret) // 4], AROUND[secret]
    leaks = [secret, around + secret + around, half, around + half, " ".join(secret), secret[5:13]]
    assert all(dropped(secret, *leaks))
    assert not any(dropped(secret, around, around[:9]))


@pytest.mark.parametrize(
    ("words", "prefix"),
    [
        ("图 书馆下午五点关门，请提前归还", "图 书馆下午五点"),
        ("👨\u200d👩\u200d👧👨\u200d👩\u200d👧", "👨\u200d👩\u200d👧"),
        ("\u1112\u1161\u11ab\u1100\u116e\u11a8", "\u1112\u1161\u11ab"),
        ("The sign (京) is Chinese for a capital", "The sign (京) is"),
    ],
)
def test_halves_are_cut_between_visible_characters(words, prefix):
    """Never in an emoji or a syllable of its letters."""
    assert data.split_in_half(words) == (prefix, words[len(prefix) :])


def test_no_partner_says_what_is_marked():
    """As whole words, in whatever case and signs; only if marked."""
    target = record("f", SECRET)
    at = SECRET.index("Linden clinic")
    rows = ["We met at the LINDEN-clinic.", "The lindens near a clinic.", "Linden clinics"]
    pool = [record(str(i), f"{PAGE} {row}") for i, row in enumerate(rows)]
    assert knn.leak_guard([target], pool)[0].all()
    target["spans"] = [[at, at + len("Linden clinic")]]
    keep, reasons = knn.leak_guard([target], pool)
    assert keep.tolist() == [False, True, False] and reasons[0]["target_id"] == "f"
    assert knn.leak_guard([target], pool, allow_copies=True)[0].all()
    target["spans"] = [[SECRET.index(mark), SECRET.index(mark) + len(mark)] for mark in ("14", ";")]
    pool = [record("a", "In 1402; later."), record("b", "No. 14; left.")]
    assert knn.leak_guard([target], pool)[0].tolist() == [True, False]


def test_a_document_is_judged_before_it_is_cut():
    """Of a secret spread over it all passages go."""
    spread = " ".join(f"{' '.join(WORDS[i : i + 7])} {PAGE}" for i in range(0, len(WORDS), 7))
    pool = [record("spread", spread), record("page", PAGE * 2)]
    keep, _ = knn.leak_guard([record("f", SECRET)], pool)
    passages, kept = knn.passages_of(pool, keep, [record("f", SECRET)], 100)
    assert len(passages) == len(kept) > 6
    assert {p["id"].split("#")[0] for p, k in zip(passages, kept, strict=True) if k} == {"page"}
