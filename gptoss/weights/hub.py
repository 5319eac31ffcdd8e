"""How is one layout turned into another?

Generated from book/weights/converting.py; edit the chapter, not this file.
"""

import re
from pathlib import Path

from gptoss.weights.layout import CheckpointError

# --- What does a name of the hub mean? ---------------------------------------

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
    "is_repo_id",
    "resolve",
]
