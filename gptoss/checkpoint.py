"""What is in the file?

Generated from book/03_checkpoint.py; edit the chapter, not this file.
"""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gptoss import config as sizes
from gptoss import mxfp4
from gptoss.config import GptOssConfig

# --- One table of names ------------------------------------------------------

class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, or not of this model."""


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
          "F64": torch.float64, "U8": torch.uint8}

# Hugging Face's name | OpenAI's name | shape | dtype. {n} is the layer; a
# part after ":" says that OpenAI keeps several in one tensor, in this order.
_HF, _OAI = "model.layers.{n}.", "block.{n}."
NAME_MAP = (
    ("model.embed_tokens.weight", "embedding.weight", "V D", "BF16"),
    (_HF + "input_layernorm.weight", _OAI + "attn.norm.scale", "D", "BF16"),
    (_HF + "self_attn.q_proj.weight", _OAI + "attn.qkv.weight", "HC D",
     "BF16"),
    (_HF + "self_attn.k_proj.weight", _OAI + "attn.qkv.weight", "GC D",
     "BF16"),
    (_HF + "self_attn.v_proj.weight", _OAI + "attn.qkv.weight", "GC D",
     "BF16"),
    (_HF + "self_attn.q_proj.bias", _OAI + "attn.qkv.bias", "HC", "BF16"),
    (_HF + "self_attn.k_proj.bias", _OAI + "attn.qkv.bias", "GC", "BF16"),
    (_HF + "self_attn.v_proj.bias", _OAI + "attn.qkv.bias", "GC", "BF16"),
    (_HF + "self_attn.o_proj.weight", _OAI + "attn.out.weight", "D HC",
     "BF16"),
    (_HF + "self_attn.o_proj.bias", _OAI + "attn.out.bias", "D", "BF16"),
    (_HF + "self_attn.sinks", _OAI + "attn.sinks", "H", "BF16"),
    (_HF + "post_attention_layernorm.weight", _OAI + "mlp.norm.scale", "D",
     "BF16"),
    (_HF + "mlp.router.weight", _OAI + "mlp.gate.weight", "E D", "BF16"),
    (_HF + "mlp.router.bias", _OAI + "mlp.gate.bias", "E", "BF16"),
    (_HF + "mlp.experts.gate_up_proj_blocks",
     _OAI + "mlp.mlp1_weight.blocks", "E 2F D/32 16", "U8"),
    (_HF + "mlp.experts.gate_up_proj_scales",
     _OAI + "mlp.mlp1_weight.scales", "E 2F D/32", "U8"),
    (_HF + "mlp.experts.gate_up_proj_bias", _OAI + "mlp.mlp1_bias", "E 2F",
     "BF16"),
    (_HF + "mlp.experts.down_proj_blocks", _OAI + "mlp.mlp2_weight.blocks",
     "E D F/32 16", "U8"),
    (_HF + "mlp.experts.down_proj_scales", _OAI + "mlp.mlp2_weight.scales",
     "E D F/32", "U8"),
    (_HF + "mlp.experts.down_proj_bias", _OAI + "mlp.mlp2_bias", "E D",
     "BF16"),
    ("model.norm.weight", "norm.scale", "D", "BF16"),
    ("lm_head.weight", "unembedding.weight", "V D", "BF16"),
)
# what stands in place of blocks and scales in a dequantised checkpoint
DENSE = {"gate_up_proj": "E D 2F", "down_proj": "E F D"}
LAYOUTS = ("hf", "original", "bf16")


# --- What a configuration promises -------------------------------------------

@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype ("BF16", "U8", …) of one stored tensor."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def dimensions(config: GptOssConfig) -> dict[str, int]:
    """The letters of `NAME_MAP` as numbers. CheckpointError: a size that
    MXFP4 cannot cut into blocks of 32."""
    D, F = config.hidden_size, config.intermediate_size
    for key, size in (("hidden_size", D), ("intermediate_size", F)):
        if size % 32:
            raise CheckpointError(f"{key}: MXFP4 needs a multiple of 32, "
                                  f"found {size}")
    H, G = config.num_attention_heads, config.num_key_value_heads
    return {"V": config.vocab_size, "D": D, "H": H, "F": F, "2F": 2 * F,
            "HC": H * config.head_dim, "GC": G * config.head_dim,
            "E": config.num_local_experts, "D/32": D // 32, "F/32": F // 32,
            "16": 16}


def canonical_rows(config: GptOssConfig, dense: bool = False
                   ) -> Iterator[tuple[TensorSpec, str]]:
    """Each tensor under its Hugging Face name, and OpenAI's name for it."""
    size = dimensions(config)

    def spec(name: str, shape: str, dtype: str) -> TensorSpec:
        return TensorSpec(name, tuple(size[s] for s in shape.split()), dtype)

    layers = [row for row in NAME_MAP if "{n}" in row[0]]
    before, after = NAME_MAP[:1], NAME_MAP[-2:]
    for n in (None, *range(config.num_hidden_layers), "end"):
        rows = {None: before, "end": after}.get(n, layers)
        for hf, original, shape, dtype in rows:
            stem = hf.removesuffix("_blocks")
            if dense and stem != hf:
                key = stem.rpartition(".")[2]
                yield spec(stem.format(n=n), DENSE[key], "BF16"), ""
            elif not (dense and hf.endswith("_scales")):
                yield (spec(hf.format(n=n), shape, dtype),
                       original.format(n=n))


def tensor_table(config: GptOssConfig, layout: str = "hf"
                 ) -> dict[str, TensorSpec]:
    """Every tensor that a checkpoint of `config` holds, name -> spec.

    The names are those of the layout; "original" joins q, k and v.
    """
    if layout not in LAYOUTS:
        raise CheckpointError(f"layout: expected {' or '.join(LAYOUTS)}, "
                              f"found {layout!r}")
    table: dict[str, TensorSpec] = {}
    for spec, original in canonical_rows(config, layout == "bf16"):
        name = original if layout == "original" else spec.name
        if name in table:
            first = table[name].shape
            shape = (first[0] + spec.shape[0], *first[1:])
        else:
            shape = spec.shape
        table[name] = TensorSpec(name, shape, spec.dtype)
    return table


# --- Where each tensor lies --------------------------------------------------

@dataclass(frozen=True)
class Place:
    """A canonical tensor inside a stored one: rows from `first` on."""

    spec: TensorSpec
    stored: str
    first: int = 0


def places(config: GptOssConfig, layout: str) -> dict[str, Place]:
    """Canonical (Hugging Face) name -> where a layout stores it."""
    rows_so_far: dict[str, int] = {}
    found = {}
    for spec, original in canonical_rows(config, layout == "bf16"):
        stored = original if layout == "original" else spec.name
        first = rows_so_far.get(stored, 0)
        rows_so_far[stored] = first + spec.shape[0]
        found[spec.name] = Place(spec, stored, first)
    return found


# --- A header by hand --------------------------------------------------------

LARGEST_HEADER = 100 * 2**20  # the limit that the safetensors library sets


@dataclass(frozen=True)
class Stored:
    """One tensor in one file: bytes `begin` to `end` of the file."""

    spec: TensorSpec
    file: Path
    begin: int
    end: int


def read_header(file: Path) -> dict[str, Stored]:
    """The header of a safetensors file, checked against the file's size.

    CheckpointError: not such a file, cut short, offsets that overlap, leave
    a gap, or don't fit shape and dtype.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise CheckpointError(
                    f"{file}: truncated, or not a safetensors file: a header"
                    f" of {length} bytes in a file of {size}")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        return _checked(file, entries, 8 + length, size)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file}: unreadable header ({error})"
                              ) from None


def _checked(file: Path, entries: dict, start: int, size: int
             ) -> dict[str, Stored]:
    found, at = {}, 0
    try:
        order = sorted(entries.items(), key=lambda e: e[1]["data_offsets"])
        for name, entry in order:
            begin, end = entry["data_offsets"]
            spec = TensorSpec(name, tuple(entry["shape"]), entry["dtype"])
            if spec.dtype not in DTYPES:
                raise CheckpointError(f"{file}: {name}: dtype {spec.dtype} "
                                      f"is none of {', '.join(DTYPES)}")
            if begin != at or end - begin != spec.nbytes:
                raise CheckpointError(
                    f"{file}: {name}: expected bytes {at} to "
                    f"{at + spec.nbytes}, found {begin} to {end}")
            found[name] = Stored(spec, file, start + begin, start + end)
            at = end
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: unreadable header ({error!r})"
                              ) from None
    if start + at != size:
        kind = "truncated" if start + at > size else "too long"
        raise CheckpointError(f"{file}: {kind}: expected {start + at} bytes, "
                              f"found {size}")
    return found


# --- From a folder to its files ----------------------------------------------

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index's weight_map."""
    if (folder / INDEX).exists():
        mapping = read_index(folder / INDEX)
        names = sorted(set(mapping.values()))
        for other in sorted(folder.glob("model-*.safetensors")):
            if other.name not in names:
                raise CheckpointError(f"{other}: looks like a shard, but "
                                      f"{INDEX} does not name it")
        return [folder / name for name in names], mapping
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(
        folder.glob("*.safetensors"))
    if not files:
        pickles = [f.name for pattern in ("*.bin", "*.pt", "*.pth")
                   for f in sorted(folder.glob(pattern))]
        more = (f" (only {pickles[0]}, a pickle, which is never read)"
                if pickles else "")
        raise CheckpointError(f"{folder}: no .safetensors file{more}")
    return files, None


def read_index(file: Path) -> dict[str, str]:
    """The weight_map of an index: tensor -> plain file name beside it."""
    try:
        mapping = json.loads(file.read_text("utf-8"))["weight_map"]
        items = list(mapping.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file}: unreadable index ({e!r})") from None
    for tensor, name in items:
        plain = (isinstance(name, str) and name.endswith(".safetensors")
                 and name == os.path.basename(name) and "\\" not in name)
        if not plain:
            raise CheckpointError(f"{file}: {tensor}: expected the name of a "
                                  f".safetensors file beside the index, "
                                  f"found {name!r}")
    return mapping


def read_headers(folder: Path) -> dict[str, Stored]:
    """All tensors of a folder; index and files must tell the same."""
    files, mapping = weight_files(folder)
    found: dict[str, Stored] = {}
    for file in files:
        if not file.exists():
            raise CheckpointError(f"{file}: no such file, but {INDEX} names "
                                  "it")
        for name, stored in read_header(file).items():
            if name in found:
                raise CheckpointError(f"{name}: in {found[name].file.name} "
                                      f"and again in {file}")
            if mapping is not None and mapping.get(name) != file.name:
                raise CheckpointError(
                    f"{file}: holds {name}, but {INDEX} puts it in "
                    f"{mapping.get(name, 'no file')}")
            found[name] = stored
    for name in mapping or ():
        if name not in found:
            raise CheckpointError(f"{folder / mapping[name]}: {name} is not "
                                  f"in it, but {INDEX} says so")
    return found


# --- Opening -----------------------------------------------------------------

FLOATS = ("BF16", "F16", "F32", "F64")


def layout_of(names: Iterable[str]) -> str:
    """Which of the three layouts a set of tensor names belongs to."""
    names = set(names)
    if "embedding.weight" in names or any(
            name.startswith("block.") for name in names):
        return "original"
    packed = any(name.endswith(("_blocks", "_scales")) for name in names)
    return "hf" if packed else "bf16"


def check_tensors(found: dict[str, Stored], config: GptOssConfig,
                  layout: str, folder: Path) -> None:
    """Raise CheckpointError for the first tensor that is missing, too many,
    or of another shape or dtype than `config` promises."""
    table = tensor_table(config, layout)
    for name, spec in table.items():
        if name not in found:
            raise CheckpointError(f"{folder}: tensor {name} is missing "
                                  f"({layout} layout)")
        stored = found[name]
        where = f"{stored.file}: {name}"
        if stored.spec.shape != spec.shape:
            raise CheckpointError(f"{where}: expected shape {spec.shape}, "
                                  f"found {stored.spec.shape}")
        allowed = FLOATS if layout == "bf16" else (spec.dtype,)
        if stored.spec.dtype not in allowed:
            raise CheckpointError(f"{where}: expected dtype "
                                  f"{' or '.join(allowed)}, found "
                                  f"{stored.spec.dtype}")
    for name, stored in found.items():
        if name not in table:
            raise CheckpointError(f"{stored.file}: {name}: no such tensor in "
                                  f"this model ({layout} layout)")


def find_folder(path: str | Path) -> Path:
    """The folder that holds config.json and weights: `path`, or its
    `original/` when only that has them."""
    folder = Path(path)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such directory")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: expected a folder with config.json,"
                              " found a file")
    inner = folder / "original"
    weights = any(folder.glob("*.safetensors")) or (folder / INDEX).exists()
    if not weights and (inner / "config.json").exists():
        return inner
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json in this folder")
    return folder


# --- Reading without copying -------------------------------------------------

class Checkpoint:
    """An open checkpoint in any layout; a context manager.

    Opening reads headers only and checks them against the configuration.
    Names are Hugging Face's, whatever the layout. Files are mapped when a
    tensor of theirs is first read; a tensor is a view of the mapping, and a
    page that nobody touches never leaves the disk.
    """

    def __init__(self, folder: Path, config: GptOssConfig, layout: str,
                 stored: dict[str, Stored]) -> None:
        self.path, self.config, self.layout = folder, config, layout
        self._stored, self._places = stored, places(config, layout)
        self._maps: dict[Path, torch.Tensor] = {}

    @classmethod
    def open(cls, path: str | Path, config: GptOssConfig | None = None
             ) -> "Checkpoint":
        """Check the checkpoint in folder `path` and open it.

        Raises CheckpointError naming the file and the tensor, or
        ConfigError naming the key.
        """
        folder = find_folder(path)
        config = config or GptOssConfig.from_pretrained(folder)
        stored = read_headers(folder)
        layout = layout_of(stored)
        check_tensors(stored, config, layout, folder)
        return cls(folder, config, layout, stored)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mappings; tensors already read stay valid."""
        self._maps.clear()

    def names(self) -> list[str]:
        """Canonical names, in the order of the model."""
        return list(self._places)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, headers not included."""
        return sum(s.end - s.begin for s in self._stored.values())

    def spec(self, name: str) -> TensorSpec:
        """Shape and dtype of a canonical tensor, as stored."""
        place = self._place(name)
        dtype = self._stored[place.stored].spec.dtype
        return TensorSpec(name, place.spec.shape, dtype)

    def _place(self, name: str) -> Place:
        if name not in self._places:
            raise CheckpointError(f"{self.path}: no tensor {name} "
                                  f"({self.layout} layout)")
        return self._places[name]

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """A tensor, or some rows of it, as a view of the mapped file.

        rows slices the first dimension with step 1; no other byte is
        touched. In the bf16 layout experts come as stored: (E, in, out).
        """
        place = self._place(name)
        stored, shape = self._stored[place.stored], place.spec.shape
        first, last, step = (rows or slice(None)).indices(shape[0])
        if step != 1:
            raise CheckpointError(f"{name}: expected rows with step 1, "
                                  f"found {step}")
        shape = (max(0, last - first), *shape[1:])
        dtype = DTYPES[stored.spec.dtype]
        row = math.prod(shape[1:]) * dtype.itemsize
        begin = stored.begin + (place.first + first) * row
        return view_bytes(self._map(stored.file), begin, shape, dtype)

    def _map(self, file: Path) -> torch.Tensor:
        if file not in self._maps:
            self._maps[file] = map_file(file)
        return self._maps[file]


def map_file(file: Path) -> torch.Tensor:
    """A file's bytes as a uint8 tensor, mapped privately: writing to the
    tensor never writes to the file."""
    size = file.stat().st_size
    storage = torch.UntypedStorage.from_file(str(file), False, size)
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,))


def view_bytes(data: torch.Tensor, begin: int, shape: tuple[int, ...],
               dtype: torch.dtype) -> torch.Tensor:
    """Bytes from `begin` on as a tensor; a copy only if the file is not
    aligned to the dtype's size."""
    raw = data[begin:begin + math.prod(shape) * dtype.itemsize]
    if begin % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(shape)


# --- From the hub ------------------------------------------------------------

WANTED = ["*.json", "*.safetensors"]
UNWANTED = ["original/*", "metal/*"]


def looks_local(text: str) -> bool:
    """Whether a name can only be meant as a path, not as `owner/name`."""
    return (Path(text).expanduser().exists() or text.startswith((".", "/",
            "~")) or text.count("/") != 1 or "\\" in text
            or text.endswith("/"))


def resolve(path_or_repo_id: str | Path, revision: str | None = None) -> Path:
    """A local folder as it is; a hub repository fetched into its cache.

    huggingface_hub does the fetching: it shows progress, resumes, and obeys
    HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE. CheckpointError in one line:
    no such folder or repository, no network, not in the cache.
    """
    text = str(path_or_repo_id)
    if isinstance(path_or_repo_id, Path) or looks_local(text):
        folder = Path(text).expanduser()
        if not folder.exists():
            raise CheckpointError(f"{text}: no such directory")
        return folder
    from huggingface_hub import errors, snapshot_download

    try:
        return Path(snapshot_download(
            text, revision=revision, allow_patterns=WANTED,
            ignore_patterns=UNWANTED))
    except (errors.HfHubHTTPError, errors.HFValidationError,
            errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{text}: not in this folder, and the hub "
                              f"gave: {why}") from error


# --- Writing -----------------------------------------------------------------

ALIGN = 8
SHARD_BYTES = 5 * 10**9


def plan_shards(table: dict[str, TensorSpec], largest: int
                ) -> list[list[TensorSpec]]:
    """Cut the tensors, in order, into files of at most `largest` bytes (a
    tensor larger than that has a file of its own)."""
    shards: list[list[TensorSpec]] = []
    room = -1
    for spec in table.values():
        if room < spec.nbytes or not shards:
            shards.append([])
            room = largest
        shards[-1].append(spec)
        room -= spec.nbytes
    return shards


def header_bytes(specs: list[TensorSpec]) -> bytes:
    """The first bytes of a safetensors file: length, JSON, padding."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape,
                              "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order, on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class Writer:
    """Writes canonical tensors into the files of a layout, in any order.

    All headers are known beforehand, so each tensor has its offset before
    it arrives, and only one needs to be in memory.
    """

    def __init__(self, folder: Path, config: GptOssConfig, layout: str,
                 largest: int) -> None:
        shards = plan_shards(tensor_table(config, layout), largest)
        self.folder, self.places = folder, places(config, layout)
        self.files: dict[str, tuple[str, int]] = {}
        self.written: dict[str, int] = {}
        self.hashes: dict[str, object] = {}
        for n, specs in enumerate(shards, start=1):
            name = ("model.safetensors" if len(shards) == 1 else
                    f"model-{n:05}-of-{len(shards):05}.safetensors")
            header = header_bytes(specs)
            (folder / name).write_bytes(header)
            at = len(header)
            for spec in specs:
                self.files[spec.name] = name, at
                at += spec.nbytes
            os.truncate(folder / name, at)
        if len(shards) > 1:
            self._write_index()

    def _write_index(self) -> None:
        total = sum(place.spec.nbytes for place in self.places.values())
        index = {"metadata": {"total_size": total},
                 "weight_map": {k: v[0] for k, v in self.files.items()}}
        text = json.dumps(index, indent=2) + "\n"
        (self.folder / INDEX).write_text(text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a canonical tensor, or its next rows."""
        if name not in self.places:
            raise CheckpointError(f"{name}: no such tensor in this model")
        place, first = self.places[name], self.written.get(name, 0)
        spec, rows = place.spec, tensor.shape[0] if tensor.ndim else 0
        fits = (tensor.shape[1:] == spec.shape[1:] and tensor.ndim
                and first + rows <= spec.shape[0])
        if not fits or tensor.dtype != DTYPES[spec.dtype]:
            raise CheckpointError(
                f"{name}: expected {spec.dtype} of shape {spec.shape}, of "
                f"which {first} rows are written; found {tensor.dtype} of "
                f"shape {tuple(tensor.shape)}")
        file, at = self.files[place.stored]
        row = spec.nbytes // spec.shape[0]
        data = raw_bytes(tensor)
        with (self.folder / file).open("r+b") as stream:
            stream.seek(at + (place.first + first) * row)
            stream.write(data)
        self.hashes.setdefault(name, hashlib.sha256()).update(data)
        self.written[name] = first + rows

    def finish(self) -> dict[str, str]:
        """The manifest, name -> sha256 of its bytes; CheckpointError if a
        tensor is missing or not whole."""
        for name, place in self.places.items():
            done = self.written.get(name, 0)
            if done != place.spec.shape[0]:
                raise CheckpointError(f"{name}: {done} of "
                                      f"{place.spec.shape[0]} rows given")
        return {name: self.hashes[name].hexdigest() for name in self.places}


MANIFEST = "manifest.json"


def write_checkpoint(path: str | Path, config: GptOssConfig,
                     tensors: Iterable[tuple[str, torch.Tensor]],
                     layout: str = "hf", max_shard_bytes: int = SHARD_BYTES,
                     extra_files: Iterable[Path] = ()) -> dict[str, str]:
    """Write a checkpoint into the new folder `path`; return its manifest.

    tensors: (canonical name, tensor) in any order; the same name again
    carries its next rows. Everything happens in a temporary folder beside
    `path`, which takes its name at the end: whatever fails, nothing that
    looks whole is left. Also written: config.json in the layout's
    spelling, manifest.json (a sha256 per tensor), copies of extra_files.
    """
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already and is not an empty"
                              " folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    spelled = (config.to_original_dict() if layout == "original"
               else config.to_hf_dict())
    if layout == "bf16":
        del spelled["quantization_config"]
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-",
                                    dir=target.parent))
    try:
        writer = Writer(partial, config, layout, max_shard_bytes)
        for name, tensor in tensors:
            writer.write(name, tensor)
        manifest = writer.finish()
        for file in extra_files:
            shutil.copyfile(file, partial / Path(file).name)
        for name, value in (("config.json", spelled),
                            (MANIFEST, manifest)):
            text = json.dumps(value, indent=2) + "\n"
            (partial / name).write_text(text)
        partial.chmod(0o755)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


# --- Converting --------------------------------------------------------------

COMPANIONS = ("generation_config.json", "tokenizer.json",
              "tokenizer_config.json", "special_tokens_map.json",
              "chat_template.jinja")


def convert(source: str | Path, target: str | Path, layout: str,
            max_shard_bytes: int = SHARD_BYTES,
            progress: Callable[[str], None] | None = None) -> dict[str, str]:
    """Rewrite a checkpoint in another layout, one tensor at a time.

    hf and original hold the same bytes; to "bf16" decodes, from "bf16"
    encodes (chapter 2: values on the grid survive). Returns the manifest.
    `progress` is called with the name of each tensor.
    """
    tensor_table(GptOssConfig(), layout)  # refuse a wrong layout first
    with Checkpoint.open(source) as checkpoint:
        folders = (checkpoint.path, checkpoint.path.parent)
        extra = {name: folder / name for folder in reversed(folders)
                 for name in COMPANIONS if (folder / name).is_file()}
        return write_checkpoint(
            target, checkpoint.config,
            translated(checkpoint, layout, progress or (lambda name: None)),
            layout, max_shard_bytes, extra.values())


def translated(checkpoint: Checkpoint, layout: str,
               progress: Callable[[str], None]
               ) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors as `layout` stores them; experts that change
    form come one expert at a time."""
    dense_now, dense_then = checkpoint.layout == "bf16", layout == "bf16"
    for name in checkpoint.names():
        progress(name)
        if name.endswith("_scales"):
            check_scales(name, checkpoint.read(name))
        if dense_now == dense_then:
            yield name, _as_bf16(checkpoint.read(name))
        elif name.endswith("_blocks"):
            yield from _decoded(checkpoint, name.removesuffix("_blocks"))
        elif name.endswith(("gate_up_proj", "down_proj")):
            yield from _encoded(checkpoint, name)
        elif not name.endswith("_scales"):
            yield name, _as_bf16(checkpoint.read(name))


def _as_bf16(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


def _one_by_one(checkpoint: Checkpoint, name: str) -> Iterator[torch.Tensor]:
    for e in range(checkpoint.config.num_local_experts):
        yield checkpoint.read(name, slice(e, e + 1))


def _decoded(checkpoint: Checkpoint, stem: str
             ) -> Iterator[tuple[str, torch.Tensor]]:
    for blocks, scales in zip(_one_by_one(checkpoint, f"{stem}_blocks"),
                              _one_by_one(checkpoint, f"{stem}_scales"),
                              strict=True):
        values = mxfp4.decode(blocks, scales, torch.bfloat16)
        yield stem, values.transpose(1, 2).contiguous()


def _encoded(checkpoint: Checkpoint, stem: str
             ) -> Iterator[tuple[str, torch.Tensor]]:
    for values in _one_by_one(checkpoint, stem):
        blocks, scales = mxfp4.encode(values.transpose(1, 2).float())
        yield f"{stem}_blocks", blocks
        yield f"{stem}_scales", scales


def check_scales(name: str, scales: torch.Tensor) -> None:
    """Raise CheckpointError if a scale byte is 255, which means NaN."""
    bad = int((scales == mxfp4.SCALE_NAN).sum())
    if bad:
        raise CheckpointError(f"{name}: expected scale bytes 0 to 254, found "
                              f"{bad} of {mxfp4.SCALE_NAN} (NaN)")


# --- Random weights, and a description ---------------------------------------

def random_tensors(config: GptOssConfig, seed: int = 0, layout: str = "hf"
                   ) -> Iterator[tuple[str, torch.Tensor]]:
    """Canonical tensors of a random model, one at a time.

    Weights have standard deviation 0.02 (every MXFP4 code occurs), norms
    are near one, biases and sinks are not zero. layout "bf16" gives dense
    experts, any other packed ones.
    """
    generator = torch.Generator().manual_seed(seed)

    def byte(spec: TensorSpec, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, spec.shape, dtype=torch.uint8,
                             generator=generator)

    for spec, _ in canonical_rows(config, layout == "bf16"):
        if spec.name.endswith("_blocks"):
            yield spec.name, byte(spec, 0, 256)
        elif spec.name.endswith("_scales"):
            yield spec.name, byte(spec, 117, 121)  # 2**-10 to 2**-7
        else:
            scale = 1.0 if spec.name.endswith("sinks") else 0.02
            centre = 1.0 if "norm" in spec.name else 0.0
            values = torch.empty(spec.shape, dtype=torch.bfloat16)
            yield spec.name, values.normal_(centre, scale,
                                            generator=generator)


def describe(path: str | Path) -> dict[str, object]:
    """What a checkpoint holds, from its headers alone.

    Keys: path, layout, config (Hugging Face's keys), files, tensors, bytes,
    bytes_by_dtype, parameters (by component), parameters_total,
    parameters_active, cache_bytes_per_token, cache_bytes_full,
    bytes_read_per_token.
    """
    with Checkpoint.open(path) as checkpoint:
        config, stored = checkpoint.config, checkpoint._stored.values()
        by_dtype: dict[str, int] = {}
        for entry in stored:
            dtype = entry.spec.dtype
            by_dtype[dtype] = (by_dtype.get(dtype, 0)
                               + entry.spec.nbytes)
        longest = config.max_position_embeddings
        return {
            "path": str(checkpoint.path), "layout": checkpoint.layout,
            "config": config.to_hf_dict(),
            "files": sorted({entry.file.name for entry in stored}),
            "tensors": len(stored), "bytes": checkpoint.nbytes,
            "bytes_by_dtype": by_dtype,
            "parameters": sizes.parameter_counts(config),
            "parameters_total": sizes.total_parameters(config),
            "parameters_active": sizes.active_parameters(config),
            "cache_bytes_per_token": sizes.cache_bytes_per_token(config),
            "cache_bytes_full": sizes.cache_bytes(config, longest),
            "bytes_read_per_token": sizes.bytes_read_per_token(config)}


__all__ = [
    "ALIGN",
    "COMPANIONS",
    "Checkpoint",
    "CheckpointError",
    "DENSE",
    "DTYPES",
    "FLOATS",
    "INDEX",
    "LARGEST_HEADER",
    "LAYOUTS",
    "MANIFEST",
    "NAME_MAP",
    "Place",
    "SHARD_BYTES",
    "Stored",
    "TensorSpec",
    "UNWANTED",
    "WANTED",
    "Writer",
    "canonical_rows",
    "check_scales",
    "check_tensors",
    "convert",
    "describe",
    "dimensions",
    "find_folder",
    "header_bytes",
    "layout_of",
    "looks_local",
    "map_file",
    "places",
    "plan_shards",
    "random_tensors",
    "raw_bytes",
    "read_header",
    "read_headers",
    "read_index",
    "resolve",
    "tensor_table",
    "translated",
    "view_bytes",
    "weight_files",
    "write_checkpoint",
]
