"""Part weights of the book: 28 names, loaded when first asked for

Generated from the front matter of book/weights/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.weights.checkpoint import Checkpoint as Checkpoint
    from gptoss.weights.checkpoint import describe as describe
    from gptoss.weights.config import ConfigError as ConfigError
    from gptoss.weights.config import GptOssConfig as GptOssConfig
    from gptoss.weights.config_file import config_from_dict as config_from_dict
    from gptoss.weights.config_file import hf_dict as hf_dict
    from gptoss.weights.config_file import original_dict as original_dict
    from gptoss.weights.config_file import read_config as read_config
    from gptoss.weights.disk import drafted as drafted
    from gptoss.weights.encoding import Audit as Audit
    from gptoss.weights.encoding import audit as audit
    from gptoss.weights.encoding import encode as encode
    from gptoss.weights.errors import Error as Error
    from gptoss.weights.hub import resolve as resolve
    from gptoss.weights.layout import CheckpointError as CheckpointError
    from gptoss.weights.layout import tensor_table as tensor_table
    from gptoss.weights.loading import load_tensors as load_tensors
    from gptoss.weights.mxfp4 import MXFP4Error as MXFP4Error
    from gptoss.weights.mxfp4 import PackedMXFP4 as PackedMXFP4
    from gptoss.weights.mxfp4 import decode as decode
    from gptoss.weights.sizes import active_parameters as active_parameters
    from gptoss.weights.sizes import cache_bytes as cache_bytes
    from gptoss.weights.sizes import checkpoint_bytes as checkpoint_bytes
    from gptoss.weights.sizes import flops_per_token as flops_per_token
    from gptoss.weights.sizes import parameter_counts as parameter_counts
    from gptoss.weights.sizes import total_parameters as total_parameters
    from gptoss.weights.write import random_tensors as random_tensors
    from gptoss.weights.write import write_checkpoint as write_checkpoint

_HOME = {
    "Audit": "encoding",
    "Checkpoint": "checkpoint",
    "CheckpointError": "layout",
    "ConfigError": "config",
    "Error": "errors",
    "GptOssConfig": "config",
    "MXFP4Error": "mxfp4",
    "PackedMXFP4": "mxfp4",
    "active_parameters": "sizes",
    "audit": "encoding",
    "cache_bytes": "sizes",
    "checkpoint_bytes": "sizes",
    "config_from_dict": "config_file",
    "decode": "mxfp4",
    "describe": "checkpoint",
    "drafted": "disk",
    "encode": "encoding",
    "flops_per_token": "sizes",
    "hf_dict": "config_file",
    "load_tensors": "loading",
    "original_dict": "config_file",
    "parameter_counts": "sizes",
    "random_tensors": "write",
    "read_config": "config_file",
    "resolve": "hub",
    "tensor_table": "layout",
    "total_parameters": "sizes",
    "write_checkpoint": "write",
}
_MODULES = (
    "config",
    "errors",
    "sizes",
    "config_file",
    "mxfp4",
    "encoding",
    "layout",
    "files",
    "spellings",
    "checkpoint",
    "loading",
    "write",
    "disk",
    "convert",
    "hub",
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
    "Audit",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Error",
    "GptOssConfig",
    "MXFP4Error",
    "PackedMXFP4",
    "active_parameters",
    "audit",
    "cache_bytes",
    "checkpoint_bytes",
    "config_from_dict",
    "decode",
    "describe",
    "drafted",
    "encode",
    "flops_per_token",
    "hf_dict",
    "load_tensors",
    "original_dict",
    "parameter_counts",
    "random_tensors",
    "read_config",
    "resolve",
    "tensor_table",
    "total_parameters",
    "write_checkpoint",
]
