"""Files that are written whole or not at all, records, pairs, marked parts of a text, downloads."""

import bisect
import contextlib
import csv
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch

from kit.text import letters, plain, split_in_half, stands_in


def cache_folder(name):
    """$ICU_CACHE, or ~/.cache/icu; without a home nothing is kept: /dev/null takes no folder."""
    home = re.sub("^~", os.devnull, os.path.expanduser("~/.cache/icu"))
    return Path(os.environ.get("ICU_CACHE") or home, name)


@contextlib.contextmanager
def reading(place):
    """Whatever goes wrong inside becomes a ValueError that begins with the place: file and line."""
    try:
        yield
    except Exception as error:
        missing = isinstance(error, OSError) and error.strerror  # its path is `place`
        raise ValueError(f"{place}: {missing.lower() if missing else error}") from error


def check_outputs(paths, *, overwrite=False, reads=()):
    """ValueError for a path that exists (but to `overwrite`), is named twice, or is read."""
    taken = {Path(path).resolve() for path in reads if path}
    for path in map(Path, filter(None, paths)):
        if path.is_dir() or path.is_symlink():
            problem = "is a folder or a link: name a file"
        elif path.resolve() in taken:
            problem = "is read or written by this command already: name another file"
        elif path.exists() and not overwrite:
            problem = "exists already: pass --overwrite to replace it"
        else:
            taken.add(path.resolve())
            continue
        raise ValueError(f"{path} {problem}")


def write_atomically(path, write):
    """Call `write(file)` on a temporary file and rename it to `path`: nobody sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path, content):
    write_atomically(path, lambda file: file.write(content))


def write_json(path, value):
    write_bytes(path, json_bytes(value, indent=2))


def write_jsonl(path, rows):
    write_atomically(path, lambda file: file.writelines(json_bytes(row) for row in rows))


def json_bytes(value, indent=None):
    """A value as a line of JSON in UTF-8, characters as they are."""
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()


def read_text(path):
    """A file or a gzip, as text without a byte order mark. ValueError: missing, or not UTF-8."""
    with reading(path):
        content = Path(path).read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    parquet = 'but parquet: pandas.read_parquet(FILE).to_json(OUT, orient="records", lines=True)'
    way_out = parquet if content[:4] == b"PAR1" else "save it as UTF-8"
    with reading(f"{path}: not UTF-8, {way_out}"):
        return content.decode("utf-8-sig")


def read_json(path):
    text = read_text(path)
    with reading(f"{path}: not JSON"):
        return json.loads(text)


def read_jsonl(path):
    return [row for _, row in numbered_jsonl(path)]


def numbered_jsonl(path):
    """Yields (line number from 1, dict) of a JSON lines file; blank lines are skipped."""
    # Not splitlines(): U+2028 and its like may stand inside a JSON string.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            with reading(f"{path} line {number}: not a JSON object"):
                row = dict(**json.loads(line, object_pairs_hook=once))
            yield number, row


def once(fields):
    row = dict(fields)
    if len(row) < len(fields):
        raise ValueError(f"a field twice: {', '.join(name for name, _ in fields)}")
    return row


def numbered_csv(path):
    """Yields (number of its last line, dict) of a CSV file's rows; no blank ones.

    The header has most of the sign that parts fields: comma, semicolon or tab.
    """
    csv.field_size_limit(2**31 - 1)  # the default stops at a field of 128 kB
    text = read_text(path)
    sign = max(",;\t", key=text.partition("\n")[0].count)
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=sign)
    while True:
        with reading(f"{path} line {max(rows.line_num, 1) + 1}"):
            row = next(rows, None)
            if row is None:
                return
            problem = None
            if None in row or None in row.values():
                problem = f"not the header's {len(rows.fieldnames)} columns: a comma needs quotes"
            elif len({*filter(None, rows.fieldnames)}) < sum(map(bool, rows.fieldnames)):
                problem = "a column stands twice in the header"
            elif [value.strip("\ufeff") for value in row.values()] == [*row]:
                problem = "the header again: take it out"
            if problem:
                raise ValueError(problem)
        if any(row.values()):
            yield rows.line_num, row


def chunks(items, size):
    """A list in pieces of `size`, the last one shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value):
    """sha256 of a value as sorted JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- records ---

PARTS = ("context", "prefix", "suffix")  # of a record; prefix + suffix is its text


def text_of(record):
    """The text without its context: what is compared and marked."""
    return record["prefix"] + record["suffix"]


def said_of(record):
    """What is embedded: the text, of messages their contents alone."""
    return record.get("said") or text_of(record)


def make_record(row, number, render):
    """A record of one row of the user's; `number`: its default id."""
    prefix, suffix, text = (row.get(name) for name in ("prefix", "suffix", "text"))
    record = {"id": str(row.get("id", number)), "context": row.get("context") or ""}
    if isinstance(prefix, str) and isinstance(suffix, str):
        record |= {"prefix": prefix, "suffix": suffix}
    elif isinstance(text, str):
        record |= dict(zip(PARTS[1:], split_in_half(text), strict=True))
    elif messages := messages_of(row):
        record |= {"context": ""} | render(messages)
    else:
        names = ", ".join(row)
        kinds = "`prefix` and `suffix`, `question` and `answer`, or `messages`"
        raise ValueError(f"needs a `text`, {kinds}; it has: {names}")
    return record | read_spans(row, record)


def rows_once(path, numbered, make):
    """[make(row, its number from 0)] of a file's (line, row); no two have the same id."""
    rows, lines = [], {}
    for line, row in numbered:
        with reading(f"{path} line {line}"):
            rows.append(make(row, len(rows)))
            id = rows[-1]["id"]
            if id in lines:
                raise ValueError(f"id {id!r} stands on line {lines[id]} already")
            lines[id] = line
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def read_records(path, *, tokenizer=None, render=None):
    """Records {id, context, prefix, suffix} of a .csv, .jsonl or, with a tokenizer, .npy file.

    Rows have a `text` (split in half), a `prefix` and a `suffix`, or messages (`messages_of`;
    render: a `renderer`). They may have `id` (default: the row number from 0), `context`, and
    `spans` or `secrets` (`read_spans`). A .npy holds token ids (N, T), which its records keep as
    context_ids, prefix_ids and suffix_ids.
    """
    if tokenizer is None or Path(path).suffix.lower() != ".npy":
        make = functools.partial(make_record, render=render or renderer(None))
        return rows_once(path, numbered_rows(path), make)
    ids = load_ids(path)  # (N, T)
    context, prefix, suffix = np.split(ids, [0, ids.shape[1] // 2], axis=1)
    return ids_records(context, prefix, suffix, tokenizer=tokenizer, where=path)


def numbered_rows(path):
    """(line, dict) of a .csv or .tsv file, zipped or not; any other is JSON lines."""
    is_csv = str(path).lower().removesuffix(".gz").endswith((".csv", ".tsv"))
    return (numbered_csv if is_csv else numbered_jsonl)(path)


def load_ids(path):
    """An array (N, T) of integers from a .npy file."""
    with reading(f"{path}: not a table of token ids"):
        ids = np.load(path, mmap_mode="r", allow_pickle=False)  # a pickle can run code
        _rows, _tokens = ids.shape
        return ids.astype(np.int64, casting="same_kind", copy=False)


def ids_records(context, prefix, suffix, *, tokenizer, where):
    """Records of token ids, an array of N rows a part; the id is the row number."""
    records = [{"id": str(number)} for number in range(len(prefix))]
    for part, ids in zip(PARTS, (context, prefix, suffix), strict=True):
        foreign = (ids < 0) | (ids >= len(tokenizer))
        if foreign.any():
            row, token = np.argwhere(foreign)[0, 0], ids[foreign][0]
            raise ValueError(f"{where} row {row}: token id {token} is none of the tokenizer's")
        for record, row in zip(records, ids.tolist(), strict=True):
            record[part], record[f"{part}_ids"] = as_text(tokenizer, row), row
    for record in records:  # the ids may be cut inside a character, its text is not
        ids = record["prefix_ids"] + record["suffix_ids"]
        text, ends = as_text(tokenizer, ids), [0, *token_ends(tokenizer, ids)]
        at = ends[len(record["prefix_ids"])]
        record["prefix"], record["suffix"] = text[:at], text[at:]
    return records


def read_texts(path):
    """The `text` column of a CSV or JSONL file, blank ones left out."""
    rows = list(numbered_rows(path))
    with reading(f"{path}: no column of this name"):
        return [row["text"] for _, row in rows if row["text"].strip()]


def read_unseen(path, **options):
    """`read_records` as pairs, each its own learn partner: only measured."""
    records = read_records(path, **options)
    return [record | {f"learn_{name}": record[name] for name in record} for record in records]


# --- questions and messages ---

TEMPLATES = "chat", "plain"  # the tokenizer's own; TOFU's (2401.06121)
PLAIN = (
    "{% for message in messages %}"
    "{{ {'user': 'Question: ', 'assistant': 'Answer: '}.get(message.role, '') }}"
    "{{ message.content + '\\n' }}{% endfor %}{{ 'Answer:' if add_generation_prompt }}"
)


def conversation(question, answer, system=""):
    texts = {"system": system, "user": question, "assistant": answer}
    return [{"role": role, "content": text} for role, text in texts.items() if text]


def messages_of(row):
    """Of a row: its `messages` (in CSV as JSON), or `question`, `answer` and perhaps `system`."""
    if {"question", "answer"} <= row.keys():
        return conversation(row["question"], row["answer"], row.get("system"))
    messages = row.get("messages")
    return json.loads(messages) if isinstance(messages, str) else messages


def render(tokenizer, messages, template="chat"):
    """{"prefix", "suffix", "said", "template"} of a conversation whose last message is the answer.

    prefix + suffix: what `apply_chat_template` writes, less white space at its end. suffix: the
    answer and its end of turn, or else EOS. said: the contents alone.
    """
    if not tokenizer:
        raise ValueError("a question is read as its model reads it: pass --model DIR")
    if template == "chat" and not tokenizer.chat_template:
        raise ValueError(f"{tokenizer.name_or_path} has no chat template: pass --template plain")
    write = functools.partial(
        tokenizer.apply_chat_template,
        chat_template=PLAIN if template == "plain" else None,
        tokenize=False,
        date_string="10 Apr 2025",  # Llama 3's has today's; open-unlearning this
    )
    with reading("the last message is not an assistant's answer as the template writes it"):
        *before, last = messages
        answer = {"assistant": last["content"].strip()}[last["role"]]
        text = write([*before, last | {"content": answer}])
        asked = os.path.commonprefix([write(before, add_generation_prompt=True), text])
        at = text.index(answer, len(asked))
    if not text[len(asked) : at].strip():
        at = len(asked)  # the space in "Answer: yes" is the model's
    text = text.rstrip()
    text += (tokenizer.eos_token or "") if text.endswith(answer) else ""
    return {
        "prefix": text[:at],
        "suffix": text[at:],
        "said": "\n".join(message["content"] for message in messages),
        "template": template_mark(tokenizer, template),
    }


def renderer(tokenizer, pairs=()):
    """`render` by the template of these pairs."""
    marks = (pair["template"] for pair in pairs if "template" in pair)
    return functools.partial(render, tokenizer, template=next(marks, "chat").split()[0])


def template_mark(tokenizer, template):
    own = [template, tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token]
    return f"{template} {digest(own)[:12]}"


def check_template(tokenizer, mark, where):
    if mark and mark != template_mark(tokenizer, mark.split()[0]):
        raise ValueError(f"{where}: by another chat template: pass --model DIR to knn.py")


# --- pairs.jsonl ---


def read_pairs(path):
    """The lines of a pairs.jsonl as dicts, checked."""
    return rows_once(path, numbered_jsonl(path), check_pair)


def check_pair(pair, _):
    rows = [(pair, ""), *((row, "learn_") for row in [pair, *pair.get("further", [])])]
    for row, side in rows:
        names = [*(f"{side}{name}" for name in ("id", *PARTS)), "similarity"]
        if missing := [name for name in names if name not in row]:
            raise ValueError(f"no {', '.join(missing)}: not a line of pairs.jsonl of knn.py's")
    if "spans" in pair:
        check_spans(pair["spans"], text_of(pair))
    return pair


# --- spans: the parts of a text that are to be forgotten ---
# A record's `spans` are [start, end) in the characters of prefix + suffix. A token that overlaps a
# span is secret; the other tokens of the text are kept by a KL to the frozen copy, as Eq. 4's.


def read_spans(row, record):
    """{"spans": [[start, end], ...]} of a user's row, in order, or {} where it marks nothing.

    It has `spans`, which in an answer count from its suffix, or `secrets`, strings that occur once
    in the text: a list, or in CSV one string with | between.
    """
    spans, secrets, text = row.get("spans") or [], row.get("secrets") or [], text_of(record)
    if "template" in record:
        spans = [[len(record["prefix"]) + place for place in span] for span in spans]
    secrets = filter(None, secrets.split("|") if isinstance(secrets, str) else secrets)
    spans = [*spans, *(find_secret(secret, text) for secret in secrets)]
    return {"spans": check_spans(spans, text)} if spans else {}


def find_secret(secret, text):
    """[start, end) of a string that must occur in the text once."""
    start = text.find(secret)
    if start < 0 or start != text.rfind(secret):
        times = "does not occur in the text" if start < 0 else "occurs twice: mark it by `spans`"
        raise ValueError(f"the secret {secret[:40]!r} {times}")
    return [start, start + len(secret)]


def check_spans(spans, text):
    """The spans in order; ValueError unless they lie inside the text, apart."""
    with reading("`spans` is a list of [start, end)"):
        spans = sorted([start, end] for start, end in spans)
    places = [0, *itertools.chain.from_iterable(spans), len(text)]
    if places != sorted(places) or any(start == end for start, end in spans):
        room = f"the text of {len(text)} characters"
        raise ValueError(f"the spans {spans} are not [start, end) inside {room}, or overlap")
    return spans


def as_text(tokenizer, ids):
    """What ids say, with special tokens."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def token_ends(tokenizer, ids):
    """Where in `as_text` of all ids each token ends.

    The tokens of one character end where it does; it is spelled once the last of them is there.
    """
    ends, first, fresh, known = [], 0, 0, 0  # the text of ids[:fresh] is `known` characters long
    for i in range(1, len(ids) + 1):
        # From a token before, since some tokenizers leave out the space before the first.
        head = as_text(tokenizer, ids[first:i])
        ends.append(known + len(head) - len(as_text(tokenizer, ids[first:fresh])))
        if not head.endswith("\ufffd") or i - fresh == 64:  # no character has as many tokens
            first, fresh, known = fresh, i, ends[-1]
    return [*itertools.accumulate(reversed(ends), min)][::-1]


def span_positions(pair, tokenizer, ids, where):
    """The positions of the tokens that overlap a span of the pair, in order, or None.

    `ids` end with the pair's prefix and suffix. Position 0 is never predicted, so it is none.
    """
    if not pair.get("spans"):
        return None
    ends, text = token_ends(tokenizer, ids), text_of(pair)
    if not as_text(tokenizer, ids).endswith(text):
        raise ValueError(f"{where}: a tokenizer that changes its text, so no span can be found")
    starts = [min(start, end - 1) for start, end in zip([0, *ends], ends, strict=False)]
    shift, positions = ends[-1] - len(text), set()
    for low, high in pair["spans"]:
        # Both lists rise: the first token that ends after `low`, and the last that starts before.
        first = max(bisect.bisect_right(ends, low + shift), 1)
        inside = range(first, bisect.bisect_left(starts, high + shift))
        if not inside:
            raise ValueError(f"{where}: span {[low, high]} holds no token that the model predicts")
        positions.update(inside)
    return tuple(sorted(positions))


def rest_of(text):
    """The predicted positions of a marked text that are not secret."""
    return tuple(sorted(set(range(max(text.t0, 1), len(text.ids))) - set(text.span_positions)))


def span_parts(samples):
    """For each sample None or, where a part is marked, (its positions, `rest_of`)."""
    return [
        sample.forget.span_positions and (sample.forget.span_positions, rest_of(sample.forget))
        for sample in samples
    ]


def kept_side(samples):
    """{"kept": what is kept of each sample's text} where one is marked, or {}: KL's other side."""
    texts = [sample.forget for sample in samples]
    if not any(text.span_positions for text in texts):
        return {}
    kept = [
        [text._replace(span_positions=rest_of(text))] if text.span_positions else []
        for text in texts
    ]
    return {"kept": kept}


def marked(pair):
    """The strings that the spans of a record mark."""
    return [text_of(pair)[start:end] for start, end in pair.get("spans", ())]


def secrets_of(pair, suffix):
    """(its part in the prompt, in the suffix) of marked strings that the prompt does not say."""
    text, secrets = text_of(pair), []
    cut = len(text) - len(suffix)
    for start, end in pair.get("spans", ()):
        at = max(start, cut)
        head, tail = text[start:at], text[at:end]
        if head + tail not in text[:cut] and letters(plain(head)) != letters(plain(head + tail)):
            secrets.append((head, tail))
    return tuple(secrets)


def says(text, secret):
    """Whether a text says a secret, in whatever case, accents, spaces or signs."""
    return stands_in(letters(plain(secret)), plain(text), letters(plain(text)))


def secret_said(sample, generation):
    """{"secret_said": 1.0 if a generation says a secret of its sample, or the rest of one that the
    prompt begins, else 0.0, or None}."""
    if not sample.secrets:
        return {"secret_said": None}
    ways = [each for head, tail in sample.secrets for each in (("", tail), (head, head + tail))]
    return {"secret_said": float(any(says(begin + generation, part) for begin, part in ways))}


# --- downloads ---

GITHUB = "https://raw.githubusercontent.com"
PILE_URL = f"{GITHUB}/ethz-spylab/lm-extraction-benchmark-data/main/datasets"
EVAL_URL = f"{GITHUB}/joeljang/knowledge-unlearning/main/validation_data"
# fmt: off
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
# fmt: on
FILES = {name: (f"{PILE_URL}/{name}", sha256) for name, sha256 in PILE_FILES.items()}
FILES |= {name: (f"{EVAL_URL}/{name}", sha256) for name, sha256 in EVAL_FILES.items()}

SUBFOLDERS = ("", "pile-extraction", "validation", "tasks")  # of --data DIR


def data_file(name, data_dir=None):
    """Path of one of FILES, in `data_dir`, its subfolders or the cache, fetched if need be."""
    url, sha256 = FILES[name]
    for folder in SUBFOLDERS if data_dir else ():
        path = Path(data_dir, folder, name)
        if path.is_file():
            if sha256_of(path) != sha256:
                raise ValueError(f"{path}: another file is expected (sha256): replace or remove it")
            return path
    path = cache_folder("data") / name
    if not path.is_file() or sha256_of(path) != sha256:
        fetch(url, path, sha256)
    return path


def fetch(url, path, sha256):
    with reading(f"{url} is not fetched, try again or pass --data DIR with {path.name} in it"):
        path.parent.mkdir(parents=True, exist_ok=True)
        bar = sys.stderr.isatty()
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=bar)


def perplexity_file(item, data_dir):
    """The file of a --ppl NAME=FILE, or of a NAME that is fetched."""
    name, _, file = item.partition("=")
    if item == name and f"{name}.csv" in FILES:
        return data_file(f"{name}.csv", data_dir)
    if not (name and file):
        raise ValueError(f"--ppl {item}: say NAME=FILE; only pile and wikitext are known by name")
    return file
