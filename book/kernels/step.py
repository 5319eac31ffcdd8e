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
# What in a step of decoding never changes? One token of the 20b is 2,411
# operators in plain torch and some 700 with kernels, and every one of them is
# called out of Python, with arguments that are looked up again: ten
# microseconds a call, as long as a small operator takes to compute. But the
# calls of one step are nearly those of the next. Make them *exactly* those,
# and they can be written down once and made again without Python.

# %%
import logging
import os
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gptoss
from gptoss.kernels.build import load_kernels
from gptoss.model.transformer import GptOss
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token

os.environ["GPTOSS_KERNELS"] = "auto"  # this chapter asks for the kernels
logging.getLogger("gptoss").setLevel(logging.ERROR)  # and says nothing of it
plt.style.use("../_static/book.mplstyle")
path = load_kernels()
big = GptOssConfig.gpt_oss_20b()


class Notes(TorchDispatchMode):
    """Notes every operator that is called: it, its arguments, its result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        self.calls.append((op, args, kwargs or {}, result))
        return result


zero = torch.zeros(1, 1, dtype=torch.int64, device="meta")  # only a shape
with Notes() as notes:
    GptOss(big, device="meta").run(zero, zero)
launches = sum(not op.is_view for op, *_ in notes.calls)  # that compute
print(f"{launches:,} operators in plain torch, the experts of a layer taken "
      "for one")

# %% [markdown]
# ## Picture
#
# Which memory does a step look at? Left, the keys of a full layer that an
# ordinary forward gets: one more in every step, so every step is another
# computation. Right, the same steps with a *fixed* number of slots: those that
# hold nothing yet say so by their position, -1, and no query sees them.

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
# What to see: on the right the shape stays, and only numbers change.
#
# ## The naive version
#
# The shipped model, three tokens, the ordinary way. What keys (B, S, G, C) is
# attention given in the last layer, a full one?

# %%
POCKET = Path(gptoss.__file__).parent / "pocket"
narrow = GptOss.from_pretrained(POCKET, dtype=torch.float32)
cache = narrow.new_cache()
for token in (5, 6, 7):
    with torch.inference_mode(), Notes() as notes:
        narrow(torch.tensor([[token]]), cache=cache)
    given = [args[1] for op, args, *_ in notes.calls
             if "sink_attention" in op.name()]
    print("keys", tuple(given[-1].shape))

# %% [markdown]
# A recording of the first of these steps would be of no use to the second: it
# holds one key. To be called again, a step must keep three rules:
#
# 1. every tensor has the same shape at every step,
# 2. it lies where it lay, and what changes is written into it,
# 3. nobody looks at a number to choose what comes next.
#
# `model(token, cache=cache)` breaks all three: full layers see a slot more,
# the cache's state is a new tensor each time, and checks ask whether ids and
# positions are right.
#
# ## Derivation
#
# The model's arithmetic, `Stack.run` of the
# [transformer](../model/transformer.ipynb), breaks none of them. What it needs
# is a cache that answers in one shape. Is an empty slot really nothing? Here
# is attention of one head, by growing and by fixed keys. (An empty slot may
# hold anything; its score becomes $-\infty$ and its weight 0.)

# %%
generator = torch.Generator().manual_seed(0)
slots, C = 8, 4
keys = torch.full((slots, C), 99.0)  # fixed memory, rubbish in it
positions = torch.full((slots,), -1)  # -1: empty
length, query = torch.zeros(1, dtype=torch.int64), torch.zeros(C)
weights = torch.zeros(slots)


def fixed_step() -> None:
    """Same shapes, same addresses, no number looked at."""
    keys.index_copy_(0, length, query[None])  # the new key into its slot
    positions.index_copy_(0, length, length)
    seen = (positions >= 0) & (positions <= length)
    scores = (keys @ query).masked_fill(~seen, float("-inf"))
    weights.copy_(scores.softmax(0))
    length.add_(1)


grown = torch.zeros(0, C)
for _ in range(3):
    query.copy_(torch.randn(C, generator=generator))
    grown = torch.cat([grown, query[None]])
    fixed_step()
    print("fixed", [round(w, 3) for w in weights.tolist()], "| growing",
          [round(w, 3) for w in (grown @ query).softmax(0).tolist()])

# %% [markdown]
# So the whole ring of a sliding layer, and the first 256, 512, 1024 … slots of
# a full one, answer as well as the filled part.
#
# ## Code
#
# ### What does the model get instead of a cache?
#
# A `FixedView`: for each layer the same memory in two shapes, to read (`seen`)
# and to write (`lines`); for each kind where to write and what the slots hold.

# %% tags=["export"]
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from gptoss.kernels.compact import CompactLinear
from gptoss.kernels.coarse import CoarseExperts
from gptoss.kernels.eight import EightLinear
from gptoss.model.cache import Cache, FullCache
from gptoss.model.rows import CacheError, Rows
from gptoss.model.layers import (
    MLP, Attention, Block, Embedding, Experts, Linear, RMSNorm, Router)
from gptoss.model.transformer import GptOss, ModelError, Stack, check_tokens
from gptoss.model.ops import has_kernel

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

# %% [markdown]
# ### What is a step?
#
# Read `_run` first, the last method: it is `fixed_step` for a whole model.
# Where the tokens go, which slots they see, the model, the greedy choice for
# the next step; and last of all the state, so that a step that fails has
# changed none of it. The rest of the class keeps the rules: `_see` shows twice
# as many slots when they run out, and only then must a step be recorded again.
#
# Cache and step must not disagree. They cannot if they hold the same tensors:
# the step puts its own, which it changes in place, into the cache as its
# `rows` (`_take_over`). Whoever else uses the cache puts other `Rows` there
# ([cache](../model/cache.ipynb)); the step notices by their identity and
# copies. Only then does it look at numbers, to learn the lengths; after that
# Python counts along. What it refuses, before anything is written: no room, or
# a rollback whose tokens wait to be fed again (CacheError); tokens of another
# shape, type or range, or none where it has not chosen any (ModelError).

# %% tags=["export"]
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

# %% [markdown]
# ### How are calls written down?
#
# In Python by `Notes`, which we have. To make the calls again, each noted one
# is made once more. An argument that an earlier call made is replaced by what
# that call gives now; every other tensor is the same tensor as before, with
# the numbers that it holds by then.

# %%
def replay(calls: list[tuple]) -> None:
    made = {}  # id of a noted result -> what stands for it now
    for op, args, kwargs, result in calls:
        args = [made.get(id(x), x) for x in args]
        made[id(result)] = op(*args, **kwargs)


with torch.inference_mode():
    query.copy_(torch.randn(C, generator=generator))
    with Notes() as notes:
        fixed_step()
    for _ in range(2):
        query.copy_(torch.randn(C, generator=generator))
        grown = torch.cat([keys[:length], query[None]])
        replay(notes.calls)
        print(len(notes.calls), "calls,", length.item(), "keys, last weight "
              f"{weights[length - 1].item():.3f}, by the growing one "
              f"{(grown @ query).softmax(0)[-1].item():.3f}")

# %% [markdown]
# The second and third of these steps were never run in Python. The same in
# C++, which is where it is quick. torch lets a callback look at every operator
# (`RecordFunction`; its profiler is made of that). A result of a noted call
# gets a *place*; a tensor that no noted call made (a weight, the cache) stays
# the tensor it is. Operators that an operator calls are not ours to call, so
# only the outermost count (`depth`). A place is emptied when it is used for
# the last time (`last`), so that intermediate results live no longer than they
# did. A callback must not throw, so what is refused is told at the end.

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
# `call_again` records the first run while it happens; later runs are replays.

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
# ### What must not be recorded?
#
# All that is not a tensor is constant in a recording, and must be. A number
# read out of a tensor (`x.item()`) would be frozen in every later step. So a
# call that makes of a tensor something else is refused, as is a list of
# tensors, whose places are not followed. Then `run` goes on being run, and a
# warning says why:

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
# Python that runs beside the operators would run once and never again: a hook,
# a replaced `forward`. So every module must run a forward of this package, as
# it was written; a subclass that adds nothing has the same one. And the
# experts must be packed: plain torch splits the tokens by sizes it reads.

# %% tags=["export"]
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
# ### And on a GPU?
#
# There torch can record what is launched, as a *CUDA graph*: one call replays
# all. Recording follows torch's notes: some runs on another stream first, so
# that what happens once (compiling a kernel, a library's work space) is not
# recorded; those runs write, so each is undone. **No GPU has recorded this
# step yet.** What can be held without one is held by `tests/kernels`, where
# something else in the place of `cuda_graph` warms up, undoes and replays.

# %% tags=["export"]
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
# ### Who asks for a step?
#
# `choose_step` of [generating](../text/generating.ipynb), by the table of what
# answers: all tokens after the prompt run by it, where kernels are loaded, for
# a model in bf16 on the CPU. Elsewhere one asks for it: `generate(...,
# decode=DecodeStep)`.

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
# **The step with fixed shapes** gives the logits of the ordinary path, 150
# tokens long, past the window of 64 and with most slots empty at first. In
# fp32 the sums over keys now run over all slots, and a library may cut a
# longer sum otherwise, hence a tolerance; the greedy tokens are the same.

# %%
from gptoss.text.generate import choose_step, forward_step, generate
from gptoss.text.sampling import Sampler
from gptoss.text.tokenizer import Tokenizer

tokens = Tokenizer.from_pretrained(POCKET).encode(
    "Once upon a time there was a small fox named Mira.")
model = GptOss.from_pretrained(POCKET)
assert narrow.config.sliding_window < 150
greedy = {"sampler": Sampler(0.0), "max_new_tokens": 150}
plain, stepped = (list(generate(narrow, tokens[:8], decode=decode, **greedy))
                  for decode in (forward_step, DecodeStep))
caches = [narrow.new_cache(max_tokens=200) for _ in range(2)]
fixed, worst = DecodeStep(narrow, caches[1]), 0.0
with torch.inference_mode():
    for given in plain:
        given = torch.tensor([[given]])
        expected = narrow(given, cache=caches[0])
        worst = max(worst, (fixed(given) - expected).abs().max().item())
same = sum(a == b for a, b in zip(plain, stepped, strict=True))
print(f"{same} of {len(plain)} greedy tokens are the same")
assert plain == stepped and worst < 1e-3
assert torch.equal(caches[0].rows.ring, caches[1].rows.ring)

# %% [markdown]
# **In bf16** the step is recorded and called again, and there an empty slot
# adds exactly nothing: the logits are equal to the last bit. The same 150
# tokens, with Python between the calls and without, tell what it saves in the
# shipped model, where the arithmetic is small.

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
# **Nothing in it depends on the numbers.** With *fake* tensors, which have a
# shape and no content, whoever asks for a number fails: the ordinary path.

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
# If $n$ calls take $c$ seconds each, and $b$ bytes are read at $\beta$ bytes a
# second, calls are $n c / (n c + b / \beta)$ of a token's time. How much is it
# for the 20b on two cores (700 calls of 10 µs, 30 GB/s), and on a GPU
# with plain torch (5 µs a launch, which we assume, 3 TB/s)?

# %% tags=["hide-cell"]
for name, n, c, speed in (("two cores", 700, 10e-6, 30e9),
                          ("a GPU", launches, 5e-6, 3e12)):
    calls, reads = n * c, bytes_read_per_token(big) / speed
    print(f"{name:9} {1e3 * calls:4.1f} ms of calls, {1e3 * reads:5.1f} of "
          f"reading: {calls / (calls + reads):.0%}")

# %% [markdown]
# ### Exercise 3
#
# `replay` refuses nothing. Note a function that looks at a number, make its
# calls again on other numbers, and see what comes out.

# %% tags=["hide-cell"]
def twice_the_first() -> None:
    out.copy_(given * given[0].item())


given, out = torch.tensor([1.0, 2.0]), torch.zeros(2)
with torch.inference_mode():
    with Notes() as notes:
        twice_the_first()
    given.copy_(torch.tensor([10.0, 20.0]))
    replay(notes.calls)
    frozen = out.tolist()
    twice_the_first()
print("replayed", frozen, "- run anew", out.tolist())
assert frozen != out.tolist()

# %% [markdown]
# ## Sources
#
# - What a graph may hold: PyTorch's notes, "CUDA Graphs",
#   https://docs.pytorch.org/docs/stable/notes/cuda.html.
# - Looking at every call of an operator: pytorch/pytorch,
#   `aten/src/ATen/record_function.h`.
