"""Text as people see it: comparable letters, where it may be cut, what may reach a terminal.

Texts that look or read alike are equal where they are compared. A cut never falls inside a visible
character (a grapheme cluster, Unicode annex 29, by the `regex` package).
"""

import functools
import html
import re
import unicodedata
from collections import Counter, defaultdict
from itertools import chain

# Characters of scripts that put no spaces between words. Dense ones are a syllable or a word each:
# radicals, kana, Han, Yi.
DENSE = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua4cf\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
)
# Thai, Lao, Tibetan, Burmese, Khmer, ...
OTHERS = "\u0e00-\u109f\u1780-\u17ff\u1950-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff"
dense = re.compile(f"[{DENSE}]")
unspaced = re.compile(f"[{DENSE}{OTHERS}]")
# Readers take these letters for equal (Turkish i, Arabic yeh, kaf and heh, strokes), and do
# not see four fillers, which are letters to Python, and tatweel.
EQUAL = str.maketrans(
    "\u0131\u0649\u06cc\u06a9\u06c1\u06be\u0629\u0142\u00f8\u0111",
    "i\u064a\u064a\u0643\u0647\u0647\u0647lod",
    "\u115f\u1160\u17b4\u17b5\u0640",
)


# --- what is compared ---


def plain(text):
    """The text without what hides a copy: HTML entities, kinds of letters (NFKD), letters that look
    alike, digits of other scripts, case, accents, format characters, line breaks written as \\n."""
    while "&" in text and (decoded := html.unescape(text)) != text:  # each round is shorter
        text = decoded
    text = text.lower()
    if not text.isascii():
        folded = unicodedata.normalize("NFKD", text).casefold()
        text = unicodedata.normalize("NFKD", folded).translate(EQUAL)
        text = re.sub(r"[^\x00-\xac\xae-\u02ff]", lambda m: shown(m[0]), text)
    return re.sub(r"\\[nrt]", " ", text)


@functools.cache
def shown(c):
    """A character as it is compared: digits as ASCII, no format characters and marks."""
    hides = unicodedata.category(c) in ("Cf", "Mn", "Me")
    return "" if hides else str(unicodedata.decimal(c, c))


def words(plain_text):
    """Runs of letters and digits; each character of a script without spaces."""
    return re.findall(r"[^\W_]+", spaced(plain_text))


def spaced(plain_text):
    return unspaced.sub(r" \g<0> ", plain_text)


def letters(plain_text):
    """The letters and digits of a plain text; of one without any, all but white space."""
    return "".join(filter(str.isalnum, plain_text)) or "".join(plain_text.split())


def weighed(spelt):
    """The letters, each ideograph or kana three times: it says as much."""
    return dense.sub(r"\g<0>\g<0>\g<0>", spelt)


def stands_in(part, plain_text, spelt):
    """Whether the letters `part` stand in a plain text, whose letters are `spelt`, as whole words,
    whatever is between. After six letters the last may go on (a plural, a case)."""
    if not part or part.isalnum() and part not in spelt:
        return False
    pattern = r"[\W_]*".join(map(re.escape, part))
    before = r"(?<![^\W_])" if part[0].isalnum() else ""
    goes_on = part[-1].isalpha() and len(weighed(part)) >= 6
    after = r"(?![^\W_])" if part[-1].isalnum() and not goes_on else ""
    return re.search(f"{before}{pattern}{after}", spaced(plain_text)) is not None


# --- what two texts share ---

LETTERS = 21  # how long the leak guard's n-grams are; 21 letters are 7 ideographs


def grams_of(spelt):
    return [spelt[i : i + LETTERS] for i in range(len(spelt) - LETTERS + 1)]


class TargetGrams:
    """The n-grams of all targets, strings of letters, to look up rows in."""

    def __init__(self, targets):
        self.grams = [set(grams_of(target)) for target in targets]
        self.holders = defaultdict(list)  # n-gram -> numbers of the targets that hold it
        for number, held in enumerate(self.grams):
            for gram in held:
                self.holders[gram].append(number)
        self.known = set(self.holders)

    def leave_out_frame(self, rows):
        """Leaves out the n-grams of two targets and over half of these rows; returns how many."""
        several = {gram for gram, targets in self.holders.items() if len(targets) > 1}
        counts = Counter(chain.from_iterable(several & {*grams_of(row)} for row in rows))
        frame = {gram for gram, count in counts.items() if count > len(rows) / 2}
        self.grams = [held - frame for held in self.grams]
        self.known -= frame
        return len(frame)

    def worst(self, row, max_overlap):
        """[(share, number)] of the target of which a row of letters holds most, or [].

        The share, 0-1, is |row's n-grams & target's| / |target's|. Where none is over `max_overlap`
        it is the count in those 3n consecutive n-grams of the row that hold most, / 3n. Text put
        around a row makes neither smaller.
        """
        grams = grams_of(row)
        shared = Counter(chain.from_iterable(map(self.holders.get, self.known & set(grams))))
        shares = ((count / len(self.grams[number]), number) for number, count in shared.items())
        share, worst = max(shares, default=(0, None))
        if share > max_overlap:
            return [(share, worst)]
        for number, count in sorted(shared.items(), key=lambda item: (-item[1], item[0])):
            if count <= max_overlap * 3 * LETTERS:
                break
            share = densest(grams, self.grams[number])
            if share > max_overlap:
                return [(share, number)]
        return []


def densest(grams, target):
    """The most n-grams of the set `target` in 3n consecutive ones of a row, / 3n."""
    width = 3 * LETTERS
    starts = (place for place, gram in enumerate(grams) if gram in target)
    return max(len(target.intersection(grams[at : at + width])) for at in starts) / width


# --- where a text may be cut ---


def breaks(text):
    """The places between the visible characters of a text, with its two ends."""
    import regex  # here: bash run.sh help needs nothing but Python

    return {0, *(match.end() for match in regex.finditer(r"\X", text))}


def unspaced_cuts(text):
    """Where a text may be cut without white space: before a character of such a script, but not
    after ASCII: "(京都" stays whole."""
    places = {match.start() for match in unspaced.finditer(text)}
    if places:
        places &= breaks(text)
    return {at for at in places if text[at - 1 : at] > "\x7f" and not text[at - 1].isspace()}


def word_starts(text):
    """Where the words of a text begin."""
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    if text.isascii():
        return starts
    return sorted((breaks(text) & {*starts}) | unspaced_cuts(text))


def split_in_half(text):
    """(prefix, suffix), split at the word boundary nearest the middle, before its white space.

    One word is split at its middle character. ValueError for fewer than two.
    """
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    middle = (first + last) / 2
    characters = {at for at in breaks(text) if first < at < last}
    gaps = {match.start() for match in re.finditer(r"\s+", text)} | unspaced_cuts(text)
    places = characters & gaps or characters
    if not places:
        raise ValueError(f"a text of two characters at least can be split, not {text!r}")
    at = min(places, key=lambda at: (abs(at - middle), at))
    return text[:at], text[at:]


# --- what a terminal or a Markdown file is shown ---


def visible(text, keep=""):
    """The text with what must not reach a terminal written out, as Python does: \\x1b, \\u202e."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode()
        if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in keep
        else c
        for c in text
    )
