"""What is in the file?

Generated from book/03_checkpoint.py; edit the chapter, not this file.
"""

import ctypes
import hashlib
import itertools
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from pathlib import Path

import torch
from torch import Tensor

from gptoss.config import (
    ConfigError,
    GptOssConfig,
    active_parameters,
    cache_bytes,
    cache_bytes_per_token,
    parameter_counts,
    read_json,
    total_parameters,
)
from gptoss.errors import Error, mismatch
from gptoss.mxfp4 import BLOCK, SCALE_NAN, MXFP4Error, decode, encode

# --- Names, shapes and dtypes as one table -----------------------------------

_log = logging.getLogger("gptoss")


class CheckpointError(Error):
    """A checkpoint that is not what it should be; names file and tensor."""


_wrong = partial(mismatch, CheckpointError)


# Hugging Face name, original name, shape. `L.` is "model.layers.N." in the
# one, "block.N." in the other. Q = H C, KV = G C. The three rows of the
# original qkv stand one under the other. blocks and scales are U8.
NAME_MAP = (
    ("model.embed_tokens.weight", "embedding.weight", "V D"),
    ("L.input_layernorm.weight", "L.attn.norm.scale", "D"),
    ("L.self_attn.q_proj.weight", "L.attn.qkv.weight", "Q D"),
    ("L.self_attn.k_proj.weight", "L.attn.qkv.weight", "KV D"),
    ("L.self_attn.v_proj.weight", "L.attn.qkv.weight", "KV D"),
    ("L.self_attn.q_proj.bias", "L.attn.qkv.bias", "Q"),
    ("L.self_attn.k_proj.bias", "L.attn.qkv.bias", "KV"),
    ("L.self_attn.v_proj.bias", "L.attn.qkv.bias", "KV"),
    ("L.self_attn.o_proj.weight", "L.attn.out.weight", "D Q"),
    ("L.self_attn.o_proj.bias", "L.attn.out.bias", "D"),
    ("L.self_attn.sinks", "L.attn.sinks", "H"),
    ("L.post_attention_layernorm.weight", "L.mlp.norm.scale", "D"),
    ("L.mlp.router.weight", "L.mlp.gate.weight", "E D"),
    ("L.mlp.router.bias", "L.mlp.gate.bias", "E"),
    ("L.mlp.experts.gate_up_proj_blocks", "L.mlp.mlp1_weight.blocks",
     "E 2F D/32 16"),
    ("L.mlp.experts.gate_up_proj_scales", "L.mlp.mlp1_weight.scales",
     "E 2F D/32"),
    ("L.mlp.experts.gate_up_proj_bias", "L.mlp.mlp1_bias", "E 2F"),
    ("L.mlp.experts.down_proj_blocks", "L.mlp.mlp2_weight.blocks",
     "E D F/32 16"),
    ("L.mlp.experts.down_proj_scales", "L.mlp.mlp2_weight.scales",
     "E D F/32"),
    ("L.mlp.experts.down_proj_bias", "L.mlp.mlp2_bias", "E D"),
    ("model.norm.weight", "norm.scale", "D"),
    ("lm_head.weight", "unembedding.weight", "V D"),
)


LAYOUTS = ("hf", "original", "bf16")
PACKED = ("_blocks", "_scales")
DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8, "F16": torch.float16,
          "F32": torch.float32, "F64": torch.float64}
FLOATS = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class TensorSpec:
    """What a header says of one tensor; dtype as safetensors spells it."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _rows(c: GptOssConfig) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """NAME_MAP with layer numbers and sizes filled in."""
    D, F, H = c.hidden_size, c.intermediate_size, c.num_attention_heads
    for key, width in (("hidden_size", D), ("intermediate_size", F)):
        if width % BLOCK:
            raise _wrong(key, f"a multiple of {BLOCK} (MXFP4 blocks)", width)
    sizes = {"V": c.vocab_size, "D": D, "2F": 2 * F, "D/32": D // 32,
             "F/32": F // 32, "16": 16, "H": H, "E": c.num_local_experts,
             "Q": H * c.head_dim, "KV": c.num_key_value_heads * c.head_dim}
    for layered, group in itertools.groupby(
            NAME_MAP, lambda row: row[0].startswith("L.")):
        rows = list(group)
        for n in range(c.num_hidden_layers if layered else 1):
            for hf, original, shape in rows:
                if layered:
                    hf = f"model.layers.{n}.{hf[2:]}"
                    original = f"block.{n}.{original[2:]}"
                yield hf, original, tuple(sizes[s] for s in shape.split())


def tensor_table(config: GptOssConfig, layout: str = "hf",
                 floats: str = "BF16") -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint: name there -> TensorSpec, in order.

    "hf" and "original" are the released layouts; "bf16" is Hugging Face's
    with decoded experts, (E, in, out). Other layouts: CheckpointError.
    floats: the dtype of what is not packed, as safetensors spells it.
    """
    if layout not in LAYOUTS:
        raise _wrong("layout", f"one of {LAYOUTS}", repr(layout))
    table: dict[str, TensorSpec] = {}
    for hf, original, shape in _rows(config):
        name = original if layout == "original" else hf
        dtype = "U8" if hf.endswith(PACKED) else floats
        if layout == "bf16" and dtype == "U8":
            if hf.endswith("_scales"):
                continue
            name, dtype = hf.removesuffix("_blocks"), floats
            experts, out, blocks, _ = shape
            shape = (experts, 32 * blocks, out)
        if name in table:  # k below q, v below k
            above = table[name].shape
            shape = (above[0] + shape[0], *above[1:])
        table[name] = TensorSpec(name, shape, dtype)
    return table


# --- Where a canonical tensor lies -------------------------------------------

@dataclass(frozen=True)
class Place:
    """A tensor under its canonical name, and where its rows are stored."""

    spec: TensorSpec  # canonical: Hugging Face's name, unfused
    stored: str  # name in the file
    first: int  # its first row there


def places(config: GptOssConfig, layout: str, floats: str = "BF16"
           ) -> dict[str, Place]:
    """Canonical name -> Place. Only q, k, v of "original" share one."""
    if layout != "original":
        table = tensor_table(config, layout, floats)
        return {name: Place(spec, name, 0) for name, spec in table.items()}
    table, filled, found = tensor_table(config, "hf", floats), Counter(), {}
    for hf, original, shape in _rows(config):
        found[hf] = Place(table[hf], original, filled[original])
        filled[original] += shape[0]
    return found


# --- The header of one file --------------------------------------------------

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class Stored:
    """One tensor in a file."""

    spec: TensorSpec
    file: Path
    offset: int  # of its first byte in the file
    nbytes: int


def read_header(file: Path) -> dict[str, Stored]:
    """What a safetensors file holds, from its header alone.

    CheckpointError if the header is none, if tensors overlap or leave a
    gap, or if the file is shorter or longer than the header says.
    """
    status = file.stat()
    size = status.st_size
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise _wrong(file, "a file", "a folder, a pipe or a device")
    with open(file, "rb") as f:
        first = f.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise _wrong(file, "safetensors", "a git-lfs pointer (git lfs "
                         "pull fetches the file)")
        if len(first) < 8 or length > min(size - 8, MAX_HEADER):
            raise _wrong(file, f"safetensors with a header of {length} bytes",
                         f"{size} bytes (cut off, or another format)")
        raw = f.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        stored = [_stored(file, name, entry, 8 + length)
                  for name, entry in header.items()]
    except CheckpointError:
        raise
    except (ValueError, RecursionError, AttributeError, TypeError,
            KeyError) as error:
        raise _wrong(file, "a safetensors header",
                     f"{raw[:40]!r}...") from error
    _check_cover(file, stored, 8 + length, size)
    return {s.spec.name: s for s in stored}


def _stored(file: Path, name: str, entry: dict, base: int) -> Stored:
    """One entry of a header; any malformed one raises some ValueError."""
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, begin, end)
    if (not all(type(n) is int and n >= 0 for n in numbers)
            or not isinstance(entry["dtype"], str)):
        raise ValueError(name)
    spec = TensorSpec(name, shape, entry["dtype"])
    if spec.dtype in DTYPES and spec.nbytes != end - begin:
        raise _wrong(f"{file}: {name}", f"{spec.nbytes} bytes for {spec}",
                     end - begin)
    return Stored(spec, file, base + begin, end - begin)


def _check_cover(file: Path, stored: list[Stored], end: int,
                 size: int) -> None:
    """Tensors must follow one another from the header to the file's end."""
    for s in sorted(stored, key=lambda s: (s.offset, s.nbytes)):
        where = f"{file}: {s.spec.name}"
        if s.offset != end:
            raise _wrong(where, f"at byte {end}", f"at {s.offset}")
        end += s.nbytes
        if end > size:
            raise _wrong(where, f"to end at byte {end}",
                         f"a file of {size} bytes (cut off?)")
    if end != size:
        raise _wrong(file, f"{end} bytes", size)


# --- Which files -------------------------------------------------------------

def _read_index(index: Path) -> dict[str, str]:
    """The weight_map of an index; file names that leave the folder, or that
    are not there, are a CheckpointError."""
    try:
        said = read_json(index)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    named = said.get("weight_map") if isinstance(said, dict) else None
    if not isinstance(named, dict):
        raise _wrong(index, "JSON with a weight_map", "none")
    for name, file in named.items():
        where = f"{index}: {name}"
        if (not isinstance(file, str) or not file.endswith(".safetensors")
                or re.search(r"[/\\:\0]", file)):
            raise _wrong(where, "the name of a .safetensors file in this "
                         "folder", repr(file))
        if not (index.parent / file).is_file():
            raise _wrong(where, f"in {file}", "no such file")
    return named


WHOLE = "model.safetensors"


def weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The safetensors files of a folder that are its model's, and the index
    that says so, if there is one."""
    files = sorted(file for file in folder.glob("*.safetensors")
                   if not file.name.startswith("adapter_"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise _wrong(folder, "one index",
                     f"{indexes[0].name} and {indexes[1].name}")
    if not indexes:
        return [file for file in files if file.name == WHOLE] or files, None
    named = set(_read_index(indexes[0]).values())
    if (folder / WHOLE).exists() and WHOLE not in named:
        raise _wrong(folder / WHOLE, f"only files that {indexes[0].name} "
                     "names", "this one (which of the two is the model?)")
    return [folder / name for name in sorted(named)], indexes[0]


def find_tensors(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder's model by their names there, from headers
    alone. An index must name exactly what is in the files that it names."""
    files, index = weight_files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in found:
                raise _wrong(f"{file}: {name}", "once",
                             f"in {found[name].file.name} as well")
            found[name] = stored
    if index is not None:
        _check_index(index, _read_index(index), found)
    return found


def _check_index(index: Path, named: dict[str, str],
                 found: dict[str, Stored]) -> None:
    for name, file in named.items():
        if name not in found or found[name].file.name != file:
            where = found[name].file.name if name in found else "no file"
            raise _wrong(f"{index}: {name}", f"in {file}", f"in {where}")
    for name, stored in found.items():
        if name not in named:
            raise _wrong(f"{stored.file}: {name}", f"in {index.name}",
                         "only in the file")


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADAPTER = ("a LoRA adapter, which changes a model and is none: merge it first "
           "(peft: merge_and_unload(), then save_pretrained())")


def weights_folder(path: Path) -> Path:
    """`path`, or its original/ if only that holds safetensors."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory")
    if not path.is_dir():
        raise _wrong(path, "a directory", "a file")
    adapter = any(path.glob("adapter_*"))
    for folder in (path, path / "original"):
        if weight_files(folder)[0]:
            if adapter:
                _log.warning("%s: an adapter lies beside the weights and is "
                             "not applied", path)
            return folder
    if adapter:
        raise _wrong(path, "a model", ADAPTER)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise _wrong(path, "*.safetensors", f"{pickles[0]}: a pickle can run "
                     "any code, so none is opened")
    there = "only config.json" if (path / "config.json").exists() else "none"
    raise _wrong(path, "config.json and *.safetensors", there)


def config_folder(path: Path) -> Path:
    """`path`, or its original/ if only that has a config.json."""
    below = path / "original"
    return below if ((below / "config.json").exists() and not (
        path / "config.json").exists()) else path


# --- Names that other programs give ------------------------------------------

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


def known_name(stored: Stored) -> str:
    """What we call a tensor of a file, if we know it under another name;
    CheckpointError for one of a kind that is not read."""
    name = stored.spec.name
    for pattern, what in REFUSED:
        if re.search(pattern, name):
            raise _wrong(f"{stored.file}: {name}", "a tensor of gpt-oss",
                         what)
    for pattern, ours in ALIASES:
        name = re.sub(pattern, ours, name)
    return name


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
            raise _wrong(f"{folder}: {name}, expert {n}", "a tensor", "none")
        spec = rows[n].spec
        if (spec.shape, spec.dtype) != (first.shape, first.dtype):
            raise _wrong(f"{rows[n].file}: {spec.name}", first, spec)
    return PerExpert(name, tuple(rows[n] for n in sorted(rows)))


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
            raise _wrong(f"{stored.file}: {stored.spec.name}",
                         f"{name} once", "it under two names")
        if name:
            known[name] = stored
    for name, rows in experts.items():
        if name in known:
            raise _wrong(f"{folder}: {name}", "once", "each expert as well")
        known[name] = stacked(folder, name, rows)
    return known


# --- One matrix for both ends ------------------------------------------------

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


# --- Files against the table -------------------------------------------------

def find_layout(names: Iterable[str]) -> str:
    """"hf", "original" or "bf16", from the names that we know."""
    names = set(names)
    if "embedding.weight" in names or any(
            name.startswith("block.") for name in names):
        return "original"
    dense = ("experts.gate_up_proj", "experts.down_proj")
    return "bf16" if any(name.endswith(dense) for name in names) else "hf"


def check_tensors(folder: Path, found: dict[str, Stored | PerExpert],
                  table: dict[str, TensorSpec]) -> None:
    """CheckpointError at the first tensor that is missing, superfluous, or
    of another shape or dtype. What is not packed may be any float."""
    for name, spec in table.items():
        if name not in found:
            tied = " (or tie_word_embeddings)" * (name in ENDS)
            raise _wrong(f"{folder}: {name}", f"{spec}{tied}",
                         "no such tensor")
        stored = found[name]
        dtypes = FLOATS if spec.dtype in FLOATS else (spec.dtype,)
        if (stored.spec.shape != spec.shape
                or stored.spec.dtype not in dtypes):
            raise _wrong(f"{stored.file}: {name}", spec, stored.spec)
    for name, stored in found.items():
        if name not in table:
            raise _wrong(f"{stored.file}: {name}", "no such tensor",
                         stored.spec)


# --- Laying out files before writing them ------------------------------------

MAX_SHARD_BYTES = 5 * 10 ** 9


def plan_shards(table: dict[str, TensorSpec], max_shard_bytes: int
                ) -> dict[str, list[TensorSpec]]:
    """File name -> its tensors, in order; a shard is closed before it would
    pass max_shard_bytes (one tensor may be longer alone)."""
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in table.values():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05}-of-{len(shards):05}.safetensors": specs
            for i, specs in enumerate(shards, 1)}


def make_header(specs: Iterable[TensorSpec]) -> bytes:
    """The safetensors header of tensors stored one after the other."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs:
        header[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape),
                             "data_offsets": [end, end + spec.nbytes]}
        end += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers start aligned
    return len(text).to_bytes(8, "little") + text


# --- Writing tensors in any order --------------------------------------------

OUR_FILES = ("config.json", "manifest.json", "model.safetensors.index.json")


class Writer:
    """Files of full length with headers; rows are put where they belong.

    `put` every canonical tensor once, in any order and a few rows at a time,
    then `finish`. dtype: of what is not packed.
    """

    def __init__(self, folder: Path, config: GptOssConfig, layout: str,
                 max_shard_bytes: int, dtype: torch.dtype = torch.bfloat16
                 ) -> None:
        self.folder, self.layout = folder, layout
        floats = next((name for name in FLOATS if DTYPES[name] == dtype), "")
        if not floats:
            raise _wrong("dtype", f"one of {FLOATS}", dtype)
        table = tensor_table(config, layout, floats)
        self.places = places(config, layout, floats)
        self.hashes = {name: hashlib.sha256() for name in self.places}
        self.rows = dict.fromkeys(self.places, 0)  # written so far
        config = replace(config, tie_word_embeddings=False)  # it has both
        self.config = (config.to_original_dict() if layout == "original"
                       else config.to_hf_dict())
        if layout == "bf16":
            del self.config["quantization_config"]
        if dtype != torch.bfloat16:
            self.config["dtype"] = str(dtype).removeprefix("torch.")
        self.shards = plan_shards(table, max_shard_bytes)
        need = sum(spec.nbytes for spec in table.values())
        free = shutil.disk_usage(folder).free
        if need > free:
            raise _wrong(folder.parent, f"{need:,} bytes free", f"{free:,}")
        self.stored: dict[str, Stored] = {}
        for name, specs in self.shards.items():
            header = make_header(specs)
            file = folder / name
            with open(file, "wb") as f:
                f.write(header)
                f.truncate(len(header) + sum(s.nbytes for s in specs))
            self.stored |= read_header(file)

    def put(self, name: str, tensor: Tensor, start: int | None = None
            ) -> None:
        """Write rows from `start` on; None: the whole tensor at once."""
        if name not in self.places:
            raise _wrong(name, f"a canonical name of layout {self.layout}",
                         "this")
        place, shape = self.places[name], tuple(tensor.shape)
        spec = place.spec
        good = (shape == spec.shape if start is None
                else shape[1:] == spec.shape[1:])
        if not good or tensor.dtype != DTYPES[spec.dtype]:
            raise _wrong(name, spec, f"{tensor.dtype} {list(shape)}")
        if self.rows[name] != (start or 0):
            raise _wrong(name, "once", "again")
        stored = self.stored[place.stored]
        width = stored.nbytes // stored.spec.shape[0]
        data = tensor.detach().cpu().contiguous()
        # numpy is no dependency of ours: the bytes straight from memory
        raw = memoryview((ctypes.c_ubyte * data.nbytes).from_address(
            data.data_ptr()))
        with open(stored.file, "r+b") as f:
            f.seek(stored.offset + (place.first + (start or 0)) * width)
            f.write(raw)
        self.hashes[name].update(raw)
        self.rows[name] += shape[0]

    def finish(self, extra_files: Iterable[Path]) -> dict[str, str]:
        """Check that nothing is missing, write the JSON; return the hashes."""
        for name, place in self.places.items():
            rows = self.rows[name]
            if rows != place.spec.shape[0]:
                raise _wrong(name, place.spec, f"{rows} rows" if rows
                             else "nothing")
        for file in map(Path, extra_files):
            if (self.folder / file.name).exists() or file.name in OUR_FILES:
                raise CheckpointError(f"{file}: expected another name")
            shutil.copyfile(file, self.folder / file.name)
        _write_json(self.folder / "config.json", self.config)
        if len(self.shards) > 1:
            total = sum(stored.nbytes for stored in self.stored.values())
            _write_json(self.folder / "model.safetensors.index.json", {
                "metadata": {"total_size": total},
                "weight_map": {name: stored.file.name for name, stored
                               in sorted(self.stored.items())}})
        return {name: each.hexdigest() for name, each in self.hashes.items()}


def _write_json(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


# --- All or nothing ----------------------------------------------------------

def _lock(folder: Path) -> int | None:
    """A descriptor that holds the folder until it is closed or the process
    dies; None if another one holds it, or if this system has no locks."""
    try:
        import fcntl

        held = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return held
    except OSError:
        os.close(held)
        return None


def _sweep(home: Path, name: str) -> None:
    """Remove the drafts of `name` in `home` whose writers have died. An
    empty one is left: its writer may be about to lock it."""
    for old in home.glob(f".{escape(name)}.*.partial"):
        held = None if old.is_symlink() else _lock(old)
        if held is not None:
            if any(old.iterdir()):
                shutil.rmtree(old, ignore_errors=True)
            os.close(held)


@contextmanager
def _draft(home: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `home`, gone at the end."""
    draft = home / f".{name}.{secrets.token_hex(4)}.partial"
    draft.mkdir()
    held = _lock(draft)
    try:
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if held is not None:
            os.close(held)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP end the process by SystemExit, as long as
    nobody else has a say in that: what was begun is undone on the way."""
    def end(number: int, frame: object) -> None:
        for each in mine:  # a second one does not stop the undoing
            signal.signal(each, signal.SIG_IGN)
        raise SystemExit(128 + number)

    mine: list[int] = []
    if threading.current_thread() is threading.main_thread():
        names = ("SIGTERM", "SIGHUP")
        mine += [number for name in names
                 if (number := getattr(signal, name, None)) is not None
                 and signal.getsignal(number) == signal.SIG_DFL]
    for each in mine:
        signal.signal(each, end)
    try:
        yield
    finally:
        for each in mine:
            signal.signal(each, signal.SIG_DFL)


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    held = os.open(path, os.O_RDONLY)
    try:
        os.fsync(held)
    finally:
        os.close(held)


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target`, or all that is in it.

    Whatever fails before leaves nothing behind. CheckpointError if `target`
    is there already, unless it is an empty folder.
    """
    target = Path(os.path.abspath(target))
    inside = target.is_dir() and not target.is_symlink()
    home = target if inside else target.parent
    above = [path for path in (home, *home.parents) if not path.exists()]
    try:
        _sweep(home, target.name)
        there = [file for file in target.iterdir()
                 if file.name != "lost+found"] if inside else []
        if there or os.path.lexists(target) and not inside:
            raise _wrong(target, "a new or empty folder", "something there")
        home.mkdir(parents=True, exist_ok=True)
        with _told_to_end(), _draft(home, target.name) as draft:
            yield draft
            for file in draft.iterdir():
                _sync(file)  # whole on disk before it has its name
            _appear(draft, target, inside)
    except BaseException as error:
        for path in above:
            with suppress(OSError):
                path.rmdir()  # unless somebody has put something there
        if isinstance(error, OSError):
            raise CheckpointError(f"{target}: {error.strerror or error}"
                                  ) from error
        raise


def _appear(draft: Path, target: Path, inside: bool) -> None:
    """Give the draft its name, or its files their places; all or none."""
    if not inside:
        os.replace(draft, target)
        return
    names = sorted((file.name for file in draft.iterdir()),
                   key=lambda name: (name == "config.json", name))
    try:
        for name in names:
            os.replace(draft / name, target / name)
    except BaseException:
        for name in names:
            (target / name).unlink(missing_ok=True)
        raise


def write_checkpoint(path: str | Path, config: GptOssConfig,
                     tensors: Iterable[tuple[str, Tensor]],
                     layout: str = "hf",
                     max_shard_bytes: int = MAX_SHARD_BYTES,
                     extra_files: Iterable[str | Path] = (),
                     dtype: torch.dtype = torch.bfloat16) -> dict[str, str]:
    """Write a checkpoint; returns canonical name -> sha256 of its bytes.

    tensors: (canonical name, tensor) in any order, one held at a time; with
    layout "original" q, k and v still come apart. Shapes and dtypes must be
    those of `tensor_table`; `dtype` is that of what is not packed.
    extra_files are copied along. The folder appears whole or not at all.
    CheckpointError names the tensor or the file.
    """
    with _new_folder(Path(path)) as draft:
        writer = Writer(draft, config, layout, max_shard_bytes, dtype)
        for name, tensor in tensors:
            writer.put(name, tensor)
        return writer.finish(map(Path, extra_files))


# --- Random checkpoints ------------------------------------------------------

def random_tensors(config: GptOssConfig, seed: int = 0, layout: str = "hf"
                   ) -> Iterator[tuple[str, Tensor]]:
    """(canonical name, random tensor) for `write_checkpoint`, one by one.

    A tensor depends on seed and name alone. Weights have a spread of about
    1/sqrt(in), so that activations stay of order one; norms vary around 1;
    biases and sinks are not zero; scales are never 255. "bf16" gives the
    decoded experts of the same model; "original" is the same as "hf".
    """
    if layout not in LAYOUTS:
        raise _wrong("layout", f"one of {LAYOUTS}", repr(layout))
    table = tensor_table(config)
    for name, spec in table.items():
        if layout != "bf16" or not name.endswith(PACKED):
            yield name, _random_tensor(spec, seed)
        elif name.endswith("_blocks"):
            name = name.removesuffix("_blocks")
            pair = (_random_tensor(table[name + p], seed) for p in PACKED)
            yield name, decode(*pair).transpose(1, 2)


def _random_tensor(spec: TensorSpec, seed: int) -> Tensor:
    key = zlib.crc32(f"{seed} {spec.name}".encode())
    g = torch.Generator().manual_seed(key)
    if spec.name.endswith("_blocks"):
        return torch.randint(256, spec.shape, generator=g, dtype=torch.uint8)
    if spec.name.endswith("_scales"):
        # the 16 codes have a spread of 2.9; three scales around the middle
        middle = 127 - round(math.log2(2.9 * math.sqrt(32 * spec.shape[-1])))
        return torch.randint(middle - 1, middle + 2, spec.shape, generator=g,
                             dtype=torch.uint8)
    mean, spread = 0.0, 1 / math.sqrt(spec.shape[-1])
    if spec.name.endswith("norm.weight"):
        mean, spread = 1.0, 0.2
    elif spec.name.endswith(("bias", "sinks", "embed_tokens.weight")):
        spread = 2.0 if spec.name.endswith("sinks") else 0.5
    out = torch.empty(spec.shape, dtype=torch.bfloat16)
    return out.normal_(mean, spread, generator=g)


# --- Reading -----------------------------------------------------------------

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
            raise _wrong(place.spec.name, "rows with step 1", rows)
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
            raise _wrong(f"{self.folder}: {name}", "a tensor's name in "
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


def check_scales(name: str, scales: Tensor) -> None:
    """CheckpointError naming `name` if a scale byte is 255, which is NaN."""
    if scales.numel() and scales.max() == SCALE_NAN:
        bad = int((scales == SCALE_NAN).sum())
        raise _wrong(name, "scales 0 to 254", f"{bad} of {SCALE_NAN} (NaN)")


# --- Converting --------------------------------------------------------------

CHUNK = 2 ** 26  # bytes copied at a time
Piece = tuple[str, int, Tensor]  # canonical name, first row, rows


def _pieces(old: Checkpoint, name: str, layout: str) -> Iterator[Piece]:
    """What `layout` makes of one tensor of `old`, a few rows at a time."""
    dense = name.endswith(("gate_up_proj", "down_proj"))
    if name.endswith("_scales"):
        old.check_scales(name)
    if layout == "bf16" and name.endswith(PACKED):
        if name.endswith("_blocks"):
            yield from _unpacked(old, name.removesuffix("_blocks"))
    elif layout != "bf16" and dense:
        yield from _packed(old, name)
    else:
        yield from _copied(old, name)


def _copied(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Rows as they are; floats of another dtype are rounded to bf16."""
    spec = old.spec(name)
    step = max(1, CHUNK * spec.shape[0] // spec.nbytes)
    for start in range(0, spec.shape[0], step):
        rows = old.read(name, slice(start, start + step))
        yield name, start, rows if spec.dtype == "U8" else rows.bfloat16()


def _unpacked(old: Checkpoint, name: str) -> Iterator[Piece]:
    """MXFP4 -> bf16, one expert at a time, transposed to (in, out)."""
    for e in range(old.config.num_local_experts):
        blocks, scales = (old.read(name + part, slice(e, e + 1))
                          for part in PACKED)
        yield name, e, decode(blocks, scales).transpose(1, 2)


def _packed(old: Checkpoint, name: str) -> Iterator[Piece]:
    """Floats (in, out) -> MXFP4 (out, in), one expert at a time."""
    for e in range(old.config.num_local_experts):
        values = old.read(name, slice(e, e + 1)).transpose(1, 2)
        try:
            pair = encode(values)
        except MXFP4Error as error:
            raise CheckpointError(f"{old.file(name)}: {name}, expert {e}: "
                                  f"{error}") from error
        for part, rows in zip(PACKED, pair, strict=True):
            yield name + part, e, rows


COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "generation_config.json", "chat_template.jinja",
    "chat_template.json", "README.md", "LICENSE", "LICENSE.txt",
    "LICENSE.md", "NOTICE", "USAGE_POLICY", "USAGE_POLICY.md")


def home_file(folder: Path, name: str) -> Path | None:
    """A small file of a model: in its folder or, for original/ alone, in
    the folder above, where the released ones lie."""
    places = [folder]
    if folder.resolve().name == "original":
        places.append(folder.resolve().parent)
    return next((place / name for place in places
                 if (place / name).is_file()), None)


def companions(old: Checkpoint) -> list[Path]:
    """Tokenizer, generation_config and the like beside the weights."""
    found = [home_file(old.folder, name) for name in COMPANIONS]
    return [file for file in found if file and _stays(file)]


def _stays(file: Path) -> bool:
    """Whether a file is where its folder says; if not, one line of log."""
    folder, real = file.parent.resolve(), file.resolve().parent
    store = folder.parent.parent / "blobs"
    if real == folder or (folder.parent.name, real) == ("snapshots", store):
        return True
    _log.warning("%s: a link that leaves its folder is not copied", file)
    return False


def _config_for(old: Checkpoint, extra: list[Path]) -> GptOssConfig:
    """The configuration to write, with the ids that only
    generation_config.json says."""
    files = [f for f in extra if f.name == "generation_config.json"]
    if old.layout != "original" or not files:
        return old.config
    said = read_json(files[0])
    if not isinstance(said, dict):
        raise _wrong(files[0], "a JSON object", type(said).__name__)
    ids = {key: said[key] for key in ("eos_token_id", "pad_token_id")
           if said.get(key) is not None}
    return GptOssConfig.from_dict(old.config.to_hf_dict() | ids,
                                  str(files[0]))


def convert(source: str | Path, target: str | Path, layout: str,
            max_shard_bytes: int = MAX_SHARD_BYTES,
            progress: Callable[[str], None] | None = None
            ) -> dict[str, str]:
    """Rewrite a checkpoint in another layout (or the same, resharded).

    hf <-> original keeps every byte; to "bf16" decodes, which is exact as
    far as bf16 reaches; from "bf16" encodes, which rounds what is not on
    the MXFP4 grid. The new folder `target` also gets manifest.json, the
    returned canonical name -> sha256, and the tokenizer and other small
    files. progress(name) is called before each tensor of the source.
    Memory: 64 MiB of rows, and one mapped tensor of the source at a time.
    CheckpointError; nothing half-written.
    """
    with Checkpoint.open(source) as old, _new_folder(Path(target)) as draft:
        extra = companions(old)
        writer = Writer(draft, _config_for(old, extra), layout,
                        max_shard_bytes)
        for source_name in old.names():
            if progress:
                progress(source_name)
            for name, start, rows in _pieces(old, source_name, layout):
                writer.put(name, rows, start)
            old.close()  # unmap: pages read so far count as memory in use
        manifest = writer.finish(extra)
        _write_json(draft / "manifest.json", manifest)
    return manifest


# --- What a file holds, without its weights ----------------------------------

COMPONENTS = {"embed_tokens": "embedding", "self_attn": "attention",
              ".router.": "router", ".experts.": "experts", "norm": "norms",
              "lm_head": "lm_head"}


def component_of(name: str) -> str:
    """The component of `parameter_counts` that a tensor belongs to."""
    return next(part for word, part in COMPONENTS.items() if word in name)


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


# --- From the hub ------------------------------------------------------------

def is_repo_id(text: str) -> bool:
    """Whether `text` can be a hub id, owner/name, and not a path."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", text, re.ASCII) is not None


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; a hub id (owner/name) as its downloaded one.

    Only a string of exactly that form, with no such file or folder here, is
    asked for at the hub: JSON and safetensors of the repository's root, at
    `revision` (branch, tag or commit), resumed and cached as HF_HOME and
    HF_HUB_OFFLINE say. CheckpointError, in one line, if that fails.
    """
    try:
        local = Path(path).expanduser()
        if local.exists():
            return local
    except RuntimeError:
        raise CheckpointError(f"{path}: no such user") from None
    if isinstance(path, Path) or not is_repo_id(path):
        raise CheckpointError(f"{path}: no such directory"
                              " (and a hub id is owner/name)")
    return _fetch(path, revision)


def _fetch(path: str, revision: str | None) -> Path:
    at = f"{path} at revision {revision}" if revision else path
    try:
        import huggingface_hub.constants  # noqa: F401  it reads HF_...
    except ValueError as error:
        raise CheckpointError(f"{at}: no such directory, and a setting HF_... "
                              f"of the environment: {error}") from error
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(
            path, revision=revision, ignore_patterns=["*/*"],
            allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the client has many kinds, and so its own
        raise CheckpointError(f"{at}: no such directory, and "
                              f"{_why(error)}") from error


def _why(error: Exception) -> str:
    """What went wrong at the hub, in a line."""
    from huggingface_hub import constants, errors

    known = {errors.GatedRepoError:
             "the hub wants a token with access (hf auth login)",
             errors.RepositoryNotFoundError:
             "the hub knows no such repository",
             errors.RevisionNotFoundError: "the hub knows no such revision",
             errors.LocalEntryNotFoundError: "the hub cannot be reached"}
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set and the cache has none"
    for kind, why in known.items():
        if isinstance(error, kind):
            return why
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return f"{constants.ENDPOINT} cannot be asked: {line}"


__all__ = [
    "ADAPTER",
    "ALIASES",
    "CHUNK",
    "COMPANIONS",
    "COMPONENTS",
    "Checkpoint",
    "CheckpointError",
    "DTYPES",
    "ENDS",
    "FLOATS",
    "LAYOUTS",
    "MAX_HEADER",
    "MAX_SHARD_BYTES",
    "NAME_MAP",
    "NOT_LEARNT",
    "ONE_EXPERT",
    "OUR_FILES",
    "PACKED",
    "PICKLES",
    "PerExpert",
    "Piece",
    "Place",
    "REFUSED",
    "Stored",
    "TensorSpec",
    "WHOLE",
    "Writer",
    "check_scales",
    "check_tensors",
    "companions",
    "component_of",
    "config_folder",
    "convert",
    "describe",
    "find_layout",
    "find_tensors",
    "home_file",
    "is_repo_id",
    "known_name",
    "make_header",
    "places",
    "plan_shards",
    "random_tensors",
    "read_header",
    "recognise",
    "resolve",
    "stacked",
    "tensor_table",
    "untied",
    "weight_files",
    "weights_folder",
    "write_checkpoint",
]
