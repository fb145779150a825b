"""evals/judge.py: each verdict is its sample's; keys and texts stay; agreement is what it says.

python -m pytest tests/test_judge.py -q
"""

import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from judged import Chat, candidate_of, completion, write_run

import experiment
from evals import judge, report
from kit import data, purge

KEY = "sk-test-0123456789"
TEXTS = {
    "a": ("The parcel was left", " at 14 Harbour Lane."),
    "b": ("Payments are due", " each month; 7731."),
}
BEFORE = {"a": " at 14 Harbour Lane.", "b": " each month; 7731."}
AFTER = {"a": " by a friend.", "b": " in spring."}
HERE = ["--base-url", "http://localhost:9/v1"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A key, a cache of its own, no waiting that no server asked for, and no proxy."""
    import openai._base_client

    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run(tmp_path):
    """A run of one epoch over two texts."""
    return write_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])


@pytest.fixture
def many(tmp_path):
    """A run over 24 texts that trained for no epoch; of text i the model says "said i"."""
    texts = {str(i): (f"p{i}", f" s{i}") for i in range(24)}
    return write_run(tmp_path / "many", texts, [{i: f"said {i}" for i in texts}])


def grade(chat, *words, tries="3"):
    words = [*map(str, words), "--judge", "gpt-x", "--base-url", chat.url]
    judge.main([*words, "--patience", "2", "--tries", tries])


def caches(tmp_path):
    return list((tmp_path / "cache" / "judge").glob("*"))


# --- reading a score ---


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Fine.\nFinal score: 7", 7),
        ("Fine.\nFinale score: 0", 0),
        ("**Final score: 8/10**", 8),
        ("**Final score:** 8.5 / 10.", 8.5),
        ("Final score: 3\nOn reflection:\nFinal score: 10", 10),
        ("Final score: 9\nFinal score: none", None),
        ("Final score: 10.5", None),
        ("Final score: 100", None),
        ("Final score: -1", None),
        ("Final score: 8/100", None),
        ("Final score: 8,5", None),
        ("8/10", None),
        ("", None),
    ],
)
def test_a_score_is_the_last_one_named_and_from_0_to_10(answer, score):
    """Both spellings, whole or decimal, with and without /10; what is no such number is no score."""
    assert judge.score_of(answer) == score


# --- a server that misbehaves ---


def after(times, trouble, then):
    return lambda n: trouble if n < times else then


FAIL = 500, {}, {"error": {"message": "oh"}}
LIMIT = 429, {}, {"error": {"message": "slow down"}}
WAIT = 429, {"Retry-After": "1"}, {}
PAGE = 200, {"Content-Type": "text/html"}, b"<html>log in</html>"
FILTER = 400, {}, {"error": {"message": "content filter"}}
# candidate: (what becomes of its n-th request, the score due, why there is none, requests)
CASES = {
    "plain": (lambda n: "Good.\nFinal score: 7", 7, None, 1),
    "429 that says how long": (after(1, WAIT, "Final score: 5"), 5, None, 2),
    "429 that does not": (after(2, LIMIT, "Final score: 4"), 4, None, 3),
    "500 twice": (after(2, FAIL, "Final score: 3"), 3, None, 3),
    "500 for ever": (lambda n: FAIL, None, "no answer: HTTP 500", 3),
    "hangs": (after(1, 6.0, "Final score: 2"), 2, None, 2),
    "is cut off": (after(1, None, "Final score: 1.5"), 1.5, None, 2),
    "a page": (lambda n: PAGE, None, "no chat completion", 1),
    "empty": (after(1, (200, {}, completion(None)), "Final score: 8"), 8, None, 2),
    "out of range": (lambda n: "Final score: 11", None, "no score", 2),
    "bare": (after(1, "8/10", "Final score: 2/10"), 2, None, 2),
    "filtered": (lambda n: FILTER, None, "refused: HTTP 400", 1),
}


def test_each_verdict_is_its_samples_whatever_the_server_does(tmp_path, capsys):
    """Scores stand with their ids, unread ones have a reason and are in no mean; it waits as told."""
    texts = {f"id {case}": (f"prefix of {case}", " reference") for case in CASES}
    generations = {f"id {case}": case for case in CASES}
    run = write_run(tmp_path / "run", texts, [generations, generations])  # said twice, asked once

    def misbehave(candidate, n):
        time.sleep(random.random() / 50)  # answers come in another order
        return CASES[candidate][0](n)

    with Chat(misbehave) as chat:
        grade(chat, run)
        rows = data.read_jsonl(run / "judge.jsonl")
        assert [(row["id"], row["epoch"]) for row in rows] == [
            (id, epoch) for epoch in (0, 1) for id in texts
        ]
        for row in rows:
            case = row["id"].removeprefix("id ")
            _, score, why, requests = CASES[case]
            assert row["score"] == score and (row["why"] is None) == (why is None), row
            assert (why or "") in (row["why"] or "") and len(chat.times(case)) == requests, row
        first, second = chat.times("429 that says how long")
        assert second - first >= 1
        requests = [request for _, _, request in chat.seen]
        assert all((request["temperature"], request["seed"]) == (0, 0) for request in requests)
        unread = [request for request in requests if candidate_of(request) == "out of range"]
        assert len({request["messages"][1]["content"] for request in unread}) == 2
        due = [score for _, score, _, _ in CASES.values() if score is not None]
        summary = data.read_json(run / "judge.json")
        for when in ("before", "after"):
            figure = summary[when]
            assert figure["mean"] == pytest.approx(sum(due) / len(due))
            assert (figure["n"], figure["unread"]) == (len(due), len(CASES) - len(due))
        assert summary["served"] == ["judge-2026-01"] and rows[0]["model"] == "judge-2026-01"
        assert rows[0]["usage"] == {"in": 100, "out": 7} and rows[0]["prompt"] == summary["prompt"]
        assert "4 unread" in capsys.readouterr().out

        chat.seen.clear()  # again: only those that have no answer
        grade(chat, run)
        again = {candidate_of(request) for _, _, request in chat.seen}
        assert again == {"500 for ever", "a page", "filtered"}


def test_eight_calls_at_a_time(many):
    """As many as WORKERS are under way at once, and never more."""
    now, most = [], []

    def busy(candidate, n):
        now.append(candidate)
        most.append(len(now))
        time.sleep(0.1)
        now.remove(candidate)
        return f"Final score: {int(candidate.removeprefix('said ')) % 11}"

    with Chat(busy) as chat:
        grade(chat, many)
    assert max(most) == judge.WORKERS == 8
    scores = [row["score"] for row in data.read_jsonl(many / "judge.jsonl")]
    assert scores == [i % 11 for i in range(24)]


@pytest.mark.parametrize(
    "reply, due, calls",
    [(FAIL, "8 texts in a row .*HTTP 500", 23), (FILTER, "24 texts in a row .*refused", 24)],
)
def test_a_server_that_answers_nobody_is_not_asked_for_ever(many, reply, due, calls):
    """Where it fails it is asked for a few texts only; where it refuses, for all, as others may pass."""
    with Chat(lambda candidate, n: reply) as chat:
        with pytest.raises(ValueError, match=due):
            grade(chat, many, tries="1")
        assert not list(many.glob("judge*")) and len(chat.seen) <= calls


def test_a_server_that_is_not_there_is_named(run):
    """By its address, and no file looks like a result."""
    with Chat(lambda candidate, n: "") as chat:
        pass
    with pytest.raises(ValueError, match=f"^{chat.url}: 4 texts in a row .*no answer"):
        grade(chat, run, tries="2")
    assert not list(run.glob("judge*"))


# --- the cache ---


def test_a_second_run_asks_nothing_and_an_interrupted_one_goes_on(run, tmp_path):
    """The server refuses after two answers: they are kept, but for one whose end a kill has cut off."""
    left = [2]

    def behave(candidate, n):
        left[0] -= 1
        if left[0] >= 0:
            return "Final score: 6"
        time.sleep(0.3)
        return 401, {}, {}

    with Chat(behave) as chat:
        with pytest.raises(ValueError, match="refuses gpt-x: HTTP 401"):
            grade(chat, run)
        assert not list(run.glob("judge*"))
        (cache,) = caches(tmp_path)
        assert cache.read_text().count("Final score") == 2
        cache.write_bytes(cache.read_bytes()[:-20])
        for calls in (3, 0):  # of four; the second time all are there
            left[0] = 99
            chat.seen.clear()
            grade(chat, run)
            summary = data.read_json(run / "judge.json")
            assert len(chat.seen) == summary["calls"] == calls
    assert summary["before"]["mean"] == summary["after"]["mean"] == 6
    assert summary["tokens"] == {"in": 400, "out": 28}


def test_ctrl_c_waits_for_no_answer_and_keeps_what_is_there(many, tmp_path):
    """Three answers, then a server that hangs: the command ends at once, its cache is private."""
    first = ("said 0", "said 1", "said 2")
    with Chat(lambda candidate, n: "Final score: 2" if candidate in first else 600) as chat:
        words = [sys.executable, "evals/judge.py", many, "--judge", "m", "--base-url", chat.url]
        process = subprocess.Popen(
            words,
            cwd=ROOT,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        while len(chat.seen) < 3 + judge.WORKERS or not caches(tmp_path):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130  # half of what an answer may take
    (cache,) = caches(tmp_path)
    assert cache.read_text().count("Final score: 2") == 3 and not list(many.glob("judge*"))
    assert cache.stat().st_mode & 0o777 == 0o600


def test_the_key_of_the_cache_is_everything_that_is_sent():
    """Another model, address, text, wording or instruction is another request."""
    triple, keys = judge.Triple("p", "r", "c"), set()

    def add(url="u", triple=triple, wording=judge.FIRST, **changes):
        args = judge.parse_args(["--dry-run"])
        vars(args).update(changes)
        keys.add(judge.key_of(url, judge.request_for(triple, wording, args)))

    add()
    add()
    add(url="v")
    add(wording=judge.AGAIN)
    add(judge="x")
    add(instructions="x")
    for field in triple._fields:
        add(triple=triple._replace(**{field: "x"}))
    assert len(keys) == 8


# --- the key, and where texts go ---


def test_the_key_reaches_no_file_or_line(run, tmp_path):
    """It is in the header alone, also where the server repeats it in an error, and under --debug."""
    with Chat(lambda candidate, n: "Final score: 5") as chat:
        grade(chat, run)
        assert chat.seen[0][1]["Authorization"] == f"Bearer {KEY}"
    for status in (401, 400):
        body = {"error": {"message": f"bad key {KEY}"}}
        with Chat(lambda candidate, n, reply=(status, {}, body): reply) as chat:
            words = [sys.executable, "evals/judge.py", run, "--base-url", chat.url, "--debug"]
            done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
            assert done.returncode and "bad key [key]" in done.stderr
            assert KEY not in done.stdout + done.stderr
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY not in path.read_text(), path


def test_nothing_of_the_environment_but_the_key_is_sent(run, monkeypatch):
    """openai would send an organisation, a project and headers of its own variables."""
    for name in ("API_KEY", "ORG_ID", "PROJECT_ID"):
        monkeypatch.setenv(f"OPENAI_{name}", "mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: mine")
    with Chat(lambda candidate, n: "Final score: 5") as chat:
        grade(chat, run)
        assert "mine" not in str(chat.seen[0][1])


@pytest.mark.parametrize(
    "url, here",
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://localhost@example.com/v1", False),
        ("http://localhost\\@example.com/v1", False),
        ("http://0.0.0.0:8000/v1", False),
    ],
)
def test_only_loopback_is_this_machine(url, here):
    """By its name alone, and only where every reader of the address sees the same one."""
    assert judge.is_loopback(url) is here


def test_texts_leave_only_when_told_to(run, monkeypatch):
    """Not to another host without --send-texts, by no proxy, after no redirect; no key, no call."""
    for words in ([str(run), "--judge", "m"], ["--dry-run"]):
        with pytest.raises(ValueError, match="--send-texts"):
            judge.main(words)
    monkeypatch.delenv("JUDGE_API_KEY")
    with pytest.raises(ValueError, match="JUDGE_API_KEY"):
        judge.main([str(run), "--send-texts"])
    with Chat(lambda candidate, n: "Final score: 1") as other:
        monkeypatch.setenv("HTTP_PROXY", other.url.removesuffix("/v1"))
        moved = 307, {"Location": f"{other.url}/chat/completions"}, {}
        with Chat(lambda candidate, n: moved) as chat:
            with pytest.raises(ValueError, match="HTTP 307"):
                grade(chat, run)
            assert chat.seen and not other.seen


def test_a_dry_run_names_calls_tokens_and_cost_and_asks_nothing(run, capsys):
    """Four texts, each a call; tokens at four bytes, 512 out at most; what is cached is not counted."""
    with Chat(lambda candidate, n: "Final score: 1") as chat:
        grade(chat, run, "--dry-run", "--price", "1000,2000")
        assert not chat.seen and not (run / "judge.json").exists()
        grade(chat, run)
        contents = [m["content"] for _, _, request in chat.seen for m in request["messages"]]
        tokens = math.ceil(sum(len(content.encode()) for content in contents) / 4)
        line = capsys.readouterr().out
        assert "4 calls" in line and f"{tokens:,} tokens in" in line and "2,048 out" in line
        assert f"at most {(1000 * tokens + 2000 * 2048) / 1e6:.2f} at --price" in line
        grade(chat, run, "--dry-run")
        assert "0 calls (4 answers" in capsys.readouterr().out


def test_other_instructions_are_sent_and_known_apart(run, tmp_path):
    """--prompt FILE is the system message, and its hash stands beside the scores."""
    (tmp_path / "mine.txt").write_text("Grade it.")
    with Chat(lambda candidate, n: "Final score: 1") as chat:
        grade(chat, run)
        usual = data.read_json(run / "judge.json")["prompt"]
        chat.seen.clear()
        grade(chat, run, "--prompt", tmp_path / "mine.txt")
        assert {request["messages"][0]["content"] for _, _, request in chat.seen} == {"Grade it."}
        assert len(chat.seen) == 4 and data.read_json(run / "judge.json")["prompt"] != usual


# --- what becomes of it ---


def test_the_report_has_the_column_and_the_papers_figures(run, tmp_path, capsys):
    """Before and after; Table 1's 3.92 and Table 3's people beside the released protocol only."""
    config = {"protocol": "released", "preset": "neo125m", "published": "icu"}
    released = write_run(tmp_path / "other", TEXTS, [BEFORE, AFTER], **config)
    score = lambda candidate, n: f"Final score: {2 if candidate in BEFORE.values() else 6.5}"  # noqa: E731
    with Chat(score) as chat:
        grade(chat, run, released)
    report.main([str(run)])
    table = (run / "table.md").read_text()
    assert "GPT (0-10) ↑" in table and "| 2.00 |" in table and "| 6.50 |" in table
    assert "3.92" not in table and "graded by gpt-x" in capsys.readouterr().out
    people = {"before": {"mean": 1.0, "n": 2}, "after": {"mean": 7.0, "n": 2}}
    data.write_json(released / "people.json", people)
    report.main([str(released)])
    table = (released / "table.md").read_text()
    assert "| 6.50 | 7.00 |" in table and f"| 3.92 | {10 * 4.7 / 7:.2f} |" in table

    with Chat(lambda candidate, n: "Final score: 9") as chat:  # by another model: not side by side
        judge.main([str(released), "--judge", "gpt-y", "--base-url", chat.url])
    report.main([str(run), str(released), "--out", str(tmp_path / "both")])
    assert "GPT" not in (tmp_path / "both" / "table.md").read_text()
    assert "the graders differ: gpt-x" in capsys.readouterr().out


def test_purge_takes_the_judges_words_and_keeps_its_scores(run, tmp_path):
    """The cache of answers and the sheet go, judge.jsonl keeps its numbers, and no text is left."""
    with Chat(lambda candidate, n: f"It says {candidate}.\nFinal score: 3") as chat:
        grade(chat, run)
    judge.main(["--sheet", str(run)])
    purge.main([str(run)])
    assert not caches(tmp_path) and not (run / "sheet.html").exists()
    assert (run / "sheet-key.json").exists()
    rows = data.read_jsonl(run / "judge.jsonl")
    assert [(row["score"], row["answer"]) for row in rows] == [(3, None)] * 4
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"Harbour Lane" not in path.read_bytes(), path
    with pytest.raises(ValueError, match="redacted"):
        judge.main([str(run), *HERE])


# --- agreement ---


@pytest.mark.parametrize("seed", range(5))
def test_correlations_and_kappa_are_their_formulas(seed):
    """Ties included: numpy's r, that of the ranks, and 1 - seen / expected squared disagreement."""
    drawn = np.random.default_rng(seed)
    x, y = drawn.integers(1, 9, (2, 12))
    ranks = [[(v < a).sum() + ((v == a).sum() + 1) / 2 for a in v] for v in (x, y)]
    exactly = lambda value: pytest.approx(value, abs=1e-12)  # noqa: E731
    assert judge.pearson(list(x), list(y)) == exactly(np.corrcoef(x, y)[0, 1])
    assert judge.spearman(list(x), list(y)) == exactly(np.corrcoef(*ranks)[0, 1])
    kappa = 1 - ((x - y) ** 2).mean() / ((x[:, None] - y[None]) ** 2).mean()
    human, machine = ([10 * (grade - 1) / 7 for grade in grades.tolist()] for grades in (x, y))
    assert judge.quadratic_kappa(human, machine) == exactly(kappa)


def test_alpha_is_krippendorffs_published_example():
    """Krippendorff 2011, example C: four observers, twelve units, five grades, gaps; 0.815."""
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [
        [int(grade) for grade in unit if grade != "."] for unit in zip(*observers, strict=True)
    ]
    assert judge.krippendorff_alpha(units) == pytest.approx(0.815, abs=0.0005)


def test_alpha_is_its_definition_by_loops():
    """Pairs within units against all pairs of grades, with the ordinal distance written out."""
    drawn = random.Random(3)
    units = [[drawn.randint(1, 8) for _ in range(drawn.randint(0, 4))] for _ in range(15)]
    paired = [unit for unit in units if len(unit) > 1]
    every = [grade for unit in paired for grade in unit]

    def distance(a, b):
        low, high = min(a, b), max(a, b)
        between = sum(every.count(g) for g in range(low, high + 1))
        return (between - (every.count(low) + every.count(high)) / 2) ** 2

    def disagreement(grades):  # each with each other
        pairs = [(a, b) for i, a in enumerate(grades) for j, b in enumerate(grades) if i != j]
        return sum(distance(a, b) for a, b in pairs) / (len(grades) - 1)

    alpha = 1 - sum(map(disagreement, paired)) / disagreement(every)
    assert judge.krippendorff_alpha(units) == pytest.approx(alpha, abs=1e-12)


def test_pearson_of_the_papers_table_3_is_the_papers():
    """Section 5.8: 0.89, which is that of the twelve pairs of means."""
    people = [3.1, 3.7, 1.1, 5.7, 1.8, 3.1, 1.4, 4.8, 1.5, 3.2, 1.1, 4.7]
    gpt = [3.75, 3.08, 1.05, 3.92, 2.72, 3.63, 1.26, 4.33, 2.11, 3.65, 1.00, 4.40]
    assert judge.pearson(people, gpt) == pytest.approx(0.89, abs=0.005)


def test_what_has_no_value_is_none():
    """No grades, one grade, all the same."""
    for measure in (judge.pearson, judge.spearman, judge.quadratic_kappa):
        assert measure([], []) is measure([3], [3]) is measure([3, 3], [3, 3]) is None
    assert judge.krippendorff_alpha([[1], [2], []]) is None
    assert judge.krippendorff_alpha([[4, 4], [4, 4]]) is None
    assert judge.mean_of([None, 1.0])["interval"] is None


def test_the_interval_is_that_of_the_mean():
    """Near the normal one for many values, and the same each time."""
    values = np.random.default_rng(0).normal(5, 2, 400).tolist()
    low, high = judge.mean_of(values)["interval"]
    half = 1.96 * statistics.stdev(values) / 20
    assert low == pytest.approx(statistics.fmean(values) - half, abs=0.05)
    assert high == pytest.approx(statistics.fmean(values) + half, abs=0.05)
    assert judge.mean_of(values)["interval"] == [low, high]


# --- experiment.py ---


def test_a_judge_is_looked_for_before_the_work_and_asked_before_the_report(monkeypatch, tmp_path):
    """bash run.sh PRESET --judge MODEL with flags of its own; a comparison judges every run of it."""
    ran = []
    monkeypatch.setattr(
        experiment.commands, "run", lambda argv, environment, quiet=False: ran.append(argv[1:]) or 0
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "chdir", lambda folder: None)
    url = "http://localhost:1/v1"
    words = ["--judge", "m", "--judge-base-url", url, "--send-texts", "--lr", "1e-5"]
    experiment.main(["neo125m", "--device", "cpu", *words])
    own = ["--judge", "m", "--base-url", url, "--send-texts"]
    names, graded = [argv[0] for argv in ran], "runs/neo125m-set0-icu-paper"
    asked = [argv[1:] for argv in ran if argv[0] == "evals/judge.py"]
    assert asked == [[*own, "--dry-run"], [graded, *own]]
    assert names.index("evals/judge.py") < names.index("icu.py")
    assert names[-2:] == ["evals/judge.py", "evals/report.py"]
    for bad, due in (
        (["--judge", "m", "--redact"], "--redact"),
        (["--judge-base-url", "x"], "MODEL"),
    ):
        with pytest.raises(ValueError, match=due):
            experiment.main(["tiny", *bad])
