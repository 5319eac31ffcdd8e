"""Triton in its interpreter, which computes on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from gptoss.kernels import triton_kernels

TRITON = """
import sys, torch
from gptoss.kernels import triton_kernels as t
from gptoss.moe.experts import packed_by_decoding
from gptoss.weights.encoding import encode
from gptoss.model.ops import attention_in_tiles

dtype, bound = getattr(torch, sys.argv[1]), float(sys.argv[2])
torch.manual_seed(0)

def check(run, exact, *arguments):
    wide = [x.double() if torch.is_tensor(x) and x.is_floating_point() else x
            for x in arguments]
    right = exact(*wide)
    error = ((run(*arguments) - right).norm() / right.norm()).item()
    assert error < bound, error

for N in (1, 3, 40):
    E, K, D, F = 4, 2, 96, 64
    ids = torch.rand(N, E).topk(K).indices
    check(t.experts_by_triton, packed_by_decoding,
          torch.randn(N, D).to(dtype), ids, torch.rand(N, K).to(dtype),
          *encode(0.2 * torch.randn(E, 2 * F, D)),
          torch.randn(E, 2 * F).to(dtype),
          *encode(0.2 * torch.randn(E, D, F)), torch.randn(E, D).to(dtype),
          7.0)
for T, S, window in ((1, 70, 0), (1, 70, 9), (20, 40, 0), (20, 40, 7)):
    k_pos = torch.arange(S).expand(2, S).clone()
    q_pos = k_pos[:, S - T:].clone()
    k_pos[:, 3:5] = -1
    q_pos[0, 0] = S - 1 if T == 1 else -1
    q, k, v = (torch.randn(2, n, heads, 32).to(dtype)
               for n, heads in ((T, 8), (S, 2), (S, 2)))
    check(t.attention_by_triton, attention_in_tiles, q, k, v,
          torch.randn(8).to(dtype), q_pos, k_pos, window, 0.2)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="no triton")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", "1e-6"),
                                              ("float16", "1e-3")])
def test_triton_kernels_in_the_interpreter(dtype, bound):
    done = subprocess.run(
        [sys.executable, "-c", TRITON, dtype, bound], text=True,
        capture_output=True, timeout=280,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]


def test_token_tiles():
    ids = torch.tensor([[2, 0], [2, 1], [2, 0]])
    order, expert, begin, end = triton_kernels.token_tiles(ids, 4, 2)
    seen = []
    for e, first, last in zip(expert.tolist(), begin.tolist(), end.tolist(),
                              strict=True):
        picks = order[first:min(first + 2, last)].tolist()
        assert all(ids.flatten()[pick] == e for pick in picks)
        seen += picks
    assert sorted(seen) == list(range(6))


def test_triton_is_not_needed():
    if find_spec("triton") is None:
        with pytest.raises(RuntimeError, match="triton"):
            triton_kernels.use_triton()
