"""A part of a text, and requests one after another: what is trained on, and what comes back."""

import argparse
import shutil
from types import SimpleNamespace

import pytest
import survive

import icu
import knn
from evals import judge
from extras import chain as extras_chain
from kit import data, models, purge, requests, runs

NAMES = ("Ines", 14), ("Bo", 27), ("the nurse", 35), ("Ada", 48), ("the driver", 52), ("Cy", 61)
TEXTS = [f"The parcel for {name} was left at the door of number {n}." for name, n in NAMES]


def pair(i, **more):
    prefix, suffix = data.split_in_half(TEXTS[i])
    learn = {"learn_prefix": "A neighbour saw", "learn_suffix": " the old van."}
    learn |= {"learn_id": "p", "learn_context": "", "similarity": 0.5}
    return {"id": str(i), "context": "", "prefix": prefix, "suffix": suffix, **learn, **more}


# --- what is marked ---


def test_marks_are_read_from_json_and_from_csv(tmp_path):
    """spans as they are, secrets where they stand, | between those of a CSV."""
    rows = [{"text": TEXTS[0], "spans": [[15, 19]]}, {"text": TEXTS[1], "secrets": ["27", "Bo"]}]
    data.write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text(f'text,secrets\n"{TEXTS[0]}",Ines|14\n"{TEXTS[1]}",\n')
    records = [row for end in ("jsonl", "csv") for row in data.read_records(tmp_path / f"a.{end}")]
    spans = [[15, 19]], [[15, 17], [49, 51]], [[15, 19], [51, 53]], None
    assert [row.get("spans") for row in records] == [*spans]


def test_tokens_that_overlap_a_span_are_the_targets_and_the_others_are_kept(
    kind, save_tiny, tmp_path
):
    """Also a token of half a letter; BOS is neither."""
    _, tokenizer = models.load_model(str(save_tiny(kind, tmp_path / "m")))
    prefix, suffix, spans = "Zoë 👩🏽‍⚕️ says", " that 5 vans came", [[2, 8], [18, 19]]
    pairs = pair(2, prefix=prefix, suffix=suffix, spans=spans), pair(1)
    (sample, other), _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)
    bos, offsets = len(models.front_of(tokenizer)), []
    for part, before in ((prefix, 0), (suffix, len(prefix))):
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)
        offsets += [(low + before, high + before) for low, high in encoded["offset_mapping"]]
    marked = {
        t
        for t, (low, high) in enumerate(offsets, start=bos)
        if t > 0 and any(low < end and high > start for start, end in spans)
    }
    assert set(sample.forget.targets) == marked and other.forget.targets[0] == other.forget.cut
    everything = sorted([*data.rest_of(sample.forget), *marked])
    assert everything == [*range(max(bos, 1), len(sample.forget.ids))]
    kept = data.kept_side([sample, other])["kept"]
    assert [len(texts) for texts in kept] == [1, 0] and data.kept_side([other]) == {}


@pytest.mark.parametrize(
    ("generation", "secret", "expected"),
    [
        ("IT WAS Inès!", "Ines", True),
        ("홍길동을 보았다", "홍길동", True),
        ("Mira Falks Haus", "Mira Falk", True),
        ("114", "14", False),
        ("Inessa", "Ines", False),
    ],
)
def test_a_secret_is_said_as_whole_words(generation, secret, expected):
    """In whatever case, accents and signs."""
    assert data.says(generation, secret) == expected


@pytest.mark.parametrize(
    ("mark", "cut", "generation", "expected"),
    [
        ([15, 19], 44, "It was Ines, as", None),  # the prompt says it
        ([44, 53], 50, " 14 and so on", 1.0),
        ([44, 53], 50, " 41 and so on", 0.0),
        ([15, 19], 17, " for Ines, I think", 1.0),
        ([51, 54], 53, ". And", None),  # no letter is left to say
    ],
)
def test_of_a_secret_the_part_in_the_suffix_is_said(mark, cut, generation, expected):
    """Or the whole that it completes."""
    secrets = data.secrets_of(pair(0, spans=[mark]), TEXTS[0][cut:])
    sample = SimpleNamespace(secrets=secrets)
    assert data.secret_said(sample, generation) == {"secret_said": expected}


# --- one after another ---


@pytest.fixture(scope="module")
def chain(tmp_path_factory, save_tiny, encoder_dir):
    """Two finished runs, the second --after the first."""
    root = tmp_path_factory.mktemp("chain").resolve()
    model = save_tiny("gpt_neo", root / "model")
    survive.memorise(model, [pair(i) for i in range(6)], steps=150)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ICU_CACHE", str(root / "cache"))
        run(root, "february", [0, 1, 2], "--model", model, "--lr", "2e-3")
        run(root, "march", [3, 4], "--after", root / "february", "--lr", "2e-3")
    return root


MEASURED = ["--bert", "minilm", "--device", "cpu", "--thresholds", "0.3,0.6"]


def run(root, name, rows, *words):
    """icu.py over these rows: root/NAME."""
    data.write_jsonl(root / f"{name}.jsonl", [pair(i) for i in rows])
    argv = ["--pairs", root / f"{name}.jsonl", "--out", root / name, *MEASURED]
    argv += ["--bert-threshold", "0.9", "--bleu-threshold", "0.9", "--max-epochs", "4", *words]
    icu.main(argv=list(map(str, argv)))
    return root / name


@pytest.fixture
def copied(chain, tmp_path, monkeypatch):
    """The same at another place."""
    root = tmp_path / "chain"
    shutil.copytree(chain, root)
    for file in root.glob("*/config.json"):
        file.write_text(file.read_text().replace(str(chain), str(root)))
    monkeypatch.setenv("ICU_CACHE", str(root / "cache"))
    return root


def test_earlier_texts_are_watched_and_the_anchor_is_the_first_model(chain):
    """As RUN-SHA/ID, not trained on."""
    rows = data.read_jsonl(chain / "march" / "samples.jsonl")
    config = data.read_json(chain / "march" / "config.json")
    ids = {row["id"] for row in rows if row["epoch"] == 0}
    sha = models.fingerprint(chain / "february.jsonl")
    assert ids == {"3", "4", *(f"february-{sha[:8]}/{i}" for i in range(3))}
    assert config["model"] == str(chain / "february" / "model")
    assert config["earlier"] == [sha]
    assert runs.read_run(chain / "march")["metrics"][0]["active"] == 2
    args = argparse.Namespace(**config | {"device": "cpu"})
    first, given = models.load_model(str(chain / "model"))[0].state_dict(), object()
    anchor = requests.anchor_model(given, args).state_dict()
    assert all((anchor[name] == value).all() for name, value in first.items())
    args.anchor = "previous"
    assert requests.anchor_model(given, args) is given


def test_what_comes_back_joins_and_what_went_again_leaves():
    """By Eq. 5, by MA, and at once where it overlaps a new text."""
    forgotten = (True, None), (False, None), (True, "new")
    earlier = [requests.Earlier({}, 0.2, by_eq5, joined) for by_eq5, joined in forgotten]
    rows = [{"ma": 0.9}, {"ma": 0.24}, {"ma": 0.24}, {"ma": 0.1}]

    def watch(before, now=frozenset({1, 3}), epoch=1):
        watched = dict(enumerate(earlier, start=1))
        return requests.watch(before, rows, forgotten_now=now, watched=watched, epoch=epoch)

    assert watch(set(), epoch=0) == {1, 2}  # the third begins with the new text
    assert watch({1, 2}) == {1, 2, 3}
    assert watch({1, 2, 3}, now=set()) == {2}
    rows[1]["ma"], rows[2]["ma_spans"] = 0.26, 0.5
    assert watch({1, 2, 3}) == {3}


def test_the_stop_rule_holds_for_new_and_for_old_texts():
    """The larger of the two means, of a marked text over its spans."""
    rows = [{"el10": 0.1, "ma": 0.9, "el10_spans": 0.0, "ma_spans": 0.3}, {"el10": 0.1, "ma": 0.2}]
    assert runs.stop_means(rows) == {"el10": 0.05, "ma": 0.25}
    assert runs.stop_means(rows, watched={1: None}) == {"el10": 0.1, "ma": 0.3}
    assert runs.stop_means([{"el10": None, "ma": 0.5}]) == {"el10": None, "ma": 0.5}


def test_a_text_that_holds_another_overlaps_it():
    """Whatever its case and signs."""
    longer, part = pair(0), pair(1, prefix="THE PARCEL — for Ines", suffix=" was left")
    assert requests.overlapping(longer, [pair(2), part]) == "1"
    assert requests.overlapping(part, [longer]) == "0"
    assert requests.overlapping(pair(3), [pair(4), part]) is None


def test_a_chain_goes_on_as_it_was_measured_and_from_the_model_it_began_with(copied):
    """Or by --anchor previous."""
    march = ["--after", copied / "march"]
    with pytest.raises(ValueError, match=r"was measured otherwise \(num_beams\)"):
        run(copied, "april", [5], *march, "--num-beams", "1")
    sha256 = data.read_json(copied / "february" / "config.json")["sha256"]["model"]
    shutil.rmtree(copied / "model")
    with pytest.raises(ValueError, match=f"--anchor original: .*{sha256}.*--anchor previous"):
        run(copied, "april", [5], *march)
    run(copied, "april", [5], *march, "--anchor", "previous", "--max-epochs", "1")


@pytest.mark.parametrize("known", [True, False])
def test_no_partner_holds_a_text_of_an_earlier_request_until_it_is_purged(known, copied, capsys):
    """Also of one with --redact; afterwards nothing knows the text."""
    file = copied / "february" / "config.json"
    data.write_json(file, data.read_json(file) | {"redact": True})
    if not known:
        purge.main([str(copied / "february")])
    pool = [{"id": str(i), "context": "", "prefix": "So: ", "suffix": TEXTS[i]} for i in range(6)]
    pool.append(pool[0] | {"id": "x", "suffix": "nothing of that is to be found in this text."})
    earlier = requests.earlier_pairs(copied / "march")
    keep, _ = knn.leak_guard([pair(5), *earlier], pool)
    assert keep.tolist() == [not known] * 3 + [False] * 3 + [True]
    assert known != ("february: its texts are gone" in capsys.readouterr().out)


def test_a_request_follows_one_whose_texts_are_gone(copied, capsys):
    """They cannot be watched; the judge reads a request's own texts."""
    purge.main([str(copied / "february")])
    out = run(copied, "april", [5], "--after", copied / "march", "--max-epochs", "1")
    assert "february: its texts are gone" in capsys.readouterr().out
    ids = {row["id"].split("-")[0] for row in data.read_jsonl(out / "samples.jsonl")}
    assert ids == {"5", "march"}
    assert {id for id, _ in judge.read_judged(out).triples} == {"5"}


def test_requests_in_folders_of_one_name_stay_apart(copied):
    """Also with equal ids: each row is of one text."""
    last = copied / "february"
    for i, name in ((3, "a"), (4, "b"), (5, "c")):
        data.write_jsonl(copied / f"{name}.pairs", [pair(i, id="0")])
        words = ["--after", last, "--pairs", copied / f"{name}.pairs", "--max-epochs", "1"]
        (copied / name).mkdir()
        last = run(copied, f"{name}/run", [], *words)
    pairs = runs.read_pairs_of(runs.read_run(last))
    assert {data.text_of(each) for each in pairs.values()} == set(TEXTS)
    assert {row["id"] for row in data.read_jsonl(last / "samples.jsonl")} == pairs.keys()


def test_the_chain_demo_measures_every_text_so_far(chain, tmp_path, monkeypatch):
    """Its table has a line a run, watched or not, and one of all at once."""

    def step(script, *words):  # in this process
        monkeypatch.setattr("sys.argv", [script, *map(str, words)])
        knn.main() if script == "knn.py" else icu.main(argv=list(map(str, words)))

    monkeypatch.setattr(extras_chain, "step", step)
    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    forget, pool, made = tmp_path / "forget.jsonl", tmp_path / "pool.jsonl", tmp_path / "made"
    data.write_jsonl(forget, [{"id": str(i), "text": TEXTS[i]} for i in range(4)])
    data.write_jsonl(pool, [{"text": f"A neighbour saw the old van of {x}."} for x in "ABCDEF"])
    flags = [*MEASURED[2:], "--lr", "2e-3", "--max-epochs", "1", "--batch-size", "2"]
    words = ["--forget", forget, "--pool", pool, "--model", chain / "model", "--parts", "2"]
    extras_chain.main([str(word) for word in [*words, "--out", made, *flags]])
    lines = [line.split(" | ")[:2] for line in (made / "table.md").read_text().splitlines()[2:]]
    runs_of = {"watched": "12", "not watched": "12", "at once": "2"}
    assert lines == [[f"| {name}", number] for name in runs_of for number in runs_of[name]]
    assert (made / "came-back.png").is_file()
