"""What the paper's text says and what the authors' released code computes, a row a difference.

Everything that computes the one or the other asks PROTOCOLS[args.protocol]; docs/protocols.md has
this table.
"""

from typing import NamedTuple

# fmt: off
# Name: (paper's value, released code's, what it is of, what the paper says, what the code does).
DIFFERENCES = {
    "context": (False, True,
        "sequence", "prefix + suffix (100 tokens)", "context + prefix + suffix (200)"),
    "targets": ("suffix", "all", "targets", "the suffix, from t0 on", "every position"),
    "cross_entropy_kl": (False, True,
        "L_kl", "KL", "cross-entropy H(p0, p): its gradient, another number"),
    "forgotten_by": (all, any, "forgotten", "BERTScore < 0.3 and BLEU < 0.01", "or"),
    "comes_back": (False, True,
        "a forgotten sample", "stays out", "comes back when measured as remembered"),
    "filter_at_start": (False, True,
        "the filter", "after each epoch", "before the first one too"),
    "stops_at_start": (True, False,
        "before any training", "the stop rule can end the run", "it never does"),
    "steps_on_all": (False, True,
        "steps an epoch", "as many as active samples fill",
        "as many as all samples fill; one with nothing active moves by Adam's momentum"),
    "el_from_suffix": (False, True, "EL10 over", "t = 1 .. T-n", "t from the suffix on"),
    "el_share_of": ("generation", "reference",
        "EL10 is", "a share of the generation's n-grams", "of the reference's"),
    "joined_perplexity": (False, True,
        "perplexity", "a text at a time, all tokens", "texts joined, windows"),
    "lenient_tasks": (False, True,
        "Lambada", "the very word", "but for case, punctuation and articles"),
    "superglue_copa": (False, True,
        "COPA", "all rows of the file", "SuperGLUE's 100 of the original 500"),
    "allow_copies": (False, True,
        "neighbours", "leak-safe", "nearest row, copies included"),
    "large_lr": (None, "2e-6",
        "lr of 1.3B, 2.7B", "5e-6", "2e-6 (the DeepSpeed file beats the flag)"),
    "own_defaults": (False, True,
        "a method's defaults", "its source's", "as its `released` says"),
    "published": (False, True,
        "the published row", "not printed", "beside a run that computes the same"),
}
# fmt: on

Protocol = NamedTuple("Protocol", [(name, object) for name in DIFFERENCES])
PROTOCOLS = {
    name: Protocol(*(row[i] for row in DIFFERENCES.values()))
    for i, name in enumerate(("paper", "released"))
}
