"""What all tests share: one core, no network, no run-to-run chance."""

import os

# kernels register for a whole process; only test_kernels.py wants them
os.environ.setdefault("GPTOSS_KERNELS", "torch")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
