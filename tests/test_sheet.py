"""The people's sheet: blind, safe to open, right in a browser; what comes back is reported."""

import json
import shutil

import numpy as np
import pytest
from judged import Chat, chromium, data_of, write_run

from evals import judge, report
from kit import data, purge

# What a page must show as it stands.
NASTY = [
    ' <script>document.title = "broken"</script>',
    " </script><img src=x onerror=document.title='broken'>",
    " \"quoted\" & 'quoted' &amp; \\ back `${1}`",
    " \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 123",
    " \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 <!-- no comment --> \u2028 line",
    " " + "long" * 80,
]
TEXTS = {f"t{i}": (f"Prefix {i}", nasty) for i, nasty in enumerate(NASTY)}
N = len(NASTY)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Runs of two methods, whose model says the reference before."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    known, runs = {id: suffix for id, (_, suffix) in TEXTS.items()}, []
    for number, method in enumerate(("icu", "npo")):
        own = {id: f" said by model {number}, {id}{suffix}" for id, suffix in known.items()}
        own["t1"] = known["t1"]  # not forgotten: the same output as before
        own["t2"] = " "
        folder = tmp_path / f"run-{method}"
        runs.append(write_run(folder, TEXTS, [known, known, own], method=method))
    return runs


def content_of(run):
    return data_of((run / "sheet.html").read_text())


def rate(run, grades, path):
    """A file as a rater saves it."""
    sheet = content_of(run)["sheet"]
    rows = [f"{sheet},{path.stem},{item},{grade}" for item, grade in enumerate(grades)]
    path.write_text("\n".join(["sheet,rater,item,grade", *rows]) + "\n")
    return str(path)


# --- the page ---


def test_the_sheet_is_blind_and_its_key_says_whose_each_output_is(runs):
    """Equal outputs stand there once."""
    words = ["--sheet", *map(str, runs), "--n", "4"]
    judge.main(words)
    html, key = (runs[0] / "sheet.html").read_text(), data.read_json(runs[0] / "sheet-key.json")
    content = content_of(runs[0])
    assert {name for item in content["items"] for name in item} == {"prefix", "reference", "output"}
    for word in ("icu", "npo", "run-", "epoch", "before", str(runs[0].parent)):
        assert word not in json.dumps(content), word
    assert "icu" not in html and "npo" not in html
    chosen = {item["text"][1] for item in key["items"]}
    # Independent count: of a text, every different one of before, after icu and after npo.
    wrote = {}
    for number, run in enumerate(runs):
        for row in data.read_jsonl(run / "samples.jsonl"):
            if row["epoch"] in (0, 2) and row["id"] in chosen:
                wrote.setdefault((row["id"], row["generation"]), set()).add((number, row["epoch"]))
    assert len(chosen) == 4 and len(content["items"]) == len(wrote)
    for item, shown in zip(key["items"], content["items"], strict=True):
        id = item["text"][1]
        assert (shown["prefix"], shown["reference"]) == TEXTS[id]
        of = {(place["run"], place["epoch"]) for place in item["of"]}
        assert of == wrote[id, shown["output"]]
    orders = content["orders"]
    assert all(sorted(order) == list(range(len(wrote))) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    with pytest.raises(ValueError, match="--overwrite"):  # without its key ratings are worthless
        judge.main(words)
    judge.main([*words, "--overwrite"])  # drawn alike each time
    assert (runs[0] / "sheet.html").read_text() == html


def test_the_page_loads_nothing_and_holds_any_text(runs):
    """No address, a policy that forbids all, no element that a text ends."""
    items = [dict.fromkeys(("prefix", "reference", "output"), text) for text in NASTY]
    _, html = judge.page(items, 2)
    assert data_of(html)["items"] == items
    assert "http" not in html.replace("http-equiv", "") and "default-src 'none'" in html
    assert html.count("</script>") == 2 and "<img" not in html and "innerHTML" not in html


# --- what comes back ---


def test_ratings_become_table_3_of_the_runs(runs, tmp_path, capsys):
    """Means on 10 (s - 1) / 7; also of runs that were purged and moved."""
    judge.main(["--sheet", *map(str, runs), "--raters", "2"])
    key, outputs = data.read_json(runs[0] / "sheet-key.json"), content_of(runs[0])["items"]
    of = [{(place["run"], place["epoch"]) for place in item["of"]} for item in key["items"]]
    grade = [2 if (0, 0) in places else 7 if (0, 2) in places else 5 for places in of]
    last = len(grade) - 1
    ann = rate(runs[0], grade, tmp_path / "ann.csv")
    bo = rate(runs[0], grade[:last], tmp_path / "bo.csv")
    with Chat(lambda candidate, n: f"Final score: {9 if 'said by' in candidate else 1}") as chat:
        judge.main([*map(str, runs), "--base-url", chat.url])
    purge.main([str(runs[0])])
    rows = data.read_jsonl(runs[0] / "judge.jsonl")
    assert all(row["score"] and row["answer"] is None for row in rows)
    assert [path.name for path in runs[0].glob("sheet*")] == ["sheet-key.json"]
    runs = [shutil.move(run, tmp_path / "moved" / run.name) for run in runs]
    judge.main(["--ratings", ann, bo, str(runs[1]), str(runs[0])])  # in any order
    printed = capsys.readouterr().out
    human = [10 * (n - 1) / 7 for n in grade]
    machine = [9 if "said by" in item["output"] else 1 for item in outputs]
    r = np.corrcoef(human, machine)[0, 1]
    for number, run in enumerate(runs):
        people = data.read_json(run / "people.json")
        for when, epoch in (("before", 0), ("after", 2)):
            mine = [n for n, places in enumerate(of) if (number, epoch) in places]
            figure = people[when]
            assert figure["mean"] == pytest.approx(np.mean([human[n] for n in mine]))
            assert figure["n"] == len(mine) == N and figure["missing"] == (last in mine)
            assert figure["interval"][0] <= figure["mean"] <= figure["interval"][1]
        assert people["alpha"]["value"] == 1 and people["raters"] == 2
        assert people["judge"]["n"] == len(grade)
        assert people["judge"]["pearson"]["value"] == pytest.approx(r, abs=1e-12)
    assert f"| run-icu (icu), before | 1.43 [1.43, 1.43] | {N} | " in printed
    report.main([str(runs[0])])
    table = (runs[0] / "table.md").read_text()
    assert "Human (0-10) ↑" in table and "| 1.43 |" in table


# --- a browser ---


@pytest.fixture
def browser():
    with chromium() as browser:
        yield browser


def test_a_sheet_is_rated_by_keyboard_reloaded_and_read_back(browser, tmp_path, runs):
    """From the disk, offline, on a phone."""
    judge.main(["--sheet", *map(str, runs), "--raters", "2"])
    content = content_of(runs[0])
    order, count, due = content["orders"][1], len(content["items"]), {}
    page = browser.new_page(offline=True, viewport={"width": 360, "height": 740})
    page.goto((runs[0] / "sheet.html").as_uri())
    page.fill("#name", "not a name")
    page.keyboard.press("Enter")
    assert page.is_visible("#start")
    page.fill("#name", "Ann-1")
    page.select_option("#number", "2")
    page.keyboard.press("Enter")
    for place, item in enumerate(order):
        assert page.inner_text("#place") == f"Output {place + 1} of {count}"
        for part in ("prefix", "reference", "output"):
            text = content["items"][item][part]
            assert page.text_content(f"#{part}") == (text if text.strip() else "(blank)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        if place == 2:  # a second thought
            page.keyboard.press("Backspace")
            page.keyboard.press("8")
            due[order[1]] = 8
        if place == count // 2:
            page.reload()
            assert page.input_value("#name") == "Ann-1"
            page.click("#start button")
        due[item] = place % 8 + 1
        page.keyboard.press(str(due[item]))
    assert page.inner_text("#done") == f"Thank you: {count} of {count} outputs are graded."
    with page.expect_download() as download:
        page.click("#save")
    saved = tmp_path / download.value.suggested_filename
    download.value.save_as(saved)
    lines = [f"{content['sheet']},Ann-1,{item},{due[item]}" for item in sorted(due)]
    assert saved.name == "ratings-Ann-1.csv" and saved.read_text().splitlines()[1:] == lines
    assert page.title() == "Grades of texts"
    judge.main(["--ratings", str(saved), *map(str, runs)])
    assert data.read_json(runs[0] / "people.json")["after"]["n"] == N
