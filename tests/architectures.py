"""Small random models of the decoder-only architectures that transformers builds in a second.

model = architectures.small("gemma3_text")
"""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB, POSITIONS = 97, 64
BASE = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE |= {
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": POSITIONS,
    "head_dim": 8,
}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FALCON = {name: value for name, value in BASE.items() if name != "head_dim"}

MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4}

# name: (model_type, its config). What BASE has and a config does not know is ignored there.
CONFIGS = {
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": POSITIONS,
        },
    ),
    "gpt2": ("gpt2", GPT2),
    "opt": ("opt", {**BASE, "ffn_dim": 64, "word_embed_proj_dim": 16}),
    **{name: (name, BASE) for name in ("gpt_neox", "llama", "qwen3")},
    "mixtral": ("mixtral", {**BASE, "num_local_experts": 4}),
    "qwen2-sliding": ("qwen2", {**BASE, "use_sliding_window": True, **SLIDING}),
    "qwen2_moe": ("qwen2_moe", BASE | MOE),
    "gemma2": ("gemma2", {**BASE, "sliding_window": 8}),
    "gemma3_text": ("gemma3_text", BASE | SLIDING),
    "phi": ("phi", {**BASE, "num_key_value_heads": 4}),
    "mpt": (
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": POSITIONS, "vocab_size": VOCAB},
    ),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        "falcon",
        {**FALCON, "alibi": True, "multi_query": False, "new_decoder_architecture": False},
    ),
    "cohere2": ("cohere2", BASE | SLIDING),
    "granite": ("granite", {**BASE, "logits_scaling": 4.0}),
    "gpt_oss": ("gpt_oss", {**BASE, "num_local_experts": 4, "sliding_window": 8}),
    "llama4_text": (
        "llama4_text",
        {
            **BASE,
            "attention_chunk_size": 8,
            "num_local_experts": 2,
            "intermediate_size_mlp": 64,
            "layer_types": ["chunked_attention", "full_attention"],
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **FALCON,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
    ),
}
# These stand for the rest in every run of the suite.
USUAL = ["gpt_neo", "opt", "llama", "gpt2", "qwen2-sliding", "gemma3_text", "bloom"]
# No plain cache of keys and values: a state, or layers of more than one kind of memory.
STATEFUL = {
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "qwen3_next": (
        "qwen3_next",
        {**BASE, **MOE, "layer_types": ["linear_attention", "full_attention"]},
    ),
    "bert": ("bert", BASE),
}
SPECIALS = {"bos_token_id": 1, "eos_token_id": 2}


def rows():
    """Three rows of ordinary tokens, of 30, 22 and 13, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [torch.randint(3, VOCAB, (length,)).tolist() for length in (30, 22, 13)]


def config_of(name):
    """The config of one of them."""
    model_type, own = (CONFIGS | STATEFUL)[name]
    return CONFIG_MAPPING[model_type](
        **SPECIALS | {"pad_token_id": 0, "tie_word_embeddings": False} | own
    )


@torch.inference_mode()
def literal_score(model, context, continuation):
    """(sum of log p, greedy ids) of a continuation, from one pass over one row."""
    positions = getattr(model.config, "max_position_embeddings", 10**6)
    ids = (context + continuation)[-(positions + 1) :]
    logits = model(torch.tensor([ids[:-1]])).logits[0, -len(continuation) :]
    logp = logits.double().log_softmax(-1)  # (K, V)
    chosen = logp[range(len(continuation)), continuation]
    return chosen.sum().item(), logp.argmax(1).tolist()


def small(name, *, dtype=torch.float32, scale=8.0):
    """A random model in eval mode, its weights drawn wide."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, scale * 0.02)
    return model
