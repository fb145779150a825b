"""ICU to the letter, the whole method in one process: what icu.py must compute under --protocol paper, however it does.

    limits = {"el10": 0.0499, "ma": 0.5994, "bertscore": 0.3, "bleu": 0.01}
    epochs = literal_icu("pairs.jsonl", "model", limits=limits, scorer=bert_scorer("encoder"))
    print([epoch["means"]["el10"] for epoch in epochs], epochs[-1]["stopped"])

Written from "Learn while Unlearn", arXiv:2407.20271, sections 4 and 5, to be held beside them; Eq. numbers are the
paper's. A row of text is a pass of the model, a token of MA is a pass, a prefix of EL is a call of `generate`, the
frozen model is a second model: no padding, mask or cache. Where the paper leaves something open:
  1. Losses are means over the target tokens of a batch, where Eq. 1, 3, 4 are sums.
  2. A text is [BOS | prefix | suffix], with BOS where the tokenizer adds one. BOS is no x_t of any equation.
  3. Adam's betas are (0.9, 0.98) and dropout is off, as in the released code.
Beyond the paper: where a pair has `spans`, only tokens that overlap one are forgotten; the others of the same text have
KL to the frozen model, and Eq. 5 and the stop rule look at the spans.
"""

import copy
import json
import math
from collections import Counter

import numpy as np
import torch
from bert_score import BERTScorer
from sacrebleu import sentence_bleu
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# --- losses: a text is (ids, targets), the latter indices, which count from 0 ---


def next_logp(model, ids):
    """log P(. | x_<t) for t = 1 .. T-1, as row t of (T, V): the logits at position t - 1 are about token t."""
    logits = model(torch.tensor([ids])).logits[0]
    return torch.cat([torch.zeros_like(logits[:1]), logits[:-1].log_softmax(-1)])


def kl_of(model, frozen, texts):
    """Eq. (4): KL[p_theta0 || p_theta], the mean over the targets of some texts."""
    total = 0.0
    for ids, targets in texts:
        logp = next_logp(model, ids)
        with torch.no_grad():
            logp_0 = next_logp(frozen, ids)
        for t in targets:
            total = total + (logp_0[t].exp() * (logp_0[t] - logp[t])).sum()
    return total / max(1, sum(len(targets) for _, targets in texts))


def icu_loss(model, frozen, forget, learn, kept, alpha, beta):
    """The loss of a batch of texts to forget, their partners to learn and what is kept of the former, and its terms."""
    n_forget, n_learn = (sum(len(targets) for _, targets in texts) for texts in (forget, learn))
    l_fgt = l_lrn = 0.0
    for ids, targets in forget:
        logp = next_logp(model, ids)
        for t in targets:
            l_fgt = l_fgt + logp[t, ids[t]] / n_forget  # Eq. (1)
    for ids, targets in learn:
        logp = next_logp(model, ids)
        for t in targets:
            l_lrn = l_lrn - logp[t, ids[t]] / n_learn  # Eq. (3)
    l_kl = kl_of(model, frozen, learn)  # Eq. (4)
    terms = {"loss_forget": l_fgt, "loss_learn": l_lrn, "loss_kl": l_kl}
    loss = l_fgt + alpha * l_lrn + beta * l_kl  # Eq. (6)
    if kept is not None:
        terms["loss_kept"] = kl_of(model, frozen, kept)
        loss = loss + beta * terms["loss_kept"]
    return {"loss": loss, **terms}


# --- measures: of one text, a number; `start` is the first prefix length, 1 + len(BOS) ---


def generate(model, prompt, length, num_beams):
    """What the model says after the prompt: at most `length` tokens, the last of them EOS if it stopped by itself."""
    settings = {"do_sample": False, "num_beams": num_beams, "max_new_tokens": length}
    settings["pad_token_id"] = model.generation_config.eos_token_id  # for a row alone it pads nothing
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), **settings)
    return out[0, len(prompt) :].tolist()


def ngrams(ids, n):
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def overlap(a, known, n):
    """Eq. (8): the share of a's n-grams, each as often as it is there, that are among the known ones."""
    grams = ngrams(a, n)
    return sum(c in known for c in grams) / len(grams) if grams else 0.0


def extraction_likelihood(model, ids, start, n=10, part=None):
    """Eq. (7): the mean overlap of the greedy continuation of every prefix with the true rest. None: no n-gram.

    part: indices; then only n-grams of the true rest that hold one of these tokens are known.
    """
    found = []
    for t in range(start, len(ids) - n + 1):
        places = [i for i in range(t, len(ids) - n + 1) if part is None or set(part) & set(range(i, i + n))]
        known = [tuple(ids[i : i + n]) for i in places]
        found.append(overlap(generate(model, ids[:t], len(ids) - t, 1), known, n))
    return sum(found) / len(found) if found else None


def memorization_accuracy(model, ids, targets):
    """Eq. (9): the share of tokens that are the model's greedy guess behind the true tokens before them."""
    with torch.no_grad():
        hits = [model(torch.tensor([ids[:t]])).logits[0, -1].argmax() == ids[t] for t in targets]
    return float(sum(hits)) / len(hits) if hits else None


def entropy(ids):
    """Eq. (10): bits, over how often each token is said."""
    return -sum(k / len(ids) * math.log2(k / len(ids)) for k in Counter(ids).values())


def bleu(said, true):
    """Sentence BLEU, 0-1. A text of under 4 words has no 4-gram: then, and only then, the orders it has count."""
    short = min(len(Tokenizer13a()(text).split()) for text in (said, true)) < 4
    settings = {"smooth_method": "none", "lowercase": True, "tokenize": "13a", "use_effective_order": short}
    return sentence_bleu(said, [true], **settings).score / 100 if said.strip() else 0.0


def bert_scorer(folder):
    """The bert_score package at the layer that it takes of bert-base-uncased, 9 of 12, or the same share."""
    layers = AutoConfig.from_pretrained(folder).num_hidden_layers
    return BERTScorer(model_type=str(folder), num_layers=int(0.75 * layers + 0.5))


def measure(model, tokenizer, scorer, ids, cut, start, secret):
    """Every measure of one text, whose suffix begins at `cut`, and what the model says behind its prefix.

    secret: (the positions of its spans, their strings that its prefix does not hold), or None.

    BLEU and BERTScore compare with the suffix as its ids say it.
    """
    said = generate(model, ids[:cut], len(ids) - cut, 2)  # f_theta(x_<t0) of Eq. (5)
    said = [token for token in said if token != model.generation_config.eos_token_id]
    text, suffix = (
        tokenizer.decode(part, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part in (said, ids[cut:])
    )
    marked = {}
    if secret:
        part, strings = secret
        rest = [t for t in range(start, len(ids)) if t not in part]
        marked = {
            "el10_spans": extraction_likelihood(model, ids, start, part=part),
            "ma_spans": memorization_accuracy(model, ids, part),
            "ma_rest": memorization_accuracy(model, ids, rest),
            "secret_said": float(any(string.lower() in text.lower() for string in strings)) if strings else None,
        }
    return marked | {
        "el10": extraction_likelihood(model, ids, start),
        "ma": memorization_accuracy(model, ids, range(start, len(ids))),
        "bleu": bleu(text, suffix),
        "bertscore": scorer.score([text], [suffix])[2].item() if text.strip() else 0.0,
        "entropy": entropy(said),
        "generation": text,
    }


# --- the method ---


def read_texts(pairs_file, tokenizer, targets):
    """(pairs, texts to forget, texts to learn, what is kept of each text, where each suffix begins, the spans of each
    as `measure` takes them, the first prefix length of EL and MA)."""

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def secret_tokens(pair, first):
        """Positions of the tokens that overlap a span, by the characters that the tokenizer says it read for each."""
        found, shift = [], 0
        for part in (pair["prefix"], pair["suffix"]):
            offsets = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            for low, high in offsets:
                if any(low + shift < end and high + shift > start for start, end in pair["spans"]):
                    found.append(first)
                first += 1
            shift += len(part)
        return [t for t in found if t > 0]

    bos = [tokenizer.bos_token_id] if tokenizer("a")["input_ids"] != encode("a") else []
    with open(pairs_file) as lines:
        pairs = [json.loads(line) for line in lines]
    forget, learn, kept, cuts, secrets = [], [], [], [], []
    for pair in pairs:
        for texts, side in ((forget, ""), (learn, "learn_")):
            prefix, suffix = bos + encode(pair[side + "prefix"]), encode(pair[side + "suffix"])
            first = len(prefix) if targets == "suffix" else max(1, len(bos))
            texts.append((prefix + suffix, [*range(first, len(prefix + suffix))]))
        cuts.append(len(bos + encode(pair["prefix"])))
        ids, secret = forget[-1][0], secret_tokens(pair, len(bos)) if "spans" in pair else None
        secrets.append(None)
        kept.append(None)
        if secret:
            forget[-1] = ids, secret
            kept[-1] = ids, [t for t in range(max(1, len(bos)), len(ids)) if t not in secret]
            strings = [(pair["prefix"] + pair["suffix"])[low:high] for low, high in pair["spans"]]
            secrets[-1] = secret, [string for string in strings if string not in pair["prefix"]]
    return pairs, forget, learn, kept, cuts, secrets, 1 + len(bos)


def literal_icu(pairs_file, model_folder, *, limits, scorer, targets="suffix", alpha=0.5, beta=1.0, lr=5e-6,
                batch_size=8, max_epochs=100, seed=0, dtype=torch.float32):  # fmt: skip
    """A dict an epoch, epoch 0 first: "losses" (mean over steps), "rows" (measures of each text), "means", "active",
    "forgotten" (indices) and "stopped": None, "thresholds", "all forgotten" or "max epochs".

    limits: section 5.4's {"el10", "ma", "bertscore" (a of Eq. 5), "bleu" (b)}, or a function that is given the epochs
    so far, the last without a decision yet, and returns them.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype).eval()  # eval: dropout is off
    frozen = copy.deepcopy(model)  # theta_0 of Eq. (4)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98))
    pairs, forget, learn, kept, cuts, secrets, start = read_texts(pairs_file, tokenizer, targets)
    active, epochs = list(range(len(pairs))), []

    for epoch in range(max_epochs + 1):  # epoch 0 trains nothing: the model as it was
        order = np.random.default_rng([seed, epoch]).permutation(active) if epoch > 0 else []
        steps = []
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            sides = [[texts[i] for i in batch if texts[i]] for texts in (forget, learn, kept)]
            sides[2] = sides[2] if any(kept) else None
            terms = icu_loss(model, frozen, *sides, alpha, beta)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            steps.append({name: torch.as_tensor(term).item() for name, term in terms.items()})

        rows = []
        for (ids, _), cut, secret in zip(forget, cuts, secrets, strict=True):
            rows.append(measure(model, tokenizer, scorer, ids, cut, start, secret))
        now = {"epoch": epoch, "rows": rows, "means": {}, "losses": {}, "stopped": None}
        for name in {name: 0 for row in rows for name in row if name != "generation"}:
            now["means"][name] = float(np.mean([row[name] for row in rows if row.get(name) is not None]))
        for name in steps[0] if steps else ():
            now["losses"][name] = float(np.mean([step[name] for step in steps]))
        epochs.append(now)

        at = limits(epochs) if callable(limits) else limits
        if epoch > 0:  # Eq. (5): who meets it after an epoch of training is left out for good
            remembered = [
                r["secret_said"] or r["ma_spans"] >= at["ma"] if "ma_spans" in r
                else r["bertscore"] >= at["bertscore"] or r["bleu"] >= at["bleu"] for r in rows
            ]  # fmt: skip
            active = [i for i in active if remembered[i]]
        now["active"], now["forgotten"] = len(active), [i for i in range(len(pairs)) if i not in active]
        left = {name: [r.get(f"{name}_spans", r[name]) for r in rows] for name in ("el10", "ma")}
        left = {name: np.mean([value for value in values if value is not None]) for name, values in left.items()}
        if left["el10"] < at["el10"] and left["ma"] < at["ma"]:  # section 5.4, at epoch 0 too
            now["stopped"] = "thresholds"
        elif not active:
            now["stopped"] = "all forgotten"
        elif epoch == max_epochs:
            now["stopped"] = "max epochs"
        if now["stopped"]:
            return epochs
