"""Part kernels of the book: 27 names, loaded when first asked for

Generated from the front matter of book/kernels/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.kernels.bench import measure as measure
    from gptoss.kernels.build import KernelError as KernelError
    from gptoss.kernels.build import kernel_path as kernel_path
    from gptoss.kernels.build import load_kernels as load_kernels
    from gptoss.kernels.build import plain_torch as plain_torch
    from gptoss.kernels.coarse import CoarseExperts as CoarseExperts
    from gptoss.kernels.coarse import hold_activations as hold_activations
    from gptoss.kernels.compact import CompactLinear as CompactLinear
    from gptoss.kernels.compact import CompactWeight as CompactWeight
    from gptoss.kernels.compact import make_compact as make_compact
    from gptoss.kernels.compact import pack as pack
    from gptoss.kernels.compact import unpack as unpack
    from gptoss.kernels.drafts import Drafter as Drafter
    from gptoss.kernels.drafts import ModelDrafter as ModelDrafter
    from gptoss.kernels.eight import EightLinear as EightLinear
    from gptoss.kernels.eight import EightWeight as EightWeight
    from gptoss.kernels.eight import hold_dense as hold_dense
    from gptoss.kernels.eight import pack_eight as pack_eight
    from gptoss.kernels.eight import unpack_eight as unpack_eight
    from gptoss.kernels.lookup import Lookup as Lookup
    from gptoss.kernels.quicker import choose_product as choose_product
    from gptoss.kernels.roofline import read_speed as read_speed
    from gptoss.kernels.step import DecodeStep as DecodeStep
    from gptoss.kernels.step import call_again as call_again
    from gptoss.kernels.step import can_record as can_record
    from gptoss.kernels.step import cuda_graph as cuda_graph
    from gptoss.kernels.triton_kernels import use_triton as use_triton

_HOME = {
    "CoarseExperts": "coarse",
    "CompactLinear": "compact",
    "CompactWeight": "compact",
    "DecodeStep": "step",
    "Drafter": "drafts",
    "EightLinear": "eight",
    "EightWeight": "eight",
    "KernelError": "build",
    "Lookup": "lookup",
    "ModelDrafter": "drafts",
    "call_again": "step",
    "can_record": "step",
    "choose_product": "quicker",
    "cuda_graph": "step",
    "hold_activations": "coarse",
    "hold_dense": "eight",
    "kernel_path": "build",
    "load_kernels": "build",
    "make_compact": "compact",
    "measure": "bench",
    "pack": "compact",
    "pack_eight": "eight",
    "plain_torch": "build",
    "read_speed": "roofline",
    "unpack": "compact",
    "unpack_eight": "eight",
    "use_triton": "triton_kernels",
}
_MODULES = (
    "roofline",
    "build",
    "quicker",
    "compact",
    "eight",
    "coarse",
    "step",
    "lookup",
    "drafts",
    "triton_kernels",
    "bench",
)


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_MODULES])


__all__ = [
    "CoarseExperts",
    "CompactLinear",
    "CompactWeight",
    "DecodeStep",
    "Drafter",
    "EightLinear",
    "EightWeight",
    "KernelError",
    "Lookup",
    "ModelDrafter",
    "call_again",
    "can_record",
    "choose_product",
    "cuda_graph",
    "hold_activations",
    "hold_dense",
    "kernel_path",
    "load_kernels",
    "make_compact",
    "measure",
    "pack",
    "pack_eight",
    "plain_torch",
    "read_speed",
    "unpack",
    "unpack_eight",
    "use_triton",
]
