"""The released dictionaries, every bad value, and the published totals."""

import copy
import dataclasses
import json
import math
import os
import pathlib
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig as HFConfig
from transformers import GptOssForCausalLM

from gptoss.weights.config import ConfigError, GptOssConfig
from gptoss.weights.sizes import (
    active_parameters,
    bf16_bytes,
    bytes_read_per_token,
    cache_bytes,
    cache_bytes_per_token,
    checkpoint_bytes,
    flops_per_token,
    parameter_counts,
    total_parameters,
)

SIZES = {"20b": (24, 32), "120b": (36, 128)}
MODELS = {"20b": GptOssConfig.gpt_oss_20b(),
          "120b": GptOssConfig.gpt_oss_120b()}
both = pytest.mark.parametrize("size", SIZES)


def released(size):
    """config.json as released, key by key."""
    layers, experts = SIZES[size]
    return {
        "architectures": ["GptOssForCausalLM"], "attention_bias": True,
        "attention_dropout": 0.0, "eos_token_id": 200002,
        "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu",
        "hidden_size": 2880, "initial_context_length": 4096,
        "initializer_range": 0.02, "intermediate_size": 2880,
        "layer_types": ["sliding_attention",
                        "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072, "model_type": "gpt_oss",
        "num_attention_heads": 64, "num_experts_per_tok": 4,
        "num_hidden_layers": layers, "num_key_value_heads": 8,
        "num_local_experts": experts, "output_router_logits": False,
        "pad_token_id": 199999,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router",
                "model.embed_tokens", "lm_head"],
            "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "rope_type": "yarn",
            "truncate": False},
        "rope_theta": 150000, "router_aux_loss_coef": 0.9,
        "sliding_window": 128, "swiglu_limit": 7.0,
        "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0",
        "use_cache": True, "vocab_size": 201088}


def released_original(size):
    """original/config.json as released."""
    layers, experts = SIZES[size]
    return {
        "num_hidden_layers": layers, "num_experts": experts,
        "experts_per_token": 4, "vocab_size": 201088, "hidden_size": 2880,
        "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8,
        "sliding_window": 128, "initial_context_length": 4096,
        "rope_theta": 150000, "rope_scaling_factor": 32.0,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32}


def new_spelling(values):
    """The same with rope_parameters, as transformers 5 writes it."""
    values = copy.deepcopy(values)
    rope = values.pop("rope_scaling")
    rope["rope_theta"] = values.pop("rope_theta")
    return values | {"rope_parameters": rope}


# --- The released files ------------------------------------------------------

@both
def test_released_file_is_the_named_config(size):
    for values in (released(size), new_spelling(released(size)),
                   released_original(size)):
        assert GptOssConfig.from_dict(values) == MODELS[size]


@both
def test_written_file_is_the_released_one(size):
    ours = MODELS[size].to_hf_dict()
    theirs = released(size)
    del theirs["transformers_version"]  # we are not transformers
    assert ours == theirs
    assert MODELS[size].to_original_dict() == released_original(size)
    assert json.loads(json.dumps(ours)) == ours


@both
def test_from_a_folder_or_a_file(size, tmp_path):
    for n, values in enumerate((released(size), released_original(size))):
        folder = tmp_path / str(n)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(values))
        for path in (folder, str(folder), folder / "config.json"):
            assert GptOssConfig.from_pretrained(path) == MODELS[size]


def test_default_is_the_120b():
    assert GptOssConfig() == GptOssConfig.gpt_oss_120b()
    c = GptOssConfig()
    assert c.layer_types[:3] == ("sliding_attention", "full_attention",
                                 "sliding_attention")
    assert hash(c) == hash(GptOssConfig.gpt_oss_120b())
    with pytest.raises(dataclasses.FrozenInstanceError):
        c.vocab_size = 1


def test_transformers_reads_ours_and_we_read_theirs():
    tiny = dataclasses.replace(GptOssConfig.gpt_oss_20b(),
                               rope_theta=10000.0, rope_factor=4.0,
                               max_position_embeddings=16384)
    for ours in (*MODELS.values(), tiny):
        hf = HFConfig(**ours.to_hf_dict())
        assert hf.rope_parameters["rope_theta"] == ours.rope_theta
        assert hf.rope_parameters["factor"] == ours.rope_factor
        assert hf.num_local_experts == ours.num_local_experts
        theirs = json.loads(hf.to_json_string())
        assert "rope_parameters" in theirs
        assert GptOssConfig.from_dict(theirs) == ours


def test_unknown_keys_are_ignored():
    values = released("20b") | {"_name_or_path": "x", "zebra": [1, {}]}
    assert GptOssConfig.from_dict(values) == MODELS["20b"]


def test_a_list_of_eos_ids_gives_its_first():
    values = released("20b") | {"eos_token_id": [7, 200002]}
    assert GptOssConfig.from_dict(values).eos_token_id == 7


def test_old_name_of_experts_per_token():
    values = released("20b")
    del values["num_experts_per_tok"]
    assert GptOssConfig.from_dict(values).num_experts_per_tok == 4


def test_rope_type_may_be_spelled_type_and_truncates_by_default():
    """As transformers does: `truncate` is true unless a file says false."""
    values = released("20b")
    del values["rope_scaling"]["truncate"]
    values["rope_scaling"]["type"] = values["rope_scaling"].pop("rope_type")
    c = GptOssConfig.from_dict(values)
    assert c.rope_type == "yarn" and c.rope_truncate is True


def test_plain_rope():
    values = released("20b") | {"rope_scaling": {"rope_type": "default"}}
    c = GptOssConfig.from_dict(values)
    assert c.rope_type == "default" and c.rope_theta == 150000
    assert c.to_hf_dict()["rope_scaling"] == {"rope_type": "default"}
    assert GptOssConfig.from_dict(c.to_hf_dict()) == c


def test_original_of_factor_one_is_plain():
    values = released_original("20b") | {"rope_scaling_factor": 1.0}
    c = GptOssConfig.from_dict(values)
    assert c.rope_type == "default" and c.max_position_embeddings == 4096
    assert GptOssConfig.from_dict(c.to_original_dict()) == c


@pytest.mark.parametrize("change, key", [
    ({"layer_types": ("full_attention",) * 24}, "layer_types"),
    ({"max_position_embeddings": 4096}, "max_position_embeddings"),
    ({"rope_type": "default"}, "rope_type"),
    ({"rope_truncate": True}, "rope_truncate"),
    ({"rms_norm_eps": 1e-6}, "rms_norm_eps")])
def test_original_refuses_what_it_cannot_say(change, key):
    config = dataclasses.replace(MODELS["20b"], **change)
    with pytest.raises(ConfigError, match=key):
        config.to_original_dict()


# --- Gaps in the rope keys ---------------------------------------------------

def rope_of(config):
    """What transformers would call these fields."""
    names = {"rope_theta": "rope_theta", "rope_type": "rope_type"}
    if config.rope_type == "yarn":
        names |= {"rope_factor": "factor", "rope_beta_fast": "beta_fast",
                  "rope_beta_slow": "beta_slow", "rope_truncate": "truncate",
                  "initial_context_length":
                  "original_max_position_embeddings"}
    return {name: getattr(config, ours) for ours, name in names.items()}


@pytest.mark.parametrize("change", [
    {}, {"rope_theta": 10000.0}, {"rope_scaling": None},
    {"rope_parameters": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default"}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "yarn", "factor": 8, "truncate": False,
                         "original_max_position_embeddings": 2048}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16,
                      "original_max_position_embeddings": 2048},
     "rope_theta": 1234}], ids=str)
def test_gaps_are_filled_as_transformers_fills_them(change):
    values = released("20b")
    del values["rope_scaling"], values["rope_theta"]
    values |= change
    theirs = HFConfig(**copy.deepcopy(values)).rope_parameters
    theirs = {"beta_fast": 32, "beta_slow": 1, "truncate": True,
              "rope_theta": 150000} | theirs
    ours = rope_of(GptOssConfig.from_dict(values))
    assert ours == {key: theirs[key] for key in ours}


def test_two_rope_objects_must_agree():
    values = released("20b") | {
        "rope_parameters": new_spelling(released("20b"))["rope_parameters"]}
    assert GptOssConfig.from_dict(values) == MODELS["20b"]
    values["rope_parameters"]["beta_slow"] = 2.0
    with pytest.raises(ConfigError, match="^config.json: rope_parameters: "
                       "expected beta_slow as in rope_scaling, 1.0, found 2"):
        GptOssConfig.from_dict(values)


def test_a_list_of_no_eos_ids_says_nothing():
    values = released("20b") | {"eos_token_id": []}
    assert GptOssConfig.from_dict(values) == MODELS["20b"]


# --- Bad values --------------------------------------------------------------

COUNTS = ("num_hidden_layers", "num_local_experts", "num_experts_per_tok",
          "vocab_size", "hidden_size", "intermediate_size", "head_dim",
          "num_attention_heads", "num_key_value_heads", "sliding_window",
          "max_position_embeddings", "initial_context_length")
NUMBERS = ("rope_theta", "rope_factor", "rope_beta_fast", "rope_beta_slow",
           "rms_norm_eps", "swiglu_limit")


@pytest.mark.parametrize("key", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 2.0, True, None, "24", [24]])
def test_bad_counts(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: .*found"):
        GptOssConfig(**{key: value})


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [0, -1.5, True, None, "7.0", math.nan,
                                   math.inf, [1.0]])
def test_bad_numbers(key, value):
    with pytest.raises(ConfigError, match=f"^{key}: .*found"):
        GptOssConfig(**{key: value})


@pytest.mark.parametrize("key", [*COUNTS, *NUMBERS])
@pytest.mark.parametrize("value", [10 ** 400, 2 ** 63, 10 ** 5000, 2 ** 31],
                         ids=["400 digits", "2**63", "endless", "2**31"])
def test_numbers_that_arithmetic_cannot_hold(key, value):
    if key in NUMBERS and key != "swiglu_limit" and value == 2 ** 31:
        value = 1e300
    with pytest.raises(ConfigError, match=f"^{key}: .*found") as error:
        GptOssConfig(**{key: value})
    assert len(str(error.value)) < 350


@pytest.mark.parametrize("key", ["rope_beta_fast", "rope_beta_slow",
                                 "rms_norm_eps", "swiglu_limit"])
def test_numbers_too_small_to_divide_by(key):
    with pytest.raises(ConfigError, match=f"^{key}: expected at least"):
        GptOssConfig(**{key: 5e-324})


@pytest.mark.parametrize("key, word", [
    ("initial_context_length", "initial_context_length"),
    ("rope_scaling_factor", "rope_scaling_factor"),
    ("rope_ntk_alpha", "rope_ntk_alpha"), ("num_experts", "num_experts"),
    ("experts_per_token", "experts_per_token")])
@pytest.mark.parametrize("value", [10 ** 400, 1e308], ids=["int", "float"])
def test_large_numbers_of_the_original_are_named_as_there(key, word, value):
    values = released_original("20b") | {key: value}
    with pytest.raises(ConfigError, match=f"^here.json: {word}: expected"):
        GptOssConfig.from_dict(values, "here.json")


def test_messages_use_the_words_of_the_file():
    values = released_original("20b") | {"rope_ntk_alpha": 64}
    with pytest.raises(ConfigError, match="rope_ntk_beta: expected at least "
                       "rope_ntk_alpha = 64, found 32"):
        GptOssConfig.from_dict(values)
    values = released("20b")
    values["rope_scaling"]["beta_slow"] = 64
    with pytest.raises(ConfigError, match="json: beta_fast: expected at least"
                       " beta_slow = 64, found 32"):
        GptOssConfig.from_dict(values)


@pytest.mark.parametrize("change, key", [
    ({"num_experts_per_tok": 129}, "num_experts_per_tok"),
    ({"num_attention_heads": 63}, "num_attention_heads"),
    ({"head_dim": 63}, "head_dim"),
    ({"layer_types": ()}, "layer_types"),
    ({"layer_types": 36}, "layer_types"),
    ({"layer_types": "sliding_attention"}, "layer_types"),
    ({"layer_types": ("full_attention",) * 35}, "layer_types"),
    ({"layer_types": ("full_attention",) * 35 + ("linear_attention",)},
     r"layer_types\[35\]"),
    ({"layer_types": ("full_attention",) * 35 + (None,)},
     r"layer_types\[35\]"),
    ({"rope_type": "longrope"}, "rope_type"),
    ({"rope_type": None}, "rope_type"),
    ({"rope_factor": 0.5}, "rope_factor"),
    ({"rope_theta": 1.0}, "rope_theta"),  # attention/rope divides by its log
    ({"rope_beta_fast": 1.0, "rope_beta_slow": 32.0}, "rope_beta_fast"),
    ({"rope_truncate": "false"}, "rope_truncate"),
    ({"rope_truncate": 0}, "rope_truncate"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings"),
    ({"eos_token_id": -1}, "eos_token_id"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    ({"pad_token_id": 1.5}, "pad_token_id"),
    ({"pad_token_id": True}, "pad_token_id")])
def test_bad_fields(change, key):
    with pytest.raises(ConfigError, match=f"^{key}: expected .*found"):
        GptOssConfig(**change)


REQUIRED = (*(key for key in COUNTS if key != "initial_context_length"),
            "model_type")


@pytest.mark.parametrize("key", REQUIRED)
@pytest.mark.parametrize("how", ["absent", "null"])
def test_missing_keys(key, how):
    values = released("20b")
    values.pop("experts_per_token")
    values[key] = None
    if how == "absent":
        del values[key]
    with pytest.raises(ConfigError, match=f"^here.json: {key}: expected"):
        GptOssConfig.from_dict(values, "here.json")


@pytest.mark.parametrize("key", released_original("20b"))
def test_missing_keys_of_the_original(key):
    values = released_original("20b")
    del values[key]
    if key == "num_experts":  # then nothing says which file this is
        key = "model_type"
    with pytest.raises(ConfigError, match=f"^here.json: {key}: expected"):
        GptOssConfig.from_dict(values, "here.json")


@pytest.mark.parametrize("key", released_original("20b"))
@pytest.mark.parametrize("value", ["4", None, [], {}, math.nan, math.inf,
                                   -1, True])
def test_bad_values_of_the_original(key, value):
    values = released_original("20b") | {key: value}
    with pytest.raises(ConfigError, match=f"^here.json: {key}: expected"):
        GptOssConfig.from_dict(values, "here.json")


@pytest.mark.parametrize("change, key", [
    ({"model_type": "llama"}, "model_type"),
    ({"eos_token_id": [None]}, "eos_token_id"),
    ({"eos_token_id": {}}, "eos_token_id"),
    ({"rope_scaling": "yarn"}, "rope_scaling"),
    ({"rope_parameters": 7}, "rope_parameters"),
    ({"rope_scaling": []}, "rope_scaling"),
    ({"rope_scaling": {}}, "rope_type"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
     "rope_parameters"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "yarn", "truncate": False}}, "factor"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 32.0}},
     "original_max_position_embeddings"),
    ({"rope_scaling": {"rope_type": ["yarn"], "factor": 32.0}},
     "rope_type"),
    ({"attention_bias": False}, "attention_bias"),
    ({"swiglu_alpha": 1.0}, "swiglu_alpha"),
    ({"layer_types": 5}, "layer_types")])
def test_files_of_another_model(change, key):
    values = released("20b") | change
    with pytest.raises(ConfigError, match=f"^here.json: {key}.*: expected"):
        GptOssConfig.from_dict(values, "here.json")


@pytest.mark.parametrize("key, value", [
    ("attention_factor", 1.0), ("mscale", 0.7), ("mscale_all_dim", 1.0),
    ("partial_rotary_factor", 0.5)])
def test_rope_keys_that_would_change_the_model(key, value):
    """Ignoring these would compute another model without a word."""
    values = new_spelling(released("20b"))
    values["rope_parameters"][key] = value
    with pytest.raises(ConfigError, match=f"^here.json: {key}: expected"):
        GptOssConfig.from_dict(values, "here.json")
    values["rope_parameters"][key] = None  # as good as absent
    assert GptOssConfig.from_dict(values) == MODELS["20b"]


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"3", b"null", b'"gpt_oss"', b"\xff\xfe{}",
    b"[" * 100_000, b'{"model_type": "gpt_oss"'])
def test_bad_json_names_the_file(tmp_path, text):
    file = tmp_path / "config.json"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as error:
        GptOssConfig.from_pretrained(tmp_path)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "large"])
def test_what_is_no_small_file_is_not_read(tmp_path, kind):
    """Without the check the first hangs and the third never ends."""
    file = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind == "device":
        file.symlink_to("/dev/zero")
    else:
        file.write_bytes(b" " * (2 ** 24 + 1))
    with pytest.raises(ConfigError, match="expected a(t most| file)"):
        GptOssConfig.from_pretrained(tmp_path)


def test_missing_file_names_the_file(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "config.json"):
        with pytest.raises(ConfigError, match="no such file"):
            GptOssConfig.from_pretrained(path)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(sorted(released("20b"))),
       st.recursive(st.none() | st.booleans() | st.integers(-3, 3)
                    | st.floats() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=2)
                    | st.dictionaries(st.sampled_from(
                        ["rope_type", "factor", "rope_theta", "x"]),
                        inner, max_size=2), max_leaves=4))
def test_any_value_gives_a_config_or_a_config_error(key, value):
    for values in (released("20b"), new_spelling(released("20b"))):
        try:
            config = GptOssConfig.from_dict(values | {key: value})
        except ConfigError as error:
            assert str(error).startswith("config.json: ")
        else:
            assert GptOssConfig.from_dict(config.to_hf_dict()) == config


# --- Round trips -------------------------------------------------------------

@st.composite
def configs(draw):
    groups, layers = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    experts = draw(st.integers(1, 9))
    kinds = st.sampled_from(["sliding_attention", "full_attention"])
    factor = draw(st.sampled_from([1.0, 2.0, 32.0]))
    trained = draw(st.integers(1, 5000))
    free = draw(st.booleans())  # what only Hugging Face's file can say
    plain = factor == 1.0 if not free else draw(st.booleans())
    special = {
        "layer_types": tuple(draw(st.lists(
            kinds, min_size=layers, max_size=layers))),
        "max_position_embeddings": draw(st.integers(1, 200_000)),
        "rope_truncate": draw(st.booleans()) and not plain,
        "rms_norm_eps": draw(st.floats(1e-9, 1.0))} if free else {
        "max_position_embeddings": int(trained * factor)}
    if plain:  # a plain rope has no other numbers to keep
        factor = 32.0 if free else 1.0
    return GptOssConfig(
        num_hidden_layers=layers, num_local_experts=experts,
        num_experts_per_tok=draw(st.integers(1, experts)),
        vocab_size=draw(st.integers(1, 999)),
        hidden_size=draw(st.integers(1, 99)),
        intermediate_size=draw(st.integers(1, 99)),
        head_dim=2 * draw(st.integers(1, 9)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_key_value_heads=groups,
        sliding_window=draw(st.integers(1, 200)),
        initial_context_length=trained,
        rope_theta=draw(st.floats(1.5, 1e7)),
        rope_type="default" if plain else "yarn", rope_factor=factor,
        swiglu_limit=draw(st.floats(0.1, 99.0)), **special)


@settings(deadline=None, max_examples=150)
@given(configs())
def test_round_trip_through_json(config):
    values = json.loads(json.dumps(config.to_hf_dict()))
    if config.rope_type == "default":
        config = dataclasses.replace(config, rope_factor=32.0)
    assert GptOssConfig.from_dict(values) == config
    assert GptOssConfig.from_dict(new_spelling(values)) == config


@settings(deadline=None, max_examples=150)
@given(configs())
def test_round_trip_through_the_original_or_refusal(config):
    try:
        values = json.loads(json.dumps(config.to_original_dict()))
    except ConfigError:
        alternating = GptOssConfig(
            num_hidden_layers=config.num_hidden_layers).layer_types
        context = int(config.initial_context_length * config.rope_factor)
        plain = config.rope_factor == 1
        assert (config.layer_types != alternating
                or config.rms_norm_eps != 1e-5 or config.rope_truncate
                or config.max_position_embeddings != context
                or plain != (config.rope_type == "default"))
    else:
        assert GptOssConfig.from_dict(values) == config


# --- Counts ------------------------------------------------------------------

PUBLISHED = {  # parameters, bytes of the released index, billions active
    "20b": (20_914_757_184, 13_761_264_768, 3.61),
    "120b": (116_829_156_672, 65_248_815_744, 5.13)}


@both
def test_published_totals(size):
    c, (parameters, stored, active) = MODELS[size], PUBLISHED[size]
    assert total_parameters(c) == parameters
    assert checkpoint_bytes(c) == stored
    assert bf16_bytes(c) == 2 * parameters
    assert round(active_parameters(c) / 1e9, 2) == active


def test_model_card_table():
    """Table 1 of the model card, in billions and GiB."""
    rows = {"20b": (19.12, 0.64, 1.16, 3.61, 20.91, 12.8),
            "120b": (114.71, 0.96, 1.16, 5.13, 116.83, 60.8)}
    for size, row in rows.items():
        c = MODELS[size]
        n = parameter_counts(c)
        found = (n["experts"] + n["router"], n["attention"],
                 n["embedding"] + n["lm_head"], active_parameters(c),
                 total_parameters(c))
        assert tuple(round(x / 1e9, 2) for x in found) == row[:5]
        assert round(checkpoint_bytes(c) / 2 ** 30, 1) == row[5]


@both
def test_cache_and_reads(size):
    c = MODELS[size]
    layers = SIZES[size][0]
    assert cache_bytes_per_token(c) == layers // 2 * 2048
    assert cache_bytes_per_token(c, 1) == layers // 2 * 1024
    full = cache_bytes(c, 131072)
    assert full == layers // 2 * 2048 * (131072 + 128)
    assert cache_bytes(c, 131072, batch_size=3) == 3 * full
    assert cache_bytes(c, 131072, dtype_bytes=4) == 2 * full
    if size == "20b":
        assert round(bytes_read_per_token(c) / 1e9, 2) == 3.71


def hf_model(config):
    """transformers' dense twin, without memory for its weights."""
    values = config.to_hf_dict()
    del values["quantization_config"]
    del values["pad_token_id"]  # torch wants it inside the vocabulary
    values |= {"rope_scaling": {"rope_type": "default"}}  # nothing to count
    with torch.device("meta"):
        return GptOssForCausalLM(HFConfig(**values))


def hf_counts(model):
    counts = dict.fromkeys(("embedding", "attention", "router", "experts",
                            "norms", "lm_head"), 0)
    words = (("embed_tokens", "embedding"), ("self_attn", "attention"),
             (".router.", "router"), (".experts.", "experts"),
             ("lm_head", "lm_head"), ("norm", "norms"))
    for name, p in model.named_parameters():
        part = next(part for word, part in words if word in name)
        counts[part] += p.numel()
    return counts


@both
def test_transformers_counts_the_same(size):
    assert hf_counts(hf_model(MODELS[size])) == parameter_counts(MODELS[size])


@settings(deadline=None, max_examples=25)
@given(configs())
def test_transformers_counts_any_config_the_same(config):
    counts = parameter_counts(config)
    assert hf_counts(hf_model(config)) == counts
    assert sum(counts.values()) == total_parameters(config)


@settings(deadline=None, max_examples=100)
@given(configs())
def test_active_is_the_model_with_only_the_chosen_experts(config):
    """K experts of K: then everything but the embedding is active, and the
    router is the only thing that had more rows."""
    small = dataclasses.replace(
        config, num_local_experts=config.num_experts_per_tok)
    gone = config.num_local_experts - config.num_experts_per_tok
    router = gone * config.num_hidden_layers * (config.hidden_size + 1)
    assert active_parameters(config) == (
        total_parameters(small) - parameter_counts(small)["embedding"]
        + router)


@settings(deadline=None, max_examples=100)
@given(configs(), st.integers(1, 8), st.integers(1, 8))
def test_bytes_by_enumeration(config, wide, deep):
    """Widths that MXFP4 can cut, every tensor written out by hand."""
    c = dataclasses.replace(config, hidden_size=32 * wide,
                            intermediate_size=32 * deep)
    D, F, E = c.hidden_size, c.intermediate_size, c.num_local_experts
    Q, KV = (n * c.head_dim for n in (c.num_attention_heads,
                                      c.num_key_value_heads))
    bf16 = [(D,), (Q, D), (KV, D), (KV, D), (Q,), (KV,), (KV,), (D, Q), (D,),
            (c.num_attention_heads,), (D,), (E, D), (E,)]
    packed = [(E, 2 * F, D // 32, 16), (E, 2 * F, D // 32),
              (E, D, F // 32, 16), (E, D, F // 32)]
    layer = (2 * sum(map(math.prod, [*bf16, (E, 2 * F), (E, D)]))
             + sum(map(math.prod, packed)))
    ends = 2 * (2 * c.vocab_size * D + D)
    assert checkpoint_bytes(c) == c.num_hidden_layers * layer + ends
    # what one token reads: of the expert tensors K of E, of the embedding
    # one row
    experts = (2 * sum(map(math.prod, [(E, 2 * F), (E, D)]))
               + sum(map(math.prod, packed)))
    read = layer - experts + experts // E * c.num_experts_per_tok
    assert bytes_read_per_token(c) == (
        c.num_hidden_layers * read + ends - 2 * c.vocab_size * D + 2 * D)


@pytest.mark.parametrize("context", [1, 3, 4, 5, 11])
def test_flops_as_torch_counts_them(context):
    """One decoding step of transformers' model over a cache."""
    from torch.utils.flop_counter import FlopCounterMode

    c = GptOssConfig(
        num_hidden_layers=4, num_local_experts=6, num_experts_per_tok=2,
        vocab_size=50, hidden_size=32, intermediate_size=96, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4,
        eos_token_id=1, pad_token_id=0)
    values = c.to_hf_dict()
    del values["quantization_config"]
    model = GptOssForCausalLM._from_config(HFConfig(
        **values, experts_implementation="eager"),
        attn_implementation="eager").eval()
    ids = torch.randint(50, (1, context))
    with torch.no_grad():
        past = None
        if context > 1:
            past = model(ids[:, :-1], use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], past_key_values=past, use_cache=True)
    assert counter.get_total_flops() == flops_per_token(c, context)


def test_training_flops_of_nemo():
    """NVIDIA-NeMo/Automodel#3091, which leaves the routers out."""
    c = MODELS["20b"]
    step = 3 * sum(flops_per_token(c, n) for n in range(1, 4097))
    routers = 3 * 4096 * 2 * 24 * 2880 * 32
    assert step - routers == 93_848_227_282_944


def test_no_import_needs_torch():
    """Counting is for everybody: these modules are plain Python."""
    from gptoss.weights import config, config_file, errors, sizes

    for module in (errors, config, config_file, sizes):
        text = pathlib.Path(module.__file__).read_text("utf-8")
        assert "torch" not in re.findall(r"^(?:import|from) (\w+)", text, re.M)


def test_a_billion_layers_are_refused_at_once():
    with pytest.raises(ConfigError, match="num_hidden_layers.*at most"):
        GptOssConfig(num_hidden_layers=10**9)


def test_the_class_needs_no_reader_before_it_is_asked():
    """What reads and writes files is looked up in a method, so the class can
    stand in a module that does not import it."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(GptOssConfig))
    readers = {"config_from_dict", "read_config", "hf_dict", "original_dict"}
    inside = {alias.name for node in ast.walk(tree)
              if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert inside == readers
