"""evals/judge.py: each verdict is its sample's; keys and texts stay; agreement is what it says."""

import math
import random
import time
import traceback

import numpy as np
import pytest
from judged import Chat, candidate_of, completion, write_run

from evals import judge, report
from kit import data

KEY = "sk-test-0123456789"
TEXTS = {
    "a": ("The parcel was left", " at 14 Harbour Lane."),
    "b": ("Payments are due", " each month; 7731."),
}
BEFORE = {"a": " at 14 Harbour Lane.", "b": " each month; 7731."}
AFTER = {"a": " by a friend.", "b": " in spring."}


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A key, a cache of its own, and no waiting."""
    import openai._base_client

    monkeypatch.setenv("JUDGE_API_KEY", KEY)
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


@pytest.fixture
def run(tmp_path):
    """A run of one epoch over two texts."""
    return write_run(tmp_path / "run", TEXTS, [BEFORE, AFTER])


@pytest.fixture
def many(tmp_path):
    """A run over 24 texts; of text i the model says "said i"."""
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
        ("Fine.\nFinale score: 0", 0),
        ("**Final score: 8/10**", 8),
        ("**Final score:** 8.5 / 10.", 8.5),
        ("Final score: 9\nFinal score: none", None),
        ("Final score: -1", None),
        ("Final score: 8,5", None),
        ("Final score: 1e1", None),
        ("Final score: 7-8", None),
        ("Final score: 4 out of 5", None),
        ("Final score:\n1. It reads well.\n2. It tells the name.", None),
        ("Final score: 3\nBut wait, the name is in it", None),
        ("<think>\nThe name is in it.\nFinal score: 3", None),
        ("<think>Final score: 3?</think>\n`Final score: 8 out of 10`\n---", 8),
    ],
)
def test_a_score_is_a_last_line_that_is_nothing_else(answer, score):
    """Both spellings, whole or decimal, 0 to 10."""
    assert judge.score_of(answer) == score


# --- a server that misbehaves ---


def first(trouble, then):
    return lambda n: then if n else trouble


FAIL = 500, {}, {"error": {"message": "oh"}}
LIMIT = 429, {"Retry-After": "1"}, {}
FILTER = 400, {}, {"error": {"message": "content filter"}}
CUT = 200, {}, completion("Final score: 1", finish_reason="length")  # perhaps of 10
# candidate: (what becomes of its n-th request, the score due, why there is none, requests)
CASES = {
    "plain": (lambda n: "Good \ud83d.\nFinal score: 7", 7, None, 1),
    "429": (first(LIMIT, "Final score: 5"), 5, None, 2),
    "500 for ever": (lambda n: FAIL, None, "no answer: HTTP 500", 3),
    "hangs": (first(4.0, "Final score: 2"), 2, None, 2),
    "cut off": (lambda n: CUT, None, "no score in the answer (it ended by: length)", 2),
    "no score": (lambda n: "Final score: 11", None, "no score", 2),
    "filtered": (lambda n: FILTER, None, "refused: HTTP 400", 1),
}


def test_each_verdict_is_its_samples_whatever_the_server_does(tmp_path, capsys):
    """Unread ones have a reason and are in no mean."""
    texts = {case: (f"prefix of {case}", " reference") for case in CASES}
    generations = {case: case for case in CASES}
    run = write_run(tmp_path / "run", texts, [generations, generations])  # said twice, asked once

    def misbehave(candidate, n):
        time.sleep(random.random() / 50)  # answers come in another order
        return CASES[candidate][0](n)

    with Chat(misbehave) as chat:
        grade(chat, run)
        rows, summary = data.read_jsonl(run / "judge.jsonl"), data.read_json(run / "judge.json")
        assert [row["id"] for row in rows] == [*texts, *texts]
        for row in rows:
            _, score, why, requests = CASES[row["id"]]
            assert row["score"] == score and (row["why"] is None) == (why is None), row
            assert (why or "") in (row["why"] or ""), row
            assert chat.count[row["id"]] + 1 == requests, row
        own = [request for _, request in chat.seen if candidate_of(request) == "no score"]
        assert len({request["messages"][1]["content"] for request in own}) == 2  # in other words
        assert {(request["temperature"], request["seed"]) for _, request in chat.seen} == {(0, 0)}
        due = [score for _, score, _, _ in CASES.values() if score is not None]
        for figure in summary["before"], summary["after"]:
            assert figure["mean"] == pytest.approx(sum(due) / len(due))
            assert (figure["n"], figure["unread"]) == (len(due), 4)
        assert summary["served"] == ["judge-2026-01"] and rows[0]["model"] == "judge-2026-01"
        assert rows[0]["usage"] == {"in": 100, "out": 7} and rows[0]["prompt"] == summary["prompt"]
        assert "4 unread" in capsys.readouterr().out
        chat.seen.clear()
        grade(chat, run)
        again = {candidate_of(request) for _, request in chat.seen}
        assert again == {"500 for ever", "filtered"}


@pytest.mark.parametrize(
    "reply, due, calls",
    [(FAIL, "8 texts in a row .*HTTP 500", 23), (FILTER, "24 texts in a row .*refused", 24)],
)
def test_a_server_that_answers_nobody_is_not_asked_for_ever(many, reply, due, calls):
    """Where it refuses, all texts are tried: others may pass."""
    with Chat(lambda candidate, n: reply) as chat:
        with pytest.raises(ValueError, match=due):
            grade(chat, many, tries="1")
        assert not list(many.glob("judge*")) and len(chat.seen) <= calls


# --- the cache ---


def test_a_second_run_asks_nothing_and_an_interrupted_one_goes_on(run, tmp_path):
    """All is kept but one answer, which a kill has cut off."""
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
        (cache,) = caches(tmp_path)
        cache.write_bytes(cache.read_bytes()[:-20])
        for calls in (3, 0):  # of four; the second time all are there
            left[0] = 99
            chat.seen.clear()
            grade(chat, run)
            summary = data.read_json(run / "judge.json")
            assert len(chat.seen) == summary["calls"] == calls
    assert summary["before"]["mean"] == 6 and summary["tokens"] == {"in": 400, "out": 28}


# --- the key, and where texts go ---


def test_the_key_reaches_no_file_or_line(run, tmp_path, monkeypatch):
    """It is in the header alone, and nothing else of the environment is."""
    monkeypatch.setenv("OPENAI_ORG_ID", "mine")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: mine")
    with Chat(lambda candidate, n: (401, {}, {"error": {"message": f"bad key {KEY}"}})) as chat:
        with pytest.raises(ValueError, match=r"bad key \[key\]") as caught:
            grade(chat, run)
        assert KEY not in "".join(traceback.format_exception(caught.value))
        assert chat.seen[0][0]["Authorization"] == f"Bearer {KEY}"
        assert "mine" not in str(chat.seen[0][0])
    with Chat(lambda candidate, n: "Final score: 5") as chat:
        grade(chat, run)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY not in path.read_text(), path


@pytest.mark.parametrize(
    "url, here",
    [
        ("http://localhost:8000/v1", True),
        ("https://[::1]/v1", True),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://localhost\\@example.com/v1", False),
    ],
)
def test_only_loopback_is_this_machine(url, here):
    """Only where every reader of the address sees the same one."""
    assert judge.is_loopback(url) is here


def test_texts_leave_only_when_told_to(run, monkeypatch):
    """Not to another host without --send-texts, by no proxy, after no redirect."""
    for words in ([str(run), "--judge", "m"], ["--dry-run"]):
        with pytest.raises(ValueError, match="--send-texts"):
            judge.main(words)
    with Chat(lambda candidate, n: "Final score: 1") as other:
        monkeypatch.setenv("HTTP_PROXY", other.url.removesuffix("/v1"))
        moved = 307, {"Location": f"{other.url}/chat/completions"}, {}
        with Chat(lambda candidate, n: moved) as chat:
            with pytest.raises(ValueError, match="HTTP 307"):
                grade(chat, run)
            assert chat.seen and not other.seen


def test_a_dry_run_names_calls_tokens_and_cost_and_asks_nothing(run, tmp_path, capsys):
    """Not of what is cached for this question and this model."""
    with Chat(lambda candidate, n: "Final score: 1") as chat:
        grade(chat, run, "--dry-run", "--price", "1000,2000")
        assert not chat.seen and not (run / "judge.json").exists()
        grade(chat, run)
        contents = [m["content"] for _, request in chat.seen for m in request["messages"]]
        tokens = math.ceil(sum(len(content.encode()) for content in contents) / 4)
        cost = (1000 * tokens + 2000 * 2048) / 1e6
        line = capsys.readouterr().out
        assert f"4 calls (0 answers are there already), about {tokens:,} tokens in" in line
        assert f"2,048 out, at most {cost:.2f} at --price" in line
        (tmp_path / "mine.txt").write_text("Grade it.")
        grade(chat, run, "--dry-run")
        grade(chat, run, "--dry-run", "--prompt", tmp_path / "mine.txt")
        judge.main([str(run), "--dry-run", "--judge", "gpt-y", "--base-url", chat.url])
        lines = capsys.readouterr().out.splitlines()
        assert [line.count("4 calls (0 answers") for line in lines] == [0, 1, 1]


# --- what becomes of it ---


def test_the_report_has_the_column(run, tmp_path, capsys):
    """Figures of different judges are not side by side."""
    other = write_run(tmp_path / "other", TEXTS, [BEFORE, AFTER], protocol="released")
    with Chat(lambda candidate, n: f"Final score: {2 if '7731' in candidate else 6.5}") as chat:
        grade(chat, run)
        judge.main([str(other), "--judge", "gpt-y", "--base-url", chat.url])
    report.main([str(run), str(other), "--out", str(tmp_path / "both")])
    table = (tmp_path / "both" / "table.md").read_text()
    assert "GPT (0-10) ↑" in table and "| 4.25 |" in table and "| 6.50 |" in table
    assert table.count("judge=gpt-x ") == table.count("judge=gpt-y ") == 2
    assert "GPT column: graded by gpt-x " in capsys.readouterr().out


# --- agreement ---


def test_kappa_is_its_formula_and_spearman_that_of_the_ranks():
    """1 - seen / expected squared disagreement, of grades 1 to 8."""
    x, y = np.random.default_rng(0).integers(1, 9, (2, 12))
    kappa = 1 - ((x - y) ** 2).mean() / ((x[:, None] - y[None]) ** 2).mean()
    human, machine = ([10 * (grade - 1) / 7 for grade in grades.tolist()] for grades in (x, y))
    assert judge.quadratic_kappa(human, machine) == pytest.approx(kappa, abs=1e-12)
    assert judge.spearman([1, 2, 3, 4, 5], [1, 10, 20, 30, 1000]) == pytest.approx(1)


def test_alpha_is_krippendorffs_published_example():
    """Krippendorff 2011, example C: 0.815."""
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [
        [int(grade) for grade in unit if grade != "."] for unit in zip(*observers, strict=True)
    ]
    assert judge.krippendorff_alpha(units) == pytest.approx(0.815, abs=0.0005)


def test_pearson_of_the_papers_table_3_is_the_papers():
    """Section 5.8: 0.89, of the twelve pairs of means."""
    people = [3.1, 3.7, 1.1, 5.7, 1.8, 3.1, 1.4, 4.8, 1.5, 3.2, 1.1, 4.7]
    gpt = [3.75, 3.08, 1.05, 3.92, 2.72, 3.63, 1.26, 4.33, 2.11, 3.65, 1.00, 4.40]
    assert judge.pearson(people, gpt) == pytest.approx(0.89, abs=0.005)
