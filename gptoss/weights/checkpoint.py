"""How to read 13.8 GB without copying them?

Generated from book/weights/reading.py; edit the chapter, not this file.
"""

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
from gptoss.weights.spellings import ENDS, PerExpert, recognise, untied

# --- Is everything there? ----------------------------------------------------

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


# --- The open checkpoint -----------------------------------------------------

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


def check_scales(name: str, scales: Tensor) -> None:
    """CheckpointError naming `name` if a scale byte is 255, which is NaN."""
    if scales.numel() and scales.max() == SCALE_NAN:
        bad = int((scales == SCALE_NAN).sum())
        raise faulty(name, "scales 0 to 254", f"{bad} of {SCALE_NAN} (NaN)")


# --- What does a checkpoint hold? --------------------------------------------

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


__all__ = [
    "Checkpoint",
    "check_scales",
    "check_tensors",
    "describe",
]
