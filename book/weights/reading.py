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
#     module: checkpoint
#     public: [Checkpoint, describe, load_tensors]
# ---

# %% [markdown]
# # How to read 13.8 GB without copying them?
#
# ## Question
#
# A program that loads the 20b in the usual way holds 69 GB for a file of
# 13.8 GB. How much must be copied to have every tensor at hand? Nothing: each
# tensor can be a view of the file, and the operating system fetches its bytes
# when somebody looks at them. And how is a file recognised as this model, if
# it may come from a dozen programs that give its tensors other names?

# %% tags=["export:spellings"]
import re
from dataclasses import dataclass, replace
from pathlib import Path

from gptoss.weights.config import GptOssConfig
from gptoss.weights.files import ADAPTER, Stored
from gptoss.weights.layout import FLOATS, TensorSpec, faulty

# %%
import json

import torch
from safetensors.torch import load, save, save_file

from gptoss.weights.layout import (
    LAYOUTS,
    CheckpointError,
    places,
    tensor_table,
)
from gptoss.weights.sizes import bf16_bytes, checkpoint_bytes

SMALL, LARGE = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()

# %% [markdown]
# ## Picture
#
# What a process needs to have the tensors of a model at hand. "The usual way"
# reads the file, makes tensors of its bytes, and decodes the experts to bf16;
# "views" is what this chapter does.
#
# What to see: the usual way needs five times the file. Views need the file's
# own pages, which the operating system has read, which processes share, and
# which it takes back when memory is short.

# %% tags=["hide-input"]
# Figure: stacked bars of memory. For the 20b, 69 GB the usual way, in three
# parts, and 13.8 GB of the file's own pages as views; for the 120b 364 and
# 65 GB.
import matplotlib.pyplot as plt

plt.style.use("../_static/book.mplstyle")
fig, ax = plt.subplots(figsize=(7, 2.5))
at, ticks = 0.0, []
for size, c in (("20b", SMALL), ("120b", LARGE)):
    file, wide = checkpoint_bytes(c) / 1e9, bf16_bytes(c) / 1e9
    left = 0.0
    for n, part in enumerate((file, file, wide)):
        ax.barh(at, part, left=left, color=f"C{n}", height=0.8)
        left += part
    ax.text(left + 3, at, f"{left:.0f} GB", va="center")
    ax.barh(at + 1, file, color="white", ec="C0", hatch="///", height=0.8)
    ax.text(file + 3, at + 1, f"{file:.1f} GB, the file's own", va="center")
    ticks += [(at, f"{size}: the usual way"), (at + 1, f"{size}: views")]
    at += 2.5
for x, word in ((33, "bytes read"), (98, "tensors"), (247, "decoded")):
    ax.text(x, 2.5, word, ha="center", va="center",
            color="black" if word == "tensors" else "white")
ax.set_yticks([y for y, _ in ticks], [word for _, word in ticks])
ax.invert_yaxis()
ax.set(xlim=(0, 400), xlabel="GB of memory")
ax.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# ## The naive version
#
# The usual loop: read a file, make tensors of it, convert them to the type
# that the model computes in.

# %%
raw = save({"w": torch.zeros(1000, 1000, dtype=torch.bfloat16)})
tensors = load(raw)                                       # a second copy
wide = {name: t.float() for name, t in tensors.items()}   # twice as wide
held = len(raw) + sum(t.nbytes for d in (tensors, wide) for t in d.values())
print(f"{held / len(raw):.1f} times the file")
held = 2 * checkpoint_bytes(SMALL) + bf16_bytes(SMALL)  # decoded to bf16
print(f"20b: {checkpoint_bytes(SMALL) / 1e9:.1f} GB, {held / 1e9:.0f} held")

# %% [markdown] tags=["given"]
# In practice: one loader took 50.14 GiB of memory for the 20b, and 3.49 GiB
# after it was made to read a layer at a time (NeMo
# [Automodel#3667](https://github.com/NVIDIA-NeMo/Automodel/issues/3667)).

# %% [markdown]
# ## A tensor that is a piece of a file
#
# An operating system can *map* a file into memory: the file's bytes get
# addresses, and nothing is read. Only when a program looks at an address is
# the page around it, 4096 bytes, fetched from the disk. A tensor made of such
# addresses is a view of the file. torch has this as `from_file`, and with
# [the header](file.ipynb), which says where each tensor begins, a reader is
# five lines. `shared=False` means that what we write into such a tensor stays
# with us and does not reach the file.

# %%
from importlib.resources import files

from gptoss.weights.files import read_header
from gptoss.weights.layout import DTYPES

pocket = Path(str(files("gptoss"))) / "pocket" / "model.safetensors"
header = read_header(pocket)
whole = torch.from_file(str(pocket), shared=False, dtype=torch.uint8,
                        size=pocket.stat().st_size)


def view(name):
    """A tensor of the shipped model, without a copy"""
    stored = header[name]
    run = whole[stored.offset:stored.offset + stored.nbytes]
    return run.view(DTYPES[stored.spec.dtype]).view(stored.spec.shape)


blocks = view("model.layers.0.mlp.experts.down_proj_blocks")
norm = view("model.norm.weight")
print(tuple(blocks.shape), tuple(norm.shape), norm.dtype)
ahead = blocks[5].data_ptr() - blocks.data_ptr()
print(f"expert 5 begins {ahead:,} bytes behind expert 0:",
      "5 x", " x ".join(map(str, blocks.shape[1:])))

# %% [markdown]
# By {eq}`layout-rows` an expert, or q in the joined matrix of the original
# layout, is one run of bytes, so it is a view too.
#
# That is the heart of the chapter. What is left: to find the tensors under
# whatever names they have, and to be sure that all of them are there.
#
# ## Which tensor is this?
#
# Programs that train write the same tensors under other names:
#
# - Wrappers of modules leave a word in the middle: `_orig_mod.` from a
#   compiled model, `module.`, `_fsdp_wrapped_module.` and
#   `_checkpoint_wrapped_module.` from training on many GPUs.
# - peft puts `base_model.model.` in front, and a save of the inner model has
#   no `model.` in front where we expect it.
# - unsloth needs ordinary linear layers to put its adapters on. So it has one
#   tensor for each expert, of shape (out, in), named `gate_up_projs.0.weight`
#   and so on, and the router's are called `router.linear`.
# - Tables of rotary frequencies (`inv_freq`, `original_inv_freq`), which hold
#   nothing that was learnt, are left out.
#
# The first table says what becomes of a part of a name. The second names
# kinds of files that hold a gpt-oss and that we cannot read, by the names
# that give them away, and says what to do.

# %% tags=["export:spellings"]
ALIASES = (  # a part of a name, and what we call it
    (r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|"
     r"module)\.", ""),
    (r"^base_model\.model\.", ""),
    (r"^(?=(embed_tokens|layers|norm\.weight)\b)", "model."),
    (r"\.router\.linear\.", ".router."),
)
ONE_EXPERT = re.compile(
    r"(.*\.experts\.(?:gate_up|down)_proj)s\.(0|[1-9]\d{0,5})\."
    r"(weight|bias)")
NOT_LEARNT = re.compile(r".*\brotary_emb\.(original_)?inv_freq")
REFUSED = (  # what is in a name, and what it shows
    (r"\b(lora_|base_layer\b|modules_to_save\b)", ADAPTER),
    (r"bitsandbytes__|\b(nested_)?(absmax|quant_map)$|\bSCB$",
     "weights that bitsandbytes has quantised: save the model merged, in 16 "
     "bits"),
    (r"\b(qweight|qzeros|g_idx)$",
     "weights quantised as GPTQ or AWQ do: take the model that was quantised"),
    (r"(_packed|_scale|_scale_inv|_zero_point)$",
     "weights quantised to FP8 or INT4: take the model that was quantised"),
    (r"\bexperts\.((gate|up)_proj\b|(gate_up|down)_proj\.|\d+\.)",
     "experts as MLX and others save them, each in a way of its own: take "
     "the model that was converted"),
    (r"^(score|classifier|v_head)\b",
     "a model with another head than a language model's"),
)

# %% tags=["export:spellings"]
def known_name(stored: Stored) -> str:
    """What we call a tensor of a file, if we know it under another name;
    CheckpointError for one of a kind that is not read."""
    name = stored.spec.name
    for pattern, what in REFUSED:
        if re.search(pattern, name):
            raise faulty(f"{stored.file}: {name}", "a tensor of gpt-oss",
                         what)
    for pattern, ours in ALIASES:
        name = re.sub(pattern, ours, name)
    return name

# %%
import tempfile

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)


def report(call, *args, **options):
    """Print the error that a call ends in, without the folder's name."""
    try:
        call(*args, **options)
    except ValueError as error:
        text = str(error).replace(f"{here}/", "").replace(str(here), ".")
        print(f"{type(error).__name__}: {text}")


file = here / "model.safetensors"
for name in ("model.layers.3._orig_mod.mlp.router.linear.bias",
             "layers.0.input_layernorm.weight", "block.3.mlp.gate.bias"):
    known = known_name(Stored(TensorSpec(name, (4,), "F32"), file, 0, 16))
    print(f"{name} -> {known}")
for name in ("model.layers.0.self_attn.q_proj.lora_A.weight",
             "model.layers.0.mlp.experts.down_projs.0.weight.absmax"):
    report(known_name, Stored(TensorSpec(name, (4,), "F32"), file, 0, 16))

# %% [markdown]
# One tensor for each expert makes a row of the tensor that we know. It lies
# (out, in) in the file; the decoded experts of Hugging Face are (E, in, out),
# so it is turned when it is read. Every expert from 0 on must be there, all
# of one shape and dtype.

# %% tags=["export:spellings"]
@dataclass(frozen=True)
class PerExpert:
    """A tensor of which each row is one in a file; matrices are turned."""

    name: str
    parts: tuple[Stored, ...]

    @property
    def spec(self) -> TensorSpec:
        """What a header would say of the whole."""
        first = self.parts[0].spec
        return TensorSpec(self.name, (len(self.parts), *first.shape[::-1]),
                          first.dtype)

    @property
    def file(self) -> Path:
        """The file of its first row."""
        return self.parts[0].file

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(part.nbytes for part in self.parts)


def stacked(folder: Path, name: str, rows: dict[int, Stored]) -> PerExpert:
    """The rows as one tensor; CheckpointError if one is missing or differs."""
    first = rows[min(rows)].spec
    for n in range(len(rows)):
        if n not in rows:
            raise faulty(f"{folder}: {name}, expert {n}", "a tensor", "none")
        spec = rows[n].spec
        if (spec.shape, spec.dtype) != (first.shape, first.dtype):
            raise faulty(f"{rows[n].file}: {spec.name}", first, spec)
    return PerExpert(name, tuple(rows[n] for n in sorted(rows)))

# %% [markdown]
# A last kind is known by its dtype. Since transformers 5 a model that was
# decoded on loading, trained and saved has its *floats* under the names
# `..._blocks`, and no scales. `transformers` itself does not recognise them:
# it takes its own file for a packed one without scales, leaves the experts as
# they are drawn at random, and warns. The numbers are all there, so here they
# are decoded experts under another name. If a file has one tensor under two
# names, or an expert twice, that is an error.

# %% tags=["export:spellings"]
def recognise(folder: Path, found: dict[str, Stored]
              ) -> dict[str, Stored | PerExpert]:
    """The tensors of a file under the names that we know them by."""
    known: dict[str, Stored | PerExpert] = {}
    experts: dict[str, dict[int, Stored]] = {}
    for stored in found.values():
        if NOT_LEARNT.fullmatch(stored.spec.name):
            continue
        name = known_name(stored)
        one = ONE_EXPERT.fullmatch(name)
        bare = name.removesuffix("_blocks")
        scales = stored.spec.name.removesuffix("_blocks") + "_scales"
        if one:
            name = one[1] + "_bias" * (one[3] == "bias")
            rows, n = experts.setdefault(name, {}), int(one[2])
            name = f"{name}, expert {n}" if n in rows else ""
            rows[n] = stored
        elif stored.spec.dtype in FLOATS and scales not in found:
            name = bare
        if name in known or one and name:
            raise faulty(f"{stored.file}: {stored.spec.name}",
                         f"{name} once", "it under two names")
        if name:
            known[name] = stored
    for name, rows in experts.items():
        if name in known:
            raise faulty(f"{folder}: {name}", "once", "each expert as well")
        known[name] = stacked(folder, name, rows)
    return known

# %%
def stand(name, shape, dtype="BF16"):
    spec = TensorSpec(name, shape, dtype)
    return Stored(spec, here / "model.safetensors", 0, spec.nbytes)


layer = "model.layers.0.mlp.experts."
strange = {name: stand(name, shape) for name, shape in {
    layer + "gate_up_proj_blocks": (2, 64, 192),
    layer + "down_projs.0.weight": (64, 96),
    layer + "down_projs.1.weight": (64, 96),
    "model.rotary_emb.inv_freq": (8,)}.items()}
for name, what in recognise(here, strange).items():
    print(name, what.spec)
report(recognise, here, {name: tensor for name, tensor in strange.items()
                         if "projs.0" not in name})

# %% [markdown]
# **One matrix for both ends.** A model may look tokens up in the matrix that
# it reads the logits from. No released gpt-oss does, but a configuration may
# say so, and then a file has one of the two, either one. It is read twice. A
# file with both has both, equal or not, as in `transformers`. What we write
# always has both, so `untied` returns a configuration that says so.

# %% tags=["export:spellings"]
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def untied(config: GptOssConfig, found: dict[str, Stored | PerExpert]
           ) -> GptOssConfig:
    """If embedding and head are tied, the one that is missing is the other,
    in `found`; returns the configuration of the two matrices."""
    if config.tie_word_embeddings:
        for missing, other in (ENDS, ENDS[::-1]):
            if missing not in found and other in found:
                found[missing] = found[other]
    return replace(config, tie_word_embeddings=False)

# %% [markdown]
# ## Is everything there?
#
# The names tell the layout; layout and configuration make
# [the table](file.ipynb); and the files must hold what is in it and nothing
# else. Packed experts are bytes. Everything else may be any float that
# safetensors has, float16, bfloat16, float32 or float64, for some programs
# save what they merged in fp32 beside experts that they have not touched. The
# model's dtype decides later what becomes of them. The first tensor that is
# missing, superfluous, or of another shape or dtype is a `CheckpointError`.

# %% tags=["export"]
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gptoss.weights.config import GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.files import (
    Stored,
    config_folder,
    find_tensors,
    weights_folder,
)
from gptoss.weights.layout import (
    COMPONENTS,
    DTYPES,
    FLOATS,
    CheckpointError,
    Place,
    TensorSpec,
    component_of,
    faulty,
    find_layout,
    places,
    tensor_table,
)
from gptoss.weights.mxfp4 import SCALE_NAN
from gptoss.weights.sizes import (
    active_parameters,
    cache_bytes,
    cache_bytes_per_token,
    parameter_counts,
    total_parameters,
)


def check_tensors(folder: Path, found: dict[str, Stored | PerExpert],
                  table: dict[str, TensorSpec]) -> None:
    """CheckpointError at the first tensor that is missing, superfluous, or
    of another shape or dtype. What is not packed may be any float."""
    for name, spec in table.items():
        if name not in found:
            tied = " (or tie_word_embeddings)" * (name in ENDS)
            raise faulty(f"{folder}: {name}", f"{spec}{tied}",
                         "no such tensor")
        stored = found[name]
        dtypes = FLOATS if spec.dtype in FLOATS else (spec.dtype,)
        if (stored.spec.shape != spec.shape
                or stored.spec.dtype not in dtypes):
            raise faulty(f"{stored.file}: {name}", spec, stored.spec)
    for name, stored in found.items():
        if name not in table:
            raise faulty(f"{stored.file}: {name}", "no such tensor",
                         stored.spec)

# %%
TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=256, hidden_size=64, intermediate_size=96, head_dim=16,
    num_attention_heads=6, num_key_value_heads=2, sliding_window=8)


def report(call, *args, **options):
    """Print the error that a call ends in, without the folder's name."""
    try:
        call(*args, **options)
    except (CheckpointError, ValueError) as error:
        text = str(error).replace(f"{here}/", "").replace(str(here), ".")
        print(f"{type(error).__name__}: {text}")
    else:
        raise AssertionError("no error")


def save_tiny(path, layout="hf"):
    """A checkpoint of random numbers; its tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, spec in tensor_table(TINY, layout).items():
        tensors[name] = (
            torch.randint(118, 124, spec.shape, generator=g).to(torch.uint8)
            if spec.dtype == "U8" else
            torch.randn(spec.shape, generator=g).bfloat16())
    save_file(tensors, path / "model.safetensors")
    return tensors


table = tensor_table(TINY)
found = {name: Stored(spec, here / "model.safetensors", 0, spec.nbytes)
         for name, spec in table.items()}
check_tensors(here, found, table)  # all is there
name = "model.layers.1.mlp.experts.down_proj_scales"
spoilt = TensorSpec(name, (4, 64, 2), "U8")
report(check_tensors, here, found | {
    name: Stored(spoilt, here / "model.safetensors", 0, 512)}, table)

# %% [markdown]
# ## The open checkpoint
#
# `Checkpoint.open` puts it together: it finds the folder, reads the
# configuration (or takes one that is handed in), the index and the headers,
# and does all the checks. Then
#
# - `names()` are the canonical names in the order of the table, and
#   `spec(name)` is shape and dtype as found in the file; `file(name)` says
#   which file, `files` are all, `nbytes` counts the bytes of all tensors;
# - `read(name, rows)` is a tensor or some of its rows: a contiguous view that
#   holds on to nothing but its own bytes (so `torch.save` of it saves no
#   more), and stays good after `close`. `rows` is a slice as Python's lists
#   know it, negative ends included, but with step 1. Two cases are copies: a
#   stack of single experts, and a tensor whose first byte does not lie on a
#   multiple of its dtype's size, which is legal and rare;
# - `dtype` is what the model was saved as: the `dtype` of `config.json`, in
#   older files `torch_dtype`. Without either, bf16 if the experts are packed
#   or the layout is OpenAI's, and otherwise the embedding's;
# - an unknown name is a `CheckpointError`, and so is a step.
#
# Only one thing is left that no header tells: whether a scale is 255, NaN.
# `check_scales` reads the scales, which are one byte in seventeen of the
# experts, and is for those who read them anyway: the model's loader and
# [the converter](writing.ipynb).

# %% tags=["export"]
class Checkpoint:
    """An open checkpoint in any of the three layouts; see `open`.

    Every name is canonical: Hugging Face's, q, k and v apart. Attributes:
    path (as given), folder (of the weights), config, layout.
    """

    def __init__(self, path: Path, folder: Path, config: GptOssConfig,
                 layout: str, found: dict[str, Stored | PerExpert]) -> None:
        self.path, self.folder, self.config = path, folder, config
        self.layout, self._found = layout, found
        self._places = places(config, layout)
        self._maps: dict[Path, Tensor] = {}

    @classmethod
    def open(cls, path: str | Path, config: GptOssConfig | None = None
             ) -> "Checkpoint":
        """Open a folder; reads config.json, the index and the headers.

        Raises CheckpointError or ConfigError, naming the file and the
        tensor, unless every tensor is there once, whole, and of the shape
        and dtype that config (by default the folder's) asks for.
        """
        path = Path(path)
        try:
            folder = weights_folder(path)
            config = config or GptOssConfig.from_pretrained(
                config_folder(path))
            found = recognise(folder, find_tensors(folder))
        except OSError as error:
            raise CheckpointError(f"{error.filename or path}: "
                                  f"{error.strerror}") from error
        layout, config = find_layout(found), untied(config, found)
        check_tensors(folder, found, tensor_table(config, layout))
        return cls(path, folder, config, layout, found)

    def names(self) -> list[str]:
        """Canonical names, in the order of the table."""
        return list(self._places)

    def spec(self, name: str) -> TensorSpec:
        """Canonical name, shape, and the dtype found in the file."""
        place = self._place(name)
        return replace(place.spec,
                       dtype=self._found[place.stored].spec.dtype)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._found[self._place(name).stored].file

    @property
    def files(self) -> list[Path]:
        """All files with weights."""
        return sorted({part.file for stored in self._found.values()
                       for part in getattr(stored, "parts", [stored])})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without headers; of a tied one, once."""
        return sum(stored.nbytes for stored in set(self._found.values()))

    @property
    def dtype(self) -> torch.dtype:
        """What a model of this checkpoint was saved as: `dtype` (before
        transformers 5, `torch_dtype`) of config.json. Without one bf16 if
        the experts are packed, else the embedding's."""
        file = config_folder(self.path) / "config.json"
        said = read_json(file) if file.exists() else {}
        for key in ("dtype", "torch_dtype"):
            name = said.get(key) if isinstance(said, dict) else None
            for dtype in (DTYPES[word] for word in FLOATS):
                if name == str(dtype).removeprefix("torch."):
                    return dtype
        return (torch.bfloat16 if self.layout != "bf16"
                else DTYPES[self.spec(ENDS[0]).dtype])

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows (its first dimension).

        A view of the mapped file: no byte is read before it is used, none
        outside `rows` ever, and writing to it does not reach the file. It
        outlives `close`. Of a stack of experts, a copy of the rows. Unknown
        name, or a step: CheckpointError.
        """
        place, rows = self._place(name), rows or slice(None)
        start, stop, step = rows.indices(place.spec.shape[0])
        if step != 1:
            raise faulty(place.spec.name, "rows with step 1", rows)
        stored = self._found[place.stored]
        count, shape = max(0, stop - start), place.spec.shape[1:]
        if isinstance(stored, Stored):
            return self._mapped(stored, place.first + start, count)
        parts = [self._mapped(part, 0, part.spec.shape[0])
                 for part in stored.parts[start:stop]]
        out = torch.empty(count, *shape, dtype=DTYPES[stored.spec.dtype])
        for row, part in zip(out, parts, strict=True):
            row.copy_(part.t())  # a vector stays as it is
        return out

    def check_scales(self, name: str | None = None) -> None:
        """CheckpointError if a scale is 255 (NaN), in one tensor or in all.

        Reads the scales, 1/17 of the packed bytes: 0.6 GB for the 20b.
        """
        for each in [name] if name else self.names():
            if each.endswith("_scales"):
                check_scales(f"{self.file(each)}: {each}", self.read(each))

    def close(self) -> None:
        """Forget the mappings; tensors read so far stay good, and reading
        on maps the files again."""
        self._maps.clear()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise faulty(f"{self.folder}: {name}", "a tensor's name in "
                         f"layout {self.layout}", "no such tensor")
        return self._places[name]

    def _map(self, file: Path) -> Tensor:
        """The whole file as bytes, mapped privately."""
        if file not in self._maps:
            self._maps[file] = torch.from_file(
                str(file), shared=False, size=file.stat().st_size,
                dtype=torch.uint8)
        return self._maps[file]

    def _mapped(self, stored: Stored, first: int, count: int) -> Tensor:
        """`count` rows of what is stored, from row `first`."""
        width = stored.nbytes // stored.spec.shape[0]  # bytes in a row
        begin = stored.offset + first * width
        whole = self._map(stored.file).untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8).set_(
            whole[begin:begin + count * width])  # torch.save: its own storage
        dtype = DTYPES[stored.spec.dtype]
        if begin % dtype.itemsize:
            raw = raw.clone()  # a file whose tensors are not aligned
        return raw.view(dtype).view(count, *stored.spec.shape[1:])

# %% tags=["export"]
def check_scales(name: str, scales: Tensor) -> None:
    """CheckpointError naming `name` if a scale byte is 255, which is NaN."""
    if scales.numel() and scales.max() == SCALE_NAN:
        bad = int((scales == SCALE_NAN).sum())
        raise faulty(name, "scales 0 to 254", f"{bad} of {SCALE_NAN} (NaN)")

# %%
saved = {layout: save_tiny(here / layout, layout) for layout in LAYOUTS}
with Checkpoint.open(here / "hf") as checkpoint:
    print(checkpoint.layout, len(checkpoint.names()), "tensors,",
          f"{checkpoint.nbytes:,} bytes")
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    print(checkpoint.spec(name), "in", checkpoint.file(name).name)
    expert = checkpoint.read(name, rows=slice(2, 3))
    again = checkpoint.read(name, rows=slice(2, 3))
    checkpoint.check_scales()
print(tuple(expert.shape), "read twice, bytes between the two:",
      expert.data_ptr() - again.data_ptr(), "(one copy, the system's)")
report(check_scales, "some scales", torch.tensor([[126, 255, 127, 255]]))

# %% [markdown]
# ### What does a checkpoint hold?
#
# `describe` answers from the configuration and the headers alone; it is what
# `python -m gptoss inspect` prints. Bytes are those of the file, so a
# checkpoint with decoded experts reads more for a token than a packed one.

# %% tags=["export"]
def describe(path: str | Path) -> dict[str, object]:
    """What `inspect` prints, from config and headers alone; JSON as it is.

    Bytes are those of the file: a bf16 checkpoint reads more for a token
    than a packed one. Raises as `Checkpoint.open` does.
    """
    with Checkpoint.open(path) as checkpoint:
        config = checkpoint.config
        parts = dict.fromkeys(COMPONENTS.values(), 0)
        dtypes: Counter[str] = Counter()
        for spec in map(checkpoint.spec, checkpoint.names()):
            parts[component_of(spec.name)] += spec.nbytes
            dtypes[spec.dtype] += spec.nbytes
        row = parts["embedding"] // config.vocab_size
        idle = config.num_local_experts - config.num_experts_per_tok
        unread = parts["experts"] // config.num_local_experts * idle
        return {
            "path": str(path), "layout": checkpoint.layout,
            "config": config.to_hf_dict(),
            "files": [file.name for file in checkpoint.files],
            "tensors": len(checkpoint._found), "bytes": checkpoint.nbytes,
            "bytes_by_dtype": dict(dtypes), "bytes_by_component": parts,
            "parameters": parameter_counts(config),
            "parameters_total": total_parameters(config),
            "parameters_active": active_parameters(config),
            "bytes_read_per_token":
                sum(parts.values()) - parts["embedding"] + row - unread,
            "cache_bytes_per_token": cache_bytes_per_token(config),
            "cache_bytes_full": cache_bytes(
                config, config.max_position_embeddings)}

# %%
for key, value in describe(here / "bf16").items():
    if key not in ("path", "config", "parameters"):
        print(f"{key}: {value}")

# %% [markdown]
# ### How are tensors handed to a model?
#
# The canonical names are those of
# [the model's attributes](../model/transformer.ipynb), but for the prefix
# `model.`; that is the whole of the mapping. With `packed` the experts are
# handed over as they lie in the file, otherwise decoded, one tensor at a
# time, and the scales are not handed over. Decoded experts of a file lie
# transposed, and a transposed view undoes that. Bytes stay bytes; floats are
# converted to `dtype`, which costs nothing where they have it already.

# %% tags=["export:loading"]
from collections.abc import Iterator

import torch
from torch import Tensor

from gptoss.weights.mxfp4 import decode


def load_tensors(checkpoint: Checkpoint, dtype: torch.dtype, device,
                 packed: bool) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors under this model's names, one at a time.

    Where dtype and device agree with the file, a tensor is a view of the
    mapped file and costs no memory; otherwise one at a time is converted.
    """
    for name in checkpoint.names():
        target, tensor = name.removeprefix("model."), checkpoint.read(name)
        if name.endswith("_scales"):
            check_scales(f"{checkpoint.path}: {name}", tensor)
            if not packed:
                continue
        elif name.endswith("_blocks") and not packed:
            target = target.removesuffix("_blocks")
            scales = checkpoint.read(name.removesuffix("blocks") + "scales")
            tensor = decode(tensor.to(device), scales.to(device), dtype)
        elif target.endswith(("gate_up_proj", "down_proj")):
            tensor = tensor.transpose(1, 2)  # HF: (E, in, out)
        wanted = tensor.dtype if tensor.dtype == torch.uint8 else dtype
        yield target, tensor.to(device, wanted)

# %%
with Checkpoint.open(here / "hf") as checkpoint:
    in_file = {checkpoint.read(name).data_ptr()
               for name in checkpoint.names()}
    for dtype, packed in ((torch.bfloat16, True), (torch.bfloat16, False),
                          (torch.float32, True)):
        state = dict(load_tensors(checkpoint, dtype, "cpu", packed))
        views = sum(t.data_ptr() in in_file for t in state.values())
        print(f"{dtype}, {'packed' if packed else 'decoded'}:",
              f"{views} of {len(state)} tensors are views of the file")

# %% [markdown]
# ## It holds
#
# What was saved is what is read, in every layout, whole and by rows:

# %%
import random

chance = random.Random(0)
for layout in LAYOUTS:
    count = 0
    with Checkpoint.open(here / layout) as checkpoint:
        for name, place in places(TINY, layout).items():
            stored, rows = saved[layout][place.stored], place.spec.shape[0]
            whole = stored[place.first:place.first + rows]
            a, b = sorted(chance.choices(range(rows + 1), k=2))
            assert torch.equal(checkpoint.read(name), whole)
            assert torch.equal(checkpoint.read(name, slice(a, b)), whole[a:b])
            count += 1
    print(f"{layout}: {count} tensors, whole and in part")

# %% [markdown]
# ## Against the others
#
# What has gone wrong elsewhere, and what happens here:
#
# - *Missing experts.* A program that takes packed files for bf16 does not find
#   the experts and leaves them random (tt-forge-models
#   [#443](https://github.com/tenstorrent/tt-forge-models/pull/443)). Here a
#   name that is missing or superfluous is an error.
# - *Orientation.* Packed experts are (E, out, in), decoded ones (E, in, out);
#   with `down_proj`, which is square, no shape tells
#   ([mlx-lm#1079](https://github.com/ml-explore/mlx-lm/issues/1079),
#   Megatron-Bridge
#   [#3743](https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/3743)). Here
#   the names tell the layout, and the layout the orientation.
# - *Floats under packed names.* transformers saves them unless
#   `save_original_format=False` is given
#   ([#44983](https://github.com/huggingface/transformers/pull/44983) made it
#   save them at all), and loads its own file with random experts. Here it is
#   read, as the cell of `recognise` shows.
#
# ## Cost
#
# Let $b_t$ be the bytes of tensor $t$, $R$ its rows, and $n_f$ the length of
# file $f$'s header.
#
# | operation | reads | memory of its own |
# |---|---|---|
# | open, describe | $\sum_f (8 + n_f)$ | the headers |
# | read rows $[r, r')$ of $t$ | $(r' - r)\, b_t / R$, when used | 0 |
# | check scales | $1/17$ of the experts | one byte a scale of a tensor |
#
# The first line, counted:

# %%
with Checkpoint.open(here / "hf") as checkpoint:
    size = sum(file.stat().st_size for file in checkpoint.files)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little")
                  for file in checkpoint.files)
    print(f"files {size:,} bytes = headers {headers:,} + tensors",
          f"{checkpoint.nbytes:,}")

# %% [markdown]
# ## Takeaways
#
# - A tensor that is a view of a mapped file costs no memory of its own; rows
#   of its first dimension are read alone.
# - One model has many spellings. Those that are known to mean the same are
#   read through a table; what is of another kind is named; nothing is left
#   at random.
# - A checkpoint that opens holds every tensor of the model once, whole, of
#   the right shape, and nothing else; only a scale of 255 is left to find.
#
# ## Exercises
#
# ### Exercise 1
#
# To write one token the 20b needs four experts of 32 in each layer. If only
# those are touched: how many runs of bytes are they in all 24 layers, and
# what share of the file?

# %% tags=["hide-cell"]
expert_tensors = [spec for name, spec in tensor_table(SMALL).items()
                  if ".experts." in name]
runs = 4 * len(expert_tensors)
touched = sum(spec.nbytes // 32 * 4 for spec in expert_tensors)
print(f"{runs} runs, {touched / 1e9:.2f} GB,",
      f"{touched / checkpoint_bytes(SMALL):.1%} of the file")

# %% [markdown]
# ### Exercise 2
#
# Write zeros into a tensor that is a view, and read the file's bytes again.
# What has changed, and where do the zeros live?

# %% tags=["hide-cell"]
with Checkpoint.open(here / "original") as checkpoint:
    file = checkpoint.files[0]
    before, tensor = file.read_bytes(), checkpoint.read("model.norm.weight")
    tensor.zero_()
    print("sum", tensor.sum().item(), "- has the file changed?",
          file.read_bytes() != before, "- the zeros are in our own page")

# %% [markdown]
# ### Exercise 3
#
# Two GPUs split every expert's gate_up projection by its output rows, the
# second dimension. How many runs of bytes does each read from a tensor of
# blocks, and of what length in the 20b? Read the second one's part of a
# tensor without touching the first one's.

# %% tags=["hide-cell"]
def read_split(checkpoint, name, rank, ranks):
    """One of `ranks` parts of dimension 1: (E, out / ranks, ...)"""
    experts, out = checkpoint.spec(name).shape[:2]
    part = slice(rank * out // ranks, (rank + 1) * out // ranks)
    return torch.stack([checkpoint.read(name, slice(e, e + 1))[0, part]
                        for e in range(experts)])


name = "model.layers.0.mlp.experts.gate_up_proj_blocks"
with Checkpoint.open(here / "hf") as checkpoint:
    half = checkpoint.spec(name).shape[1] // 2
    mine, all_of_it = read_split(checkpoint, name, 1, 2), checkpoint.read(name)
    print("elements that differ:", int((mine != all_of_it[:, half:]).sum()))
spec = tensor_table(SMALL)[name]
print(f"{spec.shape[0]} runs of {spec.nbytes // spec.shape[0] // 2:,} bytes")
folder.cleanup()

# %% [markdown]
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/weights.py`; transformers 5.23,
#   `models/gpt_oss/modeling_gpt_oss.py`, `GptOssExperts`.
# - unslothai/unsloth-zoo, `temporary_patches/gpt_oss.py` (one linear layer an
#   expert).
