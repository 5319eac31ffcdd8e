"""Dense matrices in 16, 12 and 8 bits a number, as ratios within one run.

    python bench/dense.py [--threads 2] [--json]
    GPTOSS_KERNELS=avx2 python bench/dense.py

For each shape of the 20b (an output projection of attention, the head) and
for --rows tokens at once: the time of one product with the matrix in bf16, in
twelve bits and in eight, which take turns, --repeats times, the best counts;
how many times faster than bf16 that is; and its bytes over what this
machine's memory delivers in that time. A small matrix is there many times,
so that no cache holds it.
"""

import argparse
import json
import time

import torch

from gptoss.kernels.build import kernel_path
from gptoss.kernels.compact import pack
from gptoss.kernels.eight import pack_eight
from gptoss.kernels.roofline import read_speed

OPS = torch.ops.gptoss
SHAPES = {"attention": (4096, 2880), "head": (201_088, 2880)}
BEYOND = 2 ** 28  # bytes that no cache holds


def forms(m: int, n: int) -> dict:
    """Of a random matrix: a product with it, and its bytes."""
    weight = torch.empty(m, n, dtype=torch.bfloat16).normal_(0, 0.02)
    compact, eight = pack(weight), pack_eight(weight)
    copies = -(-BEYOND // eight.nbytes)
    weights = [weight.clone() for _ in range(copies)]
    compacts = [tuple(x.clone() for x in compact) for _ in range(copies)]
    eights = [tuple(x.clone() for x in eight) for _ in range(copies)]
    return {
        "copies": copies,
        "16": (weight.nbytes,
               lambda x, i: OPS.linear(x, weights[i], None)),
        "12": (compact.nbytes, lambda x, i: OPS.compact_linear(
            x, weights[i], None, *compacts[i])),
        "8": (eight.nbytes, lambda x, i: OPS.eight_linear(x, *eights[i],
                                                          None))}


@torch.inference_mode()
def measure(name: str, rows: list[int], repeats: int, speed: float
            ) -> list[dict]:
    m, n = SHAPES[name]
    made, found = forms(m, n), []
    copies = made.pop("copies")
    for count in rows:
        x = torch.randn(count, n).bfloat16()
        best = dict.fromkeys(made, float("inf"))
        for _ in range(repeats):
            for bits, (_, run) in made.items():
                for i in range(copies):
                    start = time.perf_counter()
                    run(x, i)
                    best[bits] = min(best[bits], time.perf_counter() - start)
        found += [{"matrix": name, "rows": count, "bits": int(bits),
                   "seconds": best[bits],
                   "times_bf16": best["16"] / best[bits],
                   "read_bandwidth_share": size / best[bits] / speed}
                  for bits, (size, _) in made.items()]
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--matrix", choices=SHAPES, action="append")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    found = {"kernels": kernel_path(), "threads": torch.get_num_threads()}
    speed = read_speed()
    found["read_bytes_per_second"] = speed
    found["products"] = [
        row for name in options.matrix or SHAPES
        for row in measure(name, options.rows, options.repeats, speed)]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(f"{found['kernels']}, {found['threads']} threads, memory "
          f"{speed / 1e9:.1f} GB/s")
    for row in found["products"]:
        print(f"{row['matrix']:10} {row['rows']:2} rows, {row['bits']:2} bits:"
              f" {1000 * row['seconds']:8.3f} ms, "
              f"{row['times_bf16']:.2f} times as fast as bf16, "
              f"{row['read_bandwidth_share']:.2f} of memory's speed")


if __name__ == "__main__":
    main()
