"""A part of a text, and requests one after another: what is read, what is trained on, what comes back, what is kept.

python -m pytest tests/test_requests.py -q
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import survive

import icu
import knn
from evals import judge, report
from extras import chain as demo_chain
from kit import data, models, purge, requests, runs, text

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = [f"The parcel for {name} was left at the door of number {n}." for name, n in
         (("Ines", 14), ("Bo", 27), ("the nurse", 35), ("Ada", 48), ("the driver", 52), ("Cy", 61))]  # fmt: skip
LEARN = {
    "learn_id": "p",
    "learn_context": "",
    "learn_prefix": "A neighbour saw",
    "learn_suffix": " the old van.",
}


def pair(i, **more):
    prefix, suffix = data.split_in_half(TEXTS[i])
    return {
        "id": str(i),
        "context": "",
        "prefix": prefix,
        "suffix": suffix,
        **LEARN,
        "similarity": 0.5,
        **more,
    }


# --- what is marked ---


def test_marks_are_read_from_json_and_from_csv(tmp_path):
    """spans as they are, secrets where they stand, | between those of a CSV; nothing marked: no field."""
    rows = [
        {"text": TEXTS[0], "spans": [[15, 19]]},
        {"text": TEXTS[1], "secrets": ["27", "Bo"]},
        {"text": TEXTS[2]},
    ]
    data.write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text(f'text,secrets\n"{TEXTS[0]}",Ines|14\n"{TEXTS[1]}",\n')
    found = data.read_records(tmp_path / "a.jsonl")
    assert [row.get("spans") for row in found] == [[[15, 19]], [[15, 17], [49, 51]], None]
    first, second = data.read_records(tmp_path / "a.csv")
    assert [TEXTS[0][low:high] for low, high in first["spans"]] == [
        "Ines",
        "14",
    ] and "spans" not in second


BAD = {
    "empty": ({"spans": [[4, 4]]}, "are not .* inside"),
    "outside": ({"spans": [[4, 400]]}, "are not .* inside"),
    "overlap": ({"spans": [[4, 9], [0, 5]]}, "overlap"),
    "unknown": ({"secrets": ["Zoe"]}, "does not occur"),
    "twice": ({"secrets": ["e "]}, "occurs twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mark_that_means_nothing_is_one_line_that_names_the_row(case, tmp_path):
    """Of a file, and of pairs.jsonl where it has spans."""
    more, message = BAD[case]
    data.write_jsonl(tmp_path / "a.jsonl", [{"text": TEXTS[1]}, {"text": TEXTS[0], **more}])
    with pytest.raises(ValueError, match=f"line 2.*{message}"):
        data.read_records(tmp_path / "a.jsonl")
    if "secrets" not in more:
        data.write_jsonl(tmp_path / "pairs.jsonl", [pair(0, **more)])
        with pytest.raises(ValueError, match=f"line 1.*{message}"):
            data.read_pairs(tmp_path / "pairs.jsonl")


def test_tokens_that_overlap_a_span_are_the_targets_and_the_others_are_kept(
    kind, save_tiny, tmp_path
):
    """Also a token of half a letter, and one in the prefix; BOS is neither; the two sides make up the text."""
    _, tokenizer = models.load_model(str(save_tiny(kind, tmp_path / "m")))
    emoji = {"prefix": "Zoë 👩🏽‍⚕️ says", "suffix": " that 5 vans came"}
    pairs = [
        pair(0, spans=[[4, 10], [51, 53]]),
        pair(1),
        pair(2) | emoji | {"spans": [[2, 8], [18, 19]]},
    ]
    samples, _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)
    bos = len(models.bos_of(tokenizer))
    for sample, row in zip(samples, pairs, strict=True):
        if "spans" not in row:
            assert sample.forget.among is None and sample.forget.targets[0] == sample.forget.cut
            continue
        ids, whole, marked = sample.forget.ids, row["prefix"] + row["suffix"], set()
        offsets, shift = [], 0
        for part in (row["prefix"], row["suffix"]):
            mapping = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
            offsets += [(low + shift, high + shift) for low, high in mapping]
            shift += len(part)
        for t, (low, high) in enumerate(offsets, start=bos):
            if t > 0 and any(low < end and high > start for start, end in row["spans"]):
                marked.add(t)
        assert (
            set(sample.forget.among) == marked == set(sample.forget.targets)
            and len(whole) == offsets[-1][1]
        )
        rest = data.rest_of(sample.forget)
        assert sorted([*rest, *marked]) == [*range(max(bos, 1), len(ids))]
    kept = data.kept_side(samples)["kept"]
    assert [len(texts) for texts in kept] == [1, 0, 1] and data.kept_side(samples[1:2]) == {}
    assert icu.collate([samples[0].forget])[2].sum() == len(samples[0].forget.among)


def test_whether_a_secret_is_said():
    """In whatever case, accents and signs, as whole words; one that the prefix holds is not counted."""
    row = pair(0, spans=[[15, 19], [51, 53]])
    assert (
        data.secrets_of(row) == ("14",)
        and data.says("IT WAS Inès!", "Ines")
        and not data.says("114", "14")
    )
    assert data.says("홍길동을 보았다", "홍길동") and data.says("Mira Falks Haus", "Mira Falk")
    assert not data.says("Inessa", "Ines") and not data.says("7654321", "765432")
    row = row | {"prefix": row["prefix"].replace("Ines", "Ines, of 14,")}
    assert data.secrets_of(row | {"spans": [[15, 19]]}) == ()


# --- one after another ---


@pytest.fixture(scope="module")
def chain(tmp_path_factory, save_tiny, encoder_dir):
    """Two finished runs, february and march, the second --after the first; a model that knew all texts."""
    root = tmp_path_factory.mktemp("chain").resolve()
    model = save_tiny("gpt_neo", root / "model")
    survive.memorise(model, [pair(i) for i in range(6)], steps=150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICU_CACHE", str(root / "cache"))
        run(root, "february", [0, 1, 2], "--model", model, "--lr", "2e-3")
        run(root, "march", [3, 4], "--after", root / "february", "--lr", "2e-3")
    return root


def run(root, name, rows, *words, marked=()):
    """icu.py over these rows: root/NAME."""
    data.write_jsonl(
        root / f"{name}.jsonl",
        [pair(i, **({"spans": [[0, 10]]} if i in marked else {})) for i in rows],
    )
    argv = [
        "--pairs",
        root / f"{name}.jsonl",
        "--bert",
        "minilm",
        "--device",
        "cpu",
        "--max-epochs",
        "4",
        "--out",
    ]
    argv += [
        root / name,
        "--thresholds",
        "0.3,0.6",
        "--bert-threshold",
        "0.9",
        "--bleu-threshold",
        "0.9",
    ]
    icu.main(argv=[str(word) for word in [*argv, *words]])
    return root / name


@pytest.fixture
def copied(chain, tmp_path, monkeypatch):
    """The same at another place."""
    root = tmp_path / "chain"
    shutil.copytree(chain, root)
    for file in [root / "cache" / "traces.jsonl", *root.glob("*/config.json")]:
        file.write_text(file.read_text().replace(str(chain), str(root)))
    monkeypatch.setenv("ICU_CACHE", str(root / "cache"))
    return root


def test_earlier_texts_are_watched_and_the_anchor_is_the_first_model(chain):
    """They are measured every epoch under the name of their request; only what is new or came back is trained on."""
    rows, config = (
        data.read_jsonl(chain / "march" / "samples.jsonl"),
        data.read_json(chain / "march" / "config.json"),
    )
    ids = {row["id"] for row in rows if row["epoch"] == 0}
    assert ids == {"3", "4", "february/0", "february/1", "february/2"}
    assert config["model"] == str(chain / "february" / "model") and config["original"][
        "model"
    ] == str(chain / "model")
    assert config["earlier"] == [models.fingerprint(chain / "february.jsonl")]
    first = data.read_jsonl(chain / "march" / "metrics.jsonl")[0]
    assert first["active"] == 2  # the watched ones are forgotten, as their own run left them


@pytest.mark.parametrize("anchor", ["original", "previous"])
def test_the_frozen_copy_is_of_the_model_that_the_flag_names(anchor, chain, monkeypatch, tmp_path):
    """Eq. 4's reference: before the first request, or before this one."""
    asked = []
    monkeypatch.setattr(icu, "freeze", lambda model, *_: asked.append(model.state_dict()) or None)
    monkeypatch.setattr(icu, "train_epoch", lambda *_, **__: {})
    data.write_jsonl(tmp_path / "p.jsonl", [pair(5)])
    argv = [
        "--pairs",
        tmp_path / "p.jsonl",
        "--after",
        chain / "march",
        "--anchor",
        anchor,
        "--out",
        tmp_path / "run",
    ]
    icu.main(argv=[*map(str, argv), "--bert", "minilm", "--device", "cpu", "--max-epochs", "1"])
    source = chain / "model" if anchor == "original" else chain / "march" / "model"
    expected = models.load_model(str(source))[0].state_dict()
    assert all((asked[0][name] == value).all() for name, value in expected.items())


def test_what_comes_back_joins_and_what_went_again_leaves():
    """By Eq. 5 where it had been forgotten, by MA over its own run's end, and at once where it overlaps a new text."""
    old = [
        requests.Earlier({}, 0.2, True),
        requests.Earlier({}, 0.2, False),
        requests.Earlier({}, 0.2, True, "new"),
    ]
    watched, rows = (
        dict(enumerate(old, start=1)),
        [{"ma": 0.9}, {"ma": 0.24}, {"ma": 0.24}, {"ma": 0.1}],
    )
    how = {"watched": watched, "under_eq5": {1, 3}}
    assert requests.watch(set(), rows, epoch=0, **how) == {
        1,
        2,
    }  # the third begins with the new text
    assert requests.watch({1, 2}, rows, epoch=1, **how) == {1, 2, 3}
    rows[1]["ma"] = 0.26
    assert requests.watch({1, 2, 3}, rows, epoch=1, **how) == {2, 3}
    assert requests.watch({1, 2, 3}, rows, epoch=1, watched=watched, under_eq5=set()) == {2}
    rows[2] |= {"ma_spans": 0.5}
    assert requests.watch({1, 2, 3}, rows, epoch=1, **how) == {3}


def test_the_stop_rule_holds_for_new_and_for_old_texts():
    """The larger of the two means, of a marked text over its spans."""
    rows = [{"el10": 0.1, "ma": 0.9, "el10_spans": 0.0, "ma_spans": 0.3}, {"el10": 0.1, "ma": 0.2}]
    assert runs.decisive(rows) == {"el10": 0.05, "ma": 0.25}
    assert runs.decisive(rows, watched={1: None}) == {"el10": 0.1, "ma": 0.3}
    assert runs.decisive([{"el10": None, "ma": 0.5}]) == {"el10": None, "ma": 0.5}


def test_overlaps_are_found_before_work():
    """One text in another, whatever its case and signs."""
    whole, part = pair(0), {**pair(1), "prefix": "THE PARCEL — for Ines", "suffix": " was left"}
    assert (
        requests.overlapping(whole, [pair(2), part]) == "1"
        and requests.overlapping(part, [whole]) == "0"
    )
    assert requests.overlapping(pair(3), [pair(4), part]) is None


WRONG = {
    "no run": (["--after", "nowhere"], "no config.json"),
    "a model too": (["--after", "FEBRUARY", "--model", "MODEL"], "leave --model out"),
    "neither": ([], "--model DIR is missing"),
    "into the chain": (
        ["--after", "FEBRUARY", "--out", "FEBRUARY", "--overwrite"],
        "earlier request",
    ),
    "measured otherwise": (["--after", "FEBRUARY", "--num-beams", "1"], "measured otherwise"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_gone_on_from_is_one_line_before_work(case, chain, tmp_path, monkeypatch):
    """A missing run, flags that contradict each other, a run that would write over its own past."""
    words, message = WRONG[case]
    real = {"FEBRUARY": chain / "february", "MODEL": chain / "model"}
    argv = [
        "--pairs",
        chain / "march.jsonl",
        "--out",
        tmp_path / "run",
        "--bert",
        "minilm",
        "--device",
        "cpu",
    ]
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("work began"))
    with pytest.raises(ValueError, match=message) as error:
        icu.main(argv=[str(real.get(word, word)) for word in [*argv, *words]])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_a_model_of_the_beginning_that_has_changed_is_named_with_its_hash(copied):
    """Other weights would be another anchor; --anchor previous needs none."""
    sha256 = data.read_json(copied / "february" / "config.json")["sha256"]["model"]
    shutil.rmtree(copied / "model")
    with pytest.raises(ValueError, match=f"--anchor original: .*{sha256}.*--anchor previous"):
        run(copied, "april", [5], "--after", copied / "march")
    run(
        copied,
        "april",
        [5],
        "--after",
        copied / "march",
        "--anchor",
        "previous",
        "--max-epochs",
        "1",
    )


def test_a_config_of_an_earlier_request_that_names_no_run_is_one_line(copied):
    """Its `after` is a folder or null."""
    path = copied / "march" / "config.json"
    data.write_json(path, data.read_json(path) | {"after": True})
    with pytest.raises(ValueError, match="march.config.json: is not what a run wrote there"):
        requests.chain_of(copied / "march")


def test_no_partner_holds_a_text_of_an_earlier_request_also_a_purged_one(copied, capsys):
    """The guard knows texts that are there, and of those that went the hashes of their n-grams."""
    pool = [
        {"id": str(i), "context": "", "prefix": "He said: ", "suffix": TEXTS[i]} for i in range(6)
    ]
    other = [
        {
            "id": "x",
            "context": "",
            "prefix": "Nothing of that",
            "suffix": " is to be found in this text at all.",
        }
    ]
    for purged in (False, True):
        if purged:
            purge.main([str(copied / "february")])
            capsys.readouterr()
            assert not (copied / "february.jsonl").exists() and TEXTS[0] not in everything(
                copied / "march"
            )
        earlier, hashes = requests.targets(copied / "march")
        assert len(earlier) == (2 if purged else 5) and len(hashes) == purged
        keep, reasons = knn.leak_guard([pair(5), *earlier], pool + other, purged=hashes)
        assert keep.tolist() == [False] * 6 + [True] and {r["reason"] for r in reasons} == {"copy"}


def everything(folder):
    """All text of a folder's files."""
    return "\n".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.suffix != ".safetensors"
                     and path.is_file())  # fmt: skip


def test_purging_a_request_empties_what_later_runs_said_of_its_texts_and_no_more(copied, capsys):
    """The model of the chain stays and can be gone on from; the later request keeps its own texts."""
    purge.main([str(copied / "february")])
    rows = data.read_jsonl(copied / "march" / "samples.jsonl")
    said = {row["id"]: row["generation"] for row in rows}
    assert all((said[id] is None) == id.startswith("february/") for id in said)
    assert (copied / "march.jsonl").is_file() and "purged" not in data.read_json(
        copied / "march" / "config.json"
    )
    out = run(copied, "april", [5], "--after", copied / "march", "--max-epochs", "1")
    assert "its texts are gone" in capsys.readouterr().out
    assert {row["id"] for row in data.read_jsonl(out / "samples.jsonl")} == {
        "5",
        "march/3",
        "march/4",
    }


def test_a_later_request_is_reported_before_and_after_an_earlier_one_is_purged(copied, capsys):
    """Its cases and its page show the texts that are still there."""
    for purged in (False, True):
        if purged:
            purge.main([str(copied / "february")])
        report.main([str(copied / "march"), "--explain"])
        page, cases = (
            (copied / "march" / name).read_text() for name in ("explain.html", "cases.md")
        )
        assert (
            "door" in page
            and ("february/0" in page) != purged
            and not (purged and "february" in cases)
        )
        assert "| icu |" in capsys.readouterr().out


def test_the_readmes_story_of_march_runs_as_it_is_written(copied, tmp_path):
    """From a CSV to a certificate, the earlier request purged: each command ends well (icu.py after three epochs)."""
    story = (
        README.partition("## A request arrives in March")[2].split("```")[1].strip().splitlines()
    )
    assert len(story) == 5
    (tmp_path / "march.csv").write_text(
        "id,text\n" + "".join(f'm{i},"{TEXTS[i]}"\n' for i in (3, 4))
    )
    pages = [{"text": f"Page {i} is about the mill and the old van."} for i in range(9)]
    data.write_jsonl(tmp_path / "wiki.jsonl", pages)
    shutil.copytree(copied / "february", tmp_path / "runs" / "february")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "ICU_CACHE": str(tmp_path / "cache"),
    }
    environment |= {"OMP_NUM_THREADS": "1"}
    for command in story:
        words = command.split()
        script = (
            ["-m", "kit.purge"]
            if words[:3] == ["bash", "run.sh", "purge"]
            else [str(ROOT / words[1])]
        )
        given = words[3 if words[0] == "bash" else 2 :] + ["--max-epochs", "3"] * (
            words[1] == "icu.py"
        )
        done = subprocess.run(
            [sys.executable, *script, *given],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (command, done.stderr)
    made = {path.name for path in (tmp_path / "runs" / "march").iterdir()}
    assert {"model", "audit.md", "certificate.html", "summary.json"} <= made
    assert "R-17" in (tmp_path / "runs" / "march" / "certificate.json").read_text()


def test_a_certificate_and_a_judge_are_of_the_requests_own_texts(copied, capsys):
    """The same certificate twice, which holds; texts of an earlier request are counted, and never judged."""
    certificates = []
    for purged in (False, True):
        if purged:
            purge.main([str(copied / "february")])
        report.main([str(copied / "march"), "--certificate", "--request-id", "R-17"])
        certificates.append(data.read_json(copied / "march" / "certificate.json"))
        report.main(["--verify", str(copied / "march" / "certificate.json")])
        assert {id for id, _ in judge.read_judged(copied / "march").triples} == {"3", "4"}
    assert certificates[0] == certificates[1] and certificates[0]["scope"]["texts"] == 2
    assert (
        certificates[0]["scope"]["watched"] == 3
        and certificates[0]["figures"]["ma"]["after"]["n"] == 2
    )


def test_hashed_grams_find_what_the_texts_find_and_hold_none_of_them():
    """The same share for the same rows, by salted hashes."""
    plain = [text.plain(words) for words in TEXTS[:3]]
    hashes = text.gram_hashes(plain, b"salt")
    found = text.HashedGrams(hashes["letters"], b"salt")
    known = text.TargetGrams([text.weighed(text.letters(words)) for words in plain])
    for row in [*TEXTS, "something else that nobody wrote down anywhere before"]:
        row = text.weighed(text.letters(text.plain(row)))
        assert found.worst(row, 0.2) == known.worst(row, 0.2)
    assert not any(word in json.dumps(hashes) for word in ("parcel", "ines", "door"))
    assert text.gram_hashes(plain, b"other") != hashes


def test_the_chain_demo_measures_every_text_so_far(chain, tmp_path, monkeypatch):
    """extras/chain.py: what a watching run says of all texts at its end is what measuring them once more says."""
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))

    def step(script, *words):  # in this process
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        knn.main() if script == "knn.py" else icu.main(argv=sys.argv[1:])

    monkeypatch.setattr(demo_chain, "step", step)
    data.write_jsonl(
        tmp_path / "forget.jsonl", [{"id": str(i), "text": TEXTS[i]} for i in range(4)]
    )
    pool = [{"text": f"A neighbour saw the old van of {name}."} for name in "ABCDEF"]
    data.write_jsonl(tmp_path / "pool.jsonl", pool)
    flags = [
        "--lr",
        "2e-3",
        "--max-epochs",
        "2",
        "--device",
        "cpu",
        "--thresholds",
        "0.3,0.6",
        "--batch-size",
        "2",
    ]
    words = [
        "--forget",
        tmp_path / "forget.jsonl",
        "--pool",
        tmp_path / "pool.jsonl",
        "--model",
        chain / "model",
    ]
    words += ["--parts", "2", "--order", "1", "--out", tmp_path / "made", *flags]
    demo_chain.main([str(word) for word in words])
    made = tmp_path / "made"
    lines = [line.split(" | ")[:2] for line in (made / "table.md").read_text().splitlines()[2:]]
    each = [("watched", 1), ("watched", 2), ("not watched", 1), ("not watched", 2), ("at once", 2)]
    assert (
        lines == [[f"| {variant}", str(number)] for variant, number in each]
        and (made / "came-back.png").is_file()
    )

    requests = [
        [row["id"] for row in data.read_pairs(made / f"request{number}.pairs.jsonl")]
        for number in (1, 2)
    ]
    assert sorted(requests[0] + requests[1]) == ["0", "1", "2", "3"] != requests[0] + requests[1]
    own = demo_chain.look(made / "watched2", [[f"first/{id}" for id in requests[0]], requests[1]])
    args = argparse.Namespace(
        script="icu.py", flags=["--bert", "minilm", "--bert-threshold", "auto", *flags]
    )
    words = ["--model", made / "watched2" / "model", "--eval-only"]
    again = demo_chain.train(args, tmp_path / "again", made / "all.pairs.jsonl", words)
    assert own == demo_chain.look(again, requests)
