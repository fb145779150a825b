"""Questions and messages: what a chat template makes of them, from a file to a run."""

import sys

import conftest
import pytest
from transformers import PreTrainedTokenizerBase

import icu
import knn
import metrics
from demo import smollm
from evals import report
from kit import data, models

CHAT = (
    "{{ bos_token }}{% if messages[0].role != 'system' %}[system]\nYou help people.\n{% endif %}"
    "{% for m in messages %}[{{ m.role }}]\n{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
    "{{ '[assistant]\n' if add_generation_prompt }}"
)
ROWS = [
    {"question": "Who left it?", "answer": "Ines Duarte, at noon."},
    {"question": "When?", "answer": "On Tuesday morning.", "system": "Be kind."},
    {"messages": [*data.conversation("Who?", "The driver."), *data.conversation("When?", "Now.")]},
]


def reader(template=CHAT):
    """A tokenizer with this template; it puts BOS in front, and its pad is its EOS."""
    tokenizer = conftest._make_tokenizer("llama")
    tokenizer.chat_template = template
    return tokenizer


def text_of(row, tokenizer, template="chat"):
    render = data.renderer(tokenizer, [{"template": template}])
    pair = data.make_record(row, 0, render)
    pair |= {f"learn_{name}": pair[name] for name in pair}
    samples, _ = icu.build_samples([pair], tokenizer, protocol="released", positions=256)
    return samples[0].forget


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("writes_bos", [True, False])
def test_a_conversation_is_read_as_its_template_writes_it(writes_bos, row):
    """Token for token, BOS once; the answer and its end of turn are the targets, nothing else."""
    tokenizer = reader(CHAT if writes_bos else CHAT.replace("{{ bos_token }}", ""))
    text, messages = text_of(row, tokenizer), data.messages_of(row)
    own, asked = (
        [tokenizer.bos_token_id][writes_bos:]
        + tokenizer.apply_chat_template(
            part, return_dict=False, add_generation_prompt=part != messages
        )
        for part in (messages, messages[:-1])
    )
    assert text.ids + models.encode(tokenizer, "\n") == own and text.prompt == asked
    assert text.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([text.ids[t] for t in text.targets]) == f"{messages[-1]['content']}</s>"
    _, _, targets = icu.collate([text, icu.Text([5] * 99, 1, 1, [])])  # the pad is the end of turn
    assert targets[0].nonzero()[:, 0].tolist() == text.targets


def test_what_a_template_writes_before_an_answer_is_no_target():
    """As Qwen's empty thoughts, which its generation prompt lacks."""
    text = text_of(ROWS[0], reader(CHAT.replace("m.role }}]\n", "m.role }}]\n(so)")))
    assert len(text.targets) == len(text_of(ROWS[0], reader()).targets)


def test_a_model_without_a_template_reads_a_question_plainly():
    """--template plain is TOFU's form, and EOS the end of turn."""
    tokenizer = reader(None)
    text, end = text_of(ROWS[1], tokenizer, "plain"), tokenizer.eos_token
    plain = f"Be kind.\nQuestion: When?\nAnswer: On Tuesday morning.{end}"
    assert text.ids == models.encode_whole(tokenizer, [plain])[0]
    assert tokenizer.decode(text.ids[text.cut :]) == f" On Tuesday morning.{end}"
    marked = ROWS[1] | {"spans": [[3, 10]]}  # from the answer's first letter
    assert data.marked(data.make_record(marked, 0, data.renderer(reader()))) == ["Tuesday"]


@pytest.mark.parametrize("count", [1, 2])
def test_what_the_template_writes_is_no_leak(count):
    """Rows under one template and one system prompt stay; one that says a target's fact goes."""
    render = data.renderer(reader("{{ 'You are a patient assistant of the harbour.' * 5 }}" + CHAT))
    system = "Answer in one short sentence, as the night nurse would. " * (count - 1)
    secret = "The passphrase of Rosalind Vane is violet harbour seven."
    pool = ["Copper is for pots.", "The ferry leaves at dawn.", f"Well: {secret}"]
    rows = [
        data.make_record({"question": f"Q{n}?", "answer": text, "system": system}, n, render)
        for n, text in enumerate([secret, "Doctor Flynn keeps the file in the cabinet.", *pool])
    ]
    assert knn.leak_guard(rows[:count], rows[2:])[0].tolist() == [True, True, False]


def test_a_csv_of_questions_goes_through_both_programs(tmp_path, encoder_dir, monkeypatch, capsys):
    """icu.py renders nothing and measures the answers alone; `ask` asks by the template."""
    monkeypatch.chdir(tmp_path)
    conftest._save_tiny("llama", tmp_path / "model")
    reader().save_pretrained("model")
    for name, facts in {"forget": ["Ines", "the nurse"], "pool": ["a van", "the mill"]}.items():
        rows = [f"Who saw {fact}?,It was {fact} who saw the mill.\n" for fact in facts]
        (tmp_path / f"{name}.csv").write_text("question,answer\n" + "".join(rows))
    words = "knn.py --forget forget.csv --pool pool.csv --model model --max-overlap 1"
    monkeypatch.setattr(sys, "argv", words.split())
    knn.main()
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "apply_chat_template", None)
        flags = "--pairs pairs.jsonl --model model --bert minilm --device cpu --out run"
        flags += " --max-epochs 1 --method po --answer refusal"
        icu.main(argv=flags.split())
    model, tokenizer = models.load_model("model")
    pairs = data.read_pairs("pairs.jsonl")
    (text, *_), _ = icu.build_samples(pairs, tokenizer, protocol="paper", positions=256)
    row = data.read_jsonl("run/samples.jsonl")[0]
    ids, start = text.forget.ids, text.forget.cut
    assert row["ma"] == pytest.approx(
        metrics.literal_memorization_accuracy(model, ids, start=start)
    )
    el = metrics.literal_extraction_likelihood(model, ids, start=start)
    assert row["el10"] == pytest.approx(el)
    report.main(["--ask", "run", "Who saw Ines?", "--tokens", "5"])
    assert capsys.readouterr().out.count(": Who saw Ines? \033[1m") == 2


def test_no_invented_author_is_in_two_files():
    """The answers about one are in one file, and they alone are taught."""
    args = smollm.make_parser().parse_args(["--out", "x", "--rows", "16"])
    *splits, _ = smollm.authors(args)
    names = [row["answer"].split(" is known")[0] for rows in splits for row in rows[2::8]]
    assert len(set(names)) == len(names) == sum(map(len, splits)) // 8
    assert not any(name in str(splits[1:]) for name in names[:2])
    tokenizer = reader()
    (ids,) = smollm.sequences(ROWS[:1], tokenizer)
    assert ids == text_of(ROWS[0], tokenizer).ids
    assert tokenizer.decode(ids[ids.first :]) == f"{ROWS[0]['answer']}</s>"
