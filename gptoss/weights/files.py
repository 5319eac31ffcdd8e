"""What is in the file?

Generated from book/03_checkpoint.py; edit the chapter, not this file.
"""

import json
import logging
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from gptoss.weights.config import ConfigError, GptOssConfig
from gptoss.weights.config_file import read_json
from gptoss.weights.layout import (
    DTYPES,
    FLOATS,
    CheckpointError,
    TensorSpec,
    faulty,
)

# --- The header of one file --------------------------------------------------

_log = logging.getLogger("gptoss")


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
        raise faulty(file, "a file", "a folder, a pipe or a device")
    with open(file, "rb") as f:
        first = f.read(8)
        length = int.from_bytes(first, "little")
        if first == b"version ":
            raise faulty(file, "safetensors", "a git-lfs pointer (git lfs "
                         "pull fetches the file)")
        if len(first) < 8 or length > min(size - 8, MAX_HEADER):
            raise faulty(file, f"safetensors with a header of {length} bytes",
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
        raise faulty(file, "a safetensors header",
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
        raise faulty(f"{file}: {name}", f"{spec.nbytes} bytes for {spec}",
                     end - begin)
    return Stored(spec, file, base + begin, end - begin)


def _check_cover(file: Path, stored: list[Stored], end: int,
                 size: int) -> None:
    """Tensors must follow one another from the header to the file's end."""
    for s in sorted(stored, key=lambda s: (s.offset, s.nbytes)):
        where = f"{file}: {s.spec.name}"
        if s.offset != end:
            raise faulty(where, f"at byte {end}", f"at {s.offset}")
        end += s.nbytes
        if end > size:
            raise faulty(where, f"to end at byte {end}",
                         f"a file of {size} bytes (cut off?)")
    if end != size:
        raise faulty(file, f"{end} bytes", size)


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
        raise faulty(index, "JSON with a weight_map", "none")
    for name, file in named.items():
        where = f"{index}: {name}"
        if (not isinstance(file, str) or not file.endswith(".safetensors")
                or re.search(r"[/\\:\0]", file)):
            raise faulty(where, "the name of a .safetensors file in this "
                         "folder", repr(file))
        if not (index.parent / file).is_file():
            raise faulty(where, f"in {file}", "no such file")
    return named


WHOLE = "model.safetensors"


def weight_files(folder: Path) -> tuple[list[Path], Path | None]:
    """The safetensors files of a folder that are its model's, and the index
    that says so, if there is one."""
    files = sorted(file for file in folder.glob("*.safetensors")
                   if not file.name.startswith("adapter_"))
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise faulty(folder, "one index",
                     f"{indexes[0].name} and {indexes[1].name}")
    if not indexes:
        return [file for file in files if file.name == WHOLE] or files, None
    named = set(_read_index(indexes[0]).values())
    if (folder / WHOLE).exists() and WHOLE not in named:
        raise faulty(folder / WHOLE, f"only files that {indexes[0].name} "
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
                raise faulty(f"{file}: {name}", "once",
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
            raise faulty(f"{index}: {name}", f"in {file}", f"in {where}")
    for name, stored in found.items():
        if name not in named:
            raise faulty(f"{stored.file}: {name}", f"in {index.name}",
                         "only in the file")


PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
ADAPTER = ("a LoRA adapter, which changes a model and is none: merge it first "
           "(peft: merge_and_unload(), then save_pretrained())")


def weights_folder(path: Path) -> Path:
    """`path`, or its original/ if only that holds safetensors."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such directory")
    if not path.is_dir():
        raise faulty(path, "a directory", "a file")
    adapter = any(path.glob("adapter_*"))
    for folder in (path, path / "original"):
        if weight_files(folder)[0]:
            if adapter:
                _log.warning("%s: an adapter lies beside the weights and is "
                             "not applied", path)
            return folder
    if adapter:
        raise faulty(path, "a model", ADAPTER)
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise faulty(path, "*.safetensors", f"{pickles[0]}: a pickle can run "
                     "any code, so none is opened")
    there = "only config.json" if (path / "config.json").exists() else "none"
    raise faulty(path, "config.json and *.safetensors", there)


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
            raise faulty(f"{stored.file}: {name}", "a tensor of gpt-oss",
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
            raise faulty(f"{folder}: {name}, expert {n}", "a tensor", "none")
        spec = rows[n].spec
        if (spec.shape, spec.dtype) != (first.shape, first.dtype):
            raise faulty(f"{rows[n].file}: {spec.name}", first, spec)
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
            raise faulty(f"{stored.file}: {stored.spec.name}",
                         f"{name} once", "it under two names")
        if name:
            known[name] = stored
    for name, rows in experts.items():
        if name in known:
            raise faulty(f"{folder}: {name}", "once", "each expert as well")
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


# --- Laying out files before writing them ------------------------------------

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


__all__ = [
    "ADAPTER",
    "ALIASES",
    "ENDS",
    "MAX_HEADER",
    "NOT_LEARNT",
    "ONE_EXPERT",
    "PICKLES",
    "PerExpert",
    "REFUSED",
    "Stored",
    "WHOLE",
    "config_folder",
    "find_tensors",
    "known_name",
    "make_header",
    "read_header",
    "recognise",
    "stacked",
    "untied",
    "weight_files",
    "weights_folder",
]
