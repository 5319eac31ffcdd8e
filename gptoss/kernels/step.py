"""A step that can be called again

Generated from book/kernels/step.py; edit the chapter, not this file.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gptoss.kernels.coarse import CoarseExperts
from gptoss.kernels.compact import CompactLinear
from gptoss.kernels.eight import EightLinear
from gptoss.model.cache import Cache, FullCache
from gptoss.model.layers import (
    MLP,
    Attention,
    Block,
    Embedding,
    Experts,
    Linear,
    RMSNorm,
    Router,
)
from gptoss.model.ops import has_kernel
from gptoss.model.rows import CacheError, Rows
from gptoss.model.transformer import GptOss, ModelError, Stack, check_tokens

# --- What does the model get instead of a cache? -----------------------------

Work = Callable[[], None]


@dataclass
class FixedView:
    """The plan of a forward of one token a row: a `CacheView`, S slots a
    layer."""

    seen: list[tuple[Tensor, Tensor]]  # of each layer: k, v (B, S, G, C)
    lines: list[tuple[Tensor, Tensor]]  # the same memory, (B * G * …, C)
    kinds: list[int]  # of each layer: 0 = sliding, 1 = full
    target: list[Tensor]  # of each kind: (B * G,) lines to write to
    positions: tuple[Tensor, Tensor]  # of each kind: (B, S), -1 = empty

    def update(self, layer: int, k: Tensor, v: Tensor
               ) -> tuple[Tensor, Tensor, Tensor]:
        """`Plan.update` for k, v (B, 1, G, C) and no padding."""
        kind = self.kinds[layer]
        for to, new in zip(self.lines[layer], (k, v), strict=True):
            to.index_copy_(0, self.target[kind], new.flatten(0, 2))
        return *self.seen[layer], self.positions[kind]


# --- What is a step? ---------------------------------------------------------

def _lines(memory: Tensor) -> Tensor:
    """(B, S, G, C), as a cache lays it out -> the same memory, (…, C)."""
    return memory.transpose(1, 2).view(-1, memory.shape[-1])


class DecodeStep:
    """One token a row: fixed shapes, fixed addresses, no waiting.

    DecodeStep(model, cache, capture=None): step(tokens), int64 (B, 1), gives
    the logits (B, 1, V) of model(tokens, cache=cache), in a tensor that the
    next step overwrites; step() feeds the greedy choice of the step before.
    Every row takes a token: feed a finished one anything. The cache stays
    usable by others. What `can_record` is recorded at the first step and
    whenever the tapes outgrow what is seen of them: as a CUDA graph
    (`use_triton` first), by `call_again` on the CPU, or by another
    capture(run, undo); weights must stay where they are. ids in CUDA
    tensors are not checked.
    CacheError: no room, a replay under way, a cache that does not fit.
    ModelError: tokens of another shape or type, or out of range.
    """

    def __init__(self, model: GptOss, cache: Cache,
                 capture: Callable[[Work, Work], Work] | None = None) -> None:
        weight, B = model.embed_tokens.weight, cache.batch_size
        like = Cache(model.config, B, cache.max_tokens, weight.dtype, "meta",
                     cache.slack)
        if self._kind(like) != self._kind(cache) or (
                cache.lengths.device != weight.device):
            raise CacheError("cache: expected one of model.new_cache(), found "
                             "other layers, shapes, dtype or device")
        if capture is None and can_record(model):
            capture = cuda_graph if weight.is_cuda else call_again
        if capture is None and weight.is_cuda:
            raise ModelError("model: expected packed experts and use_triton()"
                             ", for a CUDA graph of the step")
        self.model, self.cache, self._capture = model, cache, capture
        size, device = cache.rows.ring.shape[1], weight.device
        self._rows: Rows | None = None  # what the step left in the cache
        with torch.inference_mode(False):  # in any mode they can be changed
            self.tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
            self.lengths = torch.zeros_like(self.tokens[:, 0])
            self.ring = self.tokens.repeat(1, size)
            self.heads = torch.arange(B * cache.layers[0].k.shape[2],
                                      device=device).view(B, -1)
            self.logits = torch.zeros(B, 1, model.config.vocab_size,
                                      dtype=weight.dtype, device=device)
        self._see(1)

    @staticmethod
    def _kind(cache: Cache) -> list[tuple]:
        return [(type(x), x.k.dtype, len(x.k), x.k.shape[2:],
                 isinstance(x, FullCache) or x.k.shape[1])
                for x in cache.layers]

    def _see(self, needed: int) -> None:
        """Have slots for `needed` tokens: 256, 512, 1024 … of full layers."""
        self.cache.reserve(needed)
        layers, ring = self.cache.layers, self.ring.shape[1]
        room = min([self.cache.limit[0], *(
            x.k.shape[1] for x in layers if isinstance(x, FullCache))])
        self._size = min(max(256, 1 << (needed - 1).bit_length()), room)
        self._memory = [x.k for x in layers]
        kinds = [int(isinstance(x, FullCache)) for x in layers]
        self._strides, shown = (ring, room), (ring, self._size)
        with torch.inference_mode(False):
            self.slots = torch.arange(self._size, device=self.ring.device)
            self._view = partial(
                FixedView,
                [(x.k[:, :shown[kind]], x.v[:, :shown[kind]])
                 for x, kind in zip(layers, kinds, strict=True)],
                [(_lines(x.k), _lines(x.v)) for x in layers], kinds)
        self._launch: Work | None = None  # other addresses: record again

    def _take_over(self) -> None:
        """Copy the cache's state, if another than the step has changed it."""
        rows = self.cache.rows
        if rows is self._rows:
            return
        lengths, held = rows.lengths.tolist(), rows.held.tolist()
        if lengths != held:
            raise CacheError(f"rows: expected none to replay, found lengths "
                             f"{lengths} after a rollback to {held}: feed "
                             "these tokens to the model first")
        self.lengths.copy_(rows.lengths)
        self.ring.copy_(rows.ring)
        self._rows = Rows(self.lengths, self.lengths, rows.start, self.ring)
        self.cache.rows = self._rows
        self._counts, self._chosen = lengths, False
        if any(x.k is not k for x, k in zip(self.cache.layers, self._memory,
                                            strict=True)):
            self._size = 0  # full layers moved: look at them anew

    def _check(self, tokens: Tensor | None) -> None:
        expected = self.tokens.shape
        if tokens is None:
            if not self._chosen:
                raise ModelError("tokens: expected some, for the cache was "
                                 "not left by this step, found None")
        elif tokens.shape != expected or tokens.dtype not in (torch.int64,
                                                              torch.int32):
            raise ModelError(f"tokens: expected int64 {tuple(expected)}, found"
                             f" {tokens.dtype} {tuple(tokens.shape)}")
        elif tokens.device.type == "cpu":  # elsewhere a look would wait
            check_tokens(tokens, None, self.model.config)
        needed = max(self._counts) + 1
        if needed > self._size:
            self._see(needed)

    def _record(self) -> Work:
        """What launches a step: `_run`, or a recording of it."""
        state = (self.tokens, self.lengths, self.ring)
        before = [x.clone() for x in state]

        def undo() -> None:
            for x, old in zip(state, before, strict=True):
                x.copy_(old)
        return self._capture(self._run, undo) if self._capture else self._run

    @torch.inference_mode()
    def __call__(self, tokens: Tensor | None = None) -> Tensor:
        self._take_over()
        self._check(tokens)
        if tokens is not None:
            self.tokens.copy_(tokens)
        try:
            self._launch = self._launch or self._record()
            self._launch()
        except BaseException:
            slot = self.lengths[:, None] % self.ring.shape[1]
            self.ring.scatter_(1, slot, -1)  # perhaps overwritten
            self._rows = None
            raise
        self._counts = [n + 1 for n in self._counts]
        self._chosen = True
        return self.logits

    def _run(self) -> None:
        """Arithmetic on the step's own tensors: what a graph records."""
        at = self.lengths[:, None]
        place = at % self.ring.shape[1]
        ring = self.ring.scatter(1, place, at)
        full = self.slots.where(self.slots <= at, -1)
        target = [(self.heads * stride + slot).flatten() for stride, slot
                  in zip(self._strides, (place, at), strict=True)]
        logits = self.model.run(
            self.tokens, at, self._view(target, (ring, full)), 1)
        self.logits.copy_(logits)
        self.tokens.copy_(logits.max(-1).indices)
        self.ring.copy_(ring)  # last, so that a failure leaves the state
        self.lengths.add_(1)


# --- How are calls written down? ---------------------------------------------

_log = logging.getLogger("gptoss")


def call_again(run: Work, undo: Work | None = None) -> Work:
    """What does run() and notes its calls; from then on it makes these.

    For tensors on the CPU, and kernels loaded. If a call cannot be made
    again, run() goes on being done, and a warning says why.
    """
    work = None

    def launch() -> None:
        nonlocal work
        if work is not None:
            return work()
        recording = torch.classes.gptoss.Recording()
        recording.begin()
        try:
            run()
        finally:
            refused = recording.end()
        work = run if refused else recording.replay
        if refused:
            _log.warning("gptoss: a step of decode is not recorded: %s",
                         refused)
    return launch


# --- What must not be recorded? ----------------------------------------------

_FORWARDS = {kind.forward for kind in (
    Block, Attention, MLP, Router, Experts, RMSNorm, Linear, CompactLinear,
    EightLinear, Embedding, CoarseExperts, nn.ModuleList)}


def _addition(name: str, module: nn.Module) -> str | None:
    """What a call of the module does beyond a forward of this package."""
    kind = type(module)
    known = kind.forward in _FORWARDS or isinstance(module, GptOss) and (
        kind.forward is GptOss.forward and type(module).run is Stack.run)
    if (not known or kind.__call__ is not nn.Module.__call__
            or vars(module).keys() & {"forward", "run"}):
        return f"{name or 'the model'} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks:
        return f"{name or 'the model'} has a forward hook"
    if module._compiled_call_impl is not None:
        return f"{name or 'the model'} is compiled"
    return None


def additions(model: nn.Module) -> str | None:
    """Why the C++ kernels' calls are not all that a forward does; or None."""
    if nn.modules.module._has_any_global_hook():
        return "there is a global module hook"
    return next(filter(None, (_addition(name, module) for name, module
                              in model.named_modules())), None)


def can_record(model: GptOss) -> bool:
    """Does a step of this model make the same calls for every token?

    Yes for packed experts with kernels: `use_triton` on CUDA; the C++ ones
    on the CPU, if no module has hooks or a forward that is not this
    package's. Plain torch splits the tokens by expert with sizes that the
    host reads.
    """
    # every layer: those of another stage have none
    if not all(getattr(m, "packed", True) for m in model.modules()):
        return False
    if model.embed_tokens.weight.device.type != "cpu":
        return has_kernel(device="CUDA")
    return has_kernel() and additions(model) is None


# --- And on a GPU? -----------------------------------------------------------

def cuda_graph(run: Work, undo: Work) -> Work:
    """Record what run() launches; returns a function that launches it.

    For the current CUDA device. undo() takes back what a run() changed, so
    that nothing has changed on return. RuntimeError from torch if run()
    waits for the device. Source: torch's notes, "CUDA Graphs".
    """
    current, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
            undo()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # recorded, not run
        run()
    return graph.replay


# --- Who asks for a step? ----------------------------------------------------

_told: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def _told_why(model: nn.Module, why: str) -> None:
    """One line a model and reason. None for a model that is spread over a
    group of processes: it has a `group`, and is never recorded."""
    if _told.get(model) != why and getattr(model, "group", None) is None:
        _told[model] = why
        _log.warning("gptoss: a step of decode is not recorded, which is "
                     "slower: %s", why)


def quick_step(model: GptOss, cache: Cache
               ) -> tuple["DecodeStep | None", str]:
    """The step for text/generate's `choose_step` where the C++ kernels
    compute it, or None, and why.

    A recorded `DecodeStep` for a bf16 model on the CPU that `can_record`,
    and a cache without a replay under way. If only hooks or other forwards
    are in the way, one warning says which.
    """
    weight = model.embed_tokens.weight
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return None, "the kernels compute in bfloat16 on the CPU"
    if not (has_kernel() and torch.ops.gptoss.kernels_on()):
        return None, "plain torch is in use"
    if not torch.equal(cache.rows.lengths, cache.rows.held):
        return None, "the cache waits for tokens that were rolled back"
    why = additions(model)
    if why:
        _told_why(model, why)
        return None, why
    if not can_record(model):
        return None, "dense experts are not recorded"
    return DecodeStep(model, cache, call_again), "the kernels compute it"


__all__ = [
    "DecodeStep",
    "FixedView",
    "Work",
    "additions",
    "call_again",
    "can_record",
    "cuda_graph",
    "quick_step",
]
