"""What several rows cost, as ratios within one run.

    python bench/rows.py [PATH] [--products linear,mxfp4,experts]
        [--shapes 4096x2880,2880x4096,512x2880,201088x2880]
        [--rows 1,2,4,5,8,16,32,128,512] [--tokens 1,2,4,8,16]
        [--batch 1,2,4,8] [--dense 16|12|8]
        [--activations 16|8] [--threads 2] [--save] [--json]

Products: the time of ours over the better of ours and torch's, so 1.00 is
the best that there is. `linear`, `compact` (twelve bits) and `eight` (bits)
stand beside F.linear in bf16; `mxfp4` (one packed matrix of 5760 x 2880) and
`experts` (the experts of a layer, four a row, drawn anew for each call)
beside decoding what is hit and F.linear; a third time, `bf16`, is torch's
with the matrices decoded before, which is what the arithmetic allows.
`coarse` are the experts with activations in eight bits; there the third is
ours with sixteen. Several matrices are taken in turn, so that weights come
from memory and not from a cache. Ours and theirs take turns for --seconds,
and of each the fastest turn counts. `--products none` leaves them out.

With PATH, a folder in the released layout (bench/make_checkpoint.py writes
one of random weights): --tokens, one forward of n tokens that continue one
text, with logits for all of them, as a draft is checked; and --batch, a
recorded step of one token for each of n texts, the tokens different
(`distinct`) or all one and the same (`same`), which choose the same experts.
Bytes are the weights that these very tokens need: all dense ones, and each
expert that at least one of them chose, counted in every layer. Told are

    cost     time(n) / time(1)
    excess   time(n) / time(1) over bytes(n) / bytes(1)
    of read  time(n) over bytes(n) / memory's speed
    rate     tokens a second over those of one, for --batch

each from --sets draws of tokens, the fastest of --repeats turns of each.
--save keeps the result for kernels/measured.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from gptoss.kernels.build import load_kernels
from gptoss.kernels.coarse import hold_activations
from gptoss.kernels.compact import pack, saved_bytes
from gptoss.kernels.eight import hold_dense, pack_eight
from gptoss.kernels.roofline import read_speed
from gptoss.kernels.step import DecodeStep
from gptoss.model.answers import load_answers
from gptoss.model.cache import Cache
from gptoss.model.layers import Router
from gptoss.model.transformer import GptOss
from gptoss.moe.experts import by_expert, one_expert
from gptoss.weights.config import GptOssConfig
from gptoss.weights.sizes import bytes_read_per_token, expert_bytes

ROWS = (1, 2, 4, 5, 8, 16, 32, 128, 512)
SHAPES = ("4096x2880", "2880x4096", "512x2880", "201088x2880")
BEYOND_CACHES = 256 * 10 ** 6  # bytes of all matrices together, at least
CONTEXT = 128  # tokens in the cache before a step
Call = Callable[[int], object]  # of the i-th matrix
ops = torch.ops.gptoss


# ---- products

def in_turns(calls: dict[str, Call], seconds: float, count) -> dict:
    """The best seconds of each; they take turns for about so long.

    A turn is some calls, about 5 ms, after one that is not counted. count:
    gives the next number, one for all, so that no matrix comes soon again.
    """
    def turn(call: Call, size: int) -> float:
        call(next(count))
        start = time.perf_counter()
        for _ in range(size):
            call(next(count))
        return (time.perf_counter() - start) / size

    best = {name: turn(call, 1) for name, call in calls.items()}
    size = {name: min(50, max(1, round(0.005 / taken)))
            for name, taken in best.items()}
    start, turns = time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - start < seconds:
        for name, call in calls.items():
            best[name] = min(best[name], turn(call, size[name]))
        turns += 1
    return best


def copies(nbytes: int) -> int:
    return -(-BEYOND_CACHES // nbytes)


def numbers(*shape: int) -> torch.Tensor:
    """bf16 numbers as weights have them; drawing all would take minutes."""
    size = torch.Size(shape).numel()
    drawn = (0.02 * torch.randn(2 ** 20 + 7)).bfloat16()
    return drawn.repeat(-(-size // len(drawn)))[:size].view(shape)


def packed_matrices(count: int, m: int, n: int):
    """blocks (count, m, n / 32, 16), scales (count, m, n / 32)."""
    return (torch.randint(256, (count, m, n // 32, 16), dtype=torch.uint8),
            torch.randint(115, 123, (count, m, n // 32), dtype=torch.uint8))


# kind -> what is made of a matrix, and the product with it
DENSE = {
    "linear": (lambda weight: None,
               lambda x, weight, bias, _: ops.linear(x, weight, bias)),
    "compact": (pack, lambda x, weight, bias, made: ops.compact_linear(
        x, weight, bias, *made)),
    "eight": (pack_eight, lambda x, weight, bias, made: ops.eight_linear(
        x, *made, bias))}


def dense_products(kind: str, shape: str):
    """x -> the calls and the bytes that ours reads, for a dense matrix."""
    m, n = map(int, shape.split("x"))
    weights = [numbers(m, n) for _ in range(copies(2 * m * n))]
    bias = numbers(m) if m < 10 ** 5 else None  # the head has none
    make, multiply = DENSE[kind]
    made = [make(weight) for weight in weights]

    def calls(x: torch.Tensor):
        def ours(i: int):
            i %= len(weights)
            return multiply(x, weights[i], bias, made[i])

        def theirs(i: int):
            return F.linear(x, weights[i % len(weights)], bias)
        size = (made[0] or weights[0]).nbytes
        return {"ours": ours, "torch": theirs}, size
    return calls, n


def mxfp4_products(kind: str, shape: str):
    """x -> the calls and bytes, for one packed matrix of 5760 x 2880."""
    m, n = 5760, 2880
    blocks, scales = packed_matrices(copies(m * n * 17 // 32), m, n)
    bias, decoded = numbers(m), numbers(copies(2 * m * n), m, n)

    def calls(x: torch.Tensor):
        def ours(i: int):
            i %= len(blocks)
            return ops.mxfp4_linear(x, blocks[i], scales[i], bias)

        def theirs(i: int):
            i %= len(blocks)
            weight = ops.mxfp4_decode(blocks[i], scales[i], x.dtype)
            return F.linear(x, weight, bias)

        def before(i: int):
            return F.linear(x, decoded[i % len(decoded)], bias)
        return ({"ours": ours, "torch": theirs, "bf16": before},
                m * n * 17 // 32)
    return calls, n


def expert_products(kind: str, shape: str):
    """x -> the calls and bytes, for the experts of a layer of the 20b."""
    c = GptOssConfig.gpt_oss_20b()
    E, K, D = c.num_local_experts, c.num_experts_per_tok, c.hidden_size
    up = packed_matrices(E, 2 * c.intermediate_size, D)
    down = packed_matrices(E, D, c.intermediate_size)
    up_bias, down_bias = numbers(E, 2 * c.intermediate_size), numbers(E, D)
    decoded = (numbers(E, 2 * c.intermediate_size, D),
               numbers(E, D, c.intermediate_size))

    def calls(x: torch.Tensor):
        draws = [torch.rand(len(x), E).topk(K).indices for _ in range(16)]
        shares = torch.rand(len(x), K).softmax(-1).bfloat16()

        def run(operator, i: int):
            return operator(x, draws[i % 16], shares, *up, up_bias, *down,
                            down_bias, 7.0)

        def theirs(i: int, ready=None):
            def apply(e: int, rows: torch.Tensor) -> torch.Tensor:
                first, second = (
                    (weight[e] for weight in ready) if ready else
                    (ops.mxfp4_decode(blocks[e], scales[e], x.dtype)
                     for blocks, scales in (up, down)))
                return one_expert(rows, first, up_bias[e], second,
                                  down_bias[e])
            return by_expert(x, draws[i % 16], shares, E, apply)

        hit = sum(len(ids.unique()) for ids in draws) / len(draws)
        ours = partial(run, ops.packed_experts)
        if kind == "coarse":
            return ({"ours": partial(run, ops.packed_experts_eight),
                     "torch": theirs, "sixteen": ours}, hit * expert_bytes(c))
        return ({"ours": ours, "torch": theirs,
                 "bf16": lambda i: theirs(i, decoded)},
                hit * expert_bytes(c))
    return calls, D


PRODUCTS = dict.fromkeys(DENSE, dense_products) | {
    "mxfp4": mxfp4_products, "experts": expert_products,
    "coarse": expert_products}


@torch.inference_mode()
def products(options) -> list[dict]:
    found, count = [], itertools.count()
    for kind in options.products:
        make = PRODUCTS[kind]
        shapes = {dense_products: options.shapes,
                  mxfp4_products: ["5760x2880"],
                  expert_products: ["layer"]}[make]
        for shape in shapes:
            calls, width = make(kind, shape)
            for rows in options.rows:
                x = torch.randn(rows, width).bfloat16()
                each, size = calls(x)
                best = in_turns(each, options.seconds, count)
                ours = best["ours"]
                found.append({"product": kind, "shape": shape, "rows": rows}
                             | {f"{name}_ms": 1000 * taken
                                for name, taken in best.items()}
                             | {f"over_{name}": ours / taken for name, taken
                                in best.items() if name != "ours"}
                             | {"over_best": ours / min(ours, best["torch"]),
                                "gb_per_s": size / ours / 1e9})
                if not options.json:
                    print(told_product(found[-1]), flush=True)
            del calls
    return found


def told_product(row: dict) -> str:
    name = f"{row['product']} {row['shape']}"
    line = (f"{name:19} {row['rows']:4} rows: ours {row['ours_ms']:8.3f} ms "
            f"({row['gb_per_s']:5.1f} GB/s), torch {row['torch_ms']:8.3f} ms;"
            f" {row['over_torch']:5.2f} of torch's, {row['over_best']:5.2f} "
            "of the better")
    return line + "".join(f", {row[f'over_{name}']:5.2f} of {name}'s"
                          for name in ("bf16", "sixteen")
                          if f"over_{name}" in row)


# ---- steps of a whole model

@torch.inference_mode()
def filled(model: GptOss, batch: int, slack: int, same: bool = False,
           room: int = 64) -> Cache:
    """A cache of `batch` texts with CONTEXT random keys and values each,
    the same for all or not, and room for more."""
    c = model.config
    cache = model.new_cache(batch, CONTEXT + room, slack=slack)
    plan = cache.begin(torch.arange(CONTEXT).repeat(batch, 1))
    for layer in range(c.num_hidden_layers):
        drawn = torch.randn(2, 1 if same else batch, CONTEXT,
                            c.num_key_value_heads, c.head_dim)
        k, v = drawn.to(model.dtype).expand(2, batch, -1, -1, -1)
        plan.update(layer, k.contiguous(), v.contiguous())
    cache.commit(plan)
    return cache


def forget(cache: Cache) -> None:
    """Back to CONTEXT tokens; nothing must be fed again for that."""
    assert cache.rollback(CONTEXT) == CONTEXT


@torch.inference_mode()
def hits(model: GptOss, tokens: torch.Tensor, cache: Cache) -> int:
    """How many experts these tokens hit, each layer's distinct ones."""
    chosen: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(
        lambda module, x, out: chosen.append(out[1]))
        for module in model.modules() if isinstance(module, Router)]
    try:
        model(tokens, cache=cache)
    finally:
        for hook in hooks:
            hook.remove()
    forget(cache)
    return sum(len(ids.unique()) for ids in chosen)


def weight_bytes(model: GptOss, tokens: int, experts: int) -> int:
    """Bytes of weights that so many tokens and experts hit need."""
    c = model.config
    fixed = (bytes_read_per_token(c) - saved_bytes(model)
             - c.num_hidden_layers * c.num_experts_per_tok * expert_bytes(c))
    return (fixed + (tokens - 1) * 2 * c.hidden_size
            + experts * expert_bytes(c))


class Case:
    """n tokens at a time: draws of them, and what runs a draw."""

    def __init__(self, model: GptOss, kind: str, n: int, sets: int):
        self.kind, self.n = kind, n
        batch = 1 if kind == "tokens" else n
        self.cache = filled(model, batch, n, same=kind == "same")
        draw = torch.Generator().manual_seed(n)
        tokens = torch.randint(model.config.vocab_size, (sets, n),
                               generator=draw)
        if kind == "same":
            tokens = tokens[:, :1].expand(-1, n)
        self.draws = [t.view(batch, -1).contiguous() for t in tokens]
        self.hits = [hits(model, t, self.cache) for t in self.draws]
        self.bytes = sum(weight_bytes(model, n, hit)
                         for hit in self.hits) / sets
        self.best = [float("inf")] * sets
        self.run = ((lambda t: model(t, cache=self.cache))
                    if kind == "tokens" else DecodeStep(model, self.cache))
        self.turn(0)  # recorded now
        self.best[0] = float("inf")

    @torch.inference_mode()
    def turn(self, i: int) -> None:
        start = time.perf_counter()
        self.run(self.draws[i])
        self.best[i] = min(self.best[i], time.perf_counter() - start)
        forget(self.cache)

    @property
    def seconds(self) -> float:
        return sum(self.best) / len(self.best)


def steps(model: GptOss, wanted: dict[str, list[int]], sets: int,
          repeats: int) -> tuple[list[dict], float]:
    """Rows of the tables, and memory's speed in bytes a second.

    wanted: for each of "tokens", "distinct" and "same" the numbers n; all
    cases take turns.
    """
    cases = [Case(model, kind, n, sets) for kind, ns in wanted.items()
             for n in sorted({1, *ns})]
    speed = read_speed()
    for _ in range(repeats):
        for i in range(sets):
            for case in cases:
                case.turn(i)
    speed = max(speed, read_speed())
    layers, found = model.config.num_hidden_layers, []
    ones = {case.kind: case for case in cases if case.n == 1}
    for case in cases:
        one = ones[case.kind]
        cost = case.seconds / one.seconds
        found.append({
            "kind": case.kind, "n": case.n, "ms": 1000 * case.seconds,
            "experts_a_layer": sum(case.hits) / sets / layers,
            "bytes": case.bytes, "cost": cost,
            "allowed": case.bytes / one.bytes,
            "excess": cost / (case.bytes / one.bytes),
            "of_read": case.seconds * speed / case.bytes,
            "tokens_per_second": case.n / case.seconds,
            "rate": case.n / cost})
    return found, speed


def told_step(row: dict) -> str:
    return (f"{row['kind']:8} {row['n']:3}: {row['ms']:7.1f} ms, "
            f"{row['experts_a_layer']:4.1f} experts a layer, "
            f"{row['bytes'] / 1e9:5.2f} GB; cost {row['cost']:5.2f} (bytes "
            f"allow {row['allowed']:4.2f}), excess {row['excess']:4.2f}, of "
            f"read {row['of_read']:4.2f}; {row['tokens_per_second']:6.1f} "
            f"tok/s, rate {row['rate']:4.2f}")


def loaded(path: Path, dense: int, activations: int) -> GptOss:
    model = GptOss.from_pretrained(path)
    return hold_activations(hold_dense(model, dense), activations)


def short(found):
    """The same with four digits of each number, as deep as they lie."""
    if isinstance(found, dict):
        return {key: short(value) for key, value in found.items()}
    if isinstance(found, list):
        return list(map(short, found))
    return float(f"{found:.4g}") if isinstance(found, float) else found


def integers(text: str) -> list[int]:
    """"1,2,4" -> [1, 2, 4]; "none" -> []."""
    return [] if text == "none" else [int(part) for part in text.split(",")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path, nargs="?")
    parser.add_argument("--products", default="linear,mxfp4,experts",
                        type=lambda text: [] if text == "none"
                        else text.split(","))
    parser.add_argument("--shapes", type=lambda text: text.split(","),
                        default=list(SHAPES))
    parser.add_argument("--rows", type=integers, default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--tokens", type=integers, default=[1, 2, 4, 8, 16])
    parser.add_argument("--batch", type=integers, default=[1, 2, 4, 8])
    parser.add_argument("--dense", type=int, choices=(16, 12, 8), default=16)
    parser.add_argument("--activations", type=int, choices=(16, 8),
                        default=16)
    parser.add_argument("--sets", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    unknown = [name for name in options.products if name not in PRODUCTS]
    if unknown:
        parser.error(f"--products: expected some of {', '.join(PRODUCTS)}, "
                     f"found {', '.join(unknown)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    load_answers()  # whose product for how many rows, as a model asks for it
    found = {"kernels": load_kernels(), "threads": options.threads}
    if not options.json:
        print(f"{found['kernels']}, {options.threads} threads", flush=True)
    found["products"] = products(options)
    if options.path:
        wanted = {"tokens": options.tokens, "distinct": options.batch,
                  "same": options.batch}
        found["steps"], speed = steps(
            loaded(options.path, options.dense, options.activations),
            {kind: ns for kind, ns in wanted.items() if ns}, options.sets,
            options.repeats)
        found["dense"] = options.dense
        found["read_gb_per_s"] = speed / 1e9
        if not options.json:
            print(f"memory reads at {speed / 1e9:.1f} GB/s")
            for row in found["steps"]:
                print(told_step(row))
    if options.save:
        from kernels import save

        save({"rows": {key: value for key, value in short(found).items()
                       if value != []}})
    if options.json:
        json.dump(found, sys.stdout, indent=1)
        print()


if __name__ == "__main__":
    main()
