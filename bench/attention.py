"""What attention costs over long texts, beside what its bytes allow.

    python bench/attention.py [--decode 512,8192] [--prefill 512,4096] [--save]

The shapes of one layer of the 20b, the operator alone. decode: one token, and
a few together (drafts, or rows of a batch), over so many keys; the floor is
what the keys and values take at the speed at which this machine reads
memory. prefill: a chunk of 512 tokens that ends at such a length, in a full
layer, in a sliding one with a ring, and in a sliding one that is given all
keys, as without a cache. The cases take turns, --repeats times; a median and
the best are told, and beside each the operation of torch that comes nearest
(scaled_dot_product_attention, which knows no sinks). --save keeps it in
book/_static/attention_bench.json, for kernels/long_texts. On a machine where
others compute as well, --cpu-time counts the time that one thread was given.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from gptoss.kernels.build import load_kernels

SAVED = (Path(__file__).parent.parent / "book" / "_static"
         / "attention_bench.json")
H, G, C, WINDOW, CHUNK = 64, 8, 64, 128, 512
CACHES = 200_000_000  # bytes that calls in turns read: more than caches hold

Run = Callable[[], object]
clock = time.perf_counter


def lengths(text: str) -> list[int]:
    """"512,8192" -> [512, 8192]; "" -> []."""
    found = [int(part) for part in text.split(",") if part]
    if found and min(found) < 1:
        raise ValueError
    return found


def stores(B: int, S: int, copies: int) -> list[torch.Tensor]:
    """Keys and values (2, B, S, G, C), as a cache lays them out."""
    return [torch.randn(2, B, G, S, C).bfloat16().transpose(2, 3)
            for _ in range(copies)]


def runs(B: int, T: int, S: int, window: int, ring: bool = False
         ) -> dict[str, Run]:
    """T tokens of B rows at the end of S keys: ours, and torch's if full."""
    copies = max(1, min(64, CACHES // (B * S * 4 * G * C)))
    given = stores(B, S, copies if T < CHUNK else 1)
    q, sinks = torch.randn(B, T, H, C).bfloat16(), torch.randn(H).bfloat16()
    at = torch.arange(S).expand(B, S)
    k_pos = at.roll(37, 1) if ring else at.contiguous()
    q_pos = at[:, S - T:].contiguous()
    turn = [0, 0]

    def ours() -> None:
        k, v = given[turn[0] % len(given)]
        turn[0] += 1
        torch.ops.gptoss.sink_attention(q, k, v, sinks, q_pos, k_pos, window,
                                        C ** -0.5)

    mask = None if T == 1 else at[0] <= q_pos[0, :, None]

    def torchs() -> None:
        k, v = given[turn[1] % len(given)]
        turn[1] += 1
        F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask,
            enable_gqa=True)
    if window or T * S > 2 ** 22:  # torch's would take minutes
        return {"ours": ours}
    return {"ours": ours, "torch": torchs}


def read_speed() -> float:
    """As `gptoss.kernels.read_speed`, by our clock."""
    numbers = torch.ones(2 ** 28)
    best = min(timed(numbers.sum, 0) for _ in range(5))
    return numbers.nbytes / best


def timed(run: Run, least: float = 0.02) -> float:
    """Seconds of a call, of as many as take `least` seconds."""
    start, count = clock(), 0
    while count == 0 or clock() - start < least:
        run()
        count += 1
    return (clock() - start) / count


def cases(decode: list[int], together: list[tuple[int, int]],
          prefill: list[int]) -> list[dict]:
    """What is measured, each with `runs`."""
    found: list[dict] = []
    for S in decode:
        found.append({"part": "decode", "layer": "full", "rows": 1,
                      "tokens": 1, "keys": S})
    found.append({"part": "decode", "layer": "sliding", "rows": 1,
                  "tokens": 1, "keys": WINDOW})
    for B, T in together:
        found.append({"part": "decode", "layer": "full", "rows": B,
                      "tokens": T, "keys": 8192})
    for S in prefill:
        T = min(CHUNK, S)
        kinds = [("full", S), ("sliding", min(S, T + WINDOW))]
        kinds += [("sliding, no cache", S)] if S > T + WINDOW else []
        for layer, keys in kinds:
            found.append({"part": "prefill", "layer": layer, "rows": 1,
                          "tokens": T, "keys": keys, "length": S})
    return found


@torch.inference_mode()
def measure(found: list[dict], repeats: int, speed: float) -> None:
    """Adds seconds to each case, and what they are beside; speed: bytes of
    memory a second."""
    for case in found:
        sliding = case["layer"] != "full"
        all_runs = runs(case["rows"], case["tokens"], case["keys"],
                        WINDOW if sliding else 0, case["layer"] == "sliding")
        times: dict[str, list[float]] = {name: [] for name in all_runs}
        for run in all_runs.values():
            run()
        for _ in range(repeats):
            for name, run in all_runs.items():
                times[name].append(timed(run))
        case["seconds"] = statistics.median(times["ours"])
        case["best_seconds"] = min(times["ours"])
        if "torch" in times:
            case["torch_seconds"] = statistics.median(times["torch"])
            case["torch_over_ours"] = case["torch_seconds"] / case["seconds"]
        size = case["rows"] * case["keys"] * 4 * G * C
        if case["part"] == "decode":
            case["bytes"] = size
            case["times_the_floor"] = case["seconds"] * speed / size
        else:
            case["seconds_per_token"] = case["seconds"] / case["tokens"]
            last = range(case["length"] - case["tokens"], case["length"])
            pairs = sum(min(n + 1, WINDOW) if sliding else n + 1
                        for n in last)
            case["flops_per_second"] = 4 * pairs * H * C / case["seconds"]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--decode", type=lengths,
                        default=[128, 512, 2048, 8192, 32768, 131072])
    parser.add_argument("--together", default="1x2,1x4,1x8,4x1,8x1",
                        help="rows x tokens, over 8192 keys")
    parser.add_argument("--prefill", type=lengths,
                        default=[512, 2048, 8192, 32768])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--words", default="", help="the machine")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args(argv)
    if options.cpu_time:
        global clock
        clock, options.threads = time.thread_time, 1
    if options.threads:
        torch.set_num_threads(options.threads)
    pairs = [part.split("x") for part in options.together.split(",") if part]
    found = {"kernels": load_kernels(), "threads": torch.get_num_threads(),
             "words": options.words, "cpu_time": options.cpu_time,
             "read_bytes_per_second": read_speed()}
    all_cases = cases(options.decode, [(int(b), int(t)) for b, t in pairs],
                      options.prefill)
    measure(all_cases, options.repeats, found["read_bytes_per_second"])
    found["cases"] = all_cases
    text = json.dumps(found, indent=1, sort_keys=True)
    if options.save:
        SAVED.write_text(text + "\n")
    if options.json:
        print(text)
        return
    for case in all_cases:
        beside = (f"{case['times_the_floor']:5.2f} times the floor"
                  if case["part"] == "decode" else
                  f"{1e6 * case['seconds_per_token']:7.1f} us a token, "
                  f"{case['flops_per_second'] / 1e9:5.0f} GFLOP/s")
        torchs = (f", torch takes {case['torch_over_ours']:.2f} times as long"
                  if "torch_seconds" in case else "")
        print(f"{case['part']:7} {case['layer']:17} {case['rows']} x "
              f"{case['tokens']:3} over {case['keys']:6}: "
              f"{1e3 * case['seconds']:8.3f} ms, {beside}{torchs}")


if __name__ == "__main__":
    main()
