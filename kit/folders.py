"""A model folder is what it says: config, tokenizer and weights of one model, as far as that shows without loading."""

import re
import warnings
from pathlib import Path

import torch
from safetensors import safe_open

from kit import data
from kit.flags import first_line

TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "spiece.model")
# More than any model has. transformers makes lists as long as a config says: a damaged one would fill the memory.
MOST = {"layer": 10**4, "attention_types": 10**4, "head": 10**5, "hidden": 10**7, "vocab": 10**8}
LAYER = re.compile(
    r"(?:^|\.)(?:h|layers?|blocks?)\.(\d+)\."
)  # where the name of a tensor counts layers
# Constants that older versions of transformers wrote among the weights.
CONSTANTS = re.compile(
    r"(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|position_ids$|decoder\.version$"
)


def check_parts(folder, flag):
    """ValueError for a folder with a config.json out of all bounds, without a tokenizer, or with an adapter beside."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{flag} {folder}: holds an adapter (adapter_config.json), which would be left out; merge it into the "
            "weights with peft (merge_and_unload, then save_pretrained) and pass that folder"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{flag} {folder}: no config.json, so not a model folder")
    for name, number in _whole_numbers(data.read_json(folder / "config.json")):
        most = min((limit for word, limit in MOST.items() if word in name), default=10**8)
        if number > most:
            what = f"no model has {str(number)[:20]} of anything like {name[:40] or 'this'}"
            raise ValueError(f"{flag} {folder}: config.json is damaged, {what}")
    check_tokenizer(folder, flag)
    check_generation(folder / "generation_config.json", flag)


def check_generation(file, flag):
    """ValueError for a generation_config.json that says nothing: its EOS would be left out in silence."""
    found = data.read_json(file) if file.is_file() else {}
    eos = found.get("eos_token_id") if isinstance(found, dict) else "?"
    if not all(
        token is None or type(token) is int for token in (eos if isinstance(eos, list) else [eos])
    ):
        raise ValueError(
            f"{flag} {file}: is damaged, its eos_token_id is no token id or list of them; or remove it"
        )


def _whole_numbers(value, name=""):
    """(the key that it stands under, number) of each whole number in a JSON value."""
    if type(value) is int:
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _whole_numbers(item, key)
    elif isinstance(value, list):
        for item in value:
            yield from _whole_numbers(item, name)


def check_tokenizer(folder, flag, deep=False):
    """ValueError for a folder without the files of a tokenizer, or (deep) without any in a folder of it."""
    # Without them transformers makes an empty tokenizer, to which all texts are the same.
    if not any(
        next(folder.rglob(file), None) if deep else (folder / file).is_file() for file in TOKENIZERS
    ):
        raise ValueError(f"{flag} {folder}: no tokenizer ({', '.join(TOKENIZERS)})")


def indexed(index):
    """The names of the weight files in a model.safetensors.index.json. ValueError for one that says nothing of them."""
    found = data.read_json(index)
    whole = isinstance(found, dict) and isinstance(
        found.get("metadata"), dict
    )  # transformers reads both
    names = found.get("weight_map") if whole else None
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) for name in names.values())
    ):
        raise ValueError(
            f"{index}: names no weights (weight_map, metadata); take the file that belongs to the weights"
        )
    if outside := [
        name for name in names.values() if Path(name).is_absolute() or ".." in Path(name).parts
    ]:
        raise ValueError(f"{index}: names {outside[0]}, which lies outside the folder")
    return sorted(set(names.values()))


def tensor_shapes(weights, what):
    """{name: shape} of the tensors in safetensors files, by their headers. ValueError: a file that is none, or cut."""
    shapes, those = {}, [file for file in weights if file.suffix == ".safetensors"]
    for file in those:
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
        except Exception as error:  # SafetensorError, OSError
            raise ValueError(
                f"{what}: the weights cannot be loaded, {file.name} ({first_line(error)})"
            ) from error
    if those and not shapes:
        raise ValueError(
            f"{what}: the weights cannot be loaded, {those[0].name} (it holds no tensor)"
        )
    return shapes


def check_shapes(shapes, config, make, what):
    """ValueError where `make(config)` finds no model in a config.json, or the weights have other shapes than its.

    It is made on torch's device `meta`: shapes without numbers.
    """
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.device("meta"),
        ):  # torch's, of sizes of 0
            model = make(config)
    except (
        Exception
    ) as error:  # of heads that do not divide, an unknown activation, a division by zero, ...
        raise ValueError(f"{what}: config.json describes no model ({first_line(error)})") from error
    for name, tensor in model.state_dict().items():
        if (found := shapes.get(name, [*tensor.shape])) != [*tensor.shape]:
            raise ValueError(
                f"{what}: {name} is {found} in the weights and {[*tensor.shape]} by config.json; they are of two models"
            )


def check_layers(names, config, what):
    """ValueError where the weights (names of tensors) have more layers than config.json, which then are left out."""
    said = getattr(config, "num_hidden_layers", None)
    if type(said) is int:
        said += (
            getattr(config, "num_nextn_predict_layers", None) or 0
        )  # these stand behind the layers
        surplus = [
            name for name in names if (found := LAYER.search(name)) and int(found[1]) >= said
        ]
        refuse_surplus(surplus, what, f"config.json has {said} layers and ")


def check_surplus(unexpected, model, what):
    """ValueError for tensors of a folder that its model has no place for; constants and a tied head are no loss."""
    harmless = {name for name, _ in model.named_buffers()} | set(
        getattr(model, "all_tied_weights_keys", None) or ()
    )
    surplus = [name for name in unexpected if name not in harmless and not CONSTANTS.search(name)]
    refuse_surplus(surplus, what)


def refuse_surplus(surplus, what, why=""):
    if surplus:
        more = f"{len(surplus)} tensors more than the model, the first is {sorted(surplus)[0]}"
        raise ValueError(f"{what}: {why}the weights have {more}; they are not of this config.json")
