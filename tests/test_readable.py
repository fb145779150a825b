"""Scripts that an encoder or BLEU's default words cannot read: what is measured of them, and what is said.

python -m pytest tests/test_readable.py -q
"""

from types import SimpleNamespace

import pytest
import torch

import icu
import knn
import metrics
from kit import data, readable

THAI = ["ห้องสมุดปิดเวลาห้าโมงเย็น กรุณาคืนหนังสือ", "เรือข้ามฟากมาช้าเพราะหมอกลงจัดในตอนเช้า"]
AMHARIC = ["ሰላም ለዓለም እንዴት ነህ", "መጽሐፍ ቤቱ በአምስት ሰዓት ይዘጋል"]
EMOJI = ["😀😃🎉 🚀🔥", "🐟🐳 🌊⛵"]
LATIN = ["Zoë Müller waited at the old mill.", "The ferry was late because of the fog."]


@pytest.mark.parametrize("texts", [THAI, AMHARIC, EMOJI])
def test_unrelated_texts_of_unknown_pieces_have_no_bertscore(texts, encoder_dir):
    """All pieces are [UNK]: any two texts would score 1.000; the readable rows beside them score as alone."""
    f1 = metrics.bertscore([texts[1], LATIN[0], ""], [texts[0], LATIN[1], texts[0]], encoder_dir)[2]
    assert f1.isnan().tolist() == [True, False, True]
    assert f1[1] == pytest.approx(
        metrics.bertscore(LATIN[:1], LATIN[1:], encoder_dir)[2].item(), abs=1e-6
    )
    mean = metrics.unrelated_bertscore([*texts, *LATIN], encoder_dir)
    assert 0 < mean < 0.9


def test_eq_5_does_not_take_a_row_without_a_bertscore_for_forgotten_by_it():
    """Paper, and: the row stays in training. Released code, or: BLEU alone decides."""
    rows = [
        {"bertscore": None, "bleu": 0.0},
        {"bertscore": None, "bleu": 0.9},
        {"bertscore": 0.1, "bleu": 0.0},
    ]
    limits = {"bertscore": 0.3, "bleu": 0.01}
    assert icu.refine(set(), rows, limits, SimpleNamespace(protocol="paper")) == {2}
    assert icu.refine(set(), rows, limits, SimpleNamespace(protocol="released")) == {0, 2}


def pair(suffix, name="a"):
    row = {"id": name, "context": "", "prefix": "A note:", "suffix": suffix, "similarity": 0.5}
    return row | {
        "learn_id": "p",
        "learn_context": "",
        "learn_prefix": "A neighbour",
        "learn_suffix": " saw the van.",
    }


def test_a_run_warns_in_one_line_before_any_work_and_finishes(
    encoder_dir, save_tiny, tmp_path, capsys
):
    """The share, what it does, the encoder to pass; config.json says the words of BLEU; the other row is measured."""
    data.write_jsonl(tmp_path / "pairs.jsonl", [pair(THAI[0]), pair(LATIN[0], "b")])
    folder = save_tiny("gpt_neo", tmp_path / "m")
    command = [
        "--pairs",
        tmp_path / "pairs.jsonl",
        "--model",
        folder,
        "--bert",
        encoder_dir,
        "--max-epochs",
        "1",
    ]
    icu.main(icu.icu, [*map(str, command), "--out", str(tmp_path / "run")])
    said = [line for line in capsys.readouterr().out.splitlines() if "cannot read" in line]
    assert len(said) == 1 and "1 of 2 texts (up to 100%" in said[0]
    assert "--bert bert-base-multilingual-cased" in said[0]
    assert data.read_json(tmp_path / "run" / "config.json")["bleu_tokens"] == ["13a", "char"]
    rows = data.read_jsonl(tmp_path / "run" / "samples.jsonl")
    assert {row["id"] for row in rows if row["bertscore"] is None} == {"a"}
    with pytest.raises(
        ValueError, match="here 1 of 2: pass a number, or --bert bert-base-multilingual-cased"
    ):
        icu.main(
            icu.icu,
            [*map(str, command), "--out", str(tmp_path / "auto"), "--bert-threshold", "auto"],
        )
    icu.main(
        icu.icu, [*map(str, command), "--out", str(tmp_path / "run"), "--resume"]
    )  # finished already


def test_latin_texts_are_measured_as_before_and_warned_of_nothing(encoder_dir, capsys):
    """A few unknown pieces are no reason."""
    text = "Zoë Müller ticked the box ✓ and went home to the old mill by the river."
    assert readable.check_readable(encoder_dir, [*LATIN, text], "--bert") == 3
    assert capsys.readouterr().out == ""


def test_knn_warns_of_forget_texts_that_its_encoder_cannot_read(
    encoder_dir, tmp_path, capsys, monkeypatch
):
    """Before it embeds anything, one line that names the multilingual encoder."""
    data.write_jsonl(tmp_path / "forget.jsonl", [{"id": "a", "text": THAI[0]}])
    data.write_jsonl(tmp_path / "pool.jsonl", [{"id": "b", "text": " ".join(LATIN)}])
    command = ["knn.py", "--forget", tmp_path / "forget.jsonl", "--pool", tmp_path / "pool.jsonl"]
    command += ["--encoder", encoder_dir, "--out", tmp_path / "pairs.jsonl", "--dry-run"]
    monkeypatch.setattr("sys.argv", list(map(str, command)))
    knn.main()
    (said,) = [line for line in capsys.readouterr().out.splitlines() if "cannot read" in line]
    assert "--encoder sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2" in said


@pytest.mark.parametrize(("text", "tokens"), [
    ("患者林晓雨住在青石镇柳河路十四号，她的账户尾号是 7731。", "zh"), ("図書館は午後五時に閉まります", "char"),
    (THAI[0], "char"), (LATIN[0], "13a"), ("Доброе утро", "13a"), ("도서관은 다섯 시에", "13a"), ("7731", "13a"),
    ("The sign says 出口 and nothing else.", "13a"),
])  # fmt: skip
def test_words_of_bleu_are_those_of_the_references_script(text, tokens):
    assert readable.bleu_tokens(text) == tokens


def test_bleu_of_a_chinese_text_with_one_other_character_is_neither_0_nor_1():
    """As one word it had no n-gram in common with its near copy."""
    true, near = "患者林晓雨住在青石镇柳河路十四号", "患者林晓雨住在青石镇柳河路十五号"
    assert 0.7 < metrics.bleu(near, true) < 1 and metrics.bleu(true, true) == 1
    assert metrics.bleu("天气", true) == 0
    assert torch.tensor(metrics.bleu(THAI[0], THAI[0])) == 1
