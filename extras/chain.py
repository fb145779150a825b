"""Requests one after another: watched, not watched, all at once; what comes back, and the steps.

    python extras/chain.py --forget D/forget.jsonl --pool D/pool.jsonl --model D/model --parts 4 \\
        --out runs/chain --targets all --batch-size 8 --lr 2e-4 --alpha 1     # D: runs/tiny-data

After each request all texts so far are measured: by the run itself where it watched them, else by
one more (icu.py --eval-only). The folder keeps the runs, table.md and came-back.png. Other flags
go to icu.py.
"""

import random
import sys
from pathlib import Path

from evals import report
from experiment import PYTHON, run
from kit import data, figures, flags
from kit.requests import name_of
from kit.runs import mean

VARIANTS = {"watched": "--watch", "not watched": "--no-watch"}


def step(script, *words):
    if status := run([PYTHON, script, *map(str, words)]):
        sys.exit(status)


def train(args, out, pairs, *words):
    """A run in `out`, or the one that is there."""
    if not (out / "summary.json").is_file():
        step(args.script, "--pairs", pairs, "--out", out, "--overwrite", *args.flags, *words)
    return out


def mine(args, folder):
    """Writes the pairs of each request, and of all up to it; returns the ids of each request."""
    file = folder / "all.pairs.jsonl"
    step("knn.py", "--forget", args.forget, "--pool", args.pool, "--out", file, "--overwrite")
    pairs = data.read_pairs(file)
    if args.order is not None:
        random.Random(args.order).shuffle(pairs)
    size = -(-len(pairs) // args.parts)
    parts = data.chunks(pairs, size)
    for number, part in enumerate(parts, start=1):
        data.write_jsonl(folder / f"request{number}.pairs.jsonl", part)
        data.write_jsonl(folder / f"upto{number}.pairs.jsonl", pairs[: number * size])
    return [[pair["id"] for pair in part] for part in parts]


def follow(args, folder, requests):
    """A row a run: {"variant", "request", "steps", "by request": MA of each so far, measures}."""
    rows = []
    for variant, flag in VARIANTS.items():
        made = []
        for number in range(1, len(requests) + 1):
            # The first request has nothing to watch: one run for both variants.
            name = f"{variant.replace(' ', '-')}{number}" if made else "first"
            words = ["--after", made[-1], flag] if made else ["--model", args.model]
            made.append(train(args, folder / name, folder / f"request{number}.pairs.jsonl", *words))
            run, ids, steps = made[-1], requests[:number], sum(map(steps_of, made))
            if variant == "watched":  # its own rows, named by the request
                names = [name_of(old, data.read_json(old / "config.json")) for old in made[:-1]]
                earlier = zip(names, ids[:-1], strict=True)
                ids = [[f"{name}/{id}" for id in of_old] for name, of_old in earlier] + ids[-1:]
            elif number > 1:
                pairs = folder / f"upto{number}.pairs.jsonl"
                words = ["--model", run / "model", "--eval-only"]
                run = train(args, folder / f"{name}-seen", pairs, *words)
            row = {"variant": variant, "request": number, "steps": steps}
            rows.append(row | measured(run, ids))
    run = train(args, folder / "at-once", folder / "all.pairs.jsonl", "--model", args.model)
    row = {"variant": "at once", "request": len(requests), "steps": steps_of(run)}
    return [*rows, row | measured(run, requests)]


def steps_of(run):
    """Training steps of a run: the batches of what was active in each epoch."""
    rows = data.read_jsonl(run / "metrics.jsonl")
    size = data.read_json(run / "config.json")["batch_size"]
    return sum(-(-row["active"] // size) for row in rows[:-1])


def measured(run, requests):
    """What a run measured at its end, and MA by request (the ids of each)."""
    rows, summary = data.read_jsonl(run / "samples.jsonl"), data.read_json(run / "summary.json")
    ma = {row["id"]: row["ma"] for row in rows if row["epoch"] == summary["epochs"]}
    by_request = [mean(ma[id] for id in ids) for ids in requests]
    return summary["after"] | {"limit": summary["thresholds"]["ma"], "by request": by_request}


def table(rows):
    """A line a run: means over all texts so far, the highest MA of a request, the steps so far."""
    ppl = [name for name in rows[0] if name.startswith("ppl_")]
    shares = ["EL10 (%)", "MA (%)", "highest MA of one (%)"]
    names = ["", "requests", *shares, "entropy", *ppl, "steps"]
    lines = []
    for row in rows:
        shares = [row["el10"], row["ma"], max(row["by request"])]
        cells = [row["variant"], str(row["request"]), *(f"{100 * share:.1f}" for share in shares)]
        cells += [f"{row['entropy']:.2f}", *(f"{row[name]:.1f}" for name in ppl), str(row["steps"])]
        lines.append(cells)
    return "\n".join(figures.markdown_table(names, lines)) + "\n"


def picture(rows):
    """came-back.png: MA of each request's texts after it and after those that follow."""
    figure, axes = report.plt().subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, variant in zip(axes, VARIANTS, strict=True):
        own = [row for row in rows if row["variant"] == variant]
        for j in range(len(own)):
            x, y = [row["request"] for row in own[j:]], [row["by request"][j] for row in own[j:]]
            axis.plot(x, y, marker="o", markersize=4, label=f"request {j + 1}")
        axis.axhline(rows[0]["limit"], color="0.6", linestyle="--")
        axis.set(title=f"{variant} (dashed: the stop rule's MA)", xlabel="after request")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set(ylabel="MA of its texts", ylim=(0, 1))
    axes[1].legend()
    return report.png(figure)


def main(argv=None):
    parser = flags.command_parser(__doc__, debug=False)
    for name in ("forget", "pool", "model", "out"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--parts", default=4, type=flags.positive, help="requests (%(default)s)")
    parser.add_argument("--order", type=flags.natural, metavar="SEED", help="shuffle first")
    parser.add_argument("--script", default="icu.py", help="the method's file (%(default)s)")
    args, others = parser.parse_known_args(argv)
    args.flags, folder = ["--bert", "minilm", "--bert-threshold", "auto", *others], Path(args.out)
    rows = follow(args, folder, mine(args, folder))
    data.write_bytes(folder / "table.md", table(rows).encode())
    data.write_bytes(folder / "came-back.png", picture(rows))
    print(table(rows))


if __name__ == "__main__":
    flags.run_cli(main)
