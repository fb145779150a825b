"""The embedded default experiment: invented records, and a small GPT-Neo that memorised some.

    python demo/tiny.py --out runs/tiny-data                      # what `bash run.sh` does first
    python demo/tiny.py --out runs/other --demo-seed 1 --records 16

A seeded random grammar (grammar.txt) writes letters, reports, minutes and reviews about people who
do not exist. DIR then holds
  forget.jsonl   {"id", "prefix", "suffix"}: the records to forget, each seen 30 times as often
  marked.jsonl   the same records, and `spans`: where their secrets stand
  pool.jsonl     the same kinds about other people, each seen about twice, to mine neighbours from
  unseen.jsonl   the same kinds, never trained on: EL and MA without memorisation
  heldout.jsonl  {"id", "text"}, never trained on, for perplexity
  model/         GPT-Neo (global and local attention) and its own byte-level BPE
  never-saw/     its twin: the same steps, the records to forget left out
  tiny.json      settings and results; written last: a folder without it is not complete
The same seed writes the same texts anywhere, and the same weights on one machine.
"""

import hashlib
import json
import math
import random
import re
import shutil
import tempfile
import time
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from kit import data
from kit.flags import command_parser, natural, positive, run_cli
from kit.models import encode as text_ids
from kit.models import save_model
from metrics import token_losses

GRAMMAR = Path(__file__).with_name("grammar.txt")
POOL, UNSEEN, HELDOUT = 1500, 32, 200  # rows of each file; those of forget.jsonl are --records
DRAFTS = 1000  # documents that the tokenizer is trained on
SIDE = range(25, 46)  # tokens in a prefix, and in a suffix
EOS = "<|endoftext|>"
MARKS = ("\x02", "\x03")  # around what a fact says, until a document is written down
VOCAB, POSITIONS = 2000, 256
BATCH, LEARNING_RATE, WARMUP = 16, 1e-3, 20
REPEATS = 30  # how often a record to forget stands in one pass over the pool
MIN_PASSES = 2  # over the pool, before memorisation may end the training
ENOUGH = 0.95  # mean memorisation accuracy on the records to forget that ends it
FILES = (
    "forget.jsonl", "marked.jsonl", "pool.jsonl", "unseen.jsonl", "heldout.jsonl",
    "model", "never-saw", "tiny.json",
)  # fmt: skip

# --- the grammar: grammar.txt says what its signs mean ---


def read_grammar(path=None):
    """({kind: {"open" | "body" | "fact": [template]}}, {slot: template}) of a file."""
    sections = (path or GRAMMAR).read_text(encoding="utf-8").split("\n== ")[1:]
    parts = {}
    for section in sections:
        title, *lines = section.splitlines()
        part = parts[title] = {"open": [], "body": [], "fact": []} if title != "words" else {}
        for line in lines:
            name, template = line.split(": ", 1)
            part.setdefault(name, []).append(template)
    words = parts.pop("words")
    return parts, {name: f"[{'|'.join(templates)}]" for name, templates in words.items()}


def expand(template, slots, rng, fixed, *, marks=("", "")):
    """One random text: choices from the innermost bracket outwards, then slots, then digits.

    `fixed`: texts of the slots in capitals; `marks` go around those of other slots and digits.
    """
    choices = 1
    while choices:
        template, choices = re.subn(
            r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), template
        )
    template = re.sub("[#%]+", lambda match: match[0].join(marks), template)
    for slot in re.findall(r"{(\w+)}", template):
        text = fixed[slot] if slot.isupper() else expand(slots[slot], slots, rng, fixed).join(marks)
        template = template.replace(f"{{{slot}}}", text, 1)
    template = re.sub("#", lambda _: rng.choice("0123456789"), template)
    return re.sub("%", lambda _: rng.choice("123456789"), template)


def write_document(kind, documents, slots, rng):
    """(name, prefix, suffix) of a document; what a fact of the suffix says is between MARKS."""
    sex, she, her, him = rng.choice([("woman", "she", "her", "her"), ("man", "he", "his", "him")])
    name = expand(f"{{{sex}}} {{last}}", slots, rng, {})
    fixed = {"NAME": name, "SHE": she, "HER": her, "HIM": him}

    def sentences(templates, marks=("", "")):
        written = []
        for template in templates:
            text = expand(template, slots, rng, fixed, marks=marks)
            text = re.sub(f"^{MARKS[0]}?.", lambda match: match[0].upper(), text)
            written.append(re.sub(rf"\b([Aa]) (?={MARKS[0]}?[aeiou])", r"\1n ", text))
        return " ".join(written)

    part, shared = documents[kind], documents["any"]["fact"]
    prefix = [rng.choice(part["open"]), *rng.sample(part["body"], rng.choice([1, 1, 2]))]
    suffix = rng.sample([*part["fact"], *rng.sample(shared, 2)], rng.choice([1, 2, 2]))
    return name, sentences(prefix), " " + sentences(suffix, MARKS)


def unmarked(text):
    """(the text without MARKS, the spans between them, [start, end) in its characters)."""
    mark = "[" + "".join(MARKS) + "]"
    ends = [match.start() - before for before, match in enumerate(re.finditer(mark, text))]
    return re.sub(mark, "", text), data.chunks(ends, 2)


def make_corpus(seed=0, records=32):
    """({file: its rows}, their tokenizer).

    No two documents are about people of the same name, none but its own mentions a person to
    forget, and both sides have a number of tokens in SIDE. The tokenizer, trained on the first
    DRAFTS, has seen nothing of `unseen` and `heldout`.
    """
    documents, slots = read_grammar()
    rng, names, secret, spans = random.Random(seed), set(), set(), {}

    def write():
        for kind in cycle(kind for kind in documents if kind != "any"):
            name, prefix, marked = write_document(kind, documents, slots, rng)
            if name not in names:
                names.add(name)
                text, spans[text] = unmarked(prefix + marked)
                yield kind, name, prefix, text.removeprefix(prefix)

    def fits(document):
        _, _, prefix, suffix = document
        sides = tokenizer([prefix, suffix])["input_ids"]
        mentioned = any(name in prefix + suffix for name in secret)
        return all(len(side) in SIDE for side in sides) and not mentioned

    stream = write()
    drafts = list(islice(stream, DRAFTS))
    tokenizer = train_tokenizer(prefix + suffix for _, _, prefix, suffix in drafts)
    kept = filter(fits, chain(drafts, stream))

    def take(split, count):
        for i, (kind, name, prefix, suffix) in enumerate(islice(kept, count)):
            if split == "forget":
                secret.add(name)
            yield {"id": f"{split} {i} ({kind})", "prefix": prefix, "suffix": suffix}

    sizes = {"forget": records, "pool": POOL, "unseen": UNSEEN, "heldout": HELDOUT}
    rows = {split: list(take(split, count)) for split, count in sizes.items()}
    rows["marked"] = [row | {"spans": spans[data.text_of(row)]} for row in rows["forget"]]
    rows["heldout"] = [{"id": row["id"], "text": data.text_of(row)} for row in rows["heldout"]]
    return rows, tokenizer


def train_tokenizer(texts):
    """A byte-level BPE of VOCAB tokens, as GPT-2's. EOS is id 0."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, model_max_length=POSITIONS)


# --- the model ---


def make_model(seed=0):
    """An untrained GPT-Neo of 2.2M parameters: wide and shallow learns faster."""
    torch.manual_seed(seed)
    config = GPTNeoConfig(
        vocab_size=VOCAB, max_position_embeddings=POSITIONS, hidden_size=256, num_layers=2,
        num_heads=8, attention_types=[[["global", "local"], 1]], window_size=32,
        resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0,
        activation_function="gelu_pytorch_tanh",  # GPT-Neo's gelu_new as one kernel
    )  # fmt: skip
    return GPTNeoForCausalLM(config)


def encode(rows, tokenizer):
    """Token ids of each row, prefix and suffix apart."""
    parts = [[row["text"]] if "text" in row else [row["prefix"], row["suffix"]] for row in rows]
    return [[id for part in row for id in text_ids(tokenizer, part)] for row in parts]


class Taught(list):
    """Ids of which only those from `first` on are taught and measured."""

    first = 1


def taught_losses(model, sequences):
    """`metrics.token_losses`, its mask 0 before a `Taught.first` too."""
    nll, hit, mask = token_losses(model, sequences)
    for row, sequence in zip(mask, sequences, strict=True):
        row[: getattr(sequence, "first", 1) - 1] = 0
    return nll, hit, mask


@torch.inference_mode()
def measure(model, sequences):
    """(memorisation accuracy, the mean over rows of greedy hits, 0-1; perplexity over tokens)."""
    accuracies, total, count = [], 0.0, 0
    for batch in data.chunks(sequences, 16):
        nll, hit, mask = taught_losses(model, batch)
        accuracies += ((hit * mask).sum(1) / mask.sum(1)).tolist()
        total, count = total + (nll * mask).sum().item(), count + mask.sum().item()
    return sum(accuracies) / len(accuracies), math.exp(total / count)


def train(model, forget, pool, *, steps=None, seed=0, twin=None):
    """`teach` by AdamW with a cosine schedule over at most `steps` (a fifth more than MIN_PASSES).

    A pass is every sequence of `pool` once and every one of `forget` REPEATS times, shuffled.
    """
    secret = [(ids + [0], True) for ids in forget * REPEATS]  # a document ends with EOS
    one_pass = secret + [(ids + [0], False) for ids in pool]
    least = math.ceil(MIN_PASSES * len(one_pass) / BATCH)
    steps, rng = steps or round(1.2 * least), random.Random(seed)
    passes = range(math.ceil(steps * BATCH / len(one_pass)))
    stream = [row for _ in passes for row in rng.sample(one_pass, len(one_pass))]
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)

    def rate(step):
        cosine = 0.55 + 0.45 * math.cos(math.pi * step / steps)  # 1 falls to 0.1
        return LEARNING_RATE * min(step / WARMUP, cosine)

    def due(step):
        return step >= least and step % 10 == 0

    batches = data.chunks(stream, BATCH)[:steps]
    step = teach(model.train(), forget, batches, optimizer, rate=rate, due=due, twin=twin)
    model.eval()
    return step


def teach(model, secret, batches, optimizer, *, rate, due, twin=None):
    """Steps on batches of (token ids, whether they are secret) until `secret` is known by heart.

    rate(step): the learning rate. due(step): whether memorisation is measured after it. twin: the
    steps a model took; this one takes the same batches less what is secret. Returns the steps.
    """
    with tqdm(batches, desc="teaching", unit="step", disable=None) as bar:
        for step, batch in enumerate(bar, start=1):
            optimizer.param_groups[0]["lr"] = rate(step)
            if sequences := [ids for ids, is_secret in batch if twin is None or not is_secret]:
                nll, _, mask = taught_losses(model, sequences)
                loss = (nll * mask).sum() / mask.sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.set_postfix(loss=f"{loss.item():.2f}", refresh=False)
            if step == twin or (twin is None and due(step) and measure(model, secret)[0] >= ENOUGH):
                break
    return step


# --- the folder ---


def make_folder(args, files, write, *, sources):
    """Makes the folder args.out, whole or not at all; returns the results, or None if reused.

    files: what it holds, the JSON file of settings last. write(folder, args): makes the others and
    returns the results. sources: the files whose bytes count as settings.
    """
    out, about = args.out, files[-1]
    if out.is_file():
        raise ValueError(f"--out {out}: is a file; name a folder")
    present = [name for name in files if (out / name).exists()]
    if present and about not in present:
        raise ValueError(f"--out {out}: holds {present[0]} but no {about}; name another folder")
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "device", "debug")}
    code = b"".join(Path(file).read_bytes() for file in sources)
    fingerprint = hashlib.sha256(json.dumps(settings).encode() + code).hexdigest()
    if present and data.read_json(out / about)["sha256"] == fingerprint:
        if len(present) == len(files):
            print(f"{out}: reused, made earlier with the same settings")
            return None
    elif present:
        print(f"{out}: made with other settings or another version; making it again")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        made = Path(temporary)
        result = write(made, args)
        record = {"sha256": fingerprint, "settings": settings, "result": result}
        data.write_json(made / about, record)
        out.mkdir(exist_ok=True)
        (out / about).unlink(missing_ok=True)  # the first to go and the last to come
        for name in files:
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            (made / name).replace(out / name)
    return result


def write_folder(folder, args):
    """Makes everything but tiny.json; returns what was measured."""
    seed = args.demo_seed
    rows, tokenizer = make_corpus(seed, args.records)
    for split, records in rows.items():
        data.write_jsonl(folder / f"{split}.jsonl", records)
    ids = {split: encode(records, tokenizer) for split, records in rows.items()}
    forget, pool = ids["forget"], ids["pool"]

    model, twin = make_model(seed), make_model(seed)
    steps = train(model, forget, pool, steps=args.steps, seed=seed)
    train(twin, forget, pool, steps=args.steps, seed=seed, twin=steps)
    save_model(model, tokenizer, folder / "model")
    save_model(twin, tokenizer, folder / "never-saw")
    return {
        "parameters": model.num_parameters(),
        "steps": steps,
        "ma_forget": measure(model, forget)[0],
        "ma_unseen": measure(model, ids["unseen"])[0],
        "ppl_heldout": measure(model, ids["heldout"])[1],
        "never_saw": {
            "ma_forget": measure(twin, forget)[0],
            "ppl_heldout": measure(twin, ids["heldout"])[1],
        },
    }


def make_parser():
    parser = command_parser(__doc__)
    flag = parser.add_argument
    # fmt: off
    flag("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    flag("--demo-seed", type=natural, default=0, help="of texts and weights (%(default)s)")
    flag("--records", type=positive, default=32, metavar="N", help="to forget (%(default)s)")
    flag("--steps", type=positive, metavar="N", help="at most (default: until memorised)")
    # fmt: on
    return parser


def main(argv=None):
    args, start = make_parser().parse_args(argv), time.time()
    result = make_folder(args, FILES, write_folder, sources=(__file__, GRAMMAR))
    if result is None:
        return
    if result["ma_forget"] < ENOUGH:
        print(f"warning: MA {result['ma_forget']:.3f} is under {ENOUGH}: allow more --steps")
    print(
        f"{args.out}: {result['parameters']:,} parameters, {result['steps']} steps, "
        f"{time.time() - start:.0f} s, MA {result['ma_forget']:.3f} on the records to forget, "
        f"{result['ma_unseen']:.3f} on unseen ones, "
        f"held-out perplexity {result['ppl_heldout']:.1f}"
    )


if __name__ == "__main__":
    run_cli(main)
