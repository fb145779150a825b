"""A part of a text: which characters are to be forgotten, which tokens that makes, and how they are measured.

A record's `spans` are [start, end) in the characters of prefix + suffix. A token that overlaps a span is secret; the
other tokens of the same text are kept: they have KL to the frozen copy, as Eq. 4's.
"""

from kit.text import letters, plain, stands_in


def read_spans(row, text, where):
    """{"spans": [[start, end], ...]} of a user's row, in order, or {} where it marks nothing.

    row: `spans`, a list of [start, end); or `secrets`, strings that occur once in the text: a list, or in CSV one
    string with | between. ValueError names the row `where`.
    """
    spans, secrets = (row.get(name) or None for name in ("spans", "secrets"))
    if spans is None and secrets is None:
        return {}
    if spans is not None and secrets is not None:
        raise ValueError(f"{where}: `spans` and `secrets`: pass one of them")
    if secrets is not None:
        secrets = secrets.split("|") if isinstance(secrets, str) else secrets
        spans = [
            find_secret(secret, text, where)
            for secret in check_list(secrets, f"{where}: `secrets`")
        ]
    return {"spans": check_spans(spans, text, where)}


def check_list(values, what):
    if not isinstance(values, list):
        raise ValueError(f"{what} is {type(values).__name__}, not a list")
    return values


def find_secret(secret, text, where):
    """[start, end) of a string that must occur in the text once, and no more."""
    if not isinstance(secret, str) or not secret.strip():
        raise ValueError(
            f"{where}: a secret is {'blank' if isinstance(secret, str) else 'no string'}"
        )
    start = text.find(secret)
    if start < 0:
        raise ValueError(f"{where}: the secret {secret[:40]!r} does not occur in the text")
    if text.find(secret, start + 1) >= 0:
        raise ValueError(f"{where}: the secret {secret[:40]!r} occurs twice: mark it by `spans`")
    return [start, start + len(secret)]


def check_spans(spans, text, where):
    """The spans in order, if they are pairs of whole numbers inside the text that do not overlap."""
    for span in check_list(spans, f"{where}: `spans`"):
        if not isinstance(span, list) or len(span) != 2 or any(type(x) is not int for x in span):
            raise ValueError(
                f"{where}: span {str(span)[:40]} is not [start, end], two whole numbers"
            )
        if not 0 <= span[0] < span[1] <= len(text):
            raise ValueError(
                f"{where}: span {span} is not inside the text of {len(text)} characters"
            )
    spans = sorted(spans)
    for one, other in zip(spans, spans[1:], strict=False):
        if other[0] < one[1]:
            raise ValueError(f"{where}: spans {one} and {other} overlap")
    return spans


# --- tokens ---


def positions_of(pair, tokenizer, ids, *, begin, where):
    """The positions in `ids` of the tokens that overlap a span of the pair, in order; None where it marks nothing.

    ids[begin:] are those of its prefix and suffix. Position 0 is never predicted, so it is none. ValueError names the
    row `where`: a span of no such token; a tokenizer that says a text of another length, where no character is found.
    """
    if not pair.get("spans"):
        return None
    text, own = pair["prefix"] + pair["suffix"], ids[begin:]
    ends = [
        len(tokenizer.decode(own[: i + 1], clean_up_tokenization_spaces=False))
        for i in range(len(own))
    ]
    if ends[-1] != len(text):
        raise ValueError(
            f"{where}: the tokenizer does not give its text back unchanged, so no span can be found in it"
        )
    for i in reversed(
        range(len(ends) - 1)
    ):  # half a character is decoded as one or more signs of its own
        ends[i] = min(ends[i], ends[i + 1])
    starts = [min(start, end - 1) for start, end in zip([0, *ends], ends, strict=False)]
    found = []
    for low, high in pair["spans"]:
        inside = [
            t
            for t, (s, e) in enumerate(zip(starts, ends, strict=True), begin)
            if s < high and e > low and t > 0
        ]
        if not inside:
            raise ValueError(f"{where}: span {[low, high]} holds no token that the model predicts")
        found += inside
    return tuple(sorted(set(found)))


def rest_of(text):
    """The positions of a marked text that are predicted and not secret."""
    return tuple(sorted(set(range(max(text.t0, 1), len(text.ids))) - set(text.span_positions)))


def parts_of(samples):
    """For each sample None or, where a part is marked, (its positions, those of the rest)."""
    return [
        sample.forget.span_positions and (sample.forget.span_positions, rest_of(sample.forget)) for sample in samples
    ]


def kept_side(samples):
    """{"kept": what is kept of each sample's text} where one is marked, or {}: the KL over it is what keeps it."""
    if not any(sample.forget.span_positions for sample in samples):
        return {}
    texts = [sample.forget for sample in samples]
    return {"kept": [[text._replace(span_positions=rest_of(text))] if text.span_positions else [] for text in texts]}


# --- what was said ---


def marked(pair):
    """The strings that the spans of a record mark, in order."""
    text = pair["prefix"] + pair["suffix"]
    return [text[low:high] for low, high in pair.get("spans", ())]


def secrets_of(pair):
    """The marked strings of a pair that its prefix does not give away."""
    return tuple(secret for secret in marked(pair) if secret not in pair["prefix"])


def says(text, secret):
    """Whether a text says a secret, in whatever case, accents, spaces or signs."""
    said = plain(text)
    return stands_in(letters(plain(secret)), said, letters(said))


def secret_said(sample, generation):
    """{"secret_said": 1.0 if a generation says a secret of its sample, else 0.0}; None for one without any to say."""
    said = any(says(generation, secret) for secret in sample.secrets)
    return {"secret_said": float(said) if sample.secrets else None}
