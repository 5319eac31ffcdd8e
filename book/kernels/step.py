# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   gptoss:
#     module: step
#     public: [DecodeStep, call_again, can_record, cuda_graph]
# ---

# %% [markdown]
# # A step that can be called again
#
# ## Question
#
# What in a step of decoding never changes? One token of the 20b is some 2,400
# operators in plain torch and 700 with kernels, and every one of them is
# called out of Python, with arguments that are looked up again: ten
# microseconds a call, as long as a small operator takes to compute. But the
# calls of one step are those of the next.

# %%
import logging
import os
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import gptoss
from gptoss.kernels.build import load_kernels
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

os.environ["GPTOSS_KERNELS"] = "auto"  # this chapter asks for the kernels
logging.getLogger("gptoss").setLevel(logging.ERROR)  # and says nothing of it
plt.style.use("../_static/book.mplstyle")
path = load_kernels()
big = GptOssConfig.gpt_oss_20b()

# %% [markdown]
# ## Picture
#
# Which memory does a step look at? Left, the keys of a full layer that an
# ordinary forward gets: one more in every step, so every step is another
# computation. Right, the same steps with a *fixed* number of slots: those that
# hold nothing yet say so by their position, -1, and no query sees them. What
# changes from step to step now is numbers, no longer shapes.

# %% tags=["hide-input"]
# Figure: two grids, a row a step of decoding, a column a slot. Left, row n
# has n + 1 squares with the positions 0 to n, and nothing beyond. Right, every
# row has twelve squares, those beyond n grey with the position -1. The slot
# that the step writes is dark in both.
fig, axes = plt.subplots(1, 2, figsize=(7.4, 2.6), sharey=True)
steps, slots = 6, 12
for ax, fixed in zip(axes, (False, True), strict=True):
    for n in range(steps):
        for slot in range(slots if fixed else n + 1):
            empty = slot > n
            ax.add_patch(plt.Rectangle(
                (slot, n), 0.9, 0.9, color="0.85" if empty else
                "C0" if slot == n else "C9"))
            ax.text(slot + 0.45, n + 0.5, -1 if empty else slot, ha="center",
                    va="center", fontsize=7,
                    color="0.4" if empty else "white" if slot == n else "k")
    ax.set(xlim=(-0.2, slots), ylim=(steps, -0.2), xlabel="slot", xticks=[],
           yticks=[n + 0.45 for n in range(steps)],
           yticklabels=[str(n) for n in range(steps)],
           title="fixed shapes" if fixed else "as it comes")
axes[0].set_ylabel("step")
plt.show()

# %% [markdown]
# ## Derivation
#
# On a GPU a step of decode has another floor than memory. How many kernels
# does one token of the 20b launch? Every operator that computes is one at
# least; on the meta device they can be counted without computing any.

# %%
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss.model.transformer import GptOss


class Launches(TorchDispatchMode):
    """Counts operators that compute something; a view does not."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += not operator.is_view
        return operator(*args, **(kwargs or {}))


token_zero = torch.zeros(1, 1, dtype=torch.int64, device="meta")
with Launches() as launches:  # weights that learn: what torch is made of runs
    GptOss(big, device="meta").run(token_zero, token_zero)
print(f"{launches.count:,} with plain torch, the experts of a layer taken "
      "for one")
assert launches.count * 5e-6 > 9 * bytes_read_per_token(big) / 3e12

# %% [markdown]
# If the host needs 5 µs for each (an assumption, not measured here), launching
# takes 12 ms, and reading 3.7 GB at 3 TB/s would take 1.2. Fused kernels make
# fewer launches; a *CUDA graph* makes one of all: they are recorded once, with
# their arguments, and replayed by a single call. What is recorded is addresses
# and sizes, so it holds for the next token only if
#
# 1. every tensor has the same shape at every step,
# 2. it lies where it lay, and what changes is written into it,
# 3. nothing waits for the device to choose what comes next.
#
# `model(token, cache=cache)` breaks all three: what full layers see grows by a
# slot a token, the state is a new tensor each time, and its checks ask whether
# ids and positions are right. `Stack.run`, of the
# [transformer](../model/transformer.ipynb), does none of this, it computes;
# what it needs is a cache that answers in one shape. A slot that holds nothing
# has position -1, and no query sees it. So the whole ring and the first 256,
# 512, 1024 ... slots of full layers, empty ones too, are as good an answer as
# the filled part.
#
# ## Code
#
# ### Fixed shapes

# %% tags=["export"]
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gptoss.kernels.compact import CompactLinear
from gptoss.model.cache import Cache, FullCache
from gptoss.model.rows import CacheError, Rows
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
from gptoss.model.transformer import GptOss, ModelError, Stack, check_tokens
from gptoss.model.ops import has_kernel


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

# %% [markdown]
# The new token's keys go into the lines that its slots have in memory
# (`scatter_` along the slots would need no numbers of lines, but it copies a
# cache whose heads lie apart: 100 to 200 µs a call against 5).
#
# ### For CUDA: a graph
#
# Recording follows torch's notes on CUDA graphs: some runs on another stream
# first, so that what happens once (compiling a kernel, a library's work space)
# is not recorded. Those runs write, so each is undone.

# %% tags=["export"]
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

# %% [markdown]
# ### For the CPU: called again
#
# A CUDA device records what is launched; a CPU has nothing of the kind, but
# the idea works there, too. The calls of a step are written down once, while
# they happen, and made again without Python.
#
# torch lets a callback look at every operator that is called, at its
# arguments and its results; its profiler is made of that. Of an argument we
# need to know where it came from. A result of a recorded call gets a *place*;
# a tensor that no recorded call made (a weight, the cache, the step's own
# tensors) stays the tensor it is. Operators that an operator calls are not
# ours to call, so only the outermost count.
#
# Everything else is constant, and must be. A number read out of a tensor
# (`x.item()`) would be frozen in every later step, so a call that makes of a
# tensor something else is refused, as is a list of tensors, whose places are
# not followed.

# %% [markdown] tags=["export:recording.h"]
# ```cpp
# namespace {
#
# struct Use {
#   size_t argument, place;
#   bool last;
# };
#
# struct Call {
#   c10::OperatorHandle op;
#   std::vector<c10::IValue> arguments;
#   std::vector<Use> made;         // arguments that earlier calls make
#   std::vector<int64_t> results;  // their places; -1: a tensor known before
# };
#
# // calls of operators, noted while they happen; replay() makes them again
# struct Recording : torch::CustomClassHolder {
#   std::vector<Call> calls;
#   std::vector<Tensor> places;
#   std::unordered_map<const void*, int64_t> known;  // tensor: place, or -1
#   std::string refused;  // which call cannot be made again, and why
#   at::CallbackHandle handle = at::INVALID_CALLBACK_HANDLE;
#   int depth = 0;  // of calls within calls
#
#   static thread_local Recording* current;
#
#   void begin() {
#     TORCH_CHECK(!current && calls.empty(), "recording: begun twice");
#     current = this;
#     handle = at::addThreadLocalCallback(
#         at::RecordFunctionCallback(entered, left)
#             .needsInputs(true).needsOutputs(true)
#             .scopes({at::RecordScope::FUNCTION}));
#   }
#
#   std::string end() {
#     TORCH_CHECK(current == this, "recording: ended, not begun");
#     at::removeCallback(handle);
#     current = nullptr;
#     known.clear();
#     std::vector<bool> later(places.size());
#     for (auto call = calls.rbegin(); call != calls.rend(); ++call)
#       for (auto use = call->made.rbegin(); use != call->made.rend(); ++use) {
#         use->last = !later[use->place];
#         later[use->place] = true;
#       }
#     places.assign(places.size(), Tensor());
#     return refused;
#   }
#
#   static std::unique_ptr<at::ObserverContext> entered(
#       const at::RecordFunction& function) {
#     if (current->depth++ == 0) current->add(function);
#     return nullptr;
#   }
#
#   static void left(const at::RecordFunction& function,
#                    at::ObserverContext*) {
#     if (--current->depth == 0) current->finish(function);
#   }
#
#   void refuse(const at::RecordFunction& function, const char* why) {
#     if (refused.empty()) refused = std::string(function.name()) + why;
#   }
#
#   void add(const at::RecordFunction& function) {
#     const auto name = function.operator_name();
#     if (!name) refuse(function, " is no operator");
#     if (!refused.empty()) return;  // nothing here will be called again
#     const auto inputs = function.inputs();
#     calls.push_back({c10::Dispatcher::singleton().findSchemaOrThrow(
#                          name->name.c_str(), name->overload_name.c_str()),
#                      std::vector<c10::IValue>(inputs.begin(), inputs.end()),
#                      {}, {}});
#     Call& call = calls.back();
#     for (size_t i = 0; i < inputs.size(); ++i)
#       if (inputs[i].isTensor()) {
#         const int64_t place = known.emplace(
#             inputs[i].unsafeToTensorImpl(), -1).first->second;
#         if (place < 0) continue;
#         call.made.push_back({i, size_t(place), false});
#         call.arguments[i] = {};
#       } else if (inputs[i].isList()) {
#         for (const c10::IValue& one : inputs[i].toListRef())
#           if (one.isTensor()) refuse(function, " takes a list of tensors");
#       }
#   }
#
#   void finish(const at::RecordFunction& function) {
#     if (!refused.empty()) return;
#     const auto& from = calls.back().arguments;
#     const bool constant = calls.back().made.empty() && std::none_of(
#         from.begin(), from.end(), [](auto& x) { return x.isTensor(); });
#     for (const c10::IValue& result : function.outputs()) {
#       if (!result.isTensor() && constant) return calls.pop_back();
#       if (!result.isTensor()) return refuse(function, " gives no tensor");
#       const auto [at, fresh] = known.emplace(
#           result.unsafeToTensorImpl(), int64_t(places.size()));
#       calls.back().results.push_back(fresh ? at->second : -1);
#       if (fresh) places.push_back(result.toTensor());  // keeps its address
#     }
#   }
#
#   void replay() {
#     std::vector<c10::IValue> stack;
#     for (const Call& call : calls) {
#       stack.assign(call.arguments.begin(), call.arguments.end());
#       for (const Use& use : call.made)
#         if (use.last) stack[use.argument] = std::move(places[use.place]);
#         else stack[use.argument] = places[use.place];
#       call.op.callBoxed(stack);
#       for (size_t i = 0; i < call.results.size(); ++i)
#         if (call.results[i] >= 0)
#           places[call.results[i]] = std::move(stack[i]).toTensor();
#     }
#   }
# };
#
# thread_local Recording* Recording::current = nullptr;
#
# TORCH_LIBRARY_FRAGMENT(gptoss, m) {
#   m.class_<Recording>("Recording")
#       .def(torch::init<>())
#       .def("begin", &Recording::begin)
#       .def("end", &Recording::end)
#       .def("replay", &Recording::replay);
# }
#
# }  // namespace
# ```

# %% [markdown]
# A callback must not throw (torch would print the error and go on), so what is
# refused is told at the end. A place is emptied when it is used for the last
# time: intermediate results are as short-lived as they were.

# %% [markdown]
# So the first step is recorded while it runs, and nothing is undone. A
# call that cannot be made again is no catastrophe, only slow; it is told.

# %% tags=["export"]
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

# %% [markdown]
# Three numbers show it: a sum is recorded once and made again on what its
# arguments hold by then. A function that looks at a number is refused, and
# goes on being run as it was.

# %%
given, total = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
ran, looked = [], []


def add() -> None:
    ran.append("add")
    total.copy_(total + 10 * given)


def add_and_look() -> None:
    total.copy_(total + 10 * given)
    looked.append(int(total[0].item()))


recorded = not path.startswith("torch")  # with no compiler nothing records
with torch.inference_mode():
    for run in (add, add_and_look):
        again = call_again(run) if recorded else run
        for _ in range(3):
            again()
            print(total.int().tolist(), end=" ")
            given += 1
        print("looked at:", looked)
assert len(ran) == (1 if recorded else 3) and len(looked) == 3

# %% [markdown]
# ### What may be recorded
#
# On CUDA, experts that do not ask the host which of
# them was chosen. On the CPU the kernels ask inside an operator; but a hook or
# a replaced `forward` is Python, and would run once and never again. So every
# module must run a forward of this package, as it was written. What the class
# is called or where it lies says nothing about that; a subclass that adds
# nothing to `forward` has the very same function.

# %% tags=["export"]
_FORWARDS = {kind.forward for kind in (
    Block, Attention, MLP, Router, Experts, RMSNorm, Linear, CompactLinear,
    Embedding, nn.ModuleList)}


def _addition(name: str, module: nn.Module) -> str | None:
    """What a call of the module does beyond a forward of this package."""
    kind = type(module)
    known = kind.forward in _FORWARDS or isinstance(module, GptOss) and (
        kind.forward is GptOss.forward and kind.run is Stack.run)
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

# %% tags=["export"]
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

# %% [markdown]
# ### One token a row
#
# Cache and step must not disagree. They cannot if they hold the same tensors:
# the step puts its own, which it changes in place, into the cache as its
# `rows`. Whoever else uses the cache puts other `Rows` there
# ([cache](../model/cache.ipynb)); the step notices by their identity, without
# a look at what is in them, and copies. Only then does it wait for the device,
# to learn the lengths; after that the host counts along, and refuses a token
# that has no room before anything is written.
#
# A step that fails may have written the new token's keys into some rings,
# over those of the position that leaves the window. That slot is then marked
# empty: the token can be fed again, and a rollback knows what is missing.

# %% tags=["export"]
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
                [tuple(y.transpose(1, 2).view(-1, y.shape[-1])
                       for y in (x.k, x.v)) for x in layers], kinds)
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

# %% [markdown]
# ### Who asks for it
#
# `choose_step` of [generating](../text/generating.ipynb) asks for it, by the
# table of what answers ([operators](../model/operators.ipynb)), and `generate`
# runs all tokens after the prompt by it where kernels are loaded, for a model
# in their type on the CPU. Elsewhere it has to be asked for,
# `generate(..., decode=DecodeStep)`, and on CUDA for a reason: **no GPU has
# recorded it yet.** What can be held without one is held by the assertions of
# this chapter and in `tests/kernels/test_step.py`, where something else in the
# place of `cuda_graph` warms up, undoes and replays. Sampling still waits for
# the device, once a token instead of at every check.

# %% tags=["export"]
from weakref import WeakKeyDictionary

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

# %% [markdown]
# ## It holds
#
# **A recording** beside its twin in numpy, which computes the same chain in
# float64. The second input was never seen while the calls were noted:

# %%
import numpy as np

x, y = torch.zeros(3, 4).bfloat16(), torch.zeros(3, 4)
w = torch.randn(4, generator=torch.Generator().manual_seed(0)).bfloat16()


def chain() -> None:
    y.copy_(((x + x).float() * 3).softmax(-1) * w.float())


def twin(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    power = np.exp(6 * x)
    return power / power.sum(-1, keepdims=True) * w


with torch.inference_mode():
    again = call_again(chain) if recorded else chain
    for seed in (1, 2):
        x.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(
            seed)))
        again()
        exact = twin(x.double().numpy(), w.double().numpy())
        print(f"{y[0, 0].item():7.3f} and by the twin {exact[0, 0]:7.3f}")
        np.testing.assert_allclose(y.numpy(), exact, atol=1e-6)

# %% [markdown]
# **The step with fixed shapes** gives the logits of the ordinary path, 150
# tokens long, past the window of 64 and with most slots empty at first.
# The sums over keys run over all slots now, and a library may cut a
# longer sum otherwise, hence a tolerance; the greedy tokens are the same.

# %%
from gptoss.text.generate import choose_step, forward_step, generate
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer

POCKET = Path(gptoss.__file__).parent / "pocket"
tokens = Tokenizer.from_pretrained(POCKET).encode(
    "Once upon a time there was a small fox named Mira.")
model = GptOss.from_pretrained(POCKET)
narrow = GptOss.from_pretrained(POCKET, dtype=torch.float32)
assert narrow.config.sliding_window < 150
greedy = {"sampler": Sampler(0.0), "max_new_tokens": 150}
plain, stepped = (list(generate(narrow, tokens[:8], decode=decode, **greedy))
                  for decode in (forward_step, DecodeStep))
assert plain == stepped
caches = [narrow.new_cache(max_tokens=200) for _ in range(2)]
fixed = DecodeStep(narrow, caches[1])
with torch.inference_mode():
    for given in plain:
        given = torch.tensor([[given]])
        expected = narrow(given, cache=caches[0])
        torch.testing.assert_close(fixed(given), expected, atol=1e-4,
                                   rtol=1e-5)
assert torch.equal(caches[0].rows.ring, caches[1].rows.ring)
print(len(stepped), "greedy tokens are the same, logits to 1e-4")

# %% [markdown]
# In the type of the kernels the step is recorded and called again, and there
# an empty slot adds exactly nothing: the logits are equal to the last bit.
# Then the same 150 tokens, with Python between the calls and without, tell
# what it costs in the shipped model, where the arithmetic is small.

# %% tags=["nbval-ignore-output"]
def timed_steps(step):
    """Logits of every step, and the median of their seconds."""
    logits, seconds = [], []
    for given in plain:
        start = time.perf_counter()
        logits.append(step(torch.tensor([[given]])).clone())
        seconds.append(time.perf_counter() - start)
    return torch.cat(logits), statistics.median(seconds)


with torch.inference_mode():
    by_forward, by_step = (timed_steps(make(model, model.new_cache()))
                           for make in (forward_step, choose_step))
assert torch.equal(by_forward[0], by_step[0])
print(f"{1e3 * by_forward[1]:.2f} ms a token by the model's forward, "
      f"{1e3 * by_step[1]:.2f} called again")

# %% [markdown]
# And nothing in it depends on the numbers. With *fake* tensors, which have a
# shape and no content, whoever asks for a number or makes a shape of one
# fails. The ordinary path does at its first check; the step runs through.

# %%
from torch._subclasses.fake_tensor import FakeTensorMode

with FakeTensorMode(allow_non_fake_inputs=True):
    seen = fixed()
    try:
        narrow(torch.zeros(1, 1, dtype=torch.int64), cache=caches[0])
    except Exception as error:
        print("the ordinary path:", type(error).__name__)
print("the step: logits", tuple(seen.shape))

# %% [markdown]
# ## Cost
#
# If a step makes $n$ calls of $c$ seconds each out of Python and reads $b$
# bytes at $\beta$ bytes a second, the calls take
#
# $$ \frac{n c}{n c + b / \beta} $$ (step-share)
#
# of its time, where nothing overlaps. A small model reads little in many
# calls, a fast device reads much in no time: both are where recording pays.

# %%
for name, n, c, speed in (("20b, two cores", 700, 10e-6, 30e9),
                          ("20b, a GPU", launches.count, 5e-6, 3e12)):
    calls, reads = n * c, bytes_read_per_token(big) / speed
    print(f"{name:15} {1e3 * calls:4.1f} ms of calls, {1e3 * reads:5.1f} of "
          f"reading: {calls / (calls + reads):.0%}")

# %% [markdown]
# ## Takeaways
#
# - With fixed shapes and fixed addresses, the calls of one step are those of
#   the next: they are noted once, and made again without Python.
# - A slot that holds nothing has position -1, and no query sees it: a cache
#   with room to spare gives the same logits as one that grows.
# - What is constant in a recording must be constant in truth: a number read
#   out of a tensor, a hook, a forward of somebody else is found and refused.
# - Cache and step cannot disagree if they hold the same tensors.

# %% [markdown]
# ## Exercises
#
# ### Exercise 1
#
# A full layer shows 256 slots, then 512, 1024, … and each time the step is
# recorded anew. How often is that for a text of 100,000 tokens, and what would
# it be with 256 more each time? And how many slots, empty or not, does a step
# read in the mean, compared with those that hold something?

# %% tags=["hide-cell"]
length = 100_000
needed = torch.arange(1, length + 1)
doubled = 2 ** needed.double().log2().ceil().clamp(min=8)
added = (needed + 255) // 256 * 256
for name, seen in (("doubled", doubled), ("256 more", added)):
    print(f"{name:8} recorded {len(seen.unique()):3} times, "
          f"{seen.double().sum() / needed.sum():.2f} slots for each in use")
assert len(doubled.unique()) == 10 and len(added.unique()) == 391

# %% [markdown]
# ### Exercise 2
#
# Why must `self.ring.copy_(ring)` and `self.lengths.add_(1)` come last in
# `_run`? Let the model fail in the middle of a step, and feed the token again.

# %% tags=["hide-cell"]
def as_it_is(run: Work, undo: Work) -> Work:
    return run  # a recording would not notice a hook that comes later


cache = narrow.new_cache()
step = DecodeStep(narrow, cache, as_it_is)
expected = [step(torch.tensor([[token]])).clone() for token in tokens[:2]]
cache = narrow.new_cache()
step = DecodeStep(narrow, cache, as_it_is)
step(torch.tensor([[tokens[0]]]))


def fail(*given):
    raise RuntimeError("out of memory, say")


broken = narrow.layers[2].register_forward_pre_hook(fail)
try:
    step(torch.tensor([[tokens[1]]]))
except RuntimeError as error:
    print(f"failed: {error}; the cache holds", cache.rows.lengths.tolist())
broken.remove()
logits = step(torch.tensor([[tokens[1]]]))
assert torch.equal(logits, expected[1])
print("fed again, the logits are the same; it holds",
      cache.rows.lengths.tolist())

# %% [markdown]
# ## Sources
#
# - What a graph may hold: PyTorch's notes, "CUDA Graphs",
#   https://docs.pytorch.org/docs/stable/notes/cuda.html.
# - Looking at every call of an operator: pytorch/pytorch,
#   `aten/src/ATen/record_function.h`.
# - Static shapes and a compiled step of decoding: meta-pytorch/gpt-fast,
#   `generate.py`.
