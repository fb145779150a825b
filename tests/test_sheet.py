"""The people's sheet: blind, safe to open, right in a browser; and what comes back is read, checked and reported.

python -m pytest tests/test_sheet.py -q
"""

import csv
import json
import random
import re
import shutil
import statistics
import sys

import numpy as np
import pytest
from judged import Chat, write_pairs, write_run

from evals import judge, report
from kit import data, flags, purge, sheet

# What a page must show as it stands.
NASTY = [
    ' <script>document.title = "broken"</script>',
    " </script><img src=x onerror=document.title='broken'>",
    " \"quoted\" & 'quoted' &amp; \\ back `${1}`",
    " \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 123",
    " \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301",
    " <!-- no comment --> \u2028 line",
    " \n\ttabs\n\nand lines",
    " ",
    " " + "long" * 80,
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))


def texts(n):
    """{id: (prefix, suffix)} of n texts, nasty ones first."""
    return {
        f"t{i}": (f"Prefix {i}", NASTY[i] if i < len(NASTY) else f" reference {i}.")
        for i in range(n)
    }


def two_runs(root, n=6):
    """Runs of two methods over the same n texts: before they say the reference, after it something of their own."""
    pairs, known = (
        write_pairs(root / "pairs.jsonl", texts(n)),
        {id: suffix for id, (_, suffix) in texts(n).items()},
    )
    runs = []
    for number, method in enumerate(("icu", "npo")):
        said = {
            id: f" said by model {number}, {i}{NASTY[i % len(NASTY)]}" for i, id in enumerate(known)
        }
        said["t1"] = known["t1"]  # not forgotten: the same output as before
        runs.append(write_run(root / f"run-{method}", pairs, [known, known, said], method=method))
    return runs


@pytest.fixture
def runs(tmp_path):
    return two_runs(tmp_path)


def data_of(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1])


def rate(run, grades, path, *, rater="ann", items=None):
    """A file as a rater saves it; grades: grade of (item number)."""
    data = data_of((run / "sheet.html").read_text())
    items = range(len(data["items"])) if items is None else items
    lines = [
        "sheet,rater,item,grade",
        *(f"{data['sheet']},{rater},{item},{grades(item)}" for item in items),
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def refused(words, capsys):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(sys, "argv", ["evals/judge.py"])
        flags.run_cli(lambda: judge.main([str(word) for word in words]))
    said = capsys.readouterr()
    assert exit.value.code == 2 and said.err.count("\n") == 1, said.err
    return said.err


# --- the page ---


def test_the_sheet_is_blind_and_its_key_says_whose_each_output_is(runs):
    """Prefix, reference and output, nothing else; equal outputs once; what belongs to whom stands in the key only."""
    judge.main(["--sheet", *map(str, runs), "--n", "4", "--raters", "3"])
    html, key = (runs[0] / "sheet.html").read_text(), data.read_json(runs[0] / "sheet-key.json")
    shown_, said = data_of(html), [data.read_jsonl(run / "samples.jsonl") for run in runs]
    assert {name for item in shown_["items"] for name in item} == {"prefix", "reference", "output"}
    for word in ("icu", "npo", "run-", "epoch", "before", "method", "samples", str(runs[0].parent)):
        assert word not in json.dumps(shown_), word
    assert "icu" not in html and "npo" not in html and runs[0].name not in html
    chosen = {item["text"][1] for item in key["items"]}
    assert len(chosen) == 4
    # independent count: of a text, every different one of before, after icu and after npo
    rows = [row for rows in said for row in rows if row["epoch"] in (0, 2) and row["id"] in chosen]
    due = {(row["id"], row["generation"]) for row in rows}
    assert len(shown_["items"]) == len(key["items"]) == len(due)
    for item, shown in zip(key["items"], shown_["items"], strict=True):
        id = item["text"][1]
        assert (shown["prefix"], shown["reference"]) == texts(6)[id]
        of = [(n, row["epoch"]) for n, rows in enumerate(said) for row in rows
              if row["epoch"] in (0, 2) and (row["id"], row["generation"]) == (id, shown["output"])]  # fmt: skip
        assert sorted((place["run"], place["epoch"]) for place in item["of"]) == sorted(of)
    orders = shown_["orders"]
    assert len(orders) == 3 and all(sorted(order) == list(range(len(due))) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [run["name"] for run in key["runs"]] == ["run-icu (icu)", "run-npo (npo)"]


def test_a_sheet_is_drawn_alike_each_time_and_not_replaced_unasked(runs, capsys):
    """A key that is lost makes ratings worthless."""
    judge.main(["--sheet", *map(str, runs)])
    html = (runs[0] / "sheet.html").read_bytes()
    assert "--overwrite" in refused(["--sheet", *runs], capsys)
    judge.main(["--sheet", *map(str, runs), "--overwrite"])
    assert (runs[0] / "sheet.html").read_bytes() == html


def test_the_page_loads_nothing(runs):
    """No address in it, a policy that forbids all, and no text that ends its element."""
    judge.main(["--sheet", str(runs[0])])
    html = (runs[0] / "sheet.html").read_text()
    assert "http" not in html.replace("http-equiv", "") and "default-src 'none'" in html
    assert html.count("</script>") == 2 and "<img" not in html and "innerHTML" not in html


# --- what comes back ---


def test_ratings_become_table_3_of_the_runs(runs, tmp_path, capsys):
    """Means on 10 (s - 1) / 7, missing grades, agreement with the judge; and the report's column."""
    judge.main(["--sheet", *map(str, runs), "--raters", "2"])
    key, shown = (
        data.read_json(runs[0] / "sheet-key.json"),
        data_of((runs[0] / "sheet.html").read_text()),
    )
    place = {n: {(p["run"], p["epoch"]) for p in item["of"]} for n, item in enumerate(key["items"])}
    grade = {n: 2 if (0, 0) in of else 7 if (0, 2) in of else 5 for n, of in place.items()}
    count = len(grade)
    ann = rate(runs[0], grade.get, tmp_path / "ratings-ann.csv")
    bo = rate(runs[0], grade.get, tmp_path / "ratings-bo.csv", rater="bo", items=range(count - 1))
    with Chat(lambda candidate, n: f"Final score: {9 if 'said by' in candidate else 1}") as chat:
        judge.main([*map(str, runs), "--base-url", chat.url])
    judge.main(["--ratings", ann, bo, str(runs[1]), str(runs[0])])  # in any order
    said = capsys.readouterr().out
    for number_of_run, run in enumerate(runs):
        found = data.read_json(run / "people.json")
        for when, epoch in (("before", 0), ("after", 2)):
            mine = [n for n, of in place.items() if (number_of_run, epoch) in of]
            assert found[when]["mean"] == pytest.approx(
                statistics.fmean(10 * (grade[n] - 1) / 7 for n in mine)
            )
            assert found[when]["n"] == len(mine) == 6
            assert found[when]["missing"] == sum(n == count - 1 for n in mine)
            low, high = found[when]["interval"]
            assert low <= found[when]["mean"] <= high
        assert found["alpha"]["value"] == 1 and found["raters"] == 2
        human = [10 * (grade[n] - 1) / 7 for n in place]
        machine = [9 if "said by" in shown["items"][n]["output"] else 1 for n in place]
        assert found["judge"]["n"] == count
        assert found["judge"]["pearson"]["value"] == pytest.approx(
            np.corrcoef(human, machine)[0, 1]
        )
    assert "| run-icu (icu), before | 1.43 | 1.43 to 1.43 | 6 | " in said and "alpha 1.00" in said
    report.main([str(runs[0])])
    table = (runs[0] / "table.md").read_text()
    assert "Human (0-10) ↑" in table and "| 1.43 |" in table


def test_two_hundred_raters_give_their_correlation_back(tmp_path, capsys):
    """Raters and judge share a quality with a known correlation; it comes back, inside its interval."""
    n, rho = 200, 0.6
    drawn = np.random.default_rng(5)
    quality = drawn.normal(size=n)
    noisy = rho * quality + (1 - rho**2) ** 0.5 * drawn.normal(size=n)  # corr(quality, noisy) = rho
    grades = np.clip(np.round(4.5 + 1.5 * quality), 1, 8).astype(int)
    scores = np.clip(np.round(5 + 2 * noisy, 1), 0, 10)
    known = {f"t{i}": (f"Prefix {i}", f" reference {i}") for i in range(n)}
    pairs = write_pairs(tmp_path / "pairs.jsonl", known)
    run = write_run(tmp_path / "run", pairs, [{f"t{i}": f" output {i}" for i in range(n)}])
    judge.main(["--sheet", str(run), "--n", str(n), "--raters", "200"])
    number = {
        n: int(item["text"][1][1:])
        for n, item in enumerate(data.read_json(run / "sheet-key.json")["items"])
    }
    rows = [{"id": f"t{i}", "epoch": 0, "score": float(scores[i])} for i in range(n)]
    data.write_jsonl(run / "judge.jsonl", rows)
    end = {"mean": 5.0, "n": n}
    data.write_json(run / "judge.json", {"judge": "j", "prompt": "p", "before": end, "after": end})
    csvs = []
    for rater in range(200):  # each grades twenty texts and is one off in a third of them
        off = {item: int(drawn.integers(3) == 0) * int(drawn.choice((-1, 1))) for item in range(n)}
        some = drawn.choice(n, 20, replace=False)
        near = lambda item, off=off: min(8, max(1, int(grades[number[item]]) + off[item]))  # noqa: E731
        csvs.append(
            rate(run, near, tmp_path / f"ratings-{rater}.csv", rater=f"r{rater}", items=some)
        )
    judge.main(["--ratings", *csvs, str(run)])
    found = data.read_json(run / "people.json")
    for name in ("pearson", "spearman"):
        assert found["judge"][name]["value"] == pytest.approx(rho, abs=0.1)
        low, high = found["judge"][name]["interval"]
        assert low < rho < high
    assert found["raters"] == 200 and found["before"]["missing"] == 200 * n - 200 * 20
    assert 0.7 < found["alpha"]["value"] < 0.95


def test_a_run_that_moved_or_was_purged_is_known_again(runs, tmp_path):
    """The key names a run by its summary.json."""
    judge.main(["--sheet", *map(str, runs)])
    ann = rate(runs[0], lambda item: 4, tmp_path / "ratings-ann.csv")
    purge.main([str(runs[0])])
    moved = [shutil.move(run, tmp_path / f"elsewhere-{number}") for number, run in enumerate(runs)]
    judge.main(["--ratings", ann, *map(str, moved)])
    assert data.read_json(tmp_path / "elsewhere-1" / "people.json")["after"][
        "mean"
    ] == pytest.approx(30 / 7)


def test_bad_ratings_are_one_line(runs, tmp_path, capsys):
    """What no sheet has saved, of another sheet, twice, or off the scale; and a key that is damaged."""
    judge.main(["--sheet", *map(str, runs)])
    good = rate(runs[0], lambda item: 4, tmp_path / "ratings-ann.csv")
    id = data_of((runs[0] / "sheet.html").read_text())["sheet"]
    head, bad = "sheet,rater,item,grade\n", tmp_path / "bad.csv"
    for content, due in [
        ("a,b\n1,2\n", "first line"),
        (head, "no grade"),
        (head + f"{id},ann,0\n", "3 columns"),
        (head + "x,ann,0,4\n", "of sheet 'x'"),
        (head + f"{id},ann,999,4\n", "item '999'"),
        (head + f"{id},ann,-1,4\n", "item '-1'"),
        (head + f"{id},ann,0,9\n", "grade '9'"),
        (head + f"{id},ann,0,4.5\n", "grade '4.5'"),
        (head + f"{id}, ,0,4\n", "no name"),
        (head + f"{id},ann,0,4\n{id},ann,0,5\n", "already"),
        (head + f'{id},"ann,0,4\n', "not CSV"),
        ("", "empty"),
    ]:
        bad.write_text(content)
        assert due in refused(["--ratings", bad, *runs], capsys), content
    assert "already" in refused(["--ratings", good, good, *runs], capsys)
    assert "name its folder" in refused(["--ratings", good, runs[0]], capsys)
    assert "no sheet-key.json" in refused(["--ratings", good, runs[1]], capsys)
    key = runs[0] / "sheet-key.json"
    for damage in ("[]", "{}", key.read_text().replace('"run": 1', '"run": 7')):
        key.write_text(damage)
        assert "sheet-key.json" in refused(["--ratings", good, *runs], capsys)


# --- a browser ---


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips where there is none."""
    reason = "no browser: pip install playwright, and Chromium as by apt-get install chromium"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if path is None:
        pytest.skip(reason)
    with playwright.sync_playwright() as started:
        found = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()


def test_a_sheet_is_rated_by_keyboard_reloaded_and_read_back(browser, tmp_path, runs):
    """From the disk, offline: sixteen grades, a reload in the middle, back, the file; nasty texts show as texts."""
    judge.main(["--sheet", *map(str, runs), "--raters", "2"])
    shown_ = data_of((runs[0] / "sheet.html").read_text())
    order, count = shown_["orders"][1], len(shown_["items"])
    assert count == 16
    page = browser.new_context(offline=True, accept_downloads=True).new_page()
    errors, asked = [], []
    page.on("pageerror", lambda error: errors.append(error))
    page.on(
        "console", lambda message: errors.append(message.text) if message.type == "error" else None
    )
    page.on("request", lambda request: asked.append(request.url))
    page.goto((runs[0] / "sheet.html").as_uri())
    page.fill("#name", "not a name")
    page.keyboard.press("Enter")
    assert page.is_visible("#start")
    page.fill("#name", "Ann-1")
    page.select_option("#number", "2")
    page.keyboard.press("Enter")
    due = {}
    for place, item in enumerate(order):
        assert page.inner_text("#place") == f"Output {place + 1} of {count}"
        for part in ("prefix", "reference", "output"):
            shown = page.text_content(f"#{part}")
            assert shown == (
                shown_["items"][item][part] if shown_["items"][item][part].strip() else "(blank)"
            )
        if place == 2:  # a second thought
            page.keyboard.press("Backspace")
            assert page.get_attribute("#grades li:nth-child(2) button", "aria-pressed") == "true"
            page.keyboard.press("8")
            due[order[1]] = 8
        if place == count // 2:
            page.reload()
            assert page.input_value("#name") == "Ann-1"
            page.click("#start .main")
        due[item] = place % 8 + 1
        page.keyboard.press(str(due[item]))
    assert page.inner_text("#done") == f"Thank you: {count} of {count} outputs are graded."
    with page.expect_download() as download:
        page.click("#save")
    assert download.value.suggested_filename == "ratings-Ann-1.csv"
    download.value.save_as(tmp_path / "ratings-Ann-1.csv")
    rows = list(csv.DictReader((tmp_path / "ratings-Ann-1.csv").open(newline="")))
    assert {int(row["item"]): int(row["grade"]) for row in rows} == due and {
        row["rater"] for row in rows
    } == {"Ann-1"}
    assert errors == [] and page.title() == "Grades of texts"
    assert all(url.startswith(("file:", "blob:")) for url in asked)
    judge.main(["--ratings", str(tmp_path / "ratings-Ann-1.csv"), *map(str, runs)])
    assert data.read_json(runs[0] / "people.json")["after"]["n"] == 6


@pytest.mark.parametrize("width, height", [(360, 740), (1280, 900)], ids=["phone", "desktop"])
def test_nothing_is_wider_than_the_screen(browser, runs, width, height):
    """Whatever the text, and what is pressed is large enough for a finger."""
    judge.main(["--sheet", *map(str, runs), "--n", "9", "--raters", "1"])
    page = browser.new_context(viewport={"width": width, "height": height}, offline=True).new_page()
    page.goto((runs[0] / "sheet.html").as_uri())
    assert not page.is_visible("#number")
    page.fill("#name", "bo")
    page.click(".main")
    for _ in data_of((runs[0] / "sheet.html").read_text())["items"]:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert all(
            box.bounding_box()["height"] >= 43 for box in page.query_selector_all("#rate button")
        )
        page.keyboard.press("4")
    assert (
        page.is_visible("#save") and page.evaluate("document.documentElement.scrollWidth") <= width
    )


def test_a_sheet_has_the_eight_grades():
    """One line each, as many as the keys."""
    assert len(sheet.GRADES) == len(set(sheet.GRADES)) == 8


def test_random_texts_survive_the_page():
    """Whatever JSON holds comes out of the page's JSON as it went in, and no text ends the element it stands in."""
    drawn = random.Random(0)
    signs = "<>/!-&\"'\\ascript\u2028\u2029\x00\x1f\U0001f600\u05d0"
    parts = ("prefix", "reference", "output")
    items = [{part: "".join(drawn.choices(signs, k=30)) for part in parts} for _ in range(200)]
    _, html = sheet.page(items, 2)
    assert data_of(html)["items"] == items
