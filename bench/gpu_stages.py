"""What bench/gpu.py tries on a GPU, stage by stage.

A stage is a generator of cases, (name, work): work() returns a dict of
figures, raises Missing where something is not there, Off with its figures
where a result is wrong, or anything else where something breaks. Every stage
runs in a process of its own, so that none can spoil the next.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from make_checkpoint import CONFIGS, SHARD_BYTES

import gptoss
from gptoss.attention.rope import rope_tables
from gptoss.kernels import triton_kernels
from gptoss.kernels.compact import CompactWeight, pack_by_torch, unpack
from gptoss.kernels.eight import EightWeight, pack_by_steps, unpack_eight
from gptoss.kernels.step import DecodeStep, cuda_graph
from gptoss.model.cache import Cache
from gptoss.model.ops import OPERATORS, attention_in_tiles
from gptoss.model.transformer import GptOss, token_positions
from gptoss.moe.experts import packed_by_decoding
from gptoss.parallel.collectives import Group, join, leave
from gptoss.parallel.shards import mesh_rank
from gptoss.parallel.split import SplitGptOss
from gptoss.text.generate import generate
from gptoss.text.sampling import Sampler
from gptoss.weights.config import GptOssConfig
from gptoss.weights.encoding import encode
from gptoss.weights.layout import TensorSpec, tensor_table
from gptoss.weights.mxfp4 import decode
from gptoss.weights.sizes import (
    bf16_bytes,
    bytes_read_per_token,
    checkpoint_bytes,
)
from gptoss.weights.write import write_checkpoint

POCKET = Path(gptoss.__file__).parent / "pocket"
PROMPT = [684, 685, 258, 608]  # "Once upon a time", to the pocket model
GREEDY = Sampler(temperature=0.0)
ALLOWED = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
Case = tuple[str, Callable[[], dict]]


class Missing(Exception):
    """Something that a case needs is not here; the message says what."""


class Off(Exception):
    """A result is wrong; `figures` say by how much."""

    def __init__(self, words: str, figures: dict) -> None:
        super().__init__(words)
        self.figures = figures


@dataclass(frozen=True)
class Run:
    """What every stage is told."""

    dry: bool  # tiny, on the CPU
    folder: Path  # a temporary one, for all stages
    copied: float  # bytes a second that the stage `machine` has measured

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def config(self) -> GptOssConfig:
        return (replace(CONFIGS["tiny"], pad_token_id=0, eos_token_id=1)
                if self.dry else CONFIGS["20b"])

    @property
    def model(self) -> Path:
        return self.folder / "random"


# ---- what stages share

def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(work: Callable[[], object], device: str, repeats: int = 1
          ) -> float:
    """Seconds of one work(), the best of three rounds after a first one."""
    work()
    best = float("inf")
    for _ in range(3 if device == "cuda" else 1):
        wait(device)
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        wait(device)
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def need_triton(run: Run) -> None:
    if triton_kernels.triton is None:
        raise Missing("no triton here")
    if run.dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise Missing("no TRITON_INTERPRET=1, and no GPU")


def switch_on(run: Run) -> None:
    """From now on the model's operators are the Triton kernels."""
    need_triton(run)
    if not run.dry:
        triton_kernels.use_triton()
        return
    for name, kernel in (("packed_experts", triton_kernels.experts_by_triton),
                         ("sink_attention",
                          triton_kernels.attention_by_triton)):
        torch.library.impl(f"gptoss::{name}", "CPU", kernel)


def kernels_or_dry(run: Run) -> bool:
    """Whether a step needs Triton: dry, its path is tried without, too."""
    return not run.dry or triton_kernels.triton is not None


def each(change: Callable, values: list) -> list:
    """The values, with `change` of every tensor."""
    return [change(x) if torch.is_tensor(x) else x for x in values]


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def compare(found, right, allowed: float) -> dict:
    """Relative errors of one or several results; Off if one is too large."""
    found = found if isinstance(found, tuple) else (found,)
    right = right if isinstance(right, tuple) else (right,)
    errors = [((a.cpu().double() - b).norm() / b.norm()).item()
              for a, b in zip(found, right, strict=True)]
    figures = {"error": max(errors), "allowed": allowed}
    if not all(error <= allowed for error in errors):  # NaN is wrong, too
        raise Off(f"relative error {max(errors):.1e}, allowed "
                  f"{allowed:.0e}", figures)
    return figures


# ---- the machine

def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict:
    return {"python": platform.python_version(), "torch": torch.__version__,
            "cuda": torch.version.cuda or "none", **{
                package: version(package) for package in
                ("triton", "transformers", "gpt-oss", "triton-kernels")}}


def card(run: Run) -> dict:
    if run.dry:
        return {"name": f"CPU ({platform.machine()})"}
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no CUDA device; --dry needs none")
    found = torch.cuda.get_device_properties(0)
    return {"name": found.name, "bytes": found.total_memory,
            "capability": f"{found.major}.{found.minor}",
            "processors": found.multi_processor_count}


def copy_speed(run: Run) -> dict:
    """Bytes a second of a copy, each read and written."""
    if not (run.dry or torch.cuda.is_available()):
        raise Missing("no CUDA device")
    size = 2 ** 26 if run.dry else 2 ** 31
    source = torch.ones(size // 4, device=run.device)
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), run.device, 5)
    return {"bytes_per_second": 2 * size / seconds}


def machine(run: Run) -> Iterator[Case]:
    yield "versions", versions
    yield "device", partial(card, run)
    yield "copy", partial(copy_speed, run)


# ---- every operator and each kernel, against float64

def experts_arguments(dtype: torch.dtype, N: int = 40) -> list:
    E, K, D, F = 4, 2, 96, 64
    return [torch.randn(N, D).to(dtype), torch.rand(N, E).topk(K).indices,
            torch.rand(N, K).to(dtype),
            *encode(0.2 * torch.randn(E, 2 * F, D)),
            torch.randn(E, 2 * F).to(dtype),
            *encode(0.2 * torch.randn(E, D, F)),
            torch.randn(E, D).to(dtype), 7.0]


def attention_arguments(dtype: torch.dtype, T: int = 20, S: int = 40,
                        window: int = 7) -> list:
    """Two rows, of which one has padding; two empty slots."""
    k_pos = torch.arange(S).expand(2, S).clone()
    q_pos = k_pos[:, S - T:].clone()
    k_pos[:, 3:5] = -1
    q_pos[0, 0] = S - 1 if T == 1 else -1
    q, k, v = (torch.randn(2, n, heads, 32).to(dtype)
               for n, heads in ((T, 8), (S, 2), (S, 2)))
    return [q, k, v, torch.randn(8).to(dtype), q_pos, k_pos, window, 0.2]


def arguments(name: str, dtype: torch.dtype) -> list:
    """Of an operator, on the CPU."""
    torch.manual_seed(0)
    x = torch.randn(2, 20, 96).to(dtype)
    packed, matrix = encode(torch.randn(64, 96)), torch.randn(
        64, 64).to(dtype)
    made: dict[str, Callable[[], list]] = {
        "rms_norm": lambda: [x, torch.randn(96).to(dtype), 1e-5],
        "linear": lambda: [x, torch.randn(64, 96).to(dtype),
                           torch.randn(64).to(dtype)],
        "rope": lambda: [x.view(2, 20, 3, 32), *rope_tables(
            torch.arange(20).expand(2, 20), torch.rand(16), 1.0, dtype)],
        "sink_attention": lambda: attention_arguments(dtype),
        "route": lambda: [torch.randn(40, 8).to(dtype), 2],
        "packed_experts": lambda: experts_arguments(dtype),
        "packed_experts_eight": lambda: experts_arguments(dtype),
        "packed_experts_backward": lambda: [
            torch.randn(40, 96).to(dtype), *experts_arguments(dtype)],
        "mxfp4_linear": lambda: [x, *packed, torch.randn(64).to(dtype)],
        "mxfp4_decode": lambda: [*packed, dtype],
        "pack_compact": lambda: [matrix],
        "compact_linear": lambda: [x[..., :64], matrix, None,
                                   *pack_by_torch(matrix)],
        "pack_eight": lambda: [matrix],
        "eight_linear": lambda: [x[..., :64], *pack_by_steps(matrix), None]}
    if ("compact" in name or "eight" in name) and dtype != torch.bfloat16:
        raise Missing("in bfloat16 alone")
    return made[name]()


def operator(run: Run, name: str, dtype: torch.dtype) -> dict:
    given = arguments(name, dtype)
    wide = [torch.float64 if x is dtype else x for x in each(widened, given)]
    call = getattr(torch.ops.gptoss, name)
    found = call(*each(lambda x: x.to(run.device), given))
    if name == "pack_compact":  # bits, and nothing to compute
        found, right = unpack(CompactWeight(*(x.cpu() for x in found))
                              ), wide[0]
    elif name == "pack_eight":
        found = unpack_eight(EightWeight(*(x.cpu() for x in found)))
        right = unpack_eight(pack_by_steps(given[0]))
    else:
        right = OPERATORS[name].plain(*wide)
    if name == "route":  # of equal logits either may be chosen
        found, right = ((weights, wide[0].gather(1, ids.cpu()))
                        for weights, ids in (found, right))
    return compare(found, right, ALLOWED[dtype])


def operators(run: Run) -> Iterator[Case]:
    for name in OPERATORS:
        for dtype in (torch.float32, torch.bfloat16):
            yield f"{name} {names(dtype)}", partial(operator, run, name,
                                                    dtype)


def nibbles(run: Run) -> dict:
    """`decode_fp4` of all codes and of the scale bytes below 253 (beyond,
    some of the products overflow), seen through products with ones."""
    need_triton(run)
    block = torch.arange(16, dtype=torch.uint8) * 0x11  # both nibbles
    blocks = block.expand(1, 253, 1, 16).contiguous()
    scales = torch.arange(253, dtype=torch.uint8).view(1, 253, 1)
    unit = torch.eye(32)
    found = triton_kernels.packed_linear_tiles(
        unit.to(run.device), torch.zeros(32, dtype=torch.int64,
                                         device=run.device),
        blocks.to(run.device), scales.to(run.device)).cpu()
    right = decode(blocks, scales, torch.float32)[0].T
    # what fp32 itself holds but in denormal form a GPU may take for zero
    normal = (right == 0) | (right.abs() >= 2.0 ** -126)
    wrong = int((found != right)[normal].sum())
    figures = {"values": int(normal.sum()), "wrong": wrong,
               "wrong_denormals": int((found != right)[~normal].sum())}
    if wrong:
        raise Off(f"{wrong} of {figures['values']} values", figures)
    return figures


def kernel(run: Run, ours: Callable, exact: Callable, dtype: torch.dtype,
           cases: list[list]) -> dict:
    """The worst error over the cases."""
    need_triton(run)
    found = [compare(ours(*each(lambda x: x.to(run.device), given)),
                     exact(*each(widened, given)), ALLOWED[dtype])
             for given in cases]
    return max(found, key=lambda figures: figures["error"])


def projection(x, ids, blocks, scales):
    """`packed_linear_tiles` by decoding."""
    weights = decode(blocks, scales, torch.float32).to(x.dtype)
    return torch.einsum("no,nro->nr", x, weights[ids])


def projections(run: Run, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    return kernel(run, triton_kernels.packed_linear_tiles, projection, dtype, [
        [torch.randn(N, 96).to(dtype), torch.randint(3, (N,)),
         *encode(torch.randn(3, rows, 96))]
        for N, rows in ((1, 32), (5, 50), (60, 33))])


def all_experts(run: Run, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    return kernel(run, triton_kernels.experts_by_triton, packed_by_decoding,
                  dtype, [experts_arguments(dtype, N) for N in (1, 3, 40)])


def attention(run: Run, dtype: torch.dtype) -> dict:
    torch.manual_seed(0)
    return kernel(run, triton_kernels.attention_by_triton, attention_in_tiles,
                  dtype, [attention_arguments(dtype, *sizes) for sizes in (
                      (1, 70, 0), (1, 70, 9), (20, 40, 0), (20, 40, 7))])


def share(run: Run, size: int, seconds: float) -> dict:
    return {"microseconds": 1e6 * seconds, "bytes": size,
            "share_of_memory_speed": size / seconds / run.copied}


def experts_speed(run: Run, N: int) -> dict:
    """A layer's experts for N tokens; other experts in every call."""
    need_triton(run)
    c, on = run.config, {"device": run.device}
    E, D, F = c.num_local_experts, c.hidden_size, c.intermediate_size
    K, dtype = c.num_experts_per_tok, torch.float32 if run.dry else (
        torch.bfloat16)
    packed = [made for rows, width in ((2 * F, D), (D, F)) for made in (
        torch.randint(256, (E, rows, width // 32, 16), dtype=torch.uint8,
                      **on),
        torch.full((E, rows, width // 32), 120, dtype=torch.uint8, **on),
        torch.zeros(E, rows, dtype=dtype, **on))]
    x, weights = (torch.randn(N, n, dtype=dtype, **on) for n in (D, K))
    ids = [torch.rand(N, E, **on).topk(K).indices for _ in range(8)]
    turn = iter(range(10 ** 9))
    seconds = timed(lambda: triton_kernels.experts_by_triton(
        x, ids[next(turn) % 8], weights, *packed, 7.0), run.device,
        1 if run.dry else 24)
    hit = sum(len(each.unique()) for each in ids) / 8
    size = sum(part.nbytes for part in packed) * hit / E
    return {"tokens": N, "experts_hit": hit} | share(run, size, seconds)


def attention_speed(run: Run, S: int) -> dict:
    """One query token over S keys."""
    need_triton(run)
    c, dtype = run.config, torch.float32 if run.dry else torch.bfloat16
    H, G, C = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    q, k, v = (torch.randn(1, n, heads, C, dtype=dtype, device=run.device)
               for n, heads in ((1, H), (S, G), (S, G)))
    k_pos = torch.arange(S, device=run.device)[None]
    seconds = timed(lambda: triton_kernels.attention_by_triton(
        q, k, v, torch.zeros(H, dtype=dtype, device=run.device),
        k_pos[:, -1:], k_pos, 0, 0.125), run.device, 1 if run.dry else 24)
    return {"keys": S} | share(run, k.nbytes + v.nbytes, seconds)


def kernels(run: Run) -> Iterator[Case]:
    yield "decode_fp4", partial(nibbles, run)
    # the interpreter computes with numpy, which has no bfloat16
    more = [] if run.dry else [torch.bfloat16]
    for dtype in (torch.float32, torch.float16, *more):
        for name, work in (("packed_rows", projections),
                           ("experts_by_triton", all_experts),
                           ("attend_tile", attention)):
            yield f"{name} {names(dtype)}", partial(work, run, dtype)
    for N in (1, 4) if run.dry else (1, 2, 4, 8, 32, 128, 512):
        yield f"experts of {N} tokens", partial(experts_speed, run, N)
    for S in (64,) if run.dry else (128, 1024, 8192, 131072):
        yield f"attention over {S} keys", partial(attention_speed, run, S)


# ---- the pocket model's text

def recorded(run: Run) -> Callable:
    """model, cache -> the step, recorded as a CUDA graph where there is one;
    dry, it is run as it is."""
    if run.dry:
        return lambda model, cache: DecodeStep(model, cache,
                                               lambda work, undo: work)
    return DecodeStep


def text(model: GptOss, decode="eager", count: int = 96) -> list[int]:
    return list(generate(model, PROMPT, sampler=GREEDY, max_new_tokens=count,
                         decode=decode))


def same(found: list[int], right: list[int]) -> dict:
    figures = {"tokens": len(right), "equal": sum(
        a == b for a, b in zip(found, right, strict=False))}
    if found != right:
        at = next((n for n, (a, b) in enumerate(zip(found, right,
                                                    strict=False))
                   if a != b), min(len(found), len(right)))
        raise Off(f"the text is another one from token {at} on", figures)
    return figures


def pocket(run: Run) -> Iterator[Case]:
    count = 8 if run.dry else 96
    right = text(GptOss.from_pretrained(POCKET, dtype=torch.float32),
                 count=count)
    model = GptOss.from_pretrained(POCKET, dtype=torch.float32,
                                   device=run.device)

    def by(decode, triton: bool = True) -> dict:
        if triton:
            switch_on(run)
        return same(text(model, decode, count), right)

    yield "plain torch", partial(by, "eager", triton=False)
    yield "Triton kernels", partial(by, "eager")
    yield "CUDA graph of the step", partial(by, recorded(run), kernels_or_dry(
        run))


# ---- a random 20b

def drawn(spec: TensorSpec, g: torch.Generator) -> torch.Tensor:
    """Random numbers of about the spread that released weights have, made
    where the generator is: on a GPU, that is quick."""
    on = {"generator": g, "device": g.device}
    if spec.name.endswith("_blocks"):
        return torch.randint(256, spec.shape, dtype=torch.uint8, **on)
    if spec.name.endswith("_scales"):  # 2 ** -7, and its neighbours
        return torch.randint(119, 122, spec.shape, dtype=torch.uint8, **on)
    out = torch.empty(spec.shape, dtype=torch.bfloat16, device=g.device)
    if spec.name.endswith("norm.weight"):
        return out.normal_(1.0, 0.2, generator=g)
    return out.normal_(0.0, spec.shape[-1] ** -0.5, generator=g)


def write(run: Run) -> Iterator[Case]:
    def work() -> dict:
        total = checkpoint_bytes(run.config)
        free = shutil.disk_usage(run.folder).free
        if free < 1.05 * total:
            raise Missing(f"needs {1.05 * total / 1e9:.1f} GB of disk, found "
                          f"{free / 1e9:.1f} (--folder names another place)")
        g = torch.Generator(run.device).manual_seed(0)
        start = time.perf_counter()
        write_checkpoint(run.model, run.config, (
            (name, drawn(spec, g)) for name, spec
            in tensor_table(run.config).items()), max_shard_bytes=SHARD_BYTES)
        return {"bytes": total, "write_seconds": time.perf_counter() - start}
    yield "checkpoint", work


def need_checkpoint(run: Run) -> None:
    if not run.model.exists():
        raise Missing("no random checkpoint was written")


def load(run: Run) -> tuple[GptOss, dict]:
    need_checkpoint(run)
    start = time.perf_counter()
    model = GptOss.from_pretrained(run.model, device=run.device,
                                   dtype=torch.float32 if run.dry
                                   else torch.bfloat16)
    wait(run.device)
    figures = {"load_seconds": time.perf_counter() - start}
    if not run.dry:
        figures["bytes_on_device"] = torch.cuda.memory_allocated()
    return model, figures


def lengths(run: Run) -> tuple[int, ...]:
    return (8,) if run.dry else (512, 2048)


def random_ids(run: Run, count: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(run.config.vocab_size, (1, count),
                         generator=g).to(run.device)


def prefill_figures(run: Run, count: int, seconds: float) -> dict:
    """The share is of the time in which memory gives all weights once."""
    return {"prompt_tokens": count, "tokens_per_second": count / seconds,
            "share_of_memory_speed":
                checkpoint_bytes(run.config) / seconds / run.copied}


def decode_figures(run: Run, seconds: float) -> dict:
    size = bytes_read_per_token(run.config)
    return {"tokens_per_second": 1 / seconds, "bytes_per_token": size,
            "share_of_memory_speed": size / seconds / run.copied}


@torch.inference_mode()
def prefill(run: Run, model: GptOss, count: int, triton: bool) -> dict:
    if triton:
        switch_on(run)
    ids = random_ids(run, count)
    seconds = timed(lambda: model(ids, model.new_cache(max_tokens=count + 1),
                                  logits_to_keep=1), run.device)
    return prefill_figures(run, count, seconds)


@torch.inference_mode()
def decoding(run: Run, model: GptOss, triton: bool,
             decode: Callable | None = None) -> dict:
    """Greedy tokens behind a prompt, by forwards or by what decode makes."""
    if triton:
        switch_on(run)
    length, repeats = lengths(run)[0], 2 if run.dry else 32
    cache = model.new_cache(max_tokens=length + 4 * repeats + 8)
    feed = model(random_ids(run, length), cache,
                 logits_to_keep=1).argmax(-1)
    step = decode(model, cache) if decode else None

    def work() -> None:
        nonlocal feed
        feed = (step(feed) if step else model(feed, cache,
                                              logits_to_keep=1)).argmax(-1)
    return decode_figures(run, timed(work, run.device, repeats))


def speed(run: Run) -> Iterator[Case]:
    model, loaded = load(run)
    yield "load", lambda: loaded
    for way, triton in (("plain torch", False), ("Triton kernels", True)):
        for count in lengths(run):
            yield f"{way}: prefill of {count}", partial(
                prefill, run, model, count, triton)
        yield f"{way}: decode", partial(decoding, run, model, triton)
    yield "CUDA graph: decode", partial(
        decoding, run, model, kernels_or_dry(run), recorded(run))
    if not run.dry:
        yield "memory", lambda: {
            "most_bytes_on_device": torch.cuda.max_memory_allocated()}


# ---- compiled

def compiled(run: Run) -> Iterator[Case]:
    """Dry, torch.compile traces and does not compile."""
    model, _ = load(run)
    backend = "eager" if run.dry else "inductor"
    triton = kernels_or_dry(run)

    def capture(work, undo):
        return torch.compile(work, backend=backend)

    def graph(work, undo):
        made = torch.compile(work, backend=backend)
        return made if run.dry else cuda_graph(made, undo)

    @torch.inference_mode()
    def whole(count: int) -> dict:
        if triton:
            switch_on(run)
        forward = torch.compile(model.run, backend=backend)
        ids = random_ids(run, count)
        positions = token_positions(ids)
        return prefill_figures(run, count, timed(
            lambda: forward(ids, positions, None, 1), run.device))

    def step(capture) -> Callable[[GptOss, Cache], DecodeStep]:
        return lambda model, cache: DecodeStep(model, cache, capture)

    yield "step: decode", partial(decoding, run, model, triton,
                                  step(capture))
    yield "step, CUDA graph: decode", partial(decoding, run, model, triton,
                                              step(graph))
    yield f"forward: prefill of {lengths(run)[0]}", partial(
        whole, lengths(run)[0])


# ---- the others

def need_package(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            raise Missing(f"not installed: {package}")


def transformers_model(run: Run):
    """In bf16, for its four-bit kernels come from a network."""
    need_package("transformers", "safetensors")
    need_checkpoint(run)
    size = 1.1 * bf16_bytes(run.config)
    if not run.dry and torch.cuda.mem_get_info()[0] < size:
        raise Missing(f"needs {size / 1e9:.0f} GB on the device")
    from transformers import AutoModelForCausalLM, Mxfp4Config
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    where = {"device_map": run.device} if find_spec("accelerate") else {}
    return AutoModelForCausalLM.from_pretrained(
        run.model, quantization_config=Mxfp4Config(dequantize=True),
        dtype=torch.float32 if run.dry else torch.bfloat16,
        attn_implementation="eager", **where).eval().to(run.device)


@torch.inference_mode()
def transformers_speed(run: Run) -> dict:
    start = time.perf_counter()
    model = transformers_model(run)
    found: dict = {"load_seconds": time.perf_counter() - start}
    for count in lengths(run):
        ids = random_ids(run, count)
        seconds = timed(lambda ids=ids: model(ids, use_cache=True,
                                              logits_to_keep=1), run.device)
        found[f"prefill of {count}"] = prefill_figures(run, count, seconds)
    out = model(random_ids(run, lengths(run)[0]), use_cache=True,
                logits_to_keep=1)

    def work() -> None:
        nonlocal out
        out = model(out.logits[:, -1:].argmax(-1), use_cache=True,
                    past_key_values=out.past_key_values)
    seconds = timed(work, run.device, 2 if run.dry else 32)
    return found | {"decode": decode_figures(run, seconds)}


def openai_generator(run: Run, context: int):
    """OpenAI's TokenGenerator with random weights, made on the device."""
    from gpt_oss.triton import model as theirs

    c = run.config
    config = theirs.ModelConfig(
        num_hidden_layers=c.num_hidden_layers,
        num_experts=c.num_local_experts,
        experts_per_token=c.num_experts_per_tok, vocab_size=c.vocab_size,
        hidden_size=c.hidden_size, intermediate_size=c.intermediate_size)

    def random_model(path, config=config, device="cuda"):
        model = theirs.Transformer(config=config, device=device).eval()
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data.normal_(0.0, 0.02)
            else:
                parameter.data.random_()
        for block in model.block:
            for scales in (block.mlp.mlp1_weight_mx,
                           block.mlp.mlp2_weight_mx):
                scales.storage.data.fill_(120)  # as `drawn`
        return model

    theirs.Transformer.from_checkpoint = staticmethod(random_model)
    return theirs.TokenGenerator("random", context, torch.device("cuda"))


def openai_speed(run: Run) -> dict:
    """Seconds to the first token, the prompt's, and from there on."""
    need_package("gpt_oss", "triton", "triton_kernels", "safetensors")
    if run.dry:
        raise Missing("it has no interpreted form")
    generator, found = openai_generator(run, 4096), {}

    def times(count: int, new: int) -> list[float]:
        start, ends = time.perf_counter(), []
        for _ in generator.generate(random_ids(run, count)[0].tolist(),
                                    temperature=0.0, max_tokens=new):
            ends.append(time.perf_counter() - start)
        return ends

    times(512, 4)
    for count in lengths(run):
        first = min(times(count, 1)[0] for _ in range(3))
        found[f"prefill of {count}"] = prefill_figures(run, count, first)
    ends = times(512, 97)
    return found | {"decode": decode_figures(run, (ends[-1] - ends[0]) / 96)}


def openai(run: Run) -> Iterator[Case]:
    yield "OpenAI's Triton code", partial(openai_speed, run)


def transformers(run: Run) -> Iterator[Case]:
    yield "transformers", partial(transformers_speed, run)


# ---- two ranks on the one card

class ThroughHost(Group):
    """A group of gloo's, whose messages go by the CPU's memory: NCCL wants a
    card for each rank, and gloo gathers nothing from a GPU."""

    def __init__(self, group: Group, device: str) -> None:
        self.mesh, self._group, self._device = group.mesh, group, device

    def same(self, make: Callable[[], object]) -> object:
        return self._group.same(make)

    def all_reduce(self, x):
        return self._group.all_reduce(x.cpu()).to(self._device)

    def all_gather(self, x):
        return self._group.all_gather(x.cpu()).to(self._device)

    def send_next(self, x) -> None:
        self._group.send_next(x.cpu())

    def recv_previous(self, x):
        return self._group.recv_previous(x.cpu()).to(self._device)

    def broadcast_last(self, x):
        return self._group.broadcast_last(x.cpu()).to(self._device)


def one_rank(run: Run, stages: int) -> Iterator[Case]:
    """What each of the two processes does."""
    def work() -> dict:
        mesh = mesh_rank(GptOssConfig.from_pretrained(POCKET),
                         int(os.environ["RANK"]), 2, stages)
        group = ThroughHost(join("cpu").group(mesh), run.device)
        model = SplitGptOss.part(POCKET, mesh, group, torch.float32,
                                 run.device)
        found = text(model, count=24)
        leave()
        return {"found": found}
    yield "text", work


def start_rank(run: Run, rank: int, stages: int, port: int):
    """The process of one rank, and the file of what it finds."""
    file = run.folder / f"rank-{stages}-{rank}.json"
    where = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2",
             "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
             "GLOO_SOCKET_IFNAME": "lo"}
    return file, subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("gpu.py")),
         "--child", f"rank {stages}", "--figures", str(file),
         "--folder", str(run.folder), *(["--dry"] if run.dry else [])],
        env=os.environ | where)


def two_ranks(run: Run, stages: int, right: list[int]) -> dict:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    started = [start_rank(run, rank, stages, port) for rank in range(2)]
    for _, process in started:
        process.wait()
    figures = {}
    for file, _ in started:
        found = json.loads(file.read_text())["text"]
        if found["state"] != "passed":
            raise RuntimeError(f"{found['why']}\n{found.get('traceback')}")
        figures = same(found["found"], right)
    return figures


def ranks(run: Run) -> Iterator[Case]:
    right = text(GptOss.from_pretrained(POCKET, dtype=torch.float32,
                                        device=run.device), count=24)
    for name, stages in (("tensors shared", 1), ("stages", 2)):
        yield name, partial(two_ranks, run, stages, right)


WORK: dict[str, Callable[[Run], Iterator[Case]]] = {
    "machine": machine, "operators": operators, "kernels": kernels,
    "pocket": pocket, "ranks": ranks, "write": write, "speed": speed,
    "compiled": compiled, "openai": openai, "transformers": transformers,
    "rank 1": partial(one_rank, stages=1),
    "rank 2": partial(one_rank, stages=2)}
