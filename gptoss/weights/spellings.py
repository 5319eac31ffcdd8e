"""How to read 13.8 GB without copying them?

Generated from book/weights/reading.py; edit the chapter, not this file.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from gptoss.weights.config import GptOssConfig
from gptoss.weights.files import ADAPTER, Stored
from gptoss.weights.layout import FLOATS, TensorSpec, faulty

# --- Which tensor is this? ---------------------------------------------------

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


__all__ = [
    "ALIASES",
    "ENDS",
    "NOT_LEARNT",
    "ONE_EXPERT",
    "PerExpert",
    "REFUSED",
    "known_name",
    "recognise",
    "stacked",
    "untied",
]
