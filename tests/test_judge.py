"""evals/judge.py: each verdict is its sample's, whatever the server does; keys and texts stay; agreement is what it says.

python -m pytest tests/test_judge.py -q
"""

import importlib.util
import json
import math
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
from conftest import ROOT, _make_model, _make_tokenizer
from judged import Chat, candidate_of, completion, write_pairs, write_run

import experiment
from evals import judge, report
from kit import agreement, ask, data, flags, purge

KEY = "sk-test-0123456789"
TEXTS = {
    "a": ("The parcel was left", " at 14 Harbour Lane."),
    "b": ("Payments are due", " each month; 7731."),
}
BEFORE = {"a": " at 14 Harbour Lane.", "b": " each month; 7731."}
AFTER = {"a": " by a friend.", "b": " in spring."}


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
    return write_run(
        tmp_path / "run", write_pairs(tmp_path / "pairs.jsonl", TEXTS), [BEFORE, AFTER]
    )


def grade(chat, *words):
    judge.main(
        [
            *map(str, words),
            "--judge",
            "gpt-x",
            "--base-url",
            chat.url,
            "--patience",
            "2",
            "--tries",
            "3",
        ]
    )


def refused(words, capsys):
    """The one line with which evals/judge.py refuses."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["evals/judge.py"])
        flags.run_cli(lambda: judge.main([str(word) for word in words]))
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.err.count("\n") == 1 and said.err.startswith("error: "), (
        said.err
    )
    return said.err


# --- reading a score ---


@pytest.mark.parametrize(
    "answer, score",
    [
        ("Fine.\nFinal score: 7", 7),
        ("Fine.\nFinale score: 7", 7),
        ("final Score : 0", 0),
        ("**Final score: 8/10**", 8),
        ("**Final score:** 8.5 / 10.", 8.5),
        ("Final score: 10", 10),
        ("Final score: 10/10", 10),
        ("Final score: 3\nOn reflection:\nFinal score: 9", 9),
        ("Final score: 9\nFinal score: none", None),
        ("Final score: 11", None),
        ("Final score: 10.5", None),
        ("Final score: 100", None),
        ("Final score: -1", None),
        ("Final score: 8/5", None),
        ("Final score: 8/100", None),
        ("Final score: 8,5", None),
        ("Final score: 8.5.2", None),
        ("Final score: X", None),
        ("8/10", None),
        ("", None),
        (None, None),
    ],
)
def test_a_score_is_the_last_one_named_and_from_0_to_10(answer, score):
    """Both spellings, whole or decimal, with and without /10; what is no such number is no score."""
    assert judge.score_of(answer) == score


def test_reading_takes_no_longer_for_a_long_answer():
    """A megabyte that nearly matches everywhere: a pattern that goes back would not end here."""
    marks, stars, spaces = (
        "Final score: " * 80_000,
        "final score" + "*" * 10**6,
        "Final score:" + " " * 10**6,
    )
    for hostile in (marks, stars, spaces, "8." * 500_000):
        assert judge.score_of(hostile) is None


# --- a server that misbehaves ---


def after(times, trouble, then):
    return lambda n: trouble if n < times else then


FAIL = 500, {}, {"error": {"message": "oh"}}
LIMIT = 429, {}, {"error": {"message": "slow down"}}
# candidate: (what becomes of its n-th request, the score due, a part of why there is none, how often it is asked)
CASES = {
    "plain": (lambda n: "Good.\nFinal score: 7", 7, None, 1),
    "decimal": (lambda n: "Finale score: 6.5", 6.5, None, 1),
    "429 that says how long": (
        after(1, (429, {"Retry-After": "1"}, {}), "Final score: 5"),
        5,
        None,
        2,
    ),
    "429 that does not": (after(2, LIMIT, "Final score: 4"), 4, None, 3),
    "500 twice": (after(2, FAIL, "Final score: 3"), 3, None, 3),
    "500 for ever": (lambda n: FAIL, None, "no answer: HTTP 500", 3),
    "hangs": (after(1, 6.0, "Final score: 2"), 2, None, 2),
    "is cut off": (after(1, None, "Final score: 1.5"), 1.5, None, 2),
    "a page": (
        lambda n: (200, {"Content-Type": "text/html"}, b"<html>log in</html>"),
        None,
        "no chat completion",
        2,
    ),
    "no JSON": (lambda n: (200, {}, b"<html>log in</html>"), None, "no chat completion", 2),
    "no choice": (
        lambda n: (200, {}, completion("") | {"choices": []}),
        None,
        "no chat completion",
        2,
    ),
    "strange fields": (
        lambda n: (200, {}, {"choices": 3, "usage": "x"}),
        None,
        "no chat completion",
        2,
    ),
    "empty": (after(1, (200, {}, completion(None)), "Final score: 8"), 8, None, 2),
    "out of range": (lambda n: "Final score: 11", None, "no score", 2),
    "two scores": (lambda n: "Final score: 3\nNo:\nFinal score: 9", 9, None, 1),
    "of ten": (lambda n: "**Final score: 8/10**", 8, None, 1),
    "bare": (after(1, "8/10", "Final score: 2/10"), 2, None, 2),
    "1 MB": (lambda n: "x" * 10**6 + "\nFinal score: 4.25", 4.25, None, 1),
    "half a pair": (
        lambda n: (200, {}, json.dumps(completion("\ud800 Final score: 1")).encode()),
        1,
        None,
        1,
    ),
    "refused": (lambda n: (400, {}, {"error": {"message": "content filter"}}), None, "HTTP 400", 1),
}


def misbehave(candidate, n):
    time.sleep(random.random() / 50)  # answers come in another order
    return CASES[candidate][0](n)


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory):
    """A run whose every text is a case; its one epoch said the same as before."""
    root = tmp_path_factory.mktemp("spoilt")
    pairs = write_pairs(
        root / "pairs.jsonl", {f"id {case}": (f"prefix of {case}", " reference") for case in CASES}
    )
    said = {f"id {case}": case for case in CASES}
    return write_run(root / "run", pairs, [said, said])


def test_each_verdict_is_its_samples_whatever_the_server_does(spoilt, capsys):
    """Scores stand with their ids, unread ones have a reason and are in no mean; it waits as it is told."""
    with Chat(misbehave) as chat:
        grade(chat, spoilt)
        rows = data.read_jsonl(spoilt / "judge.jsonl")
        assert [(row["id"], row["epoch"]) for row in rows] == [
            (f"id {c}", e) for e in (0, 1) for c in CASES
        ]
        for row in rows:
            _, score, why, count = CASES[row["id"].removeprefix("id ")]
            assert (
                row["score"] == score
                and (row["why"] is None) == (why is None)
                and (why or "") in (row["why"] or "")
            )
            assert len(chat.asked(row["id"].removeprefix("id "))) == count, row[
                "id"
            ]  # equal before and after: once
        first, second = chat.asked("429 that says how long")
        assert second - first >= 1
        assert [
            request
            for _, _, request in chat.seen
            if request["temperature"] != 0 or request["seed"] != 0
        ] == []
        wordings = [
            r["messages"][1]["content"]
            for _, _, r in chat.seen
            if candidate_of(r) == "out of range"
        ]
        assert len(set(wordings)) == 2
        due = [score for _, score, _, _ in CASES.values() if score is not None]
        found = data.read_json(spoilt / "judge.json")
        for when in ("before", "after"):
            assert found[when]["mean"] == pytest.approx(sum(due) / len(due))
            assert (found[when]["n"], found[when]["unread"]) == (len(due), len(CASES) - len(due))
        assert found["served"] == ["judge-2026-01"] and rows[0]["model"] == "judge-2026-01"
        assert rows[0]["usage"] == {"in": 100, "out": 7} and rows[0]["prompt"] == found["prompt"]
        assert "unread" in capsys.readouterr().out

        chat.seen.clear()  # again: only those that have no answer
        grade(chat, spoilt)
        again = {candidate_of(request) for _, _, request in chat.seen}
        assert again == {
            "500 for ever",
            "a page",
            "no JSON",
            "no choice",
            "strange fields",
            "refused",
        }


def test_eight_calls_at_a_time(tmp_path):
    """As many as WORKERS are under way at once, and never more."""
    texts = {str(i): (f"p{i}", f" s{i}") for i in range(24)}
    run = write_run(
        tmp_path / "run",
        write_pairs(tmp_path / "p.jsonl", texts),
        [{i: f"said {i}" for i in texts}],
    )
    now, most = [], []

    def busy(candidate, n):
        now.append(candidate)
        most.append(len(now))
        time.sleep(0.1)
        now.remove(candidate)
        return f"Final score: {int(candidate.removeprefix('said ')) % 11}"

    with Chat(busy) as chat:
        grade(chat, run)
    assert max(most) == 8
    assert [row["score"] for row in data.read_jsonl(run / "judge.jsonl")] == [
        i % 11 for i in range(24)
    ]


# --- the cache ---


def test_a_second_run_asks_nothing_and_an_interrupted_one_goes_on(run, tmp_path, capsys):
    """The server refuses after two answers: they are kept, but for a line whose end a kill has cut off."""
    left = [2]

    def behave(candidate, n):
        left[0] -= 1
        if left[0] >= 0:
            return "Final score: 6"
        time.sleep(0.3)
        return 401, {}, {}

    with Chat(behave) as chat:
        words = [run, "--judge", "gpt-x", "--base-url", chat.url]
        assert "refuses gpt-x: HTTP 401" in refused(words, capsys)
        assert not (run / "judge.json").exists() and not (run / "judge.jsonl").exists()
        (cache,) = (tmp_path / "cache" / "judge").iterdir()
        assert len(cache.read_text().splitlines()) == 2 and cache.stat().st_mode & 0o777 == 0o600
        cache.write_bytes(cache.read_bytes()[:-20])
        for asked in (3, 0):  # of four; the second time all are there
            left[0] = 99
            chat.seen.clear()
            grade(chat, run)
            assert len(chat.seen) == asked == data.read_json(run / "judge.json")["calls"]
    found = data.read_json(run / "judge.json")
    assert found["before"]["mean"] == found["after"]["mean"] == 6 and found["tokens"] == {
        "in": 400,
        "out": 28,
    }


def test_ctrl_c_waits_for_no_answer_and_keeps_what_is_there(tmp_path):
    """Three answers, then a server that hangs: the command ends at once, and nothing looks like a result."""
    texts = {str(i): (f"p{i}", f" s{i}") for i in range(12)}
    run = write_run(
        tmp_path / "run",
        write_pairs(tmp_path / "p.jsonl", texts),
        [{i: f"said {i}" for i in texts}],
    )
    with Chat(
        lambda candidate, n: (
            "Final score: 2" if candidate in ("said 0", "said 1", "said 2") else 600
        )
    ) as chat:
        words = [sys.executable, "evals/judge.py", str(run), "--judge", "m", "--base-url", chat.url]
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (a job in the background ignores it)
        process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=heard)
        kept = lambda: sum(  # noqa: E731
            len(f.read_text().splitlines()) for f in (tmp_path / "cache" / "judge").glob("*")
        )  # noqa: E731
        while len(chat.seen) < 3 + judge.WORKERS or kept() < 3:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 130  # half of what an answer would take
    (cache,) = (tmp_path / "cache" / "judge").iterdir()
    assert len(cache.read_text().splitlines()) == 3 and not list(run.glob("judge*"))


def test_the_key_of_the_cache_is_everything_that_is_sent():
    """Another model, address, text, wording or instruction is another request."""
    args = judge.parse_args(["--dry-run"])
    triple = judge.Triple("p", "r", "c")
    keys = {ask.key_of("u", judge.request_for(triple, judge.FIRST, args)) for _ in range(2)}
    keys |= {ask.key_of("v", judge.request_for(triple, judge.FIRST, args))}
    keys |= {ask.key_of("u", judge.request_for(triple, judge.AGAIN, args))}
    keys |= {
        ask.key_of("u", judge.request_for(triple._replace(**{f: "x"}), judge.FIRST, args))
        for f in triple._fields
    }
    for name in ("judge", "instructions"):
        before, _ = getattr(args, name), setattr(args, name, "x")
        keys |= {ask.key_of("u", judge.request_for(triple, judge.FIRST, args))}
        setattr(args, name, before)
    assert len(keys) == 1 + 1 + 1 + 3 + 2


# --- the key, and where texts go ---


def test_the_key_reaches_no_file_line_or_error(run, tmp_path, capsys, monkeypatch):
    """Also where the server says it again: as answer, as model, as an error that ends the command or one sample."""
    echo = completion(f"You said {KEY}.\nFinal score: 5", model=f"model of {KEY}")
    with Chat(lambda candidate, n: (200, {}, echo)) as chat:
        grade(chat, run)
        assert chat.seen[0][1]["Authorization"] == f"Bearer {KEY}"  # it is sent, after all
        rows = data.read_jsonl(run / "judge.jsonl")
        assert (
            rows[0]["answer"].startswith("You said [key]") and rows[0]["model"] == "model of [key]"
        )
    for status in (401, 400, 500):
        with Chat(
            lambda candidate, n, status=status: (
                status,
                {},
                {"error": {"message": f"bad key {KEY}"}},
            )
        ) as chat:
            words = [str(run), "--judge", "other", "--base-url", chat.url, "--tries", "1"]
            if status == 401:  # with a traceback
                done = subprocess.run(
                    [sys.executable, "evals/judge.py", *words, "--debug"],
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                )
                said = done.stdout + done.stderr
                assert "Traceback" in said and "bad key [key]" in said
            else:
                said = refused(words, capsys)
            assert KEY not in said
    monkeypatch.setenv("JUDGE_API_KEY", f"{KEY}\nX: y")
    assert KEY not in refused([run, "--base-url", "http://localhost:9/v1"], capsys)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert KEY not in path.read_text(), path


@pytest.mark.parametrize(
    "url, here",
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://127.9.9.9:1/v1", True),
        ("http://[::1]:8000/v1", True),
        ("https://api.openai.com/v1", False),
        ("http://127.0.0.1.example.com/v1", False),
        ("http://localhost.example.com/v1", False),
        ("http://0.0.0.0:8000/v1", False),
        ("http://192.168.0.7:8000/v1", False),
        ("http://[::ffff:8.8.8.8]/v1", False),
    ],
)
def test_only_loopback_is_this_machine(url, here):
    """Names other than localhost are none, whatever they mean now."""
    ask.check_base_url(url)
    assert ask.is_loopback(url) is here


def test_a_localhost_that_is_elsewhere_is_not_here(monkeypatch):
    """What the name means is asked, not believed."""
    both = [(0, 0, 0, "", ("127.0.0.1", 0)), (0, 0, 0, "", ("8.8.8.8", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: both)
    assert not ask.is_loopback("http://localhost:1/v1")


def test_texts_leave_only_when_told_to(run, capsys, monkeypatch):
    """Not to another host without --send-texts, not by a proxy, not behind a redirect; and no key, no call."""
    assert "--send-texts" in refused([run, "--judge", "m"], capsys)
    assert "--send-texts" in refused(["--dry-run"], capsys)
    monkeypatch.delenv("JUDGE_API_KEY")
    assert "JUDGE_API_KEY" in refused([run, "--send-texts"], capsys)
    with Chat(lambda candidate, n: "Final score: 1") as other:
        monkeypatch.setenv("HTTP_PROXY", other.url.removesuffix("/v1"))
        moved = 307, {"Location": f"{other.url}/chat/completions"}, {}
        with Chat(lambda candidate, n: moved) as chat:
            assert "HTTP 307" in refused([run, "--base-url", chat.url], capsys)
            assert chat.seen and not other.seen


# --- the plan ---


def test_a_dry_run_names_calls_tokens_and_cost_and_asks_nothing(run, capsys):
    """Four texts, each a call; tokens at four bytes, 512 out at most; what is cached is not counted."""
    with Chat(lambda candidate, n: "Final score: 1") as chat:
        grade(chat, run, "--dry-run", "--price", "1000,2000")
        assert not chat.seen and not (run / "judge.json").exists()
        said = capsys.readouterr().out
        args = judge.parse_args(["--dry-run"])
        tokens = 0
        for epoch in (BEFORE, AFTER):
            for id, (prefix, suffix) in TEXTS.items():
                request = judge.request_for(
                    judge.Triple(prefix, suffix, epoch[id]), judge.FIRST, args
                )
                tokens += (
                    sum(len(message["content"].encode()) for message in request["messages"]) / 4
                )
        tokens = math.ceil(tokens)
        assert "4 calls" in said and f"{tokens:,} tokens in" in said and "2,048 out" in said
        assert f"at most {(1000 * tokens + 2000 * 2048) / 1e6:.2f} at --price" in said
        grade(chat, run)
        grade(chat, run, "--dry-run")
        assert "0 calls (4 answers" in capsys.readouterr().out


# --- what is refused ---


@pytest.mark.parametrize(
    "behaviour, due", [(FAIL, "8 samples in a row"), ((400, {}, {}), "not one of 24 texts")]
)
def test_a_server_that_answers_nobody_is_not_asked_for_ever(tmp_path, capsys, behaviour, due):
    """Where it fails it is asked for a few samples only; where it refuses each, for all, as it may do for some."""
    texts = {str(i): (f"p{i}", f" s{i}") for i in range(24)}
    run = write_run(
        tmp_path / "run",
        write_pairs(tmp_path / "p.jsonl", texts),
        [{i: f"said {i}" for i in texts}],
    )
    with Chat(lambda candidate, n: behaviour) as chat:
        said = refused([run, "--judge", "m", "--base-url", chat.url, "--tries", "1"], capsys)
        assert due in said and not list(run.glob("judge*"))
        assert len(chat.seen) == 24 if "not one" in due else len(chat.seen) < 24


def test_a_server_that_is_not_there_ends_it(run, capsys):
    """One line, and no file that looks like a result."""
    url = f"http://127.0.0.1:{experiment.free_port()}/v1"
    said = refused([run, "--base-url", url, "--tries", "2"], capsys)
    assert (
        "not one of 4 texts has an answer: no answer: " in said
        and not (run / "judge.json").exists()
    )


def test_bad_input_is_one_line_before_any_call(run, tmp_path, capsys):
    """Runs without texts, changed pairs, files that are something else, flags that do not go together."""
    pairs = tmp_path / "pairs.jsonl"
    hidden = [{id: None for id in TEXTS}] * 2
    redacted = write_run(tmp_path / "redacted", pairs, hidden, redact=True)
    here = ["--base-url", "http://localhost:9/v1"]
    for words, due in [
        ([redacted, *here], "redacted"),
        (["--sheet", redacted], "redacted"),
        ([tmp_path / "none", *here], "no such folder"),
        (["--sheet"], "name a run folder"),
        ([], "name a run folder"),
        (["--sheet", run, "--ratings", "x.csv"], "one of them"),
        (["--ratings", run], "ratings-NAME.csv"),
        ([run, *here, "--prompt", tmp_path / "none"], "no such file"),
        ([run, *here, "--price", "1"], "IN,OUT"),
        ([run, "--base-url", "ftp://localhost"], "not an address"),
        ([run, "--base-url", "http://localhost@example.com/v1"], "not an address"),
        ([run, "--base-url", "http://localhost\\@example.com/v1"], "not an address"),
    ]:
        assert due in refused(words, capsys), words
    data.write_jsonl(run / "judge.jsonl", [{"mine": 1}])
    assert "not what this command writes" in refused([run, *here], capsys)
    (run / "judge.jsonl").unlink()
    write_pairs(pairs, TEXTS | {"a": ("The parcel was left", " elsewhere.")})
    assert "has changed" in refused([run, *here], capsys)


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


def test_the_report_has_the_column_and_the_papers_figure_under_the_released_protocol(
    run, tmp_path, capsys
):
    """Before and after; Table 1's 3.92 and Table 3's people only beside the released protocol, and of one judge."""
    config = {"protocol": "released", "preset": "neo125m", "published": "icu"}
    released = write_run(tmp_path / "other", tmp_path / "pairs.jsonl", [BEFORE, AFTER], **config)
    with Chat(
        lambda candidate, n: f"Final score: {2 if candidate in BEFORE.values() else 6.5}"
    ) as chat:
        grade(chat, run, released)
    report.main([str(run)])
    table = (run / "table.md").read_text()
    assert (
        "GPT (0-10) ↑" in table
        and "| 2.00 |" in table
        and "| 6.50 |" in table
        and "3.92" not in table
    )
    assert "graded by gpt-x" in capsys.readouterr().out
    people = {"before": {"mean": 1.0, "n": 2}, "after": {"mean": 7.0, "n": 2}}
    data.write_json(released / "people.json", people)
    report.main([str(released)])
    table = (released / "table.md").read_text().splitlines()
    ours, theirs = (
        next(line for line in table if line.startswith(start))
        for start in ("| icu", "| published: icu")
    )
    assert "| 6.50 | 7.00 |" in ours and f"| 3.92 | {10 * 4.7 / 7:.2f} |" in theirs

    with Chat(
        lambda candidate, n: "Final score: 9"
    ) as chat:  # graded by another model: not side by side
        judge.main([str(released), "--judge", "gpt-y", "--base-url", chat.url])
    report.main([str(run), str(released), "--out", str(tmp_path / "both")])
    assert "GPT" not in (tmp_path / "both" / "table.md").read_text()
    assert "the graders differ: gpt-x" in capsys.readouterr().out
    too_high = '{"judge": "x", "prompt": "y", "before": {"mean": 11, "n": 1}, "after": {}}'
    for damage in ('{"judge": "x"}', "[]", too_high):
        (run / "judge.json").write_text(damage)
        with pytest.raises(ValueError, match="judge.json"):
            report.main([str(run)])


def test_purge_takes_the_judges_words_and_keeps_its_scores(run, tmp_path, capsys):
    """The cache of answers and the sheet go, judge.jsonl keeps its numbers; nothing else in the folder is touched."""
    with Chat(lambda candidate, n: f"It says {candidate}.\nFinal score: 3") as chat:
        grade(chat, run)
    judge.main(["--sheet", str(run)])
    (cache,) = (tmp_path / "cache" / "judge").iterdir()
    assert (
        (run / "sheet.html").stat().st_mode & 0o777
        == (run / "sheet-key.json").stat().st_mode & 0o777
        == 0o600
    )
    purge.main([str(run), "--dry-run"])
    assert cache.exists() and (run / "sheet.html").exists()
    purge.main([str(run)])
    assert (
        not cache.exists()
        and not (run / "sheet.html").exists()
        and (run / "sheet-key.json").exists()
    )
    rows = data.read_jsonl(run / "judge.jsonl")
    assert [(row["score"], row["answer"]) for row in rows] == [(3, None)] * 4
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        assert b"Harbour Lane" not in path.read_bytes(), path
    capsys.readouterr()
    assert "redacted" in refused([run, "--base-url", "http://localhost:9/v1"], capsys)


def test_purging_all_caches_takes_answers(run, tmp_path):
    """bash run.sh purge --all-caches knows them too."""
    with Chat(lambda candidate, n: "Final score: 3") as chat:
        grade(chat, run)
    purge.main(["--all-caches"])
    assert list((tmp_path / "cache" / "judge").iterdir()) == []


# --- agreement ---


def random_grades(seed, n=12):
    drawn = random.Random(seed)
    return ([drawn.randint(1, 8) for _ in range(n)] for _ in range(2))


@pytest.mark.parametrize("seed", range(20))
def test_correlations_and_kappa_are_those_of_scipy_and_scikit_learn(seed):
    """Ties included."""
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    x, y = random_grades(seed)
    assert agreement.pearson(x, y) == pytest.approx(stats.pearsonr(x, y)[0])
    assert agreement.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])
    kappa = metrics.cohen_kappa_score(x, y, weights="quadratic", labels=range(1, 9))
    assert agreement.quadratic_kappa(x, y) == pytest.approx(kappa)


def test_alpha_is_krippendorffs_published_example():
    """Krippendorff 2011, example C: four observers, twelve units, five grades, gaps; ordinal alpha 0.815."""
    observers = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]
    units = [
        [int(grade) for grade in unit if grade != "."] for unit in zip(*observers, strict=True)
    ]
    assert agreement.krippendorff_alpha(units) == pytest.approx(0.815, abs=0.0005)


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

    seen = chance = 0.0
    for unit in paired:
        for i, a in enumerate(unit):
            seen += sum(distance(a, b) for j, b in enumerate(unit) if i != j) / (len(unit) - 1)
    for i, a in enumerate(every):
        chance += sum(distance(a, b) for j, b in enumerate(every) if i != j) / (len(every) - 1)
    assert agreement.krippendorff_alpha(units) == pytest.approx(1 - seen / chance)


def test_pearson_of_the_papers_table_3_is_the_papers():
    """Section 5.8: 0.89, which is that of the twelve pairs of means."""
    people = [3.1, 3.7, 1.1, 5.7, 1.8, 3.1, 1.4, 4.8, 1.5, 3.2, 1.1, 4.7]
    gpt = [3.75, 3.08, 1.05, 3.92, 2.72, 3.63, 1.26, 4.33, 2.11, 3.65, 1.00, 4.40]
    assert agreement.pearson(people, gpt) == pytest.approx(0.89, abs=0.005)


def test_what_has_no_value_is_none():
    """No grades, one grade, all the same."""
    assert (
        agreement.pearson([], [])
        is agreement.pearson([1], [2])
        is agreement.pearson([1, 1], [1, 2])
        is None
    )
    assert agreement.quadratic_kappa([], []) is agreement.quadratic_kappa([3, 3], [3, 3]) is None
    assert (
        agreement.krippendorff_alpha([[1], [2], []])
        is agreement.krippendorff_alpha([[4, 4], [4, 4]])
        is None
    )
    assert agreement.interval([1.0], statistics.fmean) is None


def test_the_interval_is_that_of_the_mean():
    """Near the normal one for many values, and the same each time."""
    values = list(np.random.default_rng(0).normal(5, 2, 400))
    low, high = agreement.interval(values, statistics.fmean)
    half = 1.96 * statistics.stdev(values) / 20
    assert low == pytest.approx(statistics.fmean(values) - half, abs=0.05)
    assert high == pytest.approx(statistics.fmean(values) + half, abs=0.05)
    assert agreement.interval(values, statistics.fmean) == [low, high]


# --- a real server ---


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base url, model) of `transformers serve` on loopback with a tiny chat model; stopped at the end."""
    for name in ("fastapi", "uvicorn", "accelerate"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is missing: transformers serve needs it (requirements.txt)")
    folder = tmp_path_factory.mktemp("served")
    tokenizer = _make_tokenizer("llama")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)
    model = _make_model(
        "llama", vocab=len(tokenizer), dtype=torch.float32, max_position_embeddings=8192
    )
    model.save_pretrained(folder)
    port = experiment.free_port()
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    words = ["serve", folder, "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", code, *map(str, words)], stdout=log, stderr=log
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url, server, log, seconds=120):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            return urllib.request.urlopen(url, timeout=2).read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"transformers serve did not start: {log.read_text()[-2000:]}")


def test_a_real_server_is_asked_as_it_wants_to_be(served, tmp_path, run, capsys, monkeypatch):
    """Every sample has an answer of a real model and its tokens; the tiny model's grades mean nothing."""
    url, model = served
    monkeypatch.setattr(judge, "ANSWER_TOKENS", 24)
    for calls in (
        8,
        0,
    ):  # each of four texts in two wordings, since noise has no score; then never again
        judge.main([str(run), "--judge", model, "--base-url", url])
        found = data.read_json(run / "judge.json")
        assert found["calls"] == calls
    rows = data.read_jsonl(run / "judge.jsonl")
    assert len(rows) == 4 and all(isinstance(row["answer"], str) and row["answer"] for row in rows)
    assert {row["why"] for row in rows} == {"no score in the answer"} and found["before"][
        "mean"
    ] is None
    assert all(row["usage"]["in"] > 500 and 0 < row["usage"]["out"] <= 48 for row in rows)
    assert found["served"] and found["served"][0].startswith(model)
    report.main([str(run)])
    assert "GPT" not in (run / "table.md").read_text()
