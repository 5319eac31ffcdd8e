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
#     module: config
#     public: [ConfigError, Error, GptOssConfig]
# ---

# %% [markdown]
# # Which numbers make a gpt-oss?
#
# ## Question
#
# A folder of gpt-oss-120b has 65 GB of weights and a file of two kilobytes,
# `config.json`, that says how they are to be used. What must it say so that
# no part of the model is left to guessing? The answer has 24 fields, and the
# 20b and the 120b differ in just two of them: the number of layers, and that
# of experts.
#
# ## A mistake has a name
#
# A wrong configuration does not crash a model, it computes another one. So
# nothing is guessed: an error says which key, what was expected and what
# was found.

# %%
import math

# %% tags=["export:errors"]
from typing import NoReturn, TypeGuard, TypeVar


class Error(ValueError):
    """What this package refuses: each of its errors is one of these."""


E = TypeVar("E", bound=Error)


def mismatch(error: type[E], what: object, expected: object,
             found: object) -> E:
    """An error of this class, worded; `found` is said as it is."""
    return error(f"{what}: expected {expected}, found {found}")


def refuse(error: type[Error], what: object, expected: object,
           found: object) -> NoReturn:
    """Raise `mismatch`; a value that was found is `shown`."""
    raise mismatch(error, what, expected, shown(found))


def expect(error: type[Error], good: bool, what: object, expected: object,
           found: object) -> None:
    """`refuse` unless it is good."""
    if not good:
        refuse(error, what, expected, found)


def shown(value: object) -> str:
    """repr(value), and no more of it than fits into a message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an int of 5,000 digits
        return f"a {type(value).__name__} too large to show"
    return text if len(text) <= 200 else text[:200] + "..."


def is_count(value: object) -> TypeGuard[int]:
    """A whole number; True is none, although Python thinks it is 1."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """A whole number or a float, infinity and NaN among them."""
    return is_count(value) or isinstance(value, float)


def is_positive(value: object) -> TypeGuard[int | float]:
    """A finite number above 0."""
    return is_number(value) and 0 < value < float("inf")

# %%
print([is_count(v) for v in (24, 24.0, "24", True)])
print([is_positive(v) for v in (7, 7.0, 0.0, math.nan, math.inf, True)])

# %% [markdown]
# All errors of the package are this one's children, so that a program can
# catch what we refuse and nothing else: `except gptoss.Error`. It is a
# `ValueError`, because that is what people catch who do not know us. The
# configuration's own:

# %% tags=["export"]
from dataclasses import dataclass
from functools import partial
from pathlib import Path


class ConfigError(Error):
    """A configuration that is not one of a gpt-oss model."""


demand = partial(expect, ConfigError)

# %% [markdown]
# ## One dataclass for both models
#
# Frozen, and complete: whoever holds a `GptOssConfig` holds a model that
# can be built. Files are read and written by functions that know this class;
# it looks for them only when it is asked, and can be used without them.

# %% tags=["export"]
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

# %%
from dataclasses import asdict, fields, replace

from gptoss.weights.config import ConfigError, GptOssConfig, demand

print(len(fields(GptOssConfig)), "fields; the sizes of the 120b:")
print([f.default for f in fields(GptOssConfig)][:10])

# %% [markdown]
# ## What is refused
#
# Every number has bounds. Not for taste: Python's integers have no end and
# JSON's floats go to $10^{308}$, but what is computed with them does not.
# $150000^{-2i/C}$ overflows for a large enough $\theta$, a ring of $10^9$
# places is more memory than there is, and 65,504, the largest number of
# float16, is the largest limit that an activation of that type can be held
# to. The bounds lie far beyond any model, and a file outside of them is
# damaged: it is refused here, by name, rather than somewhere in the middle.

# %% tags=["export"]
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


def check_number(key: str, value: object, name: str | None = None) -> None:
    """ConfigError unless it is a number within the bounds of field `key`;
    the message calls it `name`."""
    name, whole = name or key, key in COUNTS
    good = is_count(value) if whole else is_positive(value)
    kind = "a whole number" if whole else "a number"
    demand(good and value > 0, name, f"{kind} above 0", value)
    least, most = LEAST.get(key, 0), MOST[key]
    demand(value >= least, name, f"at least {least:g}", value)
    demand(value <= most, name, f"at most {most:,}", value)

# %%
for key, value in (("hidden_size", 2880.0), ("rope_theta", 10 ** 30),
                   ("swiglu_limit", 1e308)):
    try:
        check_number(key, value)
    except ConfigError as error:
        print(error)

# %% [markdown]
# Then the list of layer kinds, which a file may leave out.

# %% tags=["export"]
def fill_kinds(kinds: object, layers: object) -> tuple[str, ...]:
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

# %%
print(fill_kinds(None, 3))

# %% [markdown]
# Then the numbers, one by one and against each other.

# %% tags=["export"]
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

# %% [markdown]
# And the choices between kinds. `tie_word_embeddings` may be true although
# no released gpt-oss shares the two matrices: a fine-tune may, and
# [its one matrix is read twice](reading.ipynb).

# %% tags=["export"]
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

# %%
def refusal(make):
    """The message of the ConfigError that make() ends in."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    raise AssertionError("not refused")


small, big = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
for change in ({"hidden_size": "2880"}, {"num_experts_per_tok": 129},
               {"swiglu_limit": math.nan}, {"rope_type": "longrope"}):
    print(refusal(lambda change=change: GptOssConfig(**change)))

# %% [markdown]
# ## It holds
#
# **Two numbers.** All other fields of the two models are the same:

# %%
a, b = asdict(small), asdict(big)
assert a.pop("layer_types") == b.pop("layer_types")[:24]
differ = [key for key in a if a[key] != b[key]]
for key in differ:
    print(f"{key}: {a[key]}, {b[key]}")
assert differ == ["num_hidden_layers", "num_local_experts"]

# %% [markdown]
# (The list of kinds is as long as there are layers, and otherwise the same.)
#
# **No field is unwatched.** A text in the place of any field's value is
# refused, by the name of the field:

# %%
for field in fields(GptOssConfig):
    said = refusal(lambda key=field.name: GptOssConfig(**{key: "?"}))
    assert said.startswith(field.name), said
print(len(fields(GptOssConfig)), "fields, none takes a question mark")

# %% [markdown]
# ## Takeaways
#
# - The two released models have one code and one list of sizes; only the
#   number of layers and of experts differ.
# - A wrong configuration does not crash a model, it makes another one. So
#   every field has bounds, and an error says what was expected and what was
#   found.
# - The configuration is frozen and checked when it is made: whoever holds
#   one holds a model that can be built.
#
# ## Exercises
#
# ### Exercise 1
#
# Many models of this kind have a head size of `hidden_size` divided by
# `num_attention_heads`, and programs compute it so when the file does not
# say. What would they take here, and how would this class answer it?

# %% tags=["hide-cell"]
print(small.hidden_size / small.num_attention_heads, "instead of",
      small.head_dim)
print(refusal(lambda: replace(small, head_dim=45)))

# %% [markdown]
# ### Exercise 2
#
# `True` is an `int` in Python. Which fields would take it for the number 1
# if `is_count` did not look? What would come of such a file?

# %% tags=["hide-cell"]
whole = [key for key in asdict(big) if isinstance(asdict(big)[key], int)
         and not isinstance(asdict(big)[key], bool)]
for key in whole:
    refusal(lambda key=key: replace(big, **{key: True}))
print(len(whole), "fields; a window of 1, one head, token 1 as the last one")

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `ModelConfig`.
# - huggingface/transformers 5.23,
#   `models/gpt_oss/configuration_gpt_oss.py`: `GptOssConfig`.
# - `config.json` of openai/gpt-oss-20b and -120b; the model card
#   {cite}`gptoss2025`.
