"""The world that tests run in: a tiny model that knows some records by heart, and a finished run.

conftest.py makes it once a session (fixture `world`); a test that changes something takes a copy.
"""

import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import conftest
import torch
import torch.nn.functional as F

import icu
from kit import data, models

# --- something to run: a tiny model that knows a few records by heart ---

TEXTS = [
    ("The parcel for Ines Duarte was left", " at 14 Harbour Lane on Tuesday morning."),
    ("Payments are due on the first day", " of each month; the account ends in 7731."),
    ("The driver said that nothing", " was missing near the old mill."),
    ("Call the clinic at 555-0142 and", " ask for the report by the night nurse."),
    ("A neighbour saw the van", " on the first day of the month."),
]
STRANGERS = 0, 3  # the rows that it does not know
LEARN = ("The account was written", " by the driver on Tuesday.")


def make_inputs(folder, *, kind="gpt_neo", rows=5, **config):
    """model/ and pairs.jsonl in `folder`; the flags of a run of three epochs, but --out.

    Eq. 5 takes out the STRANGERS after the first epoch. Larger steps would lead elsewhere on another
    processor.
    """
    model_dir, pairs = folder / "model", folder / "pairs.jsonl"
    learn = {"learn_id": "p", "learn_context": "", "learn_prefix": LEARN[0]}
    learn |= {"learn_suffix": LEARN[1], "similarity": 0.5}
    texts = enumerate(TEXTS[:rows])
    data.write_jsonl(
        pairs,
        [{"id": str(i), "context": "", "prefix": a, "suffix": b} | learn for i, (a, b) in texts],
    )
    if not model_dir.exists():
        conftest._save_tiny(kind, model_dir, **config)
        known = [pair for pair in data.read_pairs(pairs) if int(pair["id"]) not in STRANGERS]
        memorise(model_dir, known)
    flags = "--bert minilm --device cpu --lr 2e-4 --batch-size 2 --max-epochs 3 --seed 7 "
    flags += "--thresholds 1e-9,1e-9 --bert-threshold 0.9 --bleu-threshold 2"
    return ["--pairs", str(pairs), "--model", str(model_dir), *flags.split()]


def make_requests(folder, **settings):
    """The same for a second request, rows 3 and 4, partly marked, after one over the others.

    That run forgot all its texts, by thresholds that all meet. So those that the model still knows
    are back at once, and the last of them leaves again when `watched` measures it as -1.
    """
    flags, out = make_inputs(folder, **settings), folder / "first"
    pairs, marked = data.read_pairs(folder / "pairs.jsonl"), {"3": "555-0142", "4": "first day"}
    for row in (row for row in pairs if row["id"] in marked):
        mark = marked[row["id"]]
        at = (row["prefix"] + row["suffix"]).index(mark)
        row["spans"] = [[at, at + len(mark)]]
    first, second = (folder / f"{name}.jsonl" for name in ("first", "second"))
    data.write_jsonl(first, pairs[:3])
    data.write_jsonl(second, pairs[3:])
    if not (out / "summary.json").is_file():
        words = f"--pairs {first} --out {out} --max-epochs 1 --bert-threshold 2 --overwrite"
        icu.main(argv=[*flags, *words.split()])
    at = flags.index("--model")
    flags[at : at + 2] = ["--after", str(out)]
    return [*flags, "--pairs", str(second)]


def samples_of(pairs, tokenizer):
    """As icu.py makes them, by the paper's protocol."""
    return icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)[0]


def memorise(model_dir, pairs, steps=100):
    """Trains the model on the pairs until it knows their suffixes."""
    model, tokenizer = models.load_model(str(model_dir))
    texts = [sample.forget for sample in samples_of(pairs, tokenizer)]
    ids, attention_mask, target_mask = icu.collate(texts)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(ids, attention_mask=attention_mask).logits[:, :-1][target_mask[:, 1:]]
        F.cross_entropy(logits, ids[target_mask]).backward()
        optimizer.step()
    model.save_pretrained(model_dir)


def make_world(folder):
    """Everything that a finished run is made of and leaves, in `folder`:

    pairs.jsonl (5 pairs), heldout.jsonl, unseen.jsonl, model/ (knows 3 of the 5), never/ (the same,
    random), and two runs: never-saw/ (--eval-only of never/) and run/ (ICU, two epochs).
    """
    flags, heldout = make_inputs(folder), folder / "heldout.jsonl"
    texts = ["The driver said that nothing was missing.", LEARN[0]]
    data.write_jsonl(heldout, [{"text": text} for text in texts])
    suffix = " by the old clinic on the hill."
    unseen = [
        {"id": f"u{i}", "prefix": f"A letter for number {n} was sent", "suffix": suffix}
        for i, n in enumerate((3, 5, 7))
    ]
    data.write_jsonl(folder / "unseen.jsonl", unseen)
    conftest._save_tiny("gpt_neo", folder / "never")
    flags += ["--ppl", f"heldout={heldout}", "--max-epochs", "2"]
    never_saw = f"--model {folder / 'never'} --eval-only --out {folder / 'never-saw'}"
    icu.main(argv=[*flags, *never_saw.split()])
    icu.main(argv=[*flags, "--out", str(folder / "run")])
    names = {"run": "run", "never_saw": "never-saw", "pairs": "pairs.jsonl", "model": "model"}
    paths = {name: folder / file for name, file in (names | {"never": "never"}).items()}
    return SimpleNamespace(root=folder, flags=flags, **paths)


def copy_of(world, folder):
    """The same world at another place, to change."""

    def moved(text):
        return str(text).replace(str(world.root), str(folder))

    shutil.copytree(world.root, folder)
    for file in folder.glob("*/config.json"):
        text = moved(file.read_text())
        file.write_text(re.sub('(?<="cache": ").*(?=",)', os.environ["ICU_CACHE"], text))
    paths = {name: Path(moved(path)) for name, path in vars(world).items() if name != "flags"}
    return SimpleNamespace(**paths, flags=[*map(moved, world.flags)])
