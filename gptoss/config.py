"""Where do 21 billion parameters live?

Generated from book/01_config.py; edit the chapter, not this file.
"""

import itertools
import json
import re
import stat
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gptoss.errors import Error, expect, is_count, is_positive, shown

# --- A mistake has a name ----------------------------------------------------

class ConfigError(Error):
    """A configuration that is not one of a gpt-oss model."""


_expect = partial(expect, ConfigError)


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
    layer_types: tuple[str, ...] | None = None
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
        return config_from_dict(values, source)

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "GptOssConfig":
        """From a folder with a config.json, or from such a file."""
        return read_config(Path(path))

    def to_hf_dict(self) -> dict:
        """What Hugging Face's config.json holds."""
        return hf_dict(self)

    def to_original_dict(self) -> dict:
        """What OpenAI's original/config.json holds."""
        return original_dict(self)


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


def _check_number(key: str, value: object, name: str | None = None) -> None:
    """ConfigError unless it is a number within the bounds of field `key`;
    the message calls it `name`."""
    name, whole = name or key, key in COUNTS
    good = is_count(value) if whole else is_positive(value)
    kind = "a whole number" if whole else "a number"
    _expect(good and value > 0, name, f"{kind} above 0", value)
    least, most = LEAST.get(key, 0), MOST[key]
    _expect(value >= least, name, f"at least {least:g}", value)
    _expect(value <= most, name, f"at most {most:,}", value)


def fill_kinds(kinds: object, layers: object) -> tuple[str, ...]:
    """The kinds of all layers, alternating if None; ConfigError if none."""
    _expect(is_count(layers) and layers > 0, "num_hidden_layers",
            "a whole number above 0", layers)
    # a damaged file must not make a list of a billion entries
    most = MOST["num_hidden_layers"]
    _expect(layers <= most, "num_hidden_layers", f"at most {most:,}", layers)
    if kinds is None:
        kinds = [KINDS[n % 2] for n in range(layers)]
    _expect(isinstance(kinds, list | tuple), "layer_types", "a list", kinds)
    _expect(len(kinds) == layers, "layer_types", f"{layers} entries",
            len(kinds))
    for n, kind in enumerate(kinds):
        _expect(kind in KINDS, f"layer_types[{n}]", " or ".join(KINDS), kind)
    return tuple(kinds)


def check_sizes(config: GptOssConfig) -> None:
    """ConfigError naming the first size that makes no model."""
    for key in (*COUNTS, *POSITIVE):
        _check_number(key, getattr(config, key))
    E, K = config.num_local_experts, config.num_experts_per_tok
    H, G = config.num_attention_heads, config.num_key_value_heads
    _expect(K <= E, "num_experts_per_tok",
            f"at most num_local_experts = {E}", K)
    _expect(H % G == 0, "num_attention_heads",
            f"a multiple of num_key_value_heads = {G}", H)
    _expect(config.head_dim % 2 == 0, "head_dim", "an even number",
            config.head_dim)


def check_choices(config: GptOssConfig) -> None:
    """ConfigError naming the first choice that gpt-oss does not have."""
    slow = config.rope_beta_slow
    _expect(config.rope_type in ROPE_TYPES, "rope_type",
            " or ".join(ROPE_TYPES), config.rope_type)
    _expect(config.rope_factor >= 1, "rope_factor", "at least 1",
            config.rope_factor)
    _expect(config.rope_theta > 1, "rope_theta", "a number above 1",
            config.rope_theta)
    _expect(config.rope_beta_fast >= slow, "rope_beta_fast",
            f"at least rope_beta_slow = {slow}", config.rope_beta_fast)
    for key in ("rope_truncate", "tie_word_embeddings"):
        value = getattr(config, key)
        _expect(isinstance(value, bool), key, "true or false", value)
    for key in ("eos_token_id", "pad_token_id"):
        value = getattr(config, key)
        _expect(is_count(value) and 0 <= value <= MOST[key], key,
                "a token id", value)


# --- Three spellings of the same numbers -------------------------------------

SAME = (*COUNTS, "layer_types", "rms_norm_eps", "swiglu_limit",
        "eos_token_id", "pad_token_id", "tie_word_embeddings")
# our field -> key in rope_scaling / rope_parameters of Hugging Face
ROPE_KEYS = {"rope_type": "rope_type", "rope_factor": "factor",
             "rope_beta_fast": "beta_fast", "rope_beta_slow": "beta_slow",
             "rope_truncate": "truncate", "rope_theta": "rope_theta",
             "initial_context_length": "original_max_position_embeddings"}
# our field -> key of OpenAI's original/config.json
ORIGINAL_KEYS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_local_experts": "num_experts",
    "num_experts_per_tok": "experts_per_token",
    "vocab_size": "vocab_size", "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit", "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "initial_context_length",
    "rope_theta": "rope_theta", "rope_factor": "rope_scaling_factor",
    "rope_beta_slow": "rope_ntk_alpha", "rope_beta_fast": "rope_ntk_beta"}


# --- Reading OpenAI's spelling -----------------------------------------------

def _from_original(values: dict) -> dict:
    """Our fields from those of original/config.json."""
    fields = {}
    for field, key in ORIGINAL_KEYS.items():
        _expect(values.get(key) is not None, key, "a value", None)
        fields[field] = values[key]
    trained, factor = fields["initial_context_length"], fields["rope_factor"]
    for field in ("initial_context_length", "rope_factor"):
        _check_number(field, fields[field], ORIGINAL_KEYS[field])
    fields["max_position_embeddings"] = int(trained * factor)
    fields["rope_type"] = "default" if factor == 1 else "yarn"
    return fields


# --- Reading Hugging Face's, rope first --------------------------------------

ROPE_SPELLINGS = ("rope_parameters", "rope_scaling")
# keys of yarn that would change the model, and the value that would not
ROPE_FIXED = {"attention_factor": None, "mscale": None,
              "mscale_all_dim": None, "partial_rotary_factor": 1.0}


def _rope_object(values: dict, spelling: str) -> dict:
    """Our fields from one rope object and what lies beside it."""
    rope = values[spelling]
    _expect(isinstance(rope, dict), spelling, "an object", rope)
    rope = {"rope_type": rope.get("type"),
            "rope_theta": values.get("rope_theta")} | rope
    kind = rope["rope_type"]
    _expect(kind in ROPE_TYPES, "rope_type", " or ".join(ROPE_TYPES), kind)
    if kind == "yarn":
        for key in ("factor", "original_max_position_embeddings"):
            _expect(rope.get(key) is not None, key, "a value", None)
        rope = {"truncate": True} | rope  # transformers' default
    for key, value in ROPE_FIXED.items():
        _expect(rope.get(key) in (None, value), key, repr(value),
                rope.get(key))
    return {field: rope[key] for field, key in ROPE_KEYS.items()
            if rope.get(key) is not None
            and (kind == "yarn" or field in ("rope_type", "rope_theta"))}


def _rope_fields(values: dict) -> dict:
    """Our fields from rope_parameters, from rope_scaling and rope_theta, or
    from what there is of them."""
    read = {spelling: _rope_object(values, spelling)
            for spelling in ROPE_SPELLINGS
            if values.get(spelling) is not None}
    if not read:  # the defaults are the released ones
        theta = values.get("rope_theta")
        return {} if theta is None else {"rope_theta": theta}
    first, *others = read.values()
    for key in itertools.chain(*read.values()):
        default = getattr(GptOssConfig, key)
        for other in others:
            _expect(first.get(key, default) == other.get(key, default),
                    ROPE_SPELLINGS[0], f"{ROPE_KEYS[key]} as in "
                    f"{ROPE_SPELLINGS[1]}, {shown(other.get(key))}",
                    first.get(key))
    return first


# --- The other keys ----------------------------------------------------------

OPTIONAL = ("layer_types", "initial_context_length", "rms_norm_eps",
            "swiglu_limit", "eos_token_id", "pad_token_id",
            "tie_word_embeddings")
FIXED = {"model_type": "gpt_oss", "attention_bias": True,
         "swiglu_alpha": 1.702}


def _from_hf(values: dict) -> dict:
    """Our fields from those of Hugging Face's config.json."""
    values = {"model_type": None} | values
    for key, value in FIXED.items():
        found = values.get(key, value)
        _expect(found == value, key, repr(value), found)
    if values.get("num_experts_per_tok") is None:
        values["num_experts_per_tok"] = values.get("experts_per_token")
    fields = {key: values[key] for key in SAME
              if values.get(key) is not None}
    for key in SAME:
        _expect(key in fields or key in OPTIONAL, key, "a value", None)
    stop = fields.get("eos_token_id")
    if isinstance(stop, list):  # stop_ids (chapter 12) reads them all
        del fields["eos_token_id"]
        fields |= {"eos_token_id": stop[0]} if stop else {}
    return fields | _rope_fields(values)


# --- From a dictionary, from a file ------------------------------------------

def config_from_dict(values: dict, source: str) -> GptOssConfig:
    """From HF keys (either rope spelling) or those of original/config.json.

    Keys that decide nothing here are ignored; a missing one, one of another
    model, or a value that makes no model is a ConfigError naming both the
    source and the key.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: expected a JSON object, found "
                          f"{type(values).__name__}")
    original = "num_experts" in values and "model_type" not in values
    try:
        fields = _from_original(values) if original else _from_hf(values)
        return GptOssConfig(**fields)
    except ConfigError as error:
        keys = ORIGINAL_KEYS if original else ROPE_KEYS
        said, comma, found = str(error).rpartition(", found ")
        said = re.sub(r"\w+", lambda word: _spelt(word[0], keys), said)
        raise ConfigError(f"{source}: {said}{comma}{found}") from None


def _spelt(word: str, keys: dict[str, str]) -> str:
    """A field's name as the file spells it; other words as they are. What
    Hugging Face calls original_max_position_embeddings may as well stand
    above the rope object, under our name."""
    return word if word == "initial_context_length" else keys.get(word, word)


MOST_JSON = 2 ** 24  # bytes


def read_json(file: Path, most: int = MOST_JSON) -> object:
    """What a JSON file says; ConfigError, in a line, if it says nothing: no
    such file, no regular one, one of more than `most` bytes, no JSON."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ConfigError(f"{file}: expected a file, found a folder, a "
                              "pipe or a device")
        with open(file, "rb") as f:
            raw = f.read(most + 1)
        if len(raw) > most:
            raise ConfigError(f"{file}: expected at most {most:,} bytes of "
                              "JSON, found more")
        return json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{file}: not readable as JSON (too deeply nested)"
                          ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: not readable as JSON ({error})") from None


def read_config(path: Path) -> GptOssConfig:
    """GptOssConfig of a folder with config.json, or of such a file."""
    file = path / "config.json" if path.is_dir() else path
    return config_from_dict(read_json(file), str(file))


# --- Writing both spellings --------------------------------------------------

NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router",
                 "model.embed_tokens", "lm_head")


def hf_dict(config: GptOssConfig) -> dict:
    """What the config.json of a released model holds, key by key."""
    values = {key: getattr(config, key) for key in SAME}
    values["layer_types"] = list(config.layer_types)
    rope = {key: getattr(config, field) for field, key in ROPE_KEYS.items()}
    if config.rope_type == "default":
        rope = {key: rope[key] for key in ("rope_type", "rope_theta")}
    theta = rope.pop("rope_theta")
    return dict(sorted((values | {
        "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss",
        "attention_bias": True, "attention_dropout": 0.0,
        "experts_per_token": config.num_experts_per_tok,
        "hidden_act": "silu", "initializer_range": 0.02,
        "output_router_logits": False, "router_aux_loss_coef": 0.9,
        "use_cache": True, "rope_theta": theta, "rope_scaling": rope,
        "quantization_config": {
            "modules_to_not_convert": list(NOT_CONVERTED),
            "quant_method": "mxfp4"},
    }).items()))


def original_dict(config: GptOssConfig) -> dict:
    """What original/config.json of a released model holds.

    That file has no key for max_position_embeddings, layer_types, rope_type
    or truncate: a model that differs there is a ConfigError, not a loss.
    """
    values = {key: getattr(config, field)
              for field, key in ORIGINAL_KEYS.items()}
    again = config_from_dict(values, "original/config.json")
    for field in ("layer_types", "max_position_embeddings", "rope_type",
                  "rope_truncate", "rms_norm_eps"):
        ours, theirs = getattr(config, field), getattr(again, field)
        _expect(ours == theirs, field, f"{theirs!r}, which is all that "
                "original/config.json can say", ours)
    return values


# --- Counting ----------------------------------------------------------------

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


def active_parameters(config: GptOssConfig) -> int:
    """Parameters that one token multiplies with: K experts of E, and
    without the embedding, which is looked up."""
    counts = parameter_counts(config)
    chosen = (config.num_hidden_layers * config.num_experts_per_tok
              * expert_size(config))
    rest = sum(counts[part] for part in ("attention", "router", "norms",
                                         "lm_head"))
    return rest + chosen


# --- Bytes -------------------------------------------------------------------

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


# --- The cache ---------------------------------------------------------------

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


# --- Arithmetic --------------------------------------------------------------

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
    "COUNTS",
    "ConfigError",
    "FIXED",
    "GptOssConfig",
    "KINDS",
    "LEAST",
    "MOST",
    "MOST_JSON",
    "NOT_CONVERTED",
    "OPTIONAL",
    "ORIGINAL_KEYS",
    "POSITIVE",
    "ROPE_FIXED",
    "ROPE_KEYS",
    "ROPE_SPELLINGS",
    "ROPE_TYPES",
    "SAME",
    "active_parameters",
    "bf16_bytes",
    "bytes_read_per_token",
    "cache_bytes",
    "cache_bytes_per_token",
    "check_choices",
    "check_sizes",
    "checkpoint_bytes",
    "config_from_dict",
    "expert_bytes",
    "expert_size",
    "fill_kinds",
    "flops_per_token",
    "hf_dict",
    "layer_cache_bytes",
    "original_dict",
    "parameter_counts",
    "read_config",
    "read_json",
    "total_parameters",
]
