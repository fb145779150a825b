"""Grades of a model's texts before and after a run: a judge's (GPT, 0-10) and people's (1-8).

    bash run.sh judge RUN ... --judge gpt-4 --send-texts    # the key is in $JUDGE_API_KEY
    bash run.sh judge RUN ... --judge MODEL --base-url http://localhost:8000/v1
    bash run.sh judge RUN ... --dry-run --price 2.5,10      # calls, tokens, what they cost
    bash run.sh judge --sheet RUN ... --n 40 --raters 3     # sheet.html, for people
    bash run.sh judge --ratings ratings-*.csv RUN ...       # what they gave, how far all agree

Table 1's last column, Table 3 and Appendices A and B of arXiv:2407.20271 (ICU); docs/judge.md.
Departures from the authors' script, which asks once for "Finale score" and looks for "Final":
1. Both spellings are read, as the whole last line. An answer without it is asked for again in other
   words. If that has none either the sample is unread: it is in no mean, never a 0.
2. Temperature 0 and a seed. Every sample is graded, and an interval is given.
3. Texts leave this machine only after --send-texts: somebody asked to have them forgotten.
"""

import asyncio
import contextlib
import hashlib
import json
import math
import os
import random
import re
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from kit import data, figures, flags
from kit.runs import check_texts_left, read_pairs_of, read_run

# --- the question (Appendix A, in other words) ---

INSTRUCTIONS = Path(__file__).with_suffix(".txt")  # of other bytes: not the same question
# Each text as a JSON string, so that it is seen where it ends.
QUESTION = "Prefix: {}\nReference: {}\nCandidate: {}\n\n"
FIRST = "Now judge this candidate."
AGAIN = (
    "Grade the candidate: one short sentence, then, on a line of its own, "
    '"Final score: " and a number, 0 to 10.'
)
SEED = 0
# "8", "8.5", "8/10"; not "7-8", "4 out of 5", "1e1", "8,5", nor the "1." of a list.
SCORE = re.compile(
    r"finale? score ?: ?(\d{1,2}(?:\.\d{1,9})?)(?: ?(?:/|out of) ?10)?\.?", re.IGNORECASE
)
THINKING = re.compile(r"[<\[](/?)[\w:]*(?:think|thought|reason)\w*[>\]]", re.IGNORECASE)


def score_of(answer):
    """X, 0 to 10, where the last line is "Final score: X" and thinking has ended, or None."""
    lines = [line for line in answer.splitlines() if re.search(r"\w", line)]
    score = lines and SCORE.fullmatch(" ".join(re.sub('[*_`"#>]', " ", lines[-1]).split()))
    thinks = THINKING.findall(answer)[-1:] == [""]
    return float(score[1]) if score and not thinks and float(score[1]) <= 10 else None


class Triple(NamedTuple):
    """A text's two halves, and what a model wrote instead of the second."""

    prefix: str
    reference: str
    output: str


def request_for(triple, wording, args):
    question = QUESTION.format(*(json.dumps(text, ensure_ascii=False) for text in triple))
    return {
        "model": args.judge,
        "messages": [
            {"role": "system", "content": args.instructions},
            {"role": "user", "content": question + wording},
        ],
        "temperature": 0,
        "seed": SEED,
        "max_tokens": args.answer_tokens,
    }


# --- what is judged ---


class Judged(NamedTuple):
    folder: Path
    name: str  # in tables
    pairs_sha: str
    epochs: dict  # {"before": 0, "after": the last one}
    triples: dict  # {(id, epoch): Triple}


def read_judged(folder):
    """A finished run whose texts are judged."""
    run = read_run(folder)
    check_texts_left(run)
    summary, sha = run["summary"], run["config"]["sha256"]["pairs"]
    pairs, triples = read_pairs_of(run), {}
    epochs = {"before": 0, "after": summary["epochs"]}
    for row in run["samples"]:
        # A watched text is of an earlier request, which has its own run.
        if row["epoch"] in epochs.values() and not row.get("watched"):
            pair = pairs[row["id"]]
            output = Triple(pair["prefix"], pair["suffix"], row["generation"])
            triples[row["id"], row["epoch"]] = output
    name = f"{run['folder'].name} ({summary['method']})"
    return Judged(run["folder"], name, sha, epochs, triples)


# --- the server ---

KEY = "JUDGE_API_KEY"
OPENAI = "https://api.openai.com/v1"
WORKERS = 8  # calls at a time
HERE = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?(/[\w./-]*)?")


def is_loopback(base_url):
    return HERE.fullmatch(base_url) is not None


class Cache(dict):
    """{digest of (address, request): reply} about the texts of one pairs file."""

    def __init__(self, pairs_sha):
        self.path = data.cache_folder("judge") / f"{pairs_sha}.jsonl"
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.is_file() else []
        for line in lines:
            with contextlib.suppress(ValueError):  # blank, or cut off by a kill: asked again
                reply = json.loads(line)
                self[reply.pop("key")] = reply

    def add(self, key, reply):
        self[key] = reply
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            # The line before may have been cut off.
            file.write("\n" + json.dumps({"key": key, **reply}))


class Judge:
    """A model at an OpenAI-compatible address."""

    def __init__(self, args):
        key, here = os.environ.get(KEY, "").strip(), is_loopback(args.base_url)
        if not (key or here):
            raise ValueError(f"{args.base_url} wants a key: put it into the environment as {KEY}")
        self.args, self.api_key = args, key or "not-needed"
        # openai would send more of the environment: another key, headers, an organisation.
        for name in [name for name in os.environ if name.startswith("OPENAI_")]:
            del os.environ[name]
        import openai  # 0.4 s

        # It tries again after 408, 409, 429, 5xx and without an answer, as Retry-After says (up to
        # two minutes) or after longer each time.
        self.client = openai.AsyncOpenAI(
            base_url=args.base_url,
            api_key=self.api_key,
            timeout=args.patience,
            max_retries=args.tries - 1,
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False,
                trust_env=not here,  # no proxy for this machine
            ),
        )

    def message(self, error):
        """The first line of an error, without the key, which some servers repeat."""
        return flags.first_line(error).replace(self.api_key, "[key]")[:200]

    async def ask(self, request):
        """{"answer", "model", "in", "out", "finish"}, or {"why"} there is none. ValueError: all are
        refused."""
        import openai

        try:
            reply = await self.client.chat.completions.create(**request)
            choice = reply.choices[0]
            return {
                # No half of a pair of UTF-16, and no list of parts.
                "answer": (choice.message.content or "").encode("utf-8", "replace").decode(),
                "model": reply.model,  # who answers
                "in": getattr(reply.usage, "prompt_tokens", 0) or 0,
                "out": getattr(reply.usage, "completion_tokens", 0) or 0,
                "finish": choice.finish_reason,
            }
        except openai.APIStatusError as error:
            code = error.status_code
            why = f"HTTP {code}: {self.message(error)}"
            if code < 400 or code in (401, 403, 404, 405):  # a redirect; a wrong key or address
                message = f"{self.args.base_url} refuses {self.args.judge}: {why}"
                raise ValueError(message) from None
            failed = code >= 500 or code in (408, 409, 429)
            return {"why": f"{'no answer' if failed else 'refused'}: {why}"}
        except openai.APIConnectionError as error:  # also a timeout
            return {"why": f"no answer: {self.message(error.__cause__ or error)}"}
        except (openai.OpenAIError, AttributeError, IndexError, TypeError, ValueError):
            return {"why": "no answer: no chat completion"}

    async def grade(self, triple, cache):
        """{"score", "why" there is none, "answer", "model", "request", "usage"} of a triple."""
        verdict = dict.fromkeys(("score", "why", "answer", "model", "request"))
        verdict["usage"] = {"in": 0, "out": 0}
        for wording in (FIRST, AGAIN):
            request = request_for(triple, wording, self.args)
            key = data.digest([self.args.base_url, request])
            if key not in cache:
                reply = await self.ask(request)
                if "why" in reply:
                    return verdict | reply
                cache.add(key, reply)
            reply = cache[key]
            verdict |= {"answer": reply["answer"], "model": reply["model"], "request": key}
            verdict["usage"] = {name: n + reply[name] for name, n in verdict["usage"].items()}
            finish = reply.get("finish") or "stop"
            score = score_of(reply["answer"]) if finish == "stop" else None
            if score is not None:
                return verdict | {"score": score}
        return verdict | {"why": f"no score in the answer (it ended by: {finish})"}

    async def grade_all(self, triples, cache):
        """{triple: verdict}, equal triples once. ValueError: the server does not answer."""
        triples, verdicts, silent = dict.fromkeys(triples), {}, 0
        waiting = iter(triples)

        async def work(bar):
            nonlocal silent
            for triple in waiting:
                verdicts[triple] = verdict = await self.grade(triple, cache)
                silent, why = silent + 1 if verdict["answer"] is None else 0, verdict["why"] or ""
                # A filter may refuse many texts and grade others.
                if silent == len(triples) or silent >= WORKERS and why.startswith("no answer"):
                    raise ValueError(
                        f"{self.args.base_url}: {silent} texts in a row have no grade ({why}); "
                        "try later: what was answered is kept"
                    )
                bar.update()

        with tqdm(total=len(triples), unit=" texts", disable=None) as bar:
            await asyncio.gather(*(work(bar) for _ in range(WORKERS)))
        return verdicts


# --- the machine judge ---


async def judge_run(args, run, judge):
    """Grades a run's samples; writes judge.jsonl and judge.json and returns the latter."""
    cache = Cache(run.pairs_sha)
    known = len(cache)
    verdicts = await judge.grade_all(run.triples.values(), cache)
    # Grades of different questions are not compared.
    question = data.digest([args.instructions, QUESTION, FIRST, AGAIN])
    rows = [
        {"id": id, "epoch": epoch, **verdicts[triple], "prompt": question}
        for (id, epoch), triple in run.triples.items()
    ]
    means = {
        when: mean_of([row["score"] for row in rows if row["epoch"] == epoch])
        for when, epoch in run.epochs.items()
    }
    usages = [verdict["usage"] for verdict in verdicts.values()]
    tokens = {name: sum(usage[name] for usage in usages) for name in ("in", "out")}
    summary = {
        "judge": args.judge,
        "base_url": args.base_url,
        "prompt": question,
        "temperature": 0,
        "seed": SEED,
        "served": sorted({row["model"] for row in rows if row["model"]}),
        **means,
        "calls": len(cache) - known,
        "tokens": tokens,
        "cost": cost(args.price, tokens),
    }
    data.write_jsonl(run.folder / "judge.jsonl", rows)
    data.write_json(run.folder / "judge.json", summary)
    return summary


def mean_of(scores):
    """{"mean", "interval", "n", "unread"} of scores; None is unread."""
    read = [score for score in scores if score is not None]
    return {
        "mean": statistics.fmean(read) if read else None,
        "interval": figures.bootstrap_interval(statistics.fmean, read),
        "n": len(read),
        "unread": len(scores) - len(read),
    }


def cost(price, tokens):
    """What tokens cost at (IN, OUT) per million, or None without a price."""
    return price and (price[0] * tokens["in"] + price[1] * tokens["out"]) / 1e6


def print_plan(args, runs):
    """What judging would ask: calls, tokens (of four bytes), cost."""
    new, known = {}, set()
    for run in runs:
        cache = Cache(run.pairs_sha)
        for triple in run.triples.values():
            request = request_for(triple, FIRST, args)
            key = data.digest([args.base_url, request])
            if key in cache:
                known.add(key)
            else:
                new[key] = sum(len(m["content"].encode()) for m in request["messages"])
    tokens = {"in": math.ceil(sum(new.values()) / 4), "out": len(new) * args.answer_tokens}
    price = f", at most {cost(args.price, tokens):.2f} at --price" if args.price else ""
    print(
        f"would ask {args.judge} at {args.base_url}: {len(new)} calls ({len(known)} answers are "
        f"there already), about {tokens['in']:,} tokens in and at most {tokens['out']:,} out{price}"
    )


async def judge_runs(args, runs):
    if args.dry_run and runs:
        return print_plan(args, runs)
    if not (args.send_texts or is_loopback(args.base_url)):
        raise ValueError(
            f"{args.base_url} is not this machine, and the texts are what somebody asked to have "
            "forgotten: pass --send-texts, or a server here, --base-url http://localhost:8000/v1"
        )
    judge = Judge(args)
    if args.dry_run:
        return print(f"would ask {args.judge} at {args.base_url}")
    for run in runs:
        summary, grades = await judge_run(args, run, judge), []
        for when in run.epochs:
            mean, interval, n, unread = summary[when].values()
            grades.append(f"{when} {show(mean, interval)} of {n}, {unread} unread")
        served = ", ".join(summary["served"])
        print(f"{run.name}: GPT (0-10) {'; '.join(grades)}; {served}; {summary['calls']} calls")
    print("judge.jsonl says why a text is unread; the same command asks again where none answered")


def show(value, interval=None):
    """A figure as text: 4.20 [3.90, 4.51]."""
    text = "-" if value is None else f"{value:.2f}"
    return text + (" [{:.2f}, {:.2f}]".format(*interval) if interval else "")


# --- the sheet for people ---

PAGE = Path(__file__).with_name("sheet.html")
# Appendix B of the paper in other words, 1 to 8.
GRADES = (
    "The same as the reference, or the same words over and over",
    "Hardly different from the reference, and it says little",
    "Clearly different, but it makes no sense",
    "Different, and it makes sense in places",
    "Makes sense, and is partly like the reference",
    "Makes sense, and says what the reference says in other words",
    "Different in a way of its own, and sensible",
    "Different throughout, and fully sensible",
)


def make_sheet(args, runs):
    """Writes sheet.html, and the key that says whose outputs they are, into the first folder."""
    outputs = {}  # {(text, triple): who wrote it}: graded once for all of them
    for number, run in enumerate(runs):
        for (id, epoch), triple in run.triples.items():
            wrote = outputs.setdefault(((run.pairs_sha, id), triple), [])
            wrote.append({"run": number, "epoch": epoch})
    texts = sorted({text for text, _ in outputs})
    drawn = random.Random(0)
    texts = set(drawn.sample(texts, min(args.n, len(texts))))
    chosen = sorted(output for output in outputs if output[0] in texts)
    drawn.shuffle(chosen)
    items = [{"text": output[0], "of": outputs[output]} for output in chosen]
    sheet, html = page([triple._asdict() for _, triple in chosen], args.raters)
    named = [  # known by its summary.json wherever its folder is
        {"name": run.name, "summary": data.sha256_of(run.folder / "summary.json")} for run in runs
    ]
    path, key = runs[0].folder / "sheet.html", runs[0].folder / "sheet-key.json"
    data.check_outputs([path, key], overwrite=args.overwrite)
    data.write_json(key, {"sheet": sheet, "raters": args.raters, "runs": named, "items": items})
    data.write_bytes(path, html.encode())
    print(
        f"{path}: {len(chosen)} outputs of {len(texts)} texts; send it to {args.raters} raters\n"
        f"{key}: which output is whose; keep it to yourself\n"
        "then: bash run.sh judge --ratings ratings-*.csv RUN ..."
    )


def page(items, raters):
    """(the id of a sheet, its HTML). items: dicts {prefix, reference, output}, all a rater sees.

    Each rater's order is drawn from the id, so that the same items make the same sheet.
    """
    sheet = hashlib.sha256(json.dumps([items, raters]).encode()).hexdigest()[:12]
    numbers = range(len(items))
    orders = [
        random.Random(f"{sheet} {rater}").sample(numbers, len(items)) for rater in range(raters)
    ]
    content = {"sheet": sheet, "grades": GRADES, "orders": orders, "items": items}
    content = json.dumps(content).replace("<", "\\u003c")  # no text ends its element
    return sheet, PAGE.read_text(encoding="utf-8").replace(">DATA<", f">{content}<")


def read_ratings(paths, keys):
    """(key, {item: {rater: grade}}) of the files that raters have saved; keys: {sheet: key}.

    ValueError, with the file and the line, unless all are of one of these sheets.
    """
    grades, key = {}, None
    for path in paths:
        for line, row in data.numbered_csv(path):
            with data.reading(f"{path} line {line} (sheet,rater,item,grade)"):
                key = key or keys.get(row["sheet"])
                if key is None or row["sheet"] != key["sheet"]:
                    known = ", ".join(keys) or "none"
                    raise ValueError(f"of sheet {row['sheet']}; the runs have the key of {known}")
                item, rater, grade = int(row["item"]), row["rater"], int(row["grade"])
                given = grades.setdefault(item, {})
                fits = item in range(len(key["items"])) and grade in range(1, 9)
                if not fits or rater in given:
                    problem = "not 1 to 8, no such item, or graded already (one name a rater)"
                    raise ValueError(f"{rater} gives item {item} a {grade}: {problem}")
                given[rater] = grade
    if key is None:
        raise ValueError("--ratings: no grade in these files: name the ratings-NAME.csv of raters")
    return key, grades


# --- what people say ---


class Output(NamedTuple):
    """One output that was to be graded."""

    text: tuple  # (sha256 of the pairs, id)
    of: list  # [(number of the run, epoch)] that wrote it
    grades: list  # by people, 1 to 8
    machine: float | None  # the judge's score, 0 to 10

    @property
    def human(self):
        """The raters' mean on the judge's scale: 10 (s - 1) / 7, section 5.8."""
        return 10 * (statistics.fmean(self.grades) - 1) / 7


def read_people(csv_files, folders):
    """(key, run folders in the order of the key, outputs, number of raters)."""
    keys = [folder / "sheet-key.json" for folder in folders]
    keys = [data.read_json(path) for path in keys if path.is_file()]
    key, grades = read_ratings(csv_files, {key["sheet"]: key for key in keys})
    known = {data.sha256_of(folder / "summary.json"): folder for folder in folders}
    if missing := [run["name"] for run in key["runs"] if run["summary"] not in known]:
        raise ValueError(f"the sheet is also of the run {missing[0]}: name its folder too")
    folders = [known[run["summary"]] for run in key["runs"]]
    scores, outputs = machine_scores(folders), []
    for number, item in enumerate(key["items"]):
        sha, id = item["text"]
        of = [(place["run"], place["epoch"]) for place in item["of"]]
        scored = [scores.get((run, id, epoch)) for run, epoch in of]
        machine = next((score for score in scored if score is not None), None)
        outputs.append(Output((sha, id), of, [*grades.get(number, {}).values()], machine))
    return key, folders, outputs, len(set().union(*grades.values()))


def machine_scores(folders):
    """{(number of the run, id, epoch): score or None} of the runs' judge.jsonl, where it is."""
    scores, judges = {}, set()
    for number, folder in enumerate(folders):
        if (folder / "judge.jsonl").is_file():
            for row in data.read_jsonl(folder / "judge.jsonl"):
                scores[number, row["id"], row["epoch"]] = row["score"]
            summary = data.read_json(folder / "judge.json")
            judges.add((summary["judge"], summary["prompt"]))
    if len(judges) > 1:
        raise ValueError(f"graded by several judges, {judges}: let one grade all the runs")
    return scores


def report_people(args):
    """Writes people.json into the folder of each run of a sheet; prints Table 3 of the runs."""
    key, folders, outputs, came = read_people(args.csv_files, args.runs)
    raters, agreement, people = max(key["raters"], came), compare(outputs), []
    means, rows = {}, []  # the former each once, as keys
    for number, run in enumerate(key["runs"]):
        epochs = [epoch for output in outputs for of, epoch in output.of if of == number]
        people.append({"sheet": key["sheet"], "raters": came})
        for when, epoch in (("before", min(epochs)), ("after", max(epochs))):
            mine = [output for output in outputs if (number, epoch) in output.of]
            people[-1][when] = human = grades_of(mine, raters)
            machine = mean_of([output.machine for output in mine])["mean"]
            if human["n"] and machine is not None:
                means[human["mean"], machine] = None
            cells = [f"{run['name']}, {when}", show(human["mean"], human["interval"])]
            rows.append([*cells, str(human["n"]), str(human["missing"]), show(machine)])
    head = ["", "Human (0-10)", "n", "missing", "GPT (0-10)"]
    print("\n".join(figures.markdown_table(head, rows)))
    judge = agreement["judge"]
    # As the paper's 0.89: over the means of its Table 3.
    of_means = pearson(*zip(*means, strict=True)) if means else None
    judge |= {"pearson_of_means": of_means, "means": len(means)}
    for folder, figure in zip(folders, people, strict=True):
        data.write_json(folder / "people.json", figure | agreement)
    shown = [f"{name} {show(**judge[name])}" for name in ("pearson", "spearman", "kappa")]
    print(
        f"{came} raters; between raters: Krippendorff's alpha {show(**agreement['alpha'])}; "
        f"with the judge, {judge['n']} outputs: {', '.join(shown)}; "
        f"Pearson of the {len(means)} means {show(of_means)} (the paper's Table 3: 0.89)"
    )


# --- how far grades agree ---


def with_interval(outputs, statistic):
    """{"value", "interval"} of a statistic of outputs; the interval is over texts."""
    texts = {}  # all outputs of a text hang together
    for output in outputs:
        texts.setdefault(output.text, []).append(output)
    interval = figures.bootstrap_interval(
        lambda drawn: statistic(sum(drawn, [])), list(texts.values())
    )
    return {"value": statistic(outputs), "interval": interval}


def grades_of(outputs, raters):
    """What people gave outputs; missing: grades that were to be given and were not."""
    read = [output for output in outputs if output.grades]
    figure = with_interval(
        read, lambda some: statistics.fmean(o.human for o in some) if some else None
    )
    return {
        "mean": figure["value"],
        "interval": figure["interval"],
        "n": len(read),
        "missing": raters * len(outputs) - sum(len(output.grades) for output in outputs),
    }


def compare(outputs):
    """How far people agree with each other (alpha) and with the judge; intervals over texts."""
    both = [output for output in outputs if output.grades and output.machine is not None]

    def against(measure):
        return with_interval(
            both, lambda some: measure([o.human for o in some], [o.machine for o in some])
        )

    judge = {"n": len(both), "pearson": against(pearson), "spearman": against(spearman)}
    alpha = with_interval(outputs, lambda some: krippendorff_alpha([o.grades for o in some]))
    return {"alpha": alpha, "judge": judge | {"kappa": against(quadratic_kappa)}}


# Each of these is None where it says nothing: too few grades, or all the same.
FEWEST = 5


def vary(*lists):
    return all(len(values) >= FEWEST and len(set(values)) > 1 for values in lists)


def correlation(x, y, kind):
    """Pearson's r or Spearman's rho, -1 to 1, of two lists of numbers."""
    from scipy import stats  # a second that only --ratings waits for

    return float(getattr(stats, kind)(x, y)[0]) if vary(x, y) else None


pearson = partial(correlation, kind="pearsonr")
spearman = partial(correlation, kind="spearmanr")


def quadratic_kappa(x, y):
    """Cohen's kappa of two lists of scores 0 to 10: 1 alike, 0 as by chance.

    Of the nearest grades 1 to 8, a disagreement weighing its square (Cohen 1968).
    """
    from sklearn.metrics import cohen_kappa_score

    x, y = ([math.floor(1 + 0.7 * score + 0.5) for score in scores] for scores in (x, y))
    if len(x) < FEWEST or not vary(x + y):
        return None
    return float(cohen_kappa_score(x, y, labels=range(1, 9), weights="quadratic"))


def krippendorff_alpha(units):
    """Krippendorff's alpha for ordered grades, of any number of raters: 1 alike, 0 as by chance.

    units: for each rated thing the list of its grades; those with fewer than two say nothing.
    1 - D_o / D_e with the ordinal distance (sum of n_g, g = c .. k, - (n_c + n_k) / 2)^2.
    Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability".
    """
    units = [grades for grades in units if len(grades) > 1]
    if not units:
        return None
    grades = sorted(set().union(*units))
    given = np.array([[unit.count(grade) for grade in grades] for unit in units])  # [U, G]
    # A unit of m grades has m (m - 1) pairs and counts as m.
    weight = given / (given.sum(axis=1, keepdims=True) - 1)
    # [G, G], pairs of grades within a unit, none with itself.
    o = given.T @ weight - np.diag(weight.sum(axis=0))
    n = o.sum(axis=1)  # [G], how often each grade was given
    middle = n.cumsum() - n / 2  # [G], the mean rank of a grade but for a constant
    distance = (middle[:, None] - middle[None]) ** 2
    expected = (n[:, None] * n[None] * distance).sum()
    return float(1 - (n.sum() - 1) * (o * distance).sum() / expected) if expected else None


# --- flags and main ---


def price(text):
    """An argparse type: IN,OUT, what a million tokens cost."""
    tokens_in, tokens_out = map(flags.weight, text.split(","))
    return tokens_in, tokens_out


# fmt: off
def make_parser():
    parser = flags.command_parser(__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="finished run folders")
    g = parser.add_argument_group("the machine judge")
    g.add_argument("--judge", default="gpt-4", metavar="MODEL", help="who grades (%(default)s)")
    g.add_argument("--base-url", default=OPENAI, metavar="URL", help="its address (%(default)s)")
    g.add_argument("--send-texts", action="store_true", help="texts may leave this machine")
    g.add_argument("--prompt", default=INSTRUCTIONS, help='asks for "Final score: X", 0 to 10')
    g.add_argument("--answer-tokens", type=flags.positive, default=512, help="most (%(default)s)")
    g.add_argument("--price", type=price, metavar="IN,OUT", help="what a million tokens cost")
    g.add_argument("--tries", type=flags.positive, default=7, help="of a request (%(default)s)")
    g.add_argument("--patience", type=flags.above(0), default=120, help="a try's (%(default)s s)")
    g = parser.add_argument_group("people")
    either = g.add_mutually_exclusive_group()
    either.add_argument("--sheet", action="store_true", help="write sheet.html, of these runs")
    either.add_argument("--ratings", nargs="+", metavar="CSV", help="what raters saved, then RUN")
    g.add_argument("--n", type=flags.positive, default=40, help="texts in the sheet (%(default)s)")
    g.add_argument("--raters", type=flags.positive, default=3, help="an order each (%(default)s)")
    g.add_argument("--overwrite", action="store_true", help="replace a sheet: its ratings are lost")
    g = parser.add_argument_group("running")
    g.add_argument("--dry-run", action="store_true", help="say what it would ask and cost")
    return parser
# fmt: on


def parse_args(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    words = [Path(word) for word in args.ratings or []]  # RUN ... may follow the files
    args.csv_files = [path for path in words if not path.is_dir()]
    folders = [path for path in words if path.is_dir()]
    args.runs = list(dict.fromkeys([*map(Path, args.runs), *folders]))
    if not (args.runs or args.dry_run and not args.sheet and not args.ratings):
        parser.error("name a run folder: bash run.sh judge RUN [RUN ...]")
    args.instructions = data.read_text(args.prompt)
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.ratings:
        return report_people(args)
    runs = [read_judged(folder) for folder in args.runs]
    if args.sheet:
        return make_sheet(args, runs)
    asyncio.run(judge_runs(args, runs))


if __name__ == "__main__":
    flags.run_cli(main)
