"""Which numbers make a gpt-oss?

Generated from book/weights/config.py; edit the chapter, not this file.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gptoss.weights.errors import Error, expect, is_count, is_positive

# --- One dataclass for both models -------------------------------------------

KINDS = ("sliding_attention", "full_attention")
ROPE_TYPES = ("yarn", "default")


@dataclass(frozen=True)
class GptOssConfig:
    """Sizes and constants of a gpt-oss model; the defaults are the 120b's.

    Names are those of Hugging Face's config.json. layer_types None means
    alternating, a sliding layer first. ConfigError names a wrong key.
    """

    num_hidden_layers: int = 36
    num_local_experts: int = 128
    num_experts_per_tok: int = 4
    vocab_size: int = 201088
    hidden_size: int = 2880
    intermediate_size: int = 2880
    head_dim: int = 64
    num_attention_heads: int = 64
    num_key_value_heads: int = 8
    sliding_window: int = 128
    # None only until __post_init__ has filled it in
    layer_types: tuple[str, ...] = None  # type: ignore[assignment]
    max_position_embeddings: int = 131072
    initial_context_length: int = 4096
    rope_theta: float = 150000.0
    rope_type: str = "yarn"
    rope_factor: float = 32.0
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_truncate: bool = False
    rms_norm_eps: float = 1e-5
    swiglu_limit: float = 7.0
    eos_token_id: int = 200002
    pad_token_id: int = 199999
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        kinds = fill_kinds(self.layer_types, self.num_hidden_layers)
        object.__setattr__(self, "layer_types", kinds)
        check_sizes(self)
        check_choices(self)

    @classmethod
    def gpt_oss_20b(cls) -> "GptOssConfig":
        """gpt-oss-20b: 24 layers of 32 experts."""
        return cls(num_hidden_layers=24, num_local_experts=32)

    @classmethod
    def gpt_oss_120b(cls) -> "GptOssConfig":
        """gpt-oss-120b: 36 layers of 128 experts."""
        return cls(num_hidden_layers=36, num_local_experts=128)

    @classmethod
    def from_dict(cls, values: dict, source: str = "config.json"
                  ) -> "GptOssConfig":
        """From the keys of either spelling; `source` names the file."""
        from gptoss.weights.config_file import config_from_dict

        return config_from_dict(values, source)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GptOssConfig":
        """From a folder with a config.json, or from such a file."""
        from gptoss.weights.config_file import read_config

        return read_config(Path(path))

    def to_hf_dict(self) -> dict:
        """What Hugging Face's config.json holds."""
        from gptoss.weights.config_file import hf_dict

        return hf_dict(self)

    def to_original_dict(self) -> dict:
        """What OpenAI's original/config.json holds."""
        from gptoss.weights.config_file import original_dict

        return original_dict(self)


# --- What is an error, and what does it say? ---------------------------------

class ConfigError(Error):
    """A configuration that is not one of a gpt-oss model."""


demand = partial(expect, ConfigError)


# --- What is refused ---------------------------------------------------------

COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts_per_tok",
          "vocab_size", "hidden_size", "intermediate_size", "head_dim",
          "num_attention_heads", "num_key_value_heads", "sliding_window",
          "max_position_embeddings", "initial_context_length")
POSITIVE = ("rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow",
            "rms_norm_eps", "swiglu_limit")
LEAST = {"rope_beta_fast": 1e-6, "rope_beta_slow": 1e-6,
         "rms_norm_eps": 1e-30, "swiglu_limit": 1e-3}
MOST = dict.fromkeys(COUNTS, 2 ** 24) | {
    "num_hidden_layers": 10_000, "sliding_window": 2 ** 20,
    "max_position_embeddings": 2 ** 30, "initial_context_length": 2 ** 30,
    "rope_theta": 1e15, "rope_factor": 1e6, "rope_beta_fast": 1e6,
    "rope_beta_slow": 1e6, "rms_norm_eps": 1.0, "swiglu_limit": 65504.0,
    "eos_token_id": 2 ** 31 - 1, "pad_token_id": 2 ** 31 - 1}


def check_number(key: str, value: Any, name: str | None = None) -> None:
    """ConfigError unless it is a number within the bounds of field `key`;
    the message calls it `name`."""
    name, whole = name or key, key in COUNTS
    good = is_count(value) if whole else is_positive(value)
    kind = "a whole number" if whole else "a number"
    demand(good and value > 0, name, f"{kind} above 0", value)
    least, most = LEAST.get(key, 0), MOST[key]
    demand(value >= least, name, f"at least {least:g}", value)
    demand(value <= most, name, f"at most {most:,}", value)


def fill_kinds(kinds: Any, layers: Any) -> tuple[str, ...]:
    """The kinds of all layers, alternating if None; ConfigError if none."""
    demand(is_count(layers) and layers > 0, "num_hidden_layers",
           "a whole number above 0", layers)
    # a damaged file must not make a list of a billion entries
    most = MOST["num_hidden_layers"]
    demand(layers <= most, "num_hidden_layers", f"at most {most:,}", layers)
    if kinds is None:
        kinds = [KINDS[n % 2] for n in range(layers)]
    demand(isinstance(kinds, list | tuple), "layer_types", "a list", kinds)
    demand(len(kinds) == layers, "layer_types", f"{layers} entries",
           len(kinds))
    for n, kind in enumerate(kinds):
        demand(kind in KINDS, f"layer_types[{n}]", " or ".join(KINDS), kind)
    return tuple(kinds)


def check_sizes(config: GptOssConfig) -> None:
    """ConfigError naming the first size that makes no model."""
    for key in (*COUNTS, *POSITIVE):
        check_number(key, getattr(config, key))
    E, K = config.num_local_experts, config.num_experts_per_tok
    H, G = config.num_attention_heads, config.num_key_value_heads
    demand(K <= E, "num_experts_per_tok",
           f"at most num_local_experts = {E}", K)
    demand(H % G == 0, "num_attention_heads",
           f"a multiple of num_key_value_heads = {G}", H)
    demand(config.head_dim % 2 == 0, "head_dim", "an even number",
           config.head_dim)


def check_choices(config: GptOssConfig) -> None:
    """ConfigError naming the first choice that gpt-oss does not have."""
    slow = config.rope_beta_slow
    demand(config.rope_type in ROPE_TYPES, "rope_type",
           " or ".join(ROPE_TYPES), config.rope_type)
    demand(config.rope_factor >= 1, "rope_factor", "at least 1",
           config.rope_factor)
    demand(config.rope_theta > 1, "rope_theta", "a number above 1",
           config.rope_theta)
    demand(config.rope_beta_fast >= slow, "rope_beta_fast",
           f"at least rope_beta_slow = {slow}", config.rope_beta_fast)
    for key in ("rope_truncate", "tie_word_embeddings"):
        value = getattr(config, key)
        demand(isinstance(value, bool), key, "true or false", value)
    for key in ("eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        demand(is_count(value) and 0 <= value <= MOST[key], key,
                "a token id", value)


__all__ = [
    "COUNTS",
    "ConfigError",
    "GptOssConfig",
    "KINDS",
    "LEAST",
    "MOST",
    "POSITIVE",
    "ROPE_TYPES",
    "check_choices",
    "check_number",
    "check_sizes",
    "demand",
    "fill_kinds",
]
