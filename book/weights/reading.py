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
# 13.8 GB. How much must be read to have all of it at hand? Nothing but the
# headers: each tensor is a view of the file, and the operating system fetches
# its bytes when somebody looks at them. And how is the file found to be this
# model, if it may come from a dozen programs that give its tensors other
# names?
#
# ## The naive version
#
# [safetensors](file.ipynb) holds numbers and nothing that can run. The usual
# loop over its files still takes far more memory than it should:

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
from safetensors.torch import load, load_file, save, save_file

from gptoss.weights.layout import (
    LAYOUTS,
    PACKED,
    CheckpointError,
    places,
    tensor_table,
)
from gptoss.weights.sizes import bf16_bytes, checkpoint_bytes

raw = save({"w": torch.zeros(1000, 1000, dtype=torch.bfloat16)})
tensors = load(raw)                                       # a second copy
wide = {name: t.float() for name, t in tensors.items()}   # twice as wide
held = len(raw) + sum(t.nbytes for d in (tensors, wide) for t in d.values())
print(f"{held / len(raw):.1f} times the file")
for name, c in (("20b", GptOssConfig.gpt_oss_20b()),
                ("120b", GptOssConfig.gpt_oss_120b())):
    held = 2 * checkpoint_bytes(c) + bf16_bytes(c)  # experts decoded to bf16
    print(f"{name}: {checkpoint_bytes(c) / 1e9:.3g} GB of file, "
          f"{held / 1e9:.3g} GB to load it so")

# %% [markdown]
# In practice: one loader took 50.14 GiB of memory for the 20b, and 3.49 GiB
# after it was made to read a layer at a time (NeMo
# [Automodel#3667](https://github.com/NVIDIA-NeMo/Automodel/issues/3667)).
#
# ## Derivation
#
# A file that is mapped into memory (`mmap`) gets addresses, and only the
# first access to a page of 4096 bytes reads it. A tensor made from such
# addresses is a view of the file; a run that nobody touches is never read.
# By {eq}`checkpoint-rows` an expert, or q, k or v in the joined matrix of the
# original layout, is such a run.
#
# ## Code
#
# Something to read: a tiny model of random numbers, in any layout, written by
# the safetensors library.

# %%
import tempfile

folder = tempfile.TemporaryDirectory()
here = Path(folder.name)
SMALL, LARGE = GptOssConfig.gpt_oss_20b(), GptOssConfig.gpt_oss_120b()
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


def save_tiny(path, layout="hf", shards=1):
    """A checkpoint of random numbers in one or more files; its tensors."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, spec in tensor_table(TINY, layout).items():
        tensors[name] = (
            torch.randint(118, 124, spec.shape, generator=g).to(torch.uint8)
            if spec.dtype == "U8" else
            torch.randn(spec.shape, generator=g).bfloat16())
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return tensors
    home = {name: f"model-{1 + n * shards // len(tensors):05}-of-{shards:05}"
                  ".safetensors" for n, name in enumerate(tensors)}
    for file in set(home.values()):
        save_file({name: tensor for name, tensor in tensors.items()
                   if home[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": home}))
    return tensors


saved = {layout: save_tiny(here / layout, layout, 1 + 4 * (layout == "hf"))
         for layout in LAYOUTS}
print(*sorted(file.name for file in (here / "hf").iterdir()), sep="\n")

# %% [markdown]
# ### Names that other programs give
#
# Programs that train write the same tensors under other names. Wrappers of
# modules leave a word in the middle; a save of the inner model has no
# `model.` in front; and unsloth, which needs ordinary linear layers to put
# its adapters on, has one tensor for each expert, (out, in), and one word
# more for the router. The first table says what becomes of a part of a
# name. The second names kinds of files that hold a gpt-oss and cannot be
# read, by the names that give them away, and says what to do. And tensors
# that hold nothing that was learnt, tables of rotary frequencies, are left
# out.

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
file = here / "model.safetensors"
for name in ("model.layers.3._orig_mod.mlp.router.linear.bias",
             "layers.0.input_layernorm.weight", "model.norm.weight",
             "block.3.mlp.gate.bias"):
    print(known_name(Stored(TensorSpec(name, (4,), "F32"), file, 0, 16)))
for name in ("model.layers.0.self_attn.q_proj.lora_A.weight",
             "model.layers.0.mlp.experts.down_projs.0.weight.absmax"):
    report(known_name, Stored(TensorSpec(name, (4,), "F32"), file, 0, 16))

# %% [markdown]
# The one tensor of each expert makes a row of the tensor that we know. It
# lies (out, in) in the file; the decoded experts of Hugging Face are (E, in,
# out), so it is turned when it is read.

# %% tags=["export:spellings"]
@dataclass(frozen=True)
class PerExpert:
    """A tensor of which each row is one in a file; matrices are turned."""

    name: str
    parts: tuple[Stored, ...]

    @property
    def spec(self) -> TensorSpec:
        first = self.parts[0].spec
        return TensorSpec(self.name, (len(self.parts), *first.shape[::-1]),
                          first.dtype)

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def nbytes(self) -> int:
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
# A fourth kind is read by its dtype. Since transformers 5.5 a model that was
# decoded on loading, trained and saved has its *floats* under the names
# `..._blocks`, and no scales. `transformers` itself does not recognise them:
# it takes its own file for a packed one without scales, leaves the experts
# as they are drawn at random, and warns. The numbers are all there, so here
# they are decoded experts under another name.

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
# ### One matrix for both ends
#
# A model may look tokens up in the matrix that it reads the logits from. No
# released gpt-oss does, but a configuration may say so, and then a file has
# one of the two. It is read twice; a file with both has both, equal or not,
# as in `transformers`. What we write always has both.

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

# %%
one = {ENDS[0]: stand(ENDS[0], (256, 64))}
print(untied(replace(SMALL, tie_word_embeddings=True), one) == SMALL,
      sorted(one))

# %% [markdown]
# ### Files against the table
#
# The names tell the layout; layout and configuration make the table; and the
# files must hold what is in it and nothing else. Packed experts are bytes.
# Everything else may be any float that safetensors has: some programs save
# what they merged in fp32 beside experts that they have not touched, in
# MXFP4. The model's dtype decides what becomes of them.

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
table = tensor_table(TINY)
found = {name: Stored(spec, here / "model.safetensors", 0, spec.nbytes)
         for name, spec in table.items()}
check_tensors(here, found, table)
name = "model.layers.1.mlp.experts.down_proj_scales"
spoilt = TensorSpec(name, (4, 64, 2), "U8")
report(check_tensors, here, found | {
    name: Stored(spoilt, here / "model.safetensors", 0, 512)}, table)
del found[name]
report(check_tensors, here, found, table)

# %% [markdown]
# ### Reading
#
# Opening reads the configuration, the index and the headers, and does all the
# checks above. One is left: whether a scale is 255, NaN, only the numbers
# can tell, 0.6 GB of scales in the 20b. `check_scales` is for those who read
# them anyway, the model's loader and [the converter](writing.ipynb).

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
            for dtype in map(DTYPES.get, FLOATS):
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
with Checkpoint.open(here / "hf") as checkpoint:
    print(checkpoint.layout, len(checkpoint.names()), checkpoint.nbytes)
    name = "model.layers.1.mlp.experts.down_proj_blocks"
    print(checkpoint.spec(name), "in", checkpoint.file(name).name)
    expert = checkpoint.read(name, rows=slice(2, 3))
    again = checkpoint.read(name, rows=slice(2, 3))
    checkpoint.check_scales()
print(tuple(expert.shape), "read twice, at one address:",
      expert.data_ptr() == again.data_ptr())
report(check_scales, "some scales", torch.tensor([[126, 255, 127, 255]]))

# %% [markdown]
# Read twice and at the same address: there is one copy, the operating
# system's.
#
# ### What a file holds, without its weights

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
# ### Handing tensors to a model
#
# The canonical names are those of
# [the model's attributes](../model/transformer.ipynb), but for the
# prefix `model.`; that is the whole of the mapping. Packed experts are handed
# over as they lie in the file, or decoded, one tensor at a time. A bf16
# checkpoint holds them transposed, and a transposed view undoes that.

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
    print(f"{layout}: {count} tensors")

# %% [markdown]
# ## Against the others
#
# What has gone wrong elsewhere, and what happens here:
#
# - *Missing experts.* A program that reads the packed files as if they were
#   bf16 does not find the experts and leaves them random (tt-forge-models
#   [#443](https://github.com/tenstorrent/tt-forge-models/pull/443)). Here
#   every name that is missing or superfluous is an error.
# - *Orientation.* Packed experts are (E, out, in), decoded ones (E, in, out);
#   with `down_proj`, which is square, no shape tells
#   ([mlx-lm#1079](https://github.com/ml-explore/mlx-lm/issues/1079),
#   Megatron-Bridge
#   [#3743](https://github.com/NVIDIA-NeMo/Megatron-Bridge/pull/3743)). Here
#   the names tell the layout, and the layout the orientation.
# - *Floats under packed names.* After a decoded load, transformers 5.23
#   saves floats as `..._blocks` unless `save_original_format=False` is given
#   ([#44983](https://github.com/huggingface/transformers/pull/44983) made it
#   save them at all), and loads its own file with random experts. Here it is
#   read. The same model as it is written by three programs, and one file in
#   which floats stand where bytes were promised:

# %%
def renamed(tensors, kind):
    """Decoded tensors under the names of another program."""
    for name, tensor in tensors:
        if kind == "transformers" and name.endswith("_proj"):
            yield name + "_blocks", tensor.float()
        elif kind == "unsloth" and ".experts." in name:
            end = ".bias" if name.endswith("_bias") else ".weight"
            for e, row in enumerate(tensor):
                yield f"{name.removesuffix('_bias')}s.{e}{end}", row.t()
        elif kind == "unsloth":
            yield name.replace("router.", "router.linear."), tensor
        else:
            yield name.replace("self_attn", "_orig_mod.self_attn"), tensor


with Checkpoint.open(here / "bf16") as checkpoint:
    wanted = {n: checkpoint.read(n).clone() for n in checkpoint.names()}
for kind in ("transformers", "unsloth", "a compiled model"):
    bad = here / kind
    bad.mkdir()
    save_file({n: t.contiguous() for n, t in renamed(wanted.items(), kind)},
              bad / "model.safetensors")
    (bad / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
    with Checkpoint.open(bad) as checkpoint:
        same = sum(torch.equal(checkpoint.read(name).bfloat16(), tensor)
                   for name, tensor in wanted.items())
    print(f"{kind}: {len(load_file(bad / 'model.safetensors'))} tensors,",
          f"{same} of {len(wanted)} read as they were")
with Checkpoint.open(here / "hf") as checkpoint:
    tensors = {n: checkpoint.read(n).clone() for n in checkpoint.names()}
name = "model.layers.0.mlp.experts.down_proj_blocks"
tensors[name] = tensors[name].bfloat16()
save_file(tensors, bad / "model.safetensors")
report(Checkpoint.open, bad)

# %% [markdown]
# ## In the 20b and the 120b
#
# With the files at hand, `python -m gptoss inspect openai/gpt-oss-20b` prints
# what `describe` finds in the headers.
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
# The first and third line, counted:

# %%
with Checkpoint.open(here / "hf") as checkpoint:
    size = sum(file.stat().st_size for file in checkpoint.files)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little")
                  for file in checkpoint.files)
    assert size == headers + checkpoint.nbytes  # (checkpoint-offset)
for config in (SMALL, LARGE):
    blocks, scales = (sum(s.nbytes for n, s in tensor_table(config).items()
                          if n.endswith(part)) for part in PACKED)
    assert blocks == 16 * scales
    print(f"{scales:,} bytes of scales")

# %% [markdown]
# ## Takeaways
#
# - A tensor that is a view of a mapped file costs no memory; rows of its
#   first dimension are read alone.
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
    assert torch.equal(read_split(checkpoint, name, 1, 2),
                       checkpoint.read(name)[:, half:])
spec = tensor_table(SMALL)[name]
runs, length = spec.shape[0], spec.nbytes // spec.shape[0] // 2
print(f"{runs} runs of {length:,} bytes")
folder.cleanup()

# %% [markdown]
# A view of an expert reads nothing yet; only the stacked halves are touched.
#
# ## Sources
#
# - openai/gpt-oss, `gpt_oss/torch/weights.py`, `Checkpoint` and
#   `PARAM_NAME_MAP`.
# - transformers 5.23, `models/gpt_oss/modeling_gpt_oss.py`, `GptOssExperts`.
# - unslothai/unsloth-zoo, `temporary_patches/gpt_oss.py` (one linear layer an
#   expert).
