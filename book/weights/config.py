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
# no part of the model is left to guessing? The answer has 24 fields. And what
# happens if one of them is wrong? Mostly nothing that anybody notices.

# %% [markdown]
# ## Picture
#
# A small gpt-oss ships with this package. Here it reads a story that it wrote
# itself. We measure its surprise at each next token, the *loss*, in nats: 0
# would mean that it knew every token beforehand. Then one field of its
# configuration is changed, the weights stay, and it reads the story again.
#
# What to see: every one of these models runs, without an error or a warning.
# Some are slightly worse, some are ruined, and for one the loss does not even
# move. (The figure uses the finished package.)

# %% tags=["hide-input", "picture"]
# Figure: ten bars, the loss of the small model on a story. The first is the
# model as it is; the others have one field of the configuration changed, and
# run without an error at a loss between the same and over four times as much.
import json
import tempfile
from importlib.resources import files
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from gptoss import GptOss, Tokenizer

plt.style.use("../_static/book.mplstyle")
STORY = """Once upon a time there was a little fox named Mira. Mira lived in \
the cave. For her birthday Mira got a white lamp. One morning she went to the \
park with the lamp. She showed the lamp to the birds. But a strong wind came, \
and the white lamp was gone. The small fox sat down and cried. Then she saw \
Clara, a horse with kind eyes. "What are you looking for?" asked Clara. "I \
came from the cave and lost my white lamp," said Mira. "Do not worry," said \
Clara. "I will help you." So the fox and the horse looked under a bench at \
the park. In the end Clara found the white lamp near the wagon at the park. \
"Thank you, Clara," said the fox to the horse. Soon the fox was back in the \
cave with the white lamp. The fox and the horse were friends for ever."""
CHANGES = (
    ("as it is", {}), ("truncate: true", {"truncate": True}),
    ("num_experts_per_tok: 4, not 2", {"num_experts_per_tok": 4}),
    ("num_experts_per_tok: 1, not 2", {"num_experts_per_tok": 1}),
    ("sliding_window: 8, not 64", {"sliding_window": 8}),
    ("layer_types: full layers first",
     {"layer_types": ["full_attention", "sliding_attention"] * 2}),
    ("rope factor: 1, not 8", {"factor": 1.0}),
    ("rope_theta: 10,000, not 150,000", {"rope_theta": 10000.0}),
    ("rms_norm_eps: 0.1, not 0.00001", {"rms_norm_eps": 0.1}),
    ("swiglu_limit: 0.5, not 7", {"swiglu_limit": 0.5}))
pocket = Path(str(files("gptoss"))) / "pocket"
ids = torch.tensor([Tokenizer.from_pretrained(pocket).encode(STORY)])


def loss(change):
    """Mean surprise at the story's tokens with a changed config.json."""
    values = json.loads((pocket / "config.json").read_text())
    for key, value in change.items():
        inner = values["rope_scaling"]
        (inner if key in inner else values)[key] = value
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(values))
        (Path(folder) / "model.safetensors").symlink_to(
            pocket / "model.safetensors")
        model = GptOss.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            logits = model(ids)[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:]).item()


fig, ax = plt.subplots(figsize=(7, 3))
fig.tolerance = 0.05
for n, (_, change) in enumerate(CHANGES):
    found = loss(change)
    ax.barh(n, found, color="C0" if n else "0.5", height=0.7)
    ax.text(found + 0.02, n, f"{found:.2f}", va="center", fontsize=8)
ax.set_yticks(range(len(CHANGES)), [word for word, _ in CHANGES])
ax.invert_yaxis()
ax.set(xlabel="loss on the story (nats a token)")
ax.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# The reason is that most fields leave no trace in the weights. A wrong number
# of experts is found as soon as a tensor is read, because the tensor has
# another shape. A wrong window, limit or base of an angle fits every shape.
# So the configuration must be complete, and checked when it is read.
#
# ## The naive version
#
# A `config.json` is a dictionary, and Python has `dict.get` for what is not
# in it. Many models of this kind have heads of size `hidden_size` divided by
# `num_attention_heads`, so programs take that where the file does not say:

# %%
values = {"hidden_size": 2880, "num_attention_heads": 64}
print(values.get("head_dim",
                 values["hidden_size"] // values["num_attention_heads"]))

# %% [markdown]
# In gpt-oss a head has 64 numbers, not 45. A training program with this very
# fallback [counted wrong](counts.ipynb). We want the opposite: no
# field has a fallback that is computed from others, and an error says which
# key is wrong, what was expected and what was found.
#
# ## One dataclass for both models
#
# Here are all 24 fields. The names are those of Hugging Face's `config.json`,
# the defaults are the 120b's. The class is frozen: whoever holds a
# `GptOssConfig` holds a model that can be built, and nobody changes it later.
# (`__post_init__` runs the checks, which come below. Reading and writing
# files is [another chapter](config_file.ipynb); the methods look it up only
# when they are called, so the class can be used without it.)

# %% tags=["export"]
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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

# %%
from dataclasses import asdict, fields, replace

from gptoss.weights.config import GptOssConfig

small, big = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
print(len(fields(GptOssConfig)), "fields of the 20b:")
for key, value in asdict(small).items():
    print(f"  {key}: {value if key != 'layer_types' else value[:2]}")

# %% [markdown]
# What do they mean? Sizes first: layers, experts in a layer and experts that
# a token uses, the vocabulary, the width of the model, the width inside an
# expert, and the three sizes of attention. [The counts](counts.ipynb) explain
# them. `sliding_window` and `layer_types` say which layers see only the last
# 128 tokens ([masks](../attention/masks.ipynb)). The fields from
# `max_position_embeddings` to `rope_truncate` say how a position is turned
# into angles ([rope](../attention/rope.ipynb)). `rms_norm_eps` keeps a
# division away from zero, `swiglu_limit` is where an expert's activation is
# cut ([experts](../moe/experts.ipynb)). The two token ids end a text and fill
# it up. `tie_word_embeddings` may be true, although no released gpt-oss
# shares the matrices at its two ends: a fine-tune may, and its one matrix is
# [read twice](reading.ipynb).
#
# The two released models differ in two of them:

# %%
a, b = asdict(small), asdict(big)
assert a.pop("layer_types") == b.pop("layer_types")[:24]
differ = [key for key in a if a[key] != b[key]]
for key in differ:
    print(f"{key}: {a[key]}, {b[key]}")

# %% [markdown]
# (The list of kinds is as long as there are layers, and otherwise the same.)
#
# ## What is an error, and what does it say?
#
# All errors of the package are children of one class, so that a program can
# catch what we refuse and nothing else: `except gptoss.Error`. It is a
# `ValueError`, because that is what people catch who do not know us. And all
# have one wording: *what: expected this, found that*. `mismatch` makes such
# an error, `refuse` raises it with the value found, and `expect` refuses
# unless a condition holds. A value is shown as Python writes it, up to 200
# characters and `...`; what Python refuses to write, such as a number of
# 5,000 digits, becomes `a int too large to show`.
#
# The last three functions tell kinds of numbers apart. `True` is an `int` in
# Python, but it is no count. NaN and infinity are numbers, but they are not
# positive ones.

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
    """A float, infinity and NaN among them, or a whole number like one."""
    return (isinstance(value, float)
            or is_count(value) and abs(value) < 2 ** 1023)


def is_positive(value: object) -> TypeGuard[int | float]:
    """A finite number above 0."""
    return is_number(value) and 0 < value < float("inf")

# %%
import math

print(mismatch(Error, "head_dim", "an even number", 45))
print("counts:", [v for v in (24, 24.0, "24", True) if is_count(v)])
print("positive:", [v for v in (7, 7.0, 0.0, math.nan, math.inf, True)
                    if is_positive(v)])

# %% [markdown]
# A configuration has its own class of error, and a shorter word for `expect`:

# %% tags=["export"]
class ConfigError(Error):
    """A configuration that is not one of a gpt-oss model."""


demand = partial(expect, ConfigError)

# %% [markdown]
# ## What is refused
#
# Every number has bounds. They are not there for taste: Python's integers
# have no end and JSON's floats go to $10^{308}$, but what is computed with
# them does not. $150000^{-2i/C}$ overflows for a large enough base in the
# place of 150,000, and a layer that keeps $10^9$ tokens needs more memory
# than there is. So the bounds lie far beyond any model, and a file outside of
# them is damaged; it is refused here, by name, rather than somewhere in the
# middle. Every count and every number must be above 0, and
#
# | field | least | most |
# |---|---|---|
# | layers | 1 | 10,000 |
# | `sliding_window` | 1 | $2^{20}$ |
# | both lengths in positions | 1 | $2^{30}$ |
# | every other count | 1 | $2^{24}$ |
# | `rope_theta` | above 1 | $10^{15}$ |
# | `rope_factor` | 1 | $10^6$ |
# | `rope_beta_fast`, `rope_beta_slow` | $10^{-6}$ | $10^6$ |
# | `rms_norm_eps` | $10^{-30}$ | 1 |
# | `swiglu_limit` | 0.001 | 65,504, the largest float16 |
# | token ids | 0 | $2^{31} - 1$ |

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

# %%
for key, value in (("hidden_size", 2880.0), ("rope_theta", 10 ** 30),
                   ("swiglu_limit", 1e308), ("rms_norm_eps", 1e-40)):
    try:
        check_number(key, value)
    except ConfigError as error:
        print(error)

# %% [markdown]
# The list of layer kinds may be left out; then kinds alternate, a sliding
# layer first. If it is there, it is a list or a tuple with one entry a layer,
# and each is one of the two kinds. An error names the entry:
# `layer_types[35]`. The number of layers is looked at before the list is
# made, so that a damaged file cannot ask for a billion entries.

# %% tags=["export"]
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

# %%
print(fill_kinds(None, 3))

# %% [markdown]
# Then the sizes against each other. A token cannot use more experts than
# there are. The query heads share the key/value heads evenly, so their number
# is a multiple. And a head is turned in pairs of numbers, so it is even.

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
# And the choices. The kind of rope is `yarn` or `default`; the fast end of
# YaRN's ramp is not below the slow end; the two flags are true or false and
# not 0, 1 or a text; a token id is a whole number from 0 on.

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
from gptoss.weights.config import ConfigError


def refusal(make):
    """The message of the ConfigError that make() ends in."""
    try:
        make()
    except ConfigError as error:
        return str(error)
    raise AssertionError("not refused")


for change in ({"hidden_size": "2880"}, {"num_experts_per_tok": 129},
               {"head_dim": 45}, {"swiglu_limit": math.nan},
               {"rope_type": "longrope"}, {"tie_word_embeddings": 0}):
    print(refusal(lambda change=change: GptOssConfig(**change)))

# %% [markdown]
# ## It holds
#
# **No field is unwatched.** A text in the place of any field's value is
# refused, by the name of the field:

# %%
refused = 0
for field in fields(GptOssConfig):
    said = refusal(lambda key=field.name: GptOssConfig(**{key: "?"}))
    assert said.startswith(field.name), said
    refused += 1
print(refused, "of", len(fields(GptOssConfig)), "refuse a question mark;",
      "the last says:")
print(said)

# %% [markdown]
# ## Takeaways
#
# - A wrong configuration does not crash a model, it makes another one. Most
#   fields leave no trace in the weights.
# - So every field has bounds, none is computed from others, and an error says
#   which key is wrong, what was expected and what was found.
# - The two released models have one code and one list of sizes; only the
#   number of layers and of experts differ.
#
# ## Exercises
#
# ### Exercise 1
#
# Which of the 24 fields could be found out from the shapes of the tensors
# alone? [The counts](counts.ipynb) have a table of the 19 tensors of a layer.
# How many fields are left that only `config.json` knows?

# %% tags=["hide-cell"]
from_shapes = {
    "num_hidden_layers": "numbers of the layers in the names",
    "num_local_experts": "rows of the router", "vocab_size": "lm_head",
    "hidden_size": "any norm", "intermediate_size": "half of gate_up's rows",
    "num_attention_heads": "the sinks",
    "head_dim": "rows of q, divided by the heads",
    "num_key_value_heads": "rows of k, divided by head_dim",
    "tie_word_embeddings": "whether there is an lm_head"}
for key, where in from_shapes.items():
    print(f"{key}: {where}")
left = [field.name for field in fields(GptOssConfig)
        if field.name not in from_shapes]
print(len(left), "are left:", ", ".join(left[:4]), "...")

# %% [markdown]
# ### Exercise 2
#
# `True` is an `int` in Python. Which fields would take it for the number 1
# if `is_count` did not look? What would come of such a file?

# %% tags=["hide-cell"]
whole = [key for key, value in asdict(big).items() if is_count(value)]
for key in whole:
    refusal(lambda key=key: replace(big, **{key: True}))
print(len(whole), "fields; a window of 1, one head, token 1 as the last one")

# %% [markdown]
# ### Exercise 3
#
# The two flags refuse 0 and 1. Why? Think of a file in which somebody has
# written `"rope_truncate": "false"`, and of what Python makes of that text.

# %% tags=["hide-cell"]
for value in ("false", 0, 1):
    print(f"{value!r} counts as {bool(value)};",
          refusal(lambda value=value: replace(big, rope_truncate=value)))

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/model.py`: `ModelConfig`.
# - huggingface/transformers 5.23,
#   `models/gpt_oss/configuration_gpt_oss.py`: `GptOssConfig`.
# - `config.json` of openai/gpt-oss-20b and -120b; the model card
#   {cite}`gptoss2025`.
