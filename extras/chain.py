"""Requests one after another on texts of yours: watched, not watched, and all at once; what comes back, and the steps.

    python extras/chain.py --forget D/forget.jsonl --pool D/pool.jsonl --model D/model --parts 4 --out runs/chain \\
        --targets all --batch-size 8 --lr 2e-4 --alpha 1 --beta 4          # D: runs/tiny-data

The texts are cut into --parts requests, in the order of the file or in another (--order SEED). After each one every
text of the requests so far is measured: by the run itself where it watched them, else by one more (icu.py --eval-only).
DIR then holds table.md, came-back.png (MA of each request's texts over the requests that follow) and the runs
themselves. Other flags go to icu.py. What is there is kept.
"""

import random
from pathlib import Path

from evals import report
from kit import commands, data
from kit.flags import command_parser, positive, run_cli, seed_number
from kit.runs import mean

VARIANTS = {"watched": ["--watch"], "not watched": ["--no-watch"]}


def step(script, *words):
    """Runs a file of this project with flags; ends where it does not end well."""
    status = commands.run([commands.PYTHON, script, *map(str, words)], {})
    if status:
        raise SystemExit(status)


def train(args, out, pairs, words):
    """A run in `out`, or the one that is there; words: --model DIR or --after RUN, and what else it is told."""
    if not (out / "summary.json").is_file():
        step(args.script, "--pairs", pairs, "--out", out, "--overwrite", *args.flags, *words)
    return out


def steps_of(run):
    """Training steps of a run: the batches of what was active, epoch after epoch."""
    rows, size = (
        data.read_jsonl(run / "metrics.jsonl"),
        data.read_json(run / "config.json")["batch_size"],
    )
    return sum(-(-row["active"] // size) for row in rows[:-1])


def mine(args, folder):
    """pairs.jsonl of each request, of the requests up to each, and of all; partners hold no text of any of them."""
    step(
        "knn.py",
        "--forget",
        args.forget,
        "--pool",
        args.pool,
        "--out",
        folder / "all.pairs.jsonl",
        "--overwrite",
    )
    pairs = data.read_pairs(folder / "all.pairs.jsonl")
    if args.order is not None:
        random.Random(args.order).shuffle(pairs)
    size = -(-len(pairs) // args.parts)
    parts = data.chunks(pairs, size)
    for number, part in enumerate(parts, start=1):
        data.write_jsonl(folder / f"request{number}.pairs.jsonl", part)
        if number > 1:
            data.write_jsonl(folder / f"upto{number}.pairs.jsonl", pairs[: number * size])
    return [[pair["id"] for pair in part] for part in parts]


def follow(args, folder, requests):
    """[{"variant", "request", "steps", "by request": MA of each request so far, measures}]: a row a run.

    The first request is the same run for all: it has nothing to watch.
    """
    rows = []
    for variant, how in VARIANTS.items():
        made = []
        for number in range(1, len(requests) + 1):
            name = f"{variant.replace(' ', '-')}{number}" if made else "first"
            start = ["--after", made[-1], *how] if made else ["--model", args.model]
            made.append(train(args, folder / name, folder / f"request{number}.pairs.jsonl", start))
            *earlier, own = requests[:number]
            seen = made[-1]
            if variant == "watched":  # its own rows, where a text of an earlier request is RUN/ID
                named = zip(made[:-1], earlier, strict=True)
                earlier = [[f"{run.name}/{id}" for id in ids] for run, ids in named]
            elif earlier:
                again = ["--model", seen / "model", "--eval-only"]
                seen = train(
                    args, folder / f"{name}-seen", folder / f"upto{number}.pairs.jsonl", again
                )
            steps = sum(map(steps_of, made))
            rows.append(
                {"variant": variant, "request": number, "steps": steps}
                | look(seen, [*earlier, own])
            )
    out = train(args, folder / "at-once", folder / "all.pairs.jsonl", ["--model", args.model])
    return [
        *rows,
        {"variant": "at once", "request": len(requests), "steps": steps_of(out)}
        | look(out, requests),
    ]


def look(run, requests):
    """What a run measured at its end, and MA by request (the ids of each)."""
    rows, summary = data.read_jsonl(run / "samples.jsonl"), data.read_json(run / "summary.json")
    ma = {row["id"]: row["ma"] for row in rows if row["epoch"] == summary["epochs"]}
    by_request = [mean(ma[id] for id in ids) for ids in requests]
    return summary["after"] | {"limit": summary["thresholds"]["ma"], "by request": by_request}


def table(rows):
    """A line a run: the measures over all texts so far, the highest MA of a request, and the steps so far."""
    ppl = [name for name in rows[0] if name.startswith("ppl_")]
    lines = [
        "| | requests | EL10 (%) | MA (%) | highest MA of one (%) | entropy | "
        + " | ".join([*ppl, "steps |"])
    ]
    lines.append("|---" * (7 + len(ppl)) + "|")
    for row in rows:
        cells = [
            row["variant"],
            row["request"],
            f"{100 * row['el10']:.1f}",
            f"{100 * row['ma']:.1f}",
        ]
        cells += [
            f"{100 * max(row['by request']):.1f}",
            f"{row['entropy']:.2f}",
            *(f"{row[p]:.1f}" for p in ppl),
        ]
        lines.append("| " + " | ".join(map(str, [*cells, row["steps"]])) + " |")
    return "\n".join(lines) + "\n"


def picture(rows):
    """came-back.png: MA of each request's texts after it and after those that follow, a panel a variant."""
    figure, axes = report.plt().subplots(
        1, len(VARIANTS), figsize=(9, 3.6), sharey=True, layout="constrained"
    )
    for axis, variant in zip(axes, VARIANTS, strict=True):
        mine = [row for row in rows if row["variant"] == variant]
        for j in range(len(mine)):
            line = [(row["request"], row["by request"][j]) for row in mine[j:]]
            axis.plot(*zip(*line, strict=True), marker="o", markersize=4, label=f"request {j + 1}")
        axis.axhline(rows[0]["limit"], color="0.6", linestyle="--", linewidth=1)
        axis.set_title(f"{variant} (dashed: the stop rule's MA)", fontsize=9)
        axis.set_xlabel("after request")
        axis.xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("MA of its texts")
    axes[0].set_ylim(0, 1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return report.png(figure)


def main(argv=None):
    parser = command_parser(__doc__)
    for flag in ("--forget", "--pool", "--model", "--out"):
        parser.add_argument(
            flag, required=True, metavar="FILE" if flag in ("--forget", "--pool") else "DIR"
        )
    parser.add_argument(
        "--parts", default=4, type=positive, metavar="N", help="requests (%(default)s)"
    )
    parser.add_argument("--order", type=seed_number, metavar="SEED", help="shuffle the texts first")
    parser.add_argument(
        "--script", default="icu.py", metavar="FILE", help="the method's file (%(default)s)"
    )
    args, flags = parser.parse_known_args(argv)
    args.flags, folder = ["--bert", "minilm", "--bert-threshold", "auto", *flags], Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    rows = follow(args, folder, mine(args, folder))
    for name, content in (("table.md", table(rows).encode()), ("came-back.png", picture(rows))):
        data.write_bytes(folder / name, content)
    print(table(rows))


if __name__ == "__main__":
    run_cli(main)
