"""How is a config read that others wrote?

Generated from book/weights/config_file.py; edit the chapter, not this file.
"""

import itertools
import json
import re
import stat
from pathlib import Path

from gptoss.weights.config import (
    COUNTS,
    ROPE_TYPES,
    ConfigError,
    GptOssConfig,
    check_number,
    demand,
)
from gptoss.weights.errors import shown

# --- The spellings as tables -------------------------------------------------

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


# --- How is OpenAI's spelling read? ------------------------------------------

def _from_original(values: dict) -> dict:
    """Our fields from those of original/config.json."""
    fields = {}
    for field, key in ORIGINAL_KEYS.items():
        demand(values.get(key) is not None, key, "a value", None)
        fields[field] = values[key]
    trained, factor = fields["initial_context_length"], fields["rope_factor"]
    for field in ("initial_context_length", "rope_factor"):
        check_number(field, fields[field], ORIGINAL_KEYS[field])
    fields["max_position_embeddings"] = int(trained * factor)
    fields["rope_type"] = "default" if factor == 1 else "yarn"
    return fields


# --- How is Hugging Face's spelling read? Rope first -------------------------

ROPE_SPELLINGS = ("rope_parameters", "rope_scaling")
# keys of yarn that would change the model, and the value that would not
ROPE_FIXED = {"attention_factor": None, "mscale": None,
              "mscale_all_dim": None, "partial_rotary_factor": 1.0}


def _rope_object(values: dict, spelling: str) -> dict:
    """Our fields from one rope object and what lies beside it."""
    rope = values[spelling]
    demand(isinstance(rope, dict), spelling, "an object", rope)
    rope = {"rope_type": rope.get("type"),
            "rope_theta": values.get("rope_theta")} | rope
    kind = rope["rope_type"]
    demand(kind in ROPE_TYPES, "rope_type", " or ".join(ROPE_TYPES), kind)
    if kind == "yarn":
        for key in ("factor", "original_max_position_embeddings"):
            demand(rope.get(key) is not None, key, "a value", None)
        rope = {"truncate": True} | rope  # transformers' default
    for key, value in ROPE_FIXED.items():
        demand(rope.get(key) in (None, value), key, repr(value),
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
            demand(first.get(key, default) == other.get(key, default),
                    ROPE_SPELLINGS[0], f"{ROPE_KEYS[key]} as in "
                    f"{ROPE_SPELLINGS[1]}, {shown(other.get(key))}",
                    first.get(key))
    return first


# --- And the other keys? -----------------------------------------------------

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
        demand(found == value, key, repr(value), found)
    if values.get("num_experts_per_tok") is None:
        values["num_experts_per_tok"] = values.get("experts_per_token")
    fields = {key: values[key] for key in SAME
              if values.get(key) is not None}
    for key in SAME:
        demand(key in fields or key in OPTIONAL, key, "a value", None)
    stop = fields.get("eos_token_id")
    if isinstance(stop, list):  # text/generate reads them all
        del fields["eos_token_id"]
        fields |= {"eos_token_id": stop[0]} if stop else {}
    return fields | _rope_fields(values)


# --- Which spelling is it? ---------------------------------------------------

def config_from_dict(values: object, source: str) -> GptOssConfig:
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


# --- What is refused of a file? ----------------------------------------------

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


# --- How are they written? ---------------------------------------------------

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
        demand(ours == theirs, field, f"{theirs!r}, which is all that "
                "original/config.json can say", ours)
    return values


__all__ = [
    "FIXED",
    "MOST_JSON",
    "NOT_CONVERTED",
    "OPTIONAL",
    "ORIGINAL_KEYS",
    "ROPE_FIXED",
    "ROPE_KEYS",
    "ROPE_SPELLINGS",
    "SAME",
    "config_from_dict",
    "hf_dict",
    "original_dict",
    "read_config",
    "read_json",
]
