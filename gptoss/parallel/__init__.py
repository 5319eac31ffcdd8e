"""Part parallel of the book: 15 names, loaded when first asked for

Generated from the front matter of book/parallel/*.py; edit it, not this file.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptoss.parallel.collectives import Group as Group
    from gptoss.parallel.collectives import join as join
    from gptoss.parallel.collectives import leave as leave
    from gptoss.parallel.collectives import rehearse as rehearse
    from gptoss.parallel.plan import CARDS as CARDS
    from gptoss.parallel.plan import estimate as estimate
    from gptoss.parallel.plan import plan_table as plan_table
    from gptoss.parallel.plan import traffic as traffic
    from gptoss.parallel.shards import MeshRank as MeshRank
    from gptoss.parallel.shards import ParallelError as ParallelError
    from gptoss.parallel.shards import Shard as Shard
    from gptoss.parallel.shards import mesh_rank as mesh_rank
    from gptoss.parallel.shards import rank_config as rank_config
    from gptoss.parallel.split import SplitGptOss as SplitGptOss
    from gptoss.parallel.split import load_split as load_split

_HOME = {
    "CARDS": "plan",
    "Group": "collectives",
    "MeshRank": "shards",
    "ParallelError": "shards",
    "Shard": "shards",
    "SplitGptOss": "split",
    "estimate": "plan",
    "join": "collectives",
    "leave": "collectives",
    "load_split": "split",
    "mesh_rank": "shards",
    "plan_table": "plan",
    "rank_config": "shards",
    "rehearse": "collectives",
    "traffic": "plan",
}
_MODULES = (
    "shards",
    "collectives",
    "launch",
    "split",
    "plan",
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
    "CARDS",
    "Group",
    "MeshRank",
    "ParallelError",
    "Shard",
    "SplitGptOss",
    "estimate",
    "join",
    "leave",
    "load_split",
    "mesh_rank",
    "plan_table",
    "rank_config",
    "rehearse",
    "traffic",
]
