"""The world that tests run in: a tiny model that knows a few records by heart, their pairs, and a finished run.

conftest.py makes it once a session (fixture `world`); a test that changes something takes a copy.
"""

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
    """Writes model/ and pairs.jsonl to `folder`; returns the flags of a run of three epochs, without --out.

    Eq. 5 takes out the STRANGERS after the first epoch, and steps are so small that the other samples stay, word by
    word. Nothing here leans on where larger steps would lead, which is another place on another processor.
    """
    model_dir, pairs = folder / "model", folder / "pairs.jsonl"
    side = {
        "learn_id": "p",
        "learn_context": "",
        "learn_prefix": LEARN[0],
        "learn_suffix": LEARN[1],
        "similarity": 0.5,
    }
    fields = [
        {"id": str(i), "context": "", "prefix": a, "suffix": b}
        for i, (a, b) in enumerate(TEXTS[:rows])
    ]
    data.write_jsonl(pairs, [row | side for row in fields])
    if not model_dir.exists():
        conftest._save_tiny(kind, model_dir, **config)
        memorise(
            model_dir, [pair for i, pair in enumerate(data.read_pairs(pairs)) if i not in STRANGERS]
        )
    flags = [
        "--pairs",
        pairs,
        "--model",
        model_dir,
        "--bert",
        "minilm",
        "--device",
        "cpu",
        "--lr",
        "2e-4",
    ]
    flags += ["--batch-size", "2", "--max-epochs", "3", "--thresholds", "1e-9,1e-9", "--seed", "7"]
    return [str(flag) for flag in [*flags, "--bert-threshold", "0.9", "--bleu-threshold", "2"]]


def make_requests(folder, **how):
    """The same for a second request, rows 3 and 4, part of each marked, that goes on from a run over the other three.

    That run forgot all its texts, by thresholds that all meet. So those that the model still knows are back at once,
    and the last of them leaves again when `watched` measures it as -1.
    """
    flags, out = make_inputs(folder, **how), folder / "first"
    pairs, mine = data.read_pairs(folder / "pairs.jsonl"), {"3": "555-0142", "4": "first day"}
    for row in (row for row in pairs if row["id"] in mine):
        at = (row["prefix"] + row["suffix"]).index(mine[row["id"]])
        row["spans"] = [[at, at + len(mine[row["id"]])]]
    for name, share in (("first", pairs[:3]), ("second", pairs[3:])):
        data.write_jsonl(folder / f"{name}.jsonl", share)
    where = [
        "--pairs",
        str(folder / "first.jsonl"),
        "--out",
        str(out),
        "--max-epochs",
        "1",
        "--bert-threshold",
        "2",
    ]
    if not (out / "summary.json").is_file():
        icu.main(argv=[*flags, *where, "--overwrite"])
    at = flags.index("--model")
    flags[at : at + 2] = ["--after", str(out)]
    return [*flags, "--pairs", str(folder / "second.jsonl")]


def memorise(model_dir, pairs, steps=100):
    """Trains the model on the pairs until it knows their suffixes."""
    model, tokenizer = models.load_model(str(model_dir))
    samples, _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)
    ids, attention_mask, target_mask = icu.collate([sample.forget for sample in samples])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(ids, attention_mask=attention_mask).logits[:, :-1][target_mask[:, 1:]]
        F.cross_entropy(logits, ids[target_mask]).backward()
        optimizer.step()
    model.save_pretrained(model_dir)


def make_world(folder):
    """Everything that a finished run is made of and leaves, in `folder`:

    pairs.jsonl (5 pairs), heldout.jsonl (2 texts), unseen.jsonl (3 records), model/ (knows 3 of the 5), never/ (the
    same model, random), and two runs: never-saw/ (--eval-only of never/) and run/ (ICU, two epochs, with perplexity).
    """
    flags = make_inputs(folder)
    data.write_jsonl(
        folder / "heldout.jsonl",
        [{"text": "The driver said that nothing was missing."}, {"text": LEARN[0]}],
    )
    unseen = [
        (f"A letter for number {n} was sent", " by the old clinic on the hill.") for n in (3, 5, 7)
    ]
    data.write_jsonl(
        folder / "unseen.jsonl",
        [{"id": f"u{i}", "prefix": a, "suffix": b} for i, (a, b) in enumerate(unseen)],
    )
    conftest._save_tiny("gpt_neo", folder / "never")
    flags += ["--ppl", f"heldout={folder / 'heldout.jsonl'}", "--max-epochs", "2"]
    icu.main(
        argv=[
            *flags,
            "--model",
            str(folder / "never"),
            "--eval-only",
            "--out",
            str(folder / "never-saw"),
        ]
    )
    icu.main(argv=[*flags, "--out", str(folder / "run")])
    return SimpleNamespace(
        root=folder,
        run=folder / "run",
        never_saw=folder / "never-saw",
        pairs=folder / "pairs.jsonl",
        model=folder / "model",
        never=folder / "never",
        flags=flags,
    )


def copy_of(world, folder):
    """The same world at another place, its runs naming the files there: a test may change it."""
    shutil.copytree(world.root, folder)
    for file in folder.glob("*/config.json"):
        file.write_text(file.read_text().replace(str(world.root), str(folder)))
    moved = {
        name: Path(str(folder) + str(value).removeprefix(str(world.root)))
        for name, value in vars(world).items()
        if name != "flags"
    }
    return SimpleNamespace(
        **moved, flags=[flag.replace(str(world.root), str(folder)) for flag in world.flags]
    )
