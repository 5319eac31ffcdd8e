# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: config_file
#     public: [config_from_dict, hf_dict, original_dict, read_config]
# ---

# %% [markdown]
# # How is a config read that others wrote?
#
# ## Question
#
# A configuration is 24 fields, but the files that people have spell them in
# three ways, and leave some out. Ten of the 31 keys that the released
# `config.json` has decide nothing, and one that may be missing, `truncate`,
# has a default that is the opposite of what gpt-oss was trained with. How are
# such files read so that nothing is guessed? (This chapter may be skipped at
# first.)
#
# ## Picture
#
# The same numbers in the three spellings: OpenAI's own
# `original/config.json`, Hugging Face's `config.json` of 2025, and the one
# that its library `transformers` writes since version 5.
#
# What to see: most keys only move. But the two drawn in red are false
# friends. YaRN, the recipe for long texts, has a fast and a slow end (see
# [rope](../attention/rope.ipynb)), and `rope_ntk_alpha` is the slow one.
# Three fields have no key on the left at all.

# %% tags=["hide-input"]
# Figure: three columns of keys, joined by lines where they hold the same
# number. rope_ntk_alpha is joined to beta_slow and rope_ntk_beta to
# beta_fast, in red; truncate, layer_types and max_position_embeddings have
# no partner on the left.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
KEYS = (  # original, config.json of 2025, since transformers 5
    ("num_experts", "num_local_experts", "num_local_experts"),
    ("experts_per_token", "num_experts_per_tok", "num_experts_per_tok"),
    ("rope_theta", "rope_theta", "rope_parameters: rope_theta"),
    ("rope_scaling_factor", "rope_scaling: factor",
     "rope_parameters: factor"),
    ("initial_context_length",
     "rope_scaling: original_max_position_…",
     "rope_parameters: original_max_position_…"),
    ("rope_ntk_beta", "rope_scaling: beta_fast",
     "rope_parameters: beta_fast"),
    ("rope_ntk_alpha", "rope_scaling: beta_slow",
     "rope_parameters: beta_slow"),
    ("", "rope_scaling: truncate", "rope_parameters: truncate"),
    ("", "max_position_embeddings", "max_position_embeddings"),
    ("", "layer_types", "layer_types"))
ORDER = (0, 1, 2, 3, 4, 6, 5)  # alpha above beta, as in the file
fig, ax = plt.subplots(figsize=(7.4, 2.9))
for row, keys in enumerate(KEYS):
    false = keys[0].startswith("rope_ntk")
    colour = "#c00000" if false else "0.25"
    for x, key in zip((1.9, 2.2, 5.5), keys, strict=True):
        y = ORDER[row] if x == 1.9 and row < 7 else row
        ax.text(x, y, key, family="monospace", fontsize=6.5, va="center",
                ha="right" if x == 1.9 else "left", color=colour)
    if keys[0]:
        ax.plot((1.93, 2.17), (ORDER[row], row), color=colour, lw=1)
    ax.plot((2.28 + 0.063 * len(keys[1]), 5.45), (row, row), color=colour,
            lw=0.7)
for x, word, side in ((1.9, "original/config.json", "right"),
                      (2.2, "config.json of 2025", "left"),
                      (5.5, "since transformers 5", "left")):
    ax.text(x, -1.2, word, ha=side, va="center")
ax.set(xlim=(0.2, 8.5), ylim=(9.7, -1.8))
ax.set_axis_off()
plt.show()

# %% [markdown]
# ## The naive version
#
# Take the keys by the names that they seem to mean:

# %%
from gptoss.weights.config import GptOssConfig

theirs = {"rope_theta": 150000, "rope_scaling_factor": 32.0,
          "rope_ntk_alpha": 1, "rope_ntk_beta": 32}
fast, slow = theirs["rope_ntk_alpha"], theirs["rope_ntk_beta"]
print("alpha as the fast end:", fast, "to", slow, "| right:",
      GptOssConfig().rope_beta_fast, "to", GptOssConfig().rope_beta_slow)
newer = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0}}
print("rope_theta of a file of transformers 5:",
      newer.get("rope_theta", 150000), "| right:",
      newer["rope_parameters"]["rope_theta"])

# %% [markdown]
# Neither fails. The first swaps the two ends of a ramp, the second takes a
# default for a number that the file does have, in another place. So we need
# the differences as tables, and a reader that knows which spelling it reads.
#
# ## The spellings as tables

# %% tags=["export"]
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

# %%
import random
from dataclasses import replace

from transformers import GptOssConfig as HFConfig

from gptoss.weights.config import KINDS

small = GptOssConfig.gpt_oss_20b()


def refusal(make):
    """The message of the ConfigError that make() ends in."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    raise AssertionError("not refused")


# %% tags=["export"]
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

# %%
renamed = {ours: theirs for ours, theirs in ORIGINAL_KEYS.items()
           if ours != theirs}
print(renamed)

# %% [markdown]
# ## How is OpenAI's spelling read?
#
# All its keys must be there. It says nothing of `max_position_embeddings`:
# that is the trained length times the factor, 4096 · 32. A factor of 1 is no
# YaRN at all but plain rope.

# %% tags=["export"]
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

# %%
ORIGINAL = {
    "num_hidden_layers": 24, "num_experts": 32, "experts_per_token": 4,
    "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
    "swiglu_limit": 7.0, "head_dim": 64, "num_attention_heads": 64,
    "num_key_value_heads": 8, "sliding_window": 128,
    "initial_context_length": 4096, "rope_theta": 150000,
    "rope_scaling_factor": 32.0, "rope_ntk_alpha": 1, "rope_ntk_beta": 32}
read = GptOssConfig(**_from_original(ORIGINAL))
print(f"{read.max_position_embeddings:,} positions, {read.rope_type}, ends",
      read.rope_beta_fast, "and", read.rope_beta_slow)
assert read == small

# %% [markdown]
# ## How is Hugging Face's spelling read? Rope first
#
# The rope object is `rope_parameters` or `rope_scaling`. Its kind stands
# under `rope_type` or, in older files, under `type`; and $\theta$ is in it or
# beside it. Files that people have leave things out:
#
# - *No rope object.* `transformers` then takes the one that gpt-oss was
#   released with, and $\theta$ is 150,000 unless the file says otherwise. Our
#   defaults are the same, so we compute what the program computed that wrote
#   the file.
# - *No `truncate` in the object.* Its default there is *true*, the opposite
#   of what gpt-oss was trained with
#   ([what that costs](../attention/rope.ipynb)). Such a file is read as
#   `transformers` reads it.
# - *No factor or no trained length in a YaRN object.* Refused: the default of
#   `transformers` for the second has changed between its versions.
#
# And three things are refused that would change the model without a word. A
# kind of rope that is neither `yarn` nor `default`. A key that `transformers`
# obeys and gpt-oss does not have, `attention_factor`, `mscale`,
# `mscale_all_dim` or a `partial_rotary_factor` other than 1 (a value of null
# is as good as no key). And two rope objects that disagree, as an edit of
# only one of them leaves behind. Of a `default` rope only $\theta$ is read.

# %% tags=["export"]
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

# %%
YARN = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
        "beta_slow": 1.0, "original_max_position_embeddings": 4096}
print(_rope_object({"rope_scaling": YARN}, "rope_scaling"))

# %% tags=["export"]
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

# %%
old = _rope_fields({"rope_scaling": YARN, "rope_theta": 150000})
new = _rope_fields({"rope_parameters": YARN | {"rope_theta": 150000}})
print("keys that differ:", [key for key in old if old[key] != new[key]],
      "| truncate left out:", old["rope_truncate"])
print("no object:", _rope_fields({"rope_theta": 10000}))
edited = YARN | {"rope_theta": 150000, "factor": 8.0}
print(refusal(lambda: _rope_fields({"rope_scaling": YARN,
                                    "rope_parameters": edited})))
print(refusal(lambda: _rope_fields({"rope_scaling": {"type": "linear"}})))

# %% [markdown]
# ## And the other keys?
#
# Keys that decide nothing are ignored: `use_cache`, `initializer_range`, or
# `hidden_act`, which says "silu" although the experts use another function.
# We find all of them below. Of the others
#
# - `model_type` must be there and be `gpt_oss`; `attention_bias` and
#   `swiglu_alpha`, if they are there, must be true and 1.702;
# - sizes must be there (null counts as missing); kinds of layers, the trained
#   length, the three small constants and the ids may be left out;
# - `experts_per_token` is an older name of `num_experts_per_tok` and is read
#   when that is missing;
# - `eos_token_id` may be a list; the first is taken, and an empty list says
#   nothing.

# %% tags=["export"]
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

# %%
print(refusal(lambda: _from_hf({"model_type": "llama"})))
print(refusal(lambda: _from_hf({"model_type": "gpt_oss"})))

# %% [markdown]
# ## Which spelling is it?
#
# That can be seen from the keys: OpenAI's has `num_experts` and no
# `model_type`. Messages use the words of the file, so that whoever reads one
# finds the key there: our `rope_beta_fast` is `rope_ntk_beta` in one and
# `beta_fast` in the other. They begin with the file's name.

# %% tags=["export"]
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

# %%
for change in ({"num_experts": 2}, {"rope_ntk_alpha": 64}):
    print(refusal(lambda change=change: GptOssConfig.from_dict(
        ORIGINAL | change, "original/config.json")))

# %% [markdown]
# ## What is refused of a file?
#
# A file comes from somebody else. If `config.json` is a pipe, reading it
# waits for ever; if it is a link to `/dev/zero`, it never ends. So only a
# regular file of at most $2^{24}$ bytes is read, thousands of times what is
# needed, and it must be JSON in UTF-8. Every failure is a `ConfigError` of
# one line that begins with the file's path.

# %% tags=["export"]
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

# %%
import tempfile

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(ORIGINAL))
    print(GptOssConfig.from_pretrained(folder).num_hidden_layers, "layers")
    for text in ("{", "[" * 10 ** 6, " " * (MOST_JSON + 1)):
        file.write_text(text)
        said = refusal(lambda: GptOssConfig.from_pretrained(folder))
        print(said.replace(folder, "...")[:74])

# %% [markdown]
# ## How are they written?
#
# What we write is the released file, key by key: a test holds it. Keys
# that only other programs read are written as OpenAI wrote them. (One is
# left out, `transformers_version`: we are not transformers.)

# %% tags=["export"]
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

# %%
print(len(small.to_hf_dict()), "keys; the rope object:")
print(small.to_hf_dict()["rope_scaling"])
assert GptOssConfig.from_dict(small.to_hf_dict()) == small

# %% [markdown]
# OpenAI's spelling can say less, and a model that it cannot describe must
# not be written in it.

# %% tags=["export"]
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

# %%
assert small.to_original_dict() == ORIGINAL
print(len(small.to_original_dict()), "keys")
longer = replace(small, max_position_embeddings=262_144)
print(refusal(longer.to_original_dict))

# %% [markdown]
# ## It holds
#
# **Every spelling comes back.** Through JSON, as a file would:

# %%
def random_config(rng):
    G, E, L = rng.randint(1, 4), rng.randint(1, 9), rng.randint(1, 5)
    return GptOssConfig(
        num_hidden_layers=L, num_local_experts=E,
        num_experts_per_tok=rng.randint(1, E), num_key_value_heads=G,
        num_attention_heads=G * rng.randint(1, 4),
        layer_types=rng.choices(KINDS, k=L))


def through_json(values):
    return GptOssConfig.from_dict(json.loads(json.dumps(values)))


rng = random.Random(0)
for _ in range(300):
    c = replace(random_config(rng), rope_theta=rng.uniform(1e3, 1e6),
                rope_factor=rng.uniform(1, 64),
                rope_truncate=rng.random() < 0.5)
    old = c.to_hf_dict()
    new = {key: value for key, value in old.items()
           if key not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = old["rope_scaling"] | {
        "rope_theta": old["rope_theta"]}
    assert through_json(old) == through_json(new) == c
    plain = replace(c, layer_types=None, rope_truncate=False,
                    max_position_embeddings=int(4096 * c.rope_factor))
    assert through_json(plain.to_original_dict()) == plain
print("300 configurations, three spellings; the last:", len(old), len(new),
      "and", len(plain.to_original_dict()), "keys")

# %% [markdown]
# **No value passes unseen.** Put something that is no number into each key
# of the released file in turn: the answer is an error that names the key,
# or the key decides nothing and the model is the same.

# %%
harmless = []
for key in small.to_hf_dict():
    try:
        config = GptOssConfig.from_dict(small.to_hf_dict() | {key: "?"})
    except ConfigError as error:
        assert f": {key}" in str(error)
    else:
        assert config == small
        harmless.append(key)
print(f"{len(harmless)} of {len(small.to_hf_dict())} decide nothing:",
      *harmless, sep="\n  ")

# %% [markdown]
# Two of these are read when something better is missing:
# `experts_per_token` is an older name of `num_experts_per_tok`, and
# `initial_context_length` yields to the rope object, as in `transformers`.
#
# ## Against the others
#
# `transformers` fills gaps. Here are four files, with the rope type, factor
# and trained length that it reads in them, and what we say:

# %%
def theirs(values):
    rope = HFConfig(**values).rope_parameters
    keys = ("rope_type", "factor", "original_max_position_embeddings")
    return [rope.get(key) for key in keys]


whole = small.to_hf_dict()
cases = {
    "as released": whole,
    "no rope object": {k: v for k, v in whole.items()
                       if k != "rope_scaling"},
    "no trained length": whole | {"rope_scaling": {
        "rope_type": "yarn", "factor": 32.0}},
    "tied": whole | {"tie_word_embeddings": True}}
for name, values in cases.items():
    try:
        GptOssConfig.from_dict(values)
        ours = "read"
    except ConfigError as error:
        ours = str(error).removeprefix("config.json: ").partition(":")[0]
        ours = f"refused for {ours}"
    print(f"{name}: {theirs(values)}; ours: {ours}")

# %% [markdown]
# In the third case `transformers` takes the longest context for the trained
# length, which moves the frequencies of [rope](../attention/rope.ipynb):
# refused. In the last it goes on with one matrix for both ends, and so do we
# (see [reading](reading.ipynb)).
#
# ## Takeaways
#
# - One model has three spellings. The differences are tables, and the reader
#   finds out which one it is from the keys.
# - A gap is filled only where the program that wrote the file would have
#   computed with the same value; everything else is an error that names the
#   file and the key.
# - A key that would change the model is refused, one that decides nothing is
#   ignored, and a test says which are which.
#
# ## Exercises
#
# ### Exercise 1
#
# `original/config.json` has no key for the longest context. What does a
# reader get from it for a model that was trained on 8,192 tokens with a
# factor of 16, and why can that not be written back if the longest context
# was 100,000?

# %% tags=["hide-cell"]
trained = ORIGINAL | {"initial_context_length": 8192,
                      "rope_scaling_factor": 16.0}
config = GptOssConfig.from_dict(trained)
print(config.max_position_embeddings)
print(refusal(replace(config, max_position_embeddings=100_000)
              .to_original_dict))

# %% [markdown]
# ### Exercise 2
#
# Somebody writes an `original/config.json` and takes the false friends for
# true ones: alpha 32 and beta 1. What would a model compute with, and what
# says our reader?

# %% tags=["hide-cell"]
swapped = ORIGINAL | {"rope_ntk_alpha": 32, "rope_ntk_beta": 1}
print(refusal(lambda: GptOssConfig.from_dict(swapped)))
print("the fast end of the ramp would lie below its slow end: no ramp at all")

# %% [markdown]
# ### Exercise 3
#
# Which keys of the released `config.json` can be left out without changing
# the model? Try them all; compare with those that decide nothing.

# %% tags=["hide-cell"]
optional = []
for key in small.to_hf_dict():
    values = {k: v for k, v in small.to_hf_dict().items() if k != key}
    try:
        if GptOssConfig.from_dict(values) == small:
            optional.append(key)
    except ConfigError:
        pass
print(len(optional), "of", len(small.to_hf_dict()))
print("decide something, and have a default:",
      *sorted(set(optional) - set(harmless)), sep="\n  ")

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `ModelConfig` (the names of
#   `original/config.json`).
# - huggingface/transformers 5.23,
#   `models/gpt_oss/configuration_gpt_oss.py`: `GptOssConfig`;
#   `modeling_rope_utils.py`: defaults of YaRN.
# - `config.json` and `original/config.json` of openai/gpt-oss-20b and
#   -120b.
