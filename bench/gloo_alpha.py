"""What an all-reduce over gloo takes on this machine: seconds to begin and
for a step, and bytes a second, fitted to measurements; see book/parallel.

    python bench/gloo_alpha.py            # worlds of 2, 3 and 4 processes
    python bench/gloo_alpha.py 2 4 8

For each world and size it prints the fastest and the median of many calls.
Ranks that share a core wait for each other's turns, which is no latency of
the network: use as many free cores as ranks.
"""

import subprocess
import sys
import time

import torch
import torch.distributed as dist

SIZES = (5_760, 65_536, 1_048_576, 16_777_216)


def measure() -> None:
    """In each process of torchrun."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    R, rows = dist.get_world_size(), []
    for size in SIZES:
        x = torch.zeros(size // 4)
        times = []
        for _ in range(400 if size < 1e6 else 20):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(x)
            times.append(time.perf_counter() - start)
        times.sort()
        rows.append((size, times[0], times[len(times) // 2]))
    if dist.get_rank() == 0:
        for size, least, middle in rows:
            print(f"{R:3} ranks {size:12,} bytes: least {1e6 * least:10,.0f} "
                  f"us, median {1e6 * middle:10,.0f} us; {2 * (R - 1):2} "
                  f"steps, {1e6 * least / (2 * (R - 1)):8,.1f} us each",
                  flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1:] == ["--in-a-world"]:
        measure()
    else:
        for ranks in sys.argv[1:] or ("2", "3", "4"):
            subprocess.run([
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", ranks, __file__, "--in-a-world"],
                check=True)
