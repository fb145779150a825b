"""Text as people see it, not as it is stored: comparable words and letters, places where a text may be cut, and what of
it may reach a terminal.

Two texts that look or read alike are made equal before they are compared (Unicode's NFKD, case folding, format
characters out), and a cut never falls inside one visible character (a grapheme cluster, Unicode annex 29).
"""

import functools
import hashlib
import html
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import chain

# Characters of scripts that put no spaces between words. Dense ones are a syllable or a word each.
DENSE = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff"  # radicals, kana
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"  # Han, Yi
)
OTHERS = "\u0e00-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff"  # Thai, Lao, Tibetan, Burmese, Khmer ...
dense = re.compile(f"[{DENSE}]")
unspaced = re.compile(f"[{DENSE}{OTHERS}]")
# Zero-width spaces, soft hyphens, accents and joiners are no letters to Python; these four fillers are, and invisible.
FILLERS = str.maketrans(dict.fromkeys("\u115f\u1160\u17b4\u17b5"))
ASCII_SIGNS = str.maketrans(dict.fromkeys(chr(i) for i in range(128) if not chr(i).isalnum()))


# --- what is compared ---


def plain(text):
    """The text without what hides a copy: HTML entities, kinds of letters (NFKD), case, accents, format characters.

    NFKD and not NFKC, because accents go: the two agree on what is equal. `plain(plain(text)) == plain(text)`.
    """
    while "&" in text and (decoded := html.unescape(text)) != text:  # each round is shorter
        text = decoded
    if text.isascii():
        return text.lower()
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold()).translate(
        FILLERS
    )
    return re.sub(r"[^\x00-\xac\xae-\u02ff]", lambda m: "" if is_hidden(m[0]) else m[0], text)


@functools.cache
def is_hidden(c):
    """Whether a character is of those that hide: format characters, accents and other marks."""
    return unicodedata.category(c) in ("Cf", "Mn", "Me")


def words(plain_text):
    """The runs of letters and digits of a plain text; a run in a script without spaces is one word."""
    return tuple(re.findall(r"[^\W_]+", plain_text))


def spaced(plain_text):
    """A plain text with spaces around each character of a script without spaces: every one is a word."""
    return plain_text if plain_text.isascii() else unspaced.sub(r" \g<0> ", plain_text)


def letters(plain_text):
    """The letters and digits of a plain text in one string; of a text without any, its characters but white space."""
    if plain_text.isascii():
        found = plain_text.translate(ASCII_SIGNS)
    else:
        found = "".join(filter(str.isalnum, plain_text))
    return found or "".join(plain_text.split())


def weighed(letters_of_text):
    """The letters with each ideograph or kana three times: it says about as much as three letters of an alphabet."""
    return (
        letters_of_text
        if letters_of_text.isascii()
        else dense.sub(r"\g<0>\g<0>\g<0>", letters_of_text)
    )


def stands_in(part, plain_text, its_letters):
    """Whether the letters `part` stand in a plain text as whole words, whatever signs or spaces are between them.

    The last word may go on (a plural, a case, a particle) where the part says enough: six letters, and no number.
    """
    if not part or part.isalnum() and part not in its_letters:
        return False
    spelt = r"[\W_]*".join(map(re.escape, part))
    before = r"(?<![^\W_])" if part[0].isalnum() else ""
    goes_on = part[-1].isalpha() and len(weighed(part)) >= 6
    after = r"(?![^\W_])" if part[-1].isalnum() and not goes_on else ""
    return re.search(f"{before}{spelt}{after}", spaced(plain_text)) is not None


# --- what two texts share ---


def holders_of_all(row_words, holders):
    """Which targets hold every one of some words, by the dict word -> set of targets; none for no words."""
    numbers = None
    for word in row_words:
        numbers = (
            holders.get(word, set()) if numbers is None else numbers & holders.get(word, set())
        )
        if not numbers:
            break
    return sorted(numbers or ())


class TargetGrams:
    """The n-grams of all targets, each target a tuple of words or ids or a string of letters, to look rows up in."""

    def __init__(self, targets, n):
        self.n, self.step = n, -(-n // 4)
        self.block = (
            n - self.step + 1
        )  # in every n-gram of a row there is a block that starts at a multiple of step
        self.grams = [self.grams_of(target) for target in targets]
        self.holders = defaultdict(list)  # n-gram -> numbers of the targets that hold it
        for number, found in enumerate(self.grams):
            for gram in found:
                self.holders[gram].append(number)
        self.known = set(self.holders)
        self.blocks = {piece for target in targets for piece in self.pieces(target, self.block)}

    def grams_of(self, target):
        return set(self.pieces(target, self.n))

    @staticmethod
    def pieces(units, length, step=1):
        return [units[i : i + length] for i in range(0, len(units) - length + 1, step)]

    def worst(self, row, max_overlap):
        """(share, number) of the target of which a row (tuple or string) holds most; (0, None): none over max_overlap.

        The share, 0-1, is of the target: |row's n-grams & target's| / |target's|. Where no target's is over
        `max_overlap` it is of the row: the same count in those 3n consecutive n-grams of the row that hold most, / 3n,
        also in a row that has fewer. Text put around a row, or more of the target, makes neither of them smaller.
        """
        grams = self.looked_up(row)
        shared = Counter(chain.from_iterable(map(self.holders.get, self.known & set(grams))))
        shares = ((count / len(self.grams[number]), number) for number, count in shared.items())
        share, worst = max(shares, default=(0, None))
        if share > max_overlap:
            return share, worst
        for number, count in shared.most_common():
            if (
                count > max_overlap * 3 * self.n
                and (share := self.densest(grams, self.grams[number])) > max_overlap
            ):
                return share, number
        return 0, None

    def looked_up(self, row):
        """The n-grams of a row; [] where no target can have one of them: most rows, exact and fast."""
        if self.blocks.isdisjoint(self.pieces(row, self.block, self.step)):
            return []
        return self.pieces(row, self.n)

    def densest(self, grams, target):
        """The most different n-grams of the set `target` in 3n consecutive ones of a row, as a share of 3n."""
        width, first, most, inside = 3 * self.n, 0, 0, Counter()
        places = [(place, gram) for place, gram in enumerate(grams) if gram in target]
        for place, gram in places:
            inside[gram] += 1
            while places[first][0] <= place - width:
                old, first = places[first][1], first + 1
                inside[old] -= 1
                if not inside[old]:
                    del inside[old]
            most = max(most, len(inside))
        return most / width


WORDS, LETTERS = 5, 21  # how long the leak guard's n-grams are; 21 letters are 7 ideographs


class HashedGrams(TargetGrams):
    """The same of targets whose texts are gone: of each only the salted hashes of its n-grams are left."""

    def __init__(self, hashes, n, salt):
        super().__init__(list(map(tuple, hashes)), n)
        self.salt = salt

    def grams_of(self, target):
        return set(target)

    def looked_up(self, row):
        return [hash_of(gram, self.salt) for gram in self.pieces(row, self.n)]


def hash_of(gram, salt):
    """16 hex digits of an n-gram, letters or a tuple of words, which say nothing to one who cannot guess it."""
    return hashlib.blake2b("\n".join(gram).encode("utf-8"), key=salt, digest_size=8).hexdigest()


def gram_hashes(texts, salt):
    """{"words", "letters"}: for each of the plain texts the hashes of its n-grams of each kind, for `HashedGrams`."""
    kinds = {"words": (words, WORDS), "letters": (lambda text: weighed(letters(text)), LETTERS)}
    return {
        kind: [
            sorted({hash_of(gram, salt) for gram in TargetGrams.pieces(units(text), n)})
            for text in texts
        ]
        for kind, (units, n) in kinds.items()
    }


# --- where a text may be cut ---

HANGUL_NEXT = {
    "L": "LVAB",
    "V": "VT",
    "A": "VT",
    "T": "T",
    "B": "T",
}  # A: a syllable LV, B: a syllable LVT

PREPENDED = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u08e2"  # Arabic signs that embrace what follows


def hangul(c):
    """The kind of a Korean letter or syllable (annex 29: L, V, T, A for LV, B for LVT), or ""."""
    for kind, first, last in (
        ("L", "\u1100", "\u115f"),
        ("V", "\u1160", "\u11a7"),
        ("T", "\u11a8", "\u11ff"),
    ):
        if first <= c <= last:
            return kind
    return ("B" if (ord(c) - 0xAC00) % 28 else "A") if "\uac00" <= c <= "\ud7a3" else ""


def extends(c):
    """Whether a character belongs to the one before it: combining marks, variation selectors, joiners, skin tones."""
    return c >= "\u0300" and (
        unicodedata.category(c) in ("Mn", "Me", "Mc")
        or c in "\u200c\u200d\u0e33\u0eb3\uff9e\uff9f"
        or "\U0001f3fb" <= c <= "\U0001f3ff"
        or "\U000e0020" <= c <= "\U000e007f"  # tags, which spell the flags of regions
    )


def is_break(text, at):
    """Whether text[:at] | text[at:] cuts between visible characters, by the rules of Unicode annex 29.

    Where the annex tells scripts or pictures apart by tables that Python lacks, this joins more: any symbol after a
    joiner, any letter after a virama.
    """
    if at <= 0 or at >= len(text):
        return True
    before, c = text[at - 1], text[at]
    if before < "\u0300" and c < "\u0300":
        return not (before == "\r" and c == "\n")
    if unicodedata.category(before) in ("Cc", "Zl", "Zp"):
        return True
    if (
        before in PREPENDED
        or extends(c)
        or hangul(c)
        and hangul(c) in HANGUL_NEXT.get(hangul(before), "")
    ):
        return False
    if "\U0001f1e6" <= c <= "\U0001f1ff":  # flags are pairs of regional indicators
        run = re.search("[\U0001f1e6-\U0001f1ff]*\\Z", text[max(0, at - 1000) : at])[0]
        return len(run) % 2 == 0
    if before == "\u200d" and (
        unicodedata.category(c) == "So" or "\U0001f000" <= c <= "\U0001faff"
    ):
        return False
    while unicodedata.category(c) == "Lo" and extends(
        text[at - 1]
    ):  # a conjunct of consonants, joined by a virama
        at -= 1
        if unicodedata.combining(text[at]) == 9 or not at:
            return False
    return True


def unspaced_cuts(text):
    """Where a text may be cut inside a run without white space: before a character of a script without spaces.

    Not behind ASCII: "(京都" stays whole.
    """
    places = (match.start() for match in unspaced.finditer(text))
    return [
        at
        for at in places
        if text[at - 1 : at] > "\x7f" and not text[at - 1].isspace() and is_break(text, at)
    ]


def word_starts(text):
    """Where the words of a text begin; in scripts without spaces each visible character counts as a word."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    if not unspaced.search(text):
        return starts if text.isascii() else [at for at in starts if is_break(text, at)]
    return sorted({at for at in starts if is_break(text, at)} | set(unspaced_cuts(text)))


def nearest_break(text, first, last):
    """The cut between visible characters nearest the middle of text[first:last], both sides of it not empty; or None.

    Of two equally near, the first.
    """
    middle = (first + last) / 2
    places = sorted(range(first + 1, last), key=lambda at: abs(at - middle))
    return next((at for at in places if is_break(text, at)), None)


# --- what a terminal or a Markdown file is shown ---

# A black flag and the tags that make it that of England, Texas, ...; or any one character.
PIECES = re.compile("\U0001f3f4[\U000e0030-\U000e007a]{3,6}\U000e007f|.", re.DOTALL)
MARKS = "\u061c\u200e\u200f"  # of a direction
# Embeddings, overrides, isolates, notes between lines, tags: no script needs them, and they can hide text or turn it.
NEVER = re.compile("[\u202a-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]")


def visible(text, keep=""):
    """The text with what must not reach a terminal raw written out, as Python does: \\x1b, \\u202e, \\ud800, \\n.

    That are control characters but those in `keep`, line separators, halves of surrogate pairs, and what is invisible
    (bidi controls, joiners, zero-width spaces, tags) where no letter or picture needs it. Letters of any script and
    emoji stay as they are.
    """
    if text.isprintable():
        return text
    rtl = any(unicodedata.bidirectional(c) in ("R", "AL") for c in filter(str.isalpha, text))
    shown, before = [], ""
    for c in PIECES.findall(text):
        raw = len(c) > 1 or c in keep or is_seen(c) or does_its_work(c, before, rtl)
        shown.append(c if raw else c.encode("unicode_escape").decode())
        before = c[-1] if raw else ""
    return "".join(shown)


def is_seen(c):
    """Whether a character is something to see, a space or a soft hyphen; the Arabic signs around a number are."""
    return (
        unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        or c in PREPENDED
        or c == "\xad"
    )


def does_its_work(c, before, rtl):
    """Whether an invisible character is needed where it stands, behind the character `before`.

    A mark of direction: in a text with right-to-left letters. A joiner or a zero-width space: behind a letter of a
    script that joins its letters or puts no spaces between words, or behind an emoji.
    """
    if unicodedata.category(c) != "Cf" or NEVER.match(c) or c in MARKS:
        return rtl and c in MARKS
    return (
        before >= "\u0590" and unicodedata.category(before)[0] in "LMS" and not dense.match(before)
    )
