"""Kernels beside plain torch, given what no model gives them: a program.

python kernel_fuzz.py SEED COUNT [wrong|valid] [sanitized] calls operators
with random sizes, types and strides, `wrong` ones by default, and compares
what becomes of each call with what plain torch makes of the same arguments.
It prints one line for every difference and, last, how many calls there were
and how many of them plain torch refused. A process of its own, so that a
signal is a failing test and not the end of all tests. sanitized: with kernels
compiled for ASan and UBSan, which must be there, and libasan in LD_PRELOAD.
"""

import random
import sys

import torch

from gptoss.kernels import build
from gptoss.kernels.compact import pack_by_torch
from gptoss.kernels.eight import pack_by_steps
from gptoss.weights.encoding import encode

OPS = torch.ops.gptoss
SANITIZED = (*(option for option in build.OPTIONS if option != "-O3"),
             "-O1", "-g1", "-fno-omit-frame-pointer",
             "-fsanitize=address,undefined", "-fno-sanitize=vptr",
             "-fno-sanitize-recover=undefined")


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16()


def linear(draw) -> list:
    m, n = draw(1, 2, 8, 33), draw(16, 32, 64, 96, 128)
    bias = draw(None, numbers(m))
    shape = draw((n,), (1, n), (5, n), (2, 3, n))
    return [numbers(*shape), numbers(m, n), bias]


def mxfp4_linear(draw) -> list:
    x, weight, bias = linear(draw)
    if weight.shape[1] % 32:
        x, weight = numbers(2, 64), numbers(len(weight), 64)
    return [x, *encode(weight.float()), bias]


def compact_linear(draw) -> list:
    m, n = draw(1, 3, 40), draw(64, 192)
    weight = numbers(m, n)
    weight[0, :3] *= 1e-9
    return [numbers(draw(1, 2, 7), n), weight, draw(None, numbers(m)),
            *pack_by_torch(weight)]


def eight_linear(draw) -> list:
    m, n = draw(1, 3, 40), draw(64, 192)
    return [numbers(draw(1, 2, 7, 9), n), *pack_by_steps(numbers(m, n)),
            draw(None, numbers(m))]


def packed_experts(draw) -> list:
    N, E, D, F = draw(1, 2, 9), draw(1, 2, 5), draw(32, 96), draw(32, 64)
    K = min(E, draw(1, 2))
    ids = torch.rand(N, E).topk(K).indices
    return [numbers(N, D), ids, numbers(N, K),
            *encode(0.2 * torch.randn(E, 2 * F, D)), numbers(E, 2 * F),
            *encode(0.2 * torch.randn(E, D, F)), numbers(E, D), 7.0]


def rms_norm(draw) -> list:
    n = draw(1, 8, 33)
    return [numbers(*draw((n,), (3, n), (2, 4, n))), numbers(n), 1e-5]


def rope(draw) -> list:
    B, T, H, half = draw(1, 2), draw(1, 5), draw(1, 3), draw(1, 4, 16)
    tables = numbers(draw(1, B), T, half)
    return [numbers(B, T, H, 2 * half), tables, numbers(*tables.shape)]


def route(draw) -> list:
    E = draw(1, 4, 9)
    return [numbers(draw(1, 6), E), draw(1, min(4, E), E)]


def sink_attention(draw) -> list:
    B, T, S = draw(1, 2, 3), draw(1, 2, 9), draw(1, 7, 80)
    G, J, C = draw(1, 2), draw(1, 3), draw(16, 32, 24)
    k_pos = torch.arange(S).expand(draw(1, B), S)
    q_pos = torch.arange(S - 1, S + T - 1).expand(draw(1, B), T)
    return [numbers(B, T, G * J, C), numbers(B, S, G, C),
            numbers(B, S, G, C), numbers(G * J), q_pos, k_pos,
            draw(0, 1, 8), C ** -0.5]


def packed_experts_eight(draw) -> list:
    return packed_experts(draw)


MAKERS = (linear, mxfp4_linear, compact_linear, eight_linear, packed_experts,
          packed_experts_eight, rms_norm, rope, route, sink_attention)
TYPES = (torch.bfloat16, torch.float32, torch.float64, torch.float16,
         torch.int64, torch.int32, torch.uint8, torch.bool)


def resized(x: torch.Tensor, draw) -> torch.Tensor:
    """The same numbers, repeated or cut, in another shape."""
    shape = list(x.shape)
    kind = draw(*range(7))
    if kind == 0 and len(shape) > 1:
        i, j = draw(*range(len(shape))), draw(*range(len(shape)))
        shape[i], shape[j] = shape[j], shape[i]
    elif kind == 1 and shape:
        shape.pop(draw(*range(len(shape))))
    elif kind == 2:
        shape.insert(draw(*range(len(shape) + 1)), draw(1, 1, 2))
    elif shape:
        at = draw(*range(len(shape)))
        n = shape[at]
        shape[at] = draw(0, 1, n + 1, max(n - 1, 0), 2 * n, 32 * n, n // 2)
    count = torch.Size(shape).numel()
    flat = x.reshape(-1)
    if not flat.numel():
        return x.new_zeros(shape)
    return flat.repeat(-(-count // flat.numel()))[:count].reshape(shape)


def strided(x: torch.Tensor, draw) -> torch.Tensor:
    """The same numbers in the same shape, elsewhere in memory."""
    kind = draw(0, 1, 2)
    if kind == 0 and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1 and x.ndim:
        return torch.stack([x, x], -1)[..., 0]
    return torch.cat([x.reshape(-1)[:1], x.reshape(-1)])[1:].view(x.shape)


def spoil(arguments: list, draw) -> None:
    """Change one argument or some, in place."""
    for _ in range(draw(1, 1, 1, 2, 3)):
        at = draw(*range(len(arguments)))
        value = arguments[at]
        if isinstance(value, torch.Tensor):
            kind = draw("size", "size", "size", "size", "type", "stride",
                        "other", "value")
            if kind == "size":
                arguments[at] = resized(value, draw)
            elif kind == "type":
                arguments[at] = value.to(draw(*TYPES))
            elif kind == "stride":
                arguments[at] = strided(value, draw)
            elif kind == "value":
                if value.dtype == torch.int64 and value.numel():
                    arguments[at] = value.clone(
                        memory_format=torch.contiguous_format)
                    arguments[at].view(-1)[0] = draw(-1, 3, 100)
            else:  # another argument's tensor
                others = [x for x in arguments
                          if isinstance(x, torch.Tensor)]
                arguments[at] = draw(*others)
        elif isinstance(value, int):
            arguments[at] = draw(-1, 0, 1, 5, 10 ** 6, 2 ** 40)
        elif value is None:
            arguments[at] = numbers(*draw((), (1,), (8,), (5, 8)))


def outcome(run, arguments: list) -> tuple:
    """Tensors, or the error, of a call."""
    try:
        with torch.inference_mode():
            found = run(*arguments)
    except Exception as error:  # which one is torch's business
        return None, error
    return found if isinstance(found, tuple) else (found,), None


def difference(fast: tuple, slow: tuple) -> str:
    for a, b in zip(fast, slow, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return (f"gave {a.dtype} {tuple(a.shape)}, expected {b.dtype} "
                    f"{tuple(b.shape)}")
        a, b = a.double(), b.double()
        if not torch.equal(a.isfinite(), b.isfinite()):
            return "gave NaN or infinity elsewhere"
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        if (a - b).norm() > 0.02 * b.norm() + 1e-30:
            return f"is off by {((a - b).norm() / b.norm()).item():.2g}"
    return ""


def words(arguments: list) -> str:
    return ", ".join(
        f"{str(x.dtype)[6:]} {tuple(x.shape)} {x.stride()}"
        if isinstance(x, torch.Tensor) else repr(x) for x in arguments)


def compared(operator, arguments: list) -> tuple[str, bool]:
    """How the kernel differs from plain torch, and if that refuses."""
    fast, error = outcome(operator, arguments)
    with build.plain_torch():
        slow, refusal = outcome(operator, arguments)
    if (fast is None) != (slow is None):
        return (f"raises {error!r}" if fast is None else
                f"gives a result where torch raises {refusal!r}"
                ), slow is None
    return difference(fast, slow) if slow is not None else "", slow is None


def main(seed: int, count: int, kind: str = "wrong",
         sanitized: str = "") -> None:
    if sanitized:
        build.OPTIONS = SANITIZED
    assert "C++" in build.load_kernels()
    assert torch.ops.gptoss.kernels_on()
    torch.set_num_threads(2 if kind == "valid" else 1)
    refused = differ = 0
    for number in range(count):
        chance = random.Random(f"{seed} {number}")

        def draw(*choices, chance=chance):
            return chance.choice(choices)
        torch.manual_seed(chance.getrandbits(30))
        make = draw(*MAKERS)
        arguments = make(draw)
        if kind == "wrong":
            spoil(arguments, draw)
        text = f"{seed} {number} {make.__name__}({words(arguments)})"
        print(text, file=sys.stderr, flush=True)  # what a signal ended
        found, refuses = compared(getattr(OPS, make.__name__), arguments)
        refused += refuses
        if found:
            differ += 1
            print(text, found)
    print(f"{count} calls, {refused} refused, {differ} differ")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
