"""How is a port in another language held to it?

Generated from book/parity/vectors.py; edit the chapter, not this file.
"""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save
from torch import Tensor

from gptoss.parity.vector_cases import (
    FILES,
    FORMAT,
    OPERATIONS,
    VERSION,
    Tensors,
    VectorError,
    all_cases,
    run_case,
)
from gptoss.weights.disk import drafted

# --- The set -----------------------------------------------------------------

def far_off(found: Tensor, wanted: Tensor, atol: float, rtol: float
            ) -> float:
    """max |found - wanted| / (atol + rtol |wanted|), at most 1 if near
    enough. Equal infinities and NaN in the same place are equal; another
    shape is infinitely far."""
    if found.shape != wanted.shape:
        return float("inf")
    a, b = found.double(), wanted.double()
    same = (a == b) | (a.isnan() & b.isnan())
    error = ((a - b).abs() / (atol + rtol * b.abs())).nan_to_num(
        nan=torch.inf, posinf=torch.inf)
    return max(error.masked_fill(same, 0.0).flatten().tolist(), default=0.0)


def write(folder: str | Path) -> list[Path]:
    """Write the set: index.json and vectors.safetensors; returns both.

    Float inputs are bf16 numbers, so they are the same in every dtype.
    Float outputs come from a run in float64, rounded once to fp32: what
    exact arithmetic gives (frequencies are fp32 by definition). An older
    set is replaced; VectorError: other files of these names are there.
    """
    folder, index = Path(folder), []
    stored: Tensors = {}
    for file in FILES:
        _check_ours(folder, folder / file)
    for case in all_cases():
        keys = {name: value if isinstance(value, str)
                else f"{case.name}/in/{name}"
                for name, value in case.inputs.items()}
        stored |= {keys[name]: value for name, value in case.inputs.items()
                   if isinstance(value, Tensor)}
        inputs = {name: stored[key] for name, key in keys.items()}
        outputs = {}
        for name, tensor in run_case(case.operation, inputs, case.parameters,
                                     torch.float64).items():
            key, exact = f"{case.name}/out/{name}", tensor.dtype
            floats = exact.is_floating_point
            stored[key] = tensor.float() if floats else tensor
            near = (case.float32, case.bfloat16) if floats else (
                (0, 0), None if name == "greedy" else (0, 0))
            outputs[name] = {"tensor": key, "float32": near[0],
                             "bfloat16": near[1]}
        index.append({"name": case.name, "operation": case.operation,
                      "explains": case.explains,
                      "parameters": dict(case.parameters), "inputs": keys,
                      "outputs": outputs})
    return _save(folder, stored, index)


# --- What is refused ---------------------------------------------------------

def _check_ours(folder: Path, file: Path) -> None:
    """Raise VectorError if `file` is there and not of an earlier set."""
    if not os.path.lexists(file):
        return
    with suppress(OSError, ValueError, RecursionError, TypeError, KeyError):
        index = json.loads((folder / FILES[0]).read_bytes())
        whole = file.name == FILES[0] or index["sha256"] == hashlib.sha256(
            file.read_bytes()).hexdigest()
        if index["format"] == FORMAT and whole:
            return
    raise VectorError(f"{file}: exists, and is not of a set of vectors; "
                      "nothing was written")


def _save(folder: Path, stored: Tensors, cases: list[dict]) -> list[Path]:
    files = [folder / name for name in FILES]
    data = save({key: stored[key].contiguous().clone()
                 for key in sorted(stored)})
    index = {
        "format": FORMAT, "version": VERSION, "file": FILES[1],
        "sha256": hashlib.sha256(data).hexdigest(),
        "near": "[atol, rtol]: |found - wanted| <= atol + rtol |wanted|; "
                "NaN equals NaN; null: not defined in this dtype",
        "operations": {name: text for name, (_, text)
                       in OPERATIONS.items()},
        "cases": cases}
    folder.mkdir(parents=True, exist_ok=True)
    for file, raw in ((files[1], data), (files[0], (
            json.dumps(index, indent=1) + "\n").encode())):
        with drafted(file) as draft:
            draft.write_bytes(raw)
    return files


_KIND: dict[type, str] = {
    str: "a string", dict: "an object", list: "a list"}


def _entry(of: object, name: str, kind: type, where: str) -> Any:
    """of[name], which must be of that kind."""
    found = of.get(name) if isinstance(of, dict) else None
    if not isinstance(found, kind):
        raise VectorError(f"{where}: {name}: expected {_KIND[kind]}, found "
                          f"{type(found).__name__}")
    return found


def _check_near(near: object, where: str) -> None:
    """[atol, rtol], neither negative nor huge, or None."""
    if near is not None and not (
            isinstance(near, list) and len(near) == 2 and all(
                type(x) in (int, float) and 0 <= x < 2 ** 60
                for x in near)):
        raise VectorError(f"{where}: expected [atol, rtol] or null, found "
                          f"{near!r}")


def _check_numbers(value: object, where: str) -> None:
    """No number is so large that a case could ask for all memory."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            _check_numbers(each, where)
    elif (isinstance(value, int | float) and type(value) is not bool
          and not abs(value) <= 2 ** 20):
        raise VectorError(f"{where}: expected numbers up to 2**20, found "
                          f"{value!r:.40}")


def _check_case(case: object, number: int, file: Path, stored: Tensors
                ) -> None:
    """Raise VectorError unless `check` can work with a case's entries."""
    where = f"{file}: case {number}"
    where = f"{file}: case {_entry(case, 'name', str, where)!r}"
    operation = _entry(case, "operation", str, where)
    if operation not in OPERATIONS:
        raise VectorError(f"{where}: operation: expected one of "
                          f"{', '.join(OPERATIONS)}, found {operation!r}")
    _check_numbers(_entry(case, "parameters", dict, where),
                   f"{where}: parameters")
    used = [*_entry(case, "inputs", dict, where).items()]
    for name, out in _entry(case, "outputs", dict, where).items():
        at = f"{where}: outputs: {name}"
        used.append((name, _entry(out, "tensor", str, at)))
        for kind in ("float32", "bfloat16"):
            if kind not in out:
                raise VectorError(f"{at}: {kind}: expected [atol, rtol] or "
                                  "null, found nothing")
            _check_near(out[kind], f"{at}: {kind}")
    for name, key in used:
        if not isinstance(key, str) or key not in stored:
            raise VectorError(f"{where}: {name}: expected a tensor of "
                              f"{FILES[1]}, found {key!r}")


def _read(file: Path) -> bytes:
    """A plain file's content, which leaves its folder by no link."""
    try:
        if file.resolve().parent != file.parent.resolve():
            raise VectorError(f"{file}: expected a file in its folder, found "
                              f"a link to {file.resolve()}")
        if file.exists() and not file.is_file():
            raise VectorError(f"{file}: expected a plain file")
        return file.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a ring
        why = getattr(error, "strerror", None) or error
        raise VectorError(f"{file}: {why}") from error


def _read_index(file: Path) -> dict:
    """index.json, its head checked, its cases not yet."""
    try:
        index = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        if isinstance(error, VectorError):
            raise
        raise VectorError(f"{file}: expected an index of vectors, found "
                          f"{type(error).__name__}: {error}") from error
    if not isinstance(index, dict) or index.get("version") != VERSION:
        found = index.get("version") if isinstance(index, dict) else index
        raise VectorError(f"{file}: version: expected {VERSION}, found "
                          f"{found!r:.40}")
    name = _entry(index, "file", str, str(file))
    if "/" in name or "\\" in name or name in ("", ".", "..") or (
            "\0" in name):
        raise VectorError(f"{file}: file: expected a name in this folder, "
                          f"found {name!r:.80}")
    _entry(index, "sha256", str, str(file))
    _entry(index, "cases", list, str(file))
    return index


def read_vectors(folder: str | Path) -> tuple[dict, Tensors]:
    """The index and all tensors. VectorError: a file that is missing,
    changed, or of another version; an index that is not one."""
    file = Path(folder) / FILES[0]
    index = _read_index(file)
    data = file.parent / index["file"]
    raw = _read(data)
    digest = hashlib.sha256(raw).hexdigest()
    if digest != index["sha256"]:
        raise VectorError(f"{data}: expected sha256 {index['sha256']:.80}, "
                          f"found {digest}")
    stored = _tensors(lambda: load(raw), data)
    for number, case in enumerate(index["cases"]):
        _check_case(case, number, file, stored)
    return index, stored


def _tensors(read: Callable[[], Tensors], file: Path) -> Tensors:
    """Tensors of a safetensors file; VectorError, if it is none."""
    try:
        return read()
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError,
            TypeError, AttributeError, OverflowError) as error:
        raise VectorError(f"{file}: expected a safetensors file, found "
                          f"{type(error).__name__}: {error}") from error


# --- The check ---------------------------------------------------------------

def _computed(case: dict, inputs: Tensors, kind: str, file: Path) -> Tensors:
    """`run_case`; what it cannot compute from such inputs is told as the
    case's mistake."""
    try:
        return run_case(case["operation"], inputs, case["parameters"],
                        getattr(torch, kind))
    except Exception as error:  # any: inputs of any shape, type and number
        raise VectorError(
            f"{file}: case {case['name']!r}: inputs that {case['operation']} "
            f"cannot take ({type(error).__name__}: "
            f"{' '.join(str(error).split()):.160})") from error


def check(folder: str | Path, answers: str | Path | None = None,
          dtype: str = "float32") -> list[str]:
    """Hold an implementation to a set of vectors; returns what is wrong.

    By default this package, in float32 and bfloat16. With answers: a port's
    safetensors file, which has the outputs that it computed, in dtype, under
    the names of the index. VectorError: as `read_vectors`, and a case that
    cannot be computed.
    """
    index, stored = read_vectors(folder)
    given = None if answers is None else _tensors(
        lambda: load_file(answers), Path(answers))
    wrong = []
    for case in index["cases"]:
        inputs = {name: stored[key] for name, key in case["inputs"].items()}
        for kind in ("float32", "bfloat16") if given is None else (dtype,):
            found = given if given is not None else _computed(
                case, inputs, kind, Path(folder) / FILES[0])
            for name, out in case["outputs"].items():
                key = name if given is None else out["tensor"]
                if out[kind] is None:
                    continue
                far = (far_off(found[key], stored[out["tensor"]], *out[kind])
                       if key in found else float("inf"))
                if not far <= 1:
                    wrong.append(f"{out['tensor']} in {kind}: {far:.3g} "
                                 "times the tolerance")
    return wrong


__all__ = [
    "check",
    "far_off",
    "read_vectors",
    "write",
]
