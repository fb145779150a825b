"""Which texts a measure can read: the words of BLEU by script, the pieces of an encoder that are unknown to it."""

import re
from functools import lru_cache

from kit.processes import print0

HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
KANA = re.compile("[\u3041-\u30ff]")
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")  # Thai, Lao, Burmese, Khmer

MOST_UNKNOWN = 0.2  # of a text's pieces; two texts of unknown pieces alone are equal to an encoder
MULTILINGUAL = {
    "--bert": "bert-base-multilingual-cased",
    "--encoder": "sentence-transformers/paraphrase-multilingual-MiniLM-L12-v2",
}


def bleu_tokens(reference):
    """sacrebleu's tokenisation for the script that most letters of the reference are of.

    13a, the default, splits at spaces, and so has a Chinese or a Thai sentence for one word.
    """
    letters = sum(map(str.isalpha, reference))
    han, kana, unspaced = (len(script.findall(reference)) for script in (HAN, KANA, UNSPACED))
    if 2 * (han + kana) > letters:
        return "char" if kana else "zh"  # ja-mecab would need a package
    return "char" if 2 * unspaced > letters else "13a"


def unknown_share(tokenizer, text):
    """The share of a text's pieces that the tokenizer knows as the unknown token only, 0-1."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if tokenizer else []
    return sum(token == tokenizer.unk_token_id for token in ids) / max(len(ids), 1)


def can_read(tokenizer, text):
    return unknown_share(tokenizer, text) <= MOST_UNKNOWN


def check_readable(encoder, texts, flag):
    """How many of the texts the encoder can read; one warning line if not all, which names the multilingual encoder."""
    tokenizer = encoder_tokenizer(str(encoder))
    check_embedded(encoder, tokenizer, texts, flag)
    shares = [unknown_share(tokenizer, text) for text in texts]
    unread = [share for share in shares if share > MOST_UNKNOWN]
    if unread:
        effect = {
            "--bert": "they have no BERTScore and Eq. 5 does not take them for forgotten by it",
            "--encoder": "their neighbours are those of other texts",
        }
        print0(
            f"warning: the encoder cannot read {len(unread)} of {len(texts)} texts (up to {max(unread):.0%} of the "
            f"pieces of a text are unknown to it): {effect[flag]}; pass {flag} {MULTILINGUAL[flag]}"
        )
    return len(texts) - len(unread)


def check_embedded(encoder, tokenizer, texts, flag):
    """ValueError for a text with a token that was added to the encoder's tokenizer and has no embedding."""
    from transformers import AutoConfig

    vocab = getattr(AutoConfig.from_pretrained(encoder), "vocab_size", 1 << 60) if tokenizer else 0
    for number, text in enumerate(texts if tokenizer and len(tokenizer) > vocab else [], start=1):
        if max(tokenizer(text, verbose=False)["input_ids"], default=0) >= vocab:
            raise ValueError(
                f"{flag} {encoder}: text {number} holds a token that is none of its {vocab} embeddings"
            )


@lru_cache(maxsize=2)
def encoder_tokenizer(encoder):
    """An encoder's tokenizer, or None where there is none to load: the encoder itself will say why."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(encoder)
    except Exception:
        return None


def check_run(args, suffixes):
    """What of a run's true suffixes its BERTScore can read, and args.bleu_tokens, the tokenisations of their BLEU.

    ValueError where --bert-threshold auto has no two suffixes to compare.
    """
    readable = check_readable(args.bert, suffixes, "--bert")
    if args.bert_threshold == "auto" and suffixes and readable < 2:
        raise ValueError(
            f"--bert-threshold auto compares suffixes that the encoder can read, here {readable} of {len(suffixes)}: "
            f"pass a number, or --bert {MULTILINGUAL['--bert']}"
        )
    args.bleu_tokens = sorted(set(map(bleu_tokens, suffixes)))
