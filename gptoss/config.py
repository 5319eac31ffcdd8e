"""Stand-in until chapter 1 is tangled."""
from dataclasses import dataclass


class ConfigError(ValueError):
    pass


@dataclass(frozen=True)
class GptOssConfig:
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
    layer_types: tuple | None = None
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

    def __post_init__(self):
        if self.layer_types is None:
            object.__setattr__(self, "layer_types", tuple(
                ("sliding_attention", "full_attention")[i % 2] for i in range(self.num_hidden_layers)))
