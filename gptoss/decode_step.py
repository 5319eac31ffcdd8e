"""Four bits at full speed

Generated from book/13_kernels.py; edit the chapter, not this file.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss.cache import Cache, CacheError, Ring, Rows, Tape
from gptoss.model import GptOss, ModelError, check_tokens

# --- A step of decode that can be recorded -----------------------------------

@dataclass
class FixedView:
    """A cache as `Stack.run` sees it for one token a row: every slot."""

    layers: list[Ring | Tape]
    ring: Tensor  # (B, size) position in each slot, the new ones included
    tape: Tensor  # (B, max_tokens) the same; -1 = empty

    def update(self, layer: int, k: Tensor, v: Tensor, positions: Tensor
               ) -> tuple[Tensor, Tensor, Tensor]:
        """`Cache.update` for k, v (B, 1, G, C) and no padding."""
        store = self.layers[layer]
        slot = (positions % store.k.shape[1])[..., None, None].expand_as(k)
        store.k.scatter_(1, slot, k)
        store.v.scatter_(1, slot, v)
        return store.k, store.v, (
            self.ring if isinstance(store, Ring) else self.tape)


Work = Callable[[], None]


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


def can_record(model: GptOss) -> bool:
    """Are a CUDA model's experts computed without asking the host?

    Plain torch splits the tokens by expert with sizes that the host reads;
    `use_triton` does not, and takes packed experts.
    """
    return model.layers[0].mlp.experts.packed and (
        torch._C._dispatch_has_kernel_for_dispatch_key(
            "gptoss::packed_experts", "CUDA"))


class _State:
    """Model and cache, and the tensors that a step changes in place."""

    def __init__(self, model: GptOss, cache: Cache,
                 capture: Callable[[Work, Work], Work] | None = None) -> None:
        weight, B = model.embed_tokens.weight, cache.batch_size
        if cache.max_tokens is None:
            raise CacheError("cache: expected one with max_tokens, whose "
                             "tapes stay where they are, found None")
        like = Cache(model.config, B, cache.max_tokens, weight.dtype, "meta",
                     cache.slack)
        if self._kind(like) != self._kind(cache) or (
                cache.lengths.device != weight.device):
            raise CacheError("cache: expected one of model.new_cache(), found "
                             "other layers, shapes, dtype or device")
        if weight.is_cuda and capture is None:
            if not can_record(model):
                raise ModelError("model: expected packed experts and use_"
                                 "triton(), for a CUDA graph of the step")
            capture = cuda_graph
        self.model, self.cache, self._capture = model, cache, capture
        size, device = cache.rows.ring.shape[1], weight.device
        self._launch: Work | None = None
        self._rows: Rows | None = None  # what the step left in the cache
        with torch.inference_mode(False):  # in any mode they can be changed
            self.tokens = torch.zeros(B, 1, dtype=torch.int64, device=device)
            self.lengths = torch.zeros_like(self.tokens[:, 0])
            self.ring = self.tokens.repeat(1, size)
            self.slots = torch.arange(cache.max_tokens, device=device)
            self.logits = torch.zeros(B, 1, model.config.vocab_size,
                                      dtype=weight.dtype, device=device)

    @staticmethod
    def _kind(cache: Cache) -> list[tuple]:
        return [(type(x), x.k.shape, x.k.dtype) for x in cache.layers]


class _Bookkeeping(_State):
    """What the host does around a step."""

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

    def _check(self, tokens: Tensor | None) -> None:
        needed, room = max(self._counts) + 1, self.cache.max_tokens
        if needed > room:
            raise CacheError(f"cache too small: max_tokens is {room}, this "
                             f"step needs {needed} tokens")
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

    def _record(self) -> Work:
        """What launches a step: `_run`, or a recording of it."""
        state = (self.tokens, self.lengths, self.ring)
        before = [x.clone() for x in state]

        def undo() -> None:
            for x, old in zip(state, before, strict=True):
                x.copy_(old)
        return self._capture(self._run, undo) if self._capture else self._run


class DecodeStep(_Bookkeeping):
    """One token a row: fixed shapes, fixed addresses, no waiting.

    DecodeStep(model, cache, capture=None): step(tokens), int64 (B, 1), gives
    the logits (B, 1, V) of model(tokens, cache=cache), in a tensor that the
    next step overwrites; step() feeds the greedy choice of the step before.
    Every row takes a token: feed a finished one anything. cache needs
    max_tokens, and stays usable by others. On CUDA the first step becomes a
    CUDA graph (`use_triton` first; weights must stay where they are), or
    what capture(run, undo) returns; ids in CUDA tensors are not checked.
    CacheError: no room, a replay under way, a cache that does not fit.
    ModelError: tokens of another shape or type, or out of range.
    """

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
        ring = self.ring.scatter(1, at % self.ring.shape[1], at)
        tape = self.slots.where(self.slots <= at, -1)
        logits = self.model.run(
            self.tokens, at, FixedView(self.cache.layers, ring, tape), 1)
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(-1))
        self.ring.copy_(ring)  # last, so that a failure leaves the state
        self.lengths.add_(1)


__all__ = [
    "DecodeStep",
    "FixedView",
    "Work",
    "can_record",
    "cuda_graph",
]
