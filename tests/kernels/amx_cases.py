"""What packed products must give, run by a process of its own.

python amx_cases.py LIBRARY loads these compiled parts and nothing else.
Prints "well".
"""

import sys

import numpy as np
import torch
from kernel_parts import OPS, answers, exact, near, numbers, packed

from gptoss.model.ops import OPERATORS
from gptoss.weights.mxfp4 import decode


def products() -> None:
    """Few and many columns, rows that fill no register, an odd block."""
    for rows, columns in ((50, 96), (64, 128), (33, 32), (200, 320),
                          (16, 2880)):
        code, scales, weight = packed(rows, columns)
        for tokens in (1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 48, 65, 192,
                       193, 225, 400):  # from 193 on in turns
            x, bias = numbers(tokens, columns), numbers(rows)
            near(OPS.mxfp4_linear(x, code, scales, bias),
                 exact(x) @ weight.T + exact(bias))


def dense() -> None:
    """Few and many tokens, rows that fill no register, a row of one step."""
    for rows, columns in ((1, 32), (15, 64), (150, 320), (300, 96)):
        weight, bias = numbers(rows, columns), numbers(rows)
        for tokens in (1, 3, 4, 5, 16, 17, 33, 64, 65, 97, 130):
            x = numbers(tokens, columns)
            near(OPS.linear(x, weight, bias),
                 exact(x) @ exact(weight).T + exact(bias))
            y = OPS.linear(x, weight, None)
            right = exact(x) @ exact(weight).T
            rounded = exact(torch.from_numpy(right).bfloat16())
            assert (np.linalg.norm(exact(y) - right)
                    < 1.01 * np.linalg.norm(rounded - right))


def same_bits_in_company() -> None:
    """From four tokens on it does not matter how many there are."""
    x, weight = numbers(130, 320), numbers(100, 320)
    all_ = OPS.linear(x, weight, None)
    for tokens in (4, 5, 16, 17, 96, 97):
        assert torch.equal(OPS.linear(x[:tokens], weight, None),
                           all_[:tokens])
    x = numbers(400, 320)
    code, scales, _ = packed(100, 320)
    all_ = OPS.mxfp4_linear(x, code, scales, None)
    for tokens in (4, 5, 16, 17, 32, 33, 64, 192, 193, 225):
        assert torch.equal(OPS.mxfp4_linear(x[:tokens], code, scales, None),
                           all_[:tokens])


def experts() -> None:
    """Uneven: an expert with one place, one with two, one with most; what
    stands between the layers keeps sixteen bits, so that the error is hardly
    more than that of rounding the result."""
    for N, E, D, F in ((9, 3, 64, 32), (40, 5, 96, 160), (70, 4, 320, 96),
                       (230, 4, 64, 96)):
        x, shares = numbers(N, D), numbers(N, 2)
        ids = torch.tensor([[0, 1]]).repeat(N, 1)
        ids[0, 0], ids[1:3, 1] = E - 1, E - 2
        up, down = packed(E, 2 * F, D), packed(E, D, F)
        up_bias, down_bias = numbers(E, 2 * F), numbers(E, D)
        right = answers(x, ids, shares, up[2], up_bias, down[2], down_bias)
        y = OPS.packed_experts(x, ids, shares, *up[:2], up_bias, *down[:2],
                               down_bias, 7.0)
        near(y, right)
        rounded = exact(torch.from_numpy(right).bfloat16())
        assert (np.linalg.norm(exact(y) - right)
                < 1.01 * np.linalg.norm(rounded - right))


def scales_without_room() -> None:
    """Whatever the scales are: as by decoding, NaN among them."""
    for some in (0, 1, 2, 252, 253, 254, 255):
        code, scales, _ = packed(40, 96)
        scales[3, 1] = some
        x = numbers(20, 96) * (2.0 ** 60 if some < 100 else 2.0 ** -60)
        weight = decode(code, scales, torch.float64)
        right = x.double() @ weight.T
        y = OPS.mxfp4_linear(x, code, scales, None).double()
        assert torch.equal(y.isnan(), right.isnan()), some
        for row in range(40):
            if not right[:, row].isnan().any():
                near(y[:, row], right[:, row].numpy())


def scales_without_room_between() -> None:
    """The same in the second layer, whose columns are two of a number."""
    for some in (0, 1, 255):
        x, shares = numbers(20, 64), numbers(20, 1)
        ids = torch.arange(20)[:, None] % 2
        up, down = packed(2, 64, 64), packed(2, 64, 32)
        down[1][0, 3, 0] = some
        weight = decode(*down[:2], torch.float64).numpy()
        up_bias, down_bias = numbers(2, 64), numbers(2, 64)
        right = answers(x, ids, shares, up[2], up_bias, weight, down_bias)
        y = exact(OPS.packed_experts(x, ids, shares, *up[:2], up_bias,
                                     *down[:2], down_bias, 7.0))
        assert np.array_equal(np.isnan(y), np.isnan(right))
        assert np.isnan(y).sum() == (10 if some == 255 else 0)
        near(torch.from_numpy(np.nan_to_num(y)), np.nan_to_num(right))


def what_is_not_a_number() -> None:
    """NaN in a token is its own; infinity is NaN in every column of it."""
    x = numbers(20, 96)
    x[4, 7], x[9, 30] = float("nan"), float("inf")
    code, scales, weight = packed(40, 96)
    y = OPS.mxfp4_linear(x, code, scales, None)
    others = [n for n in range(20) if n not in (4, 9)]
    assert y[4].isnan().all() and not y[9].isfinite().any()
    near(y[others], exact(x)[others] @ weight.T)


def all_codes_exactly() -> None:
    """Every code under scales that bf16 holds: sums of one product each."""
    code = (torch.arange(16, dtype=torch.uint8) * 0x11)[:, None, None].expand(
        16, 1, 16).contiguous()
    x = torch.eye(32).bfloat16()
    for scale in range(2, 253):
        scales = torch.full((16, 1), scale, dtype=torch.uint8)
        y = OPS.mxfp4_linear(x, code, scales, None)
        assert torch.equal(y, decode(code, scales, torch.bfloat16).T), scale


CASES = (products, dense, same_bits_in_company, experts, scales_without_room,
         scales_without_room_between, what_is_not_a_number,
         all_codes_exactly)


@torch.inference_mode()
def main(library: str) -> None:
    torch.ops.load_library(library)
    assert "packed_experts" in OPERATORS
    for case in CASES:
        torch.manual_seed(0)
        case()
    print("well")


if __name__ == "__main__":
    main(sys.argv[1])
