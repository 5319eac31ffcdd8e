"""Where do 21 billion parameters live?

Generated from book/weights/counts.py; edit the chapter, not this file.
"""

from gptoss.weights.config import GptOssConfig

# --- How many parameters? ----------------------------------------------------

def parameter_counts(config: GptOssConfig) -> dict[str, int]:
    """Parameters by component; the values sum to `total_parameters`."""
    D, V, C = config.hidden_size, config.vocab_size, config.head_dim
    E, L = config.num_local_experts, config.num_hidden_layers
    H, G = config.num_attention_heads, config.num_key_value_heads
    attention = D * (H + 2 * G) * C + (H + 2 * G) * C   # q, k, v
    attention += H * C * D + D + H                      # o and the sinks
    return {"embedding": V * D, "attention": L * attention,
            "router": L * (D + 1) * E, "experts": L * E * expert_size(config),
            "norms": (2 * L + 1) * D, "lm_head": V * D}


def expert_size(config: GptOssConfig) -> int:
    """Parameters of one expert: gate and up, down, and their biases."""
    D, F = config.hidden_size, config.intermediate_size
    return 2 * F * D + 2 * F + D * F + D


def total_parameters(config: GptOssConfig) -> int:
    """All parameters, each counted as one number."""
    return sum(parameter_counts(config).values())


# --- How many of them does a token use? --------------------------------------

def active_parameters(config: GptOssConfig) -> int:
    """Parameters that one token multiplies with: K experts of E, and
    without the embedding, which is looked up."""
    counts = parameter_counts(config)
    chosen = (config.num_hidden_layers * config.num_experts_per_tok
              * expert_size(config))
    rest = sum(counts[part] for part in ("attention", "router", "norms",
                                         "lm_head"))
    return rest + chosen


# --- How many bytes? ---------------------------------------------------------

def expert_bytes(config: GptOssConfig) -> int:
    """One expert in the file: 17 bytes per 32 weights, bf16 biases."""
    D, F = config.hidden_size, config.intermediate_size
    blocks = 2 * F * -(-D // 32) + D * -(-F // 32)
    return 17 * blocks + 2 * (2 * F + D)


def checkpoint_bytes(config: GptOssConfig) -> int:
    """Bytes of all tensors in the released layout: experts in MXFP4."""
    experts = config.num_hidden_layers * config.num_local_experts
    counts = parameter_counts(config)
    dense = total_parameters(config) - counts["experts"]
    return experts * expert_bytes(config) + 2 * dense


def bf16_bytes(config: GptOssConfig) -> int:
    """Bytes of all tensors if every parameter took two."""
    return 2 * total_parameters(config)


def bytes_read_per_token(config: GptOssConfig) -> int:
    """Bytes of weights that decoding one token reads, K experts a layer.

    One row of the embedding counts; the cache does not (`cache_bytes`).
    """
    counts = parameter_counts(config)
    dense = sum(counts[part] for part in ("attention", "router", "norms",
                                          "lm_head"))
    experts = config.num_hidden_layers * config.num_experts_per_tok
    return (2 * (dense + config.hidden_size)
            + experts * expert_bytes(config))


# --- What does the text itself take? -----------------------------------------

def layer_cache_bytes(config: GptOssConfig, dtype_bytes: int = 2) -> int:
    """Bytes of one token's key and value in one layer: 2 G C numbers."""
    return 2 * config.num_key_value_heads * config.head_dim * dtype_bytes


def cache_bytes_per_token(config: GptOssConfig, dtype_bytes: int = 2) -> int:
    """Bytes that a token adds to each layer's keys and values, times the
    full layers only: a sliding layer's ring does not grow."""
    full = config.layer_types.count("full_attention")
    return full * layer_cache_bytes(config, dtype_bytes)


def cache_bytes(config: GptOssConfig, tokens: int, batch_size: int = 1,
                dtype_bytes: int = 2) -> int:
    """Bytes of a cache with room for `tokens`, its rings included."""
    sliding = config.layer_types.count("sliding_attention")
    rings = sliding * config.sliding_window * layer_cache_bytes(
        config, dtype_bytes)
    return batch_size * (rings + tokens * cache_bytes_per_token(
        config, dtype_bytes))


# --- How much arithmetic? ----------------------------------------------------

def flops_per_token(config: GptOssConfig, context: int) -> int:
    """Multiplications and additions of one token that sees `context` keys.

    Two for each active weight of a matrix (biases, norms and sinks left
    out) and 4 H C for each visible key of each layer.
    """
    D, F, C = config.hidden_size, config.intermediate_size, config.head_dim
    H, G = config.num_attention_heads, config.num_key_value_heads
    layer = D * C * (2 * H + 2 * G) + D * config.num_local_experts
    layer += config.num_experts_per_tok * 3 * D * F
    seen = sum(min(context, config.sliding_window)
               if kind == "sliding_attention" else context
               for kind in config.layer_types)
    return (2 * (config.num_hidden_layers * layer + D * config.vocab_size)
            + 4 * H * C * seen)


__all__ = [
    "active_parameters",
    "bf16_bytes",
    "bytes_read_per_token",
    "cache_bytes",
    "cache_bytes_per_token",
    "checkpoint_bytes",
    "expert_bytes",
    "expert_size",
    "flops_per_token",
    "layer_cache_bytes",
    "parameter_counts",
    "total_parameters",
]
