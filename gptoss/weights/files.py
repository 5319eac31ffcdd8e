"""What is in the file?

Generated from book/weights/file.py; edit the chapter, not this file.
"""

import json
import logging
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gptoss.weights.config import ConfigError
from gptoss.weights.config_file import read_json
from gptoss.weights.layout import DTYPES, CheckpointError, TensorSpec, faulty

# --- How is a header made? ---------------------------------------------------

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


# --- What is refused ---------------------------------------------------------

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


# --- Which files of a folder are the model's? --------------------------------

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
    """CheckpointError unless index and headers name the same tensors."""
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


__all__ = [
    "ADAPTER",
    "MAX_HEADER",
    "PICKLES",
    "Stored",
    "WHOLE",
    "config_folder",
    "find_tensors",
    "make_header",
    "read_header",
    "weight_files",
    "weights_folder",
]
