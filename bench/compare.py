"""Ours, transformers, llama.cpp and its relatives on one checkpoint.

    python bench/compare.py PATH [--engines ours,transformers,llama.cpp]
        [--prompt 512] [--tokens 32] [--repeats 3] [--rounds 1]
        [--gguf FILE] [--llama-python PYTHON] [--binary NAME=FOLDER]
        [--distinct NAME] [--together 1,2,4,8] [--long 4096] [--save SHAPE]
        [--json]

Every engine runs in a process of its own, alone, one after the other; printed
are load seconds, peak resident memory, prefill and decode speed (medians),
and each one's ratio to ours. PATH is a folder in the released layout
(bench/make_checkpoint.py writes one of random weights). ours-compact has a
copy of the dense matrices in twelve bits, ours-eight has them rounded to
eight; ours-coarse rounds what enters the experts to eight bits, and
ours-coarse-eight does both. transformers decodes the experts (bf16, or
float32 with transformers-fp32).

Engines that read GGUF get the checkpoint written on first use with the
package `gguf` of --llama-python's interpreter: to --gguf with dense matrices
in bf16, and for NAME-q8_0 beside it, as FILE.q8_0, with dense matrices in
Q8_0. llama.cpp needs its Python binding (llama-cpp-python) in that
interpreter. --binary, any number of times, names an engine by the folder of
its `llama-bench` and `llama-batched-bench`, built elsewhere; options for both
may follow the folder, as llama-bench takes them: --binary
"ik_llama.cpp=/path/to/build/bin -muge 1". It adds the engine NAME (and
NAME-q8_0, if --engines asks for it). Where its help knows -rtr, as
ik_llama.cpp's does, `-rtr 1` is set unless the options say otherwise: weights
repacked while loading. Its flash attention and fused experts are on unless
told otherwise, and so is llama.cpp's own repacking. What cannot be run is
left out, and a line says so.

--together: that many texts decode together, tokens a second of all of them,
each text 128 tokens long at first (shared by all texts, for a binary). ours
is measured twice: `distinct`, where each text goes on with random tokens of
its own, and `same`, where all texts are equal, so that all choose the same
four experts a layer and read fewer bytes. ik_llama.cpp's llama-batched-bench
feeds token 0 to all texts in every step, which is `same`; llama.cpp's feeds
random tokens, which is `distinct`; --distinct NAME says that a build of the
former was changed to do so too. A ratio compares like with like. --long: a
second, longer prompt, read once a round.

--rounds: how often the engines take turns; of each, the round with the
fastest decode counts, since a machine's memory is not always equally fast,
and the fastest of --together and --long. --save keeps the result for
kernels/measured.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import time
from pathlib import Path

from llama_binaries import bench_binary

SEED = 0
CONTEXT = 128  # tokens of each text before --together, as in rows.py


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def prompt_ids(vocabulary: int, count: int) -> list[int]:
    import random

    return [random.Random(SEED + n).randrange(vocabulary)
            for n in range(count)]


def raw(load: float, runs: list[list[float]]) -> dict:
    """runs: seconds from the start to each token, the first of which ends
    the prompt. What they say is worked out by the process that compares."""
    return {"load_seconds": load, "peak_rss_bytes": peak(), "runs": runs}


# ---- the engines, each in a process of its own

def run_ours(path: Path, options) -> dict:
    from gptoss.kernels.bench import measure
    from gptoss.kernels.coarse import hold_activations
    from gptoss.kernels.eight import hold_dense
    from gptoss.model.transformer import GptOss

    dense, activations = OURS[options.child]
    kept = []

    def load(path: Path) -> GptOss:
        if not kept:
            model = GptOss.from_pretrained(path)
            kept.append(hold_activations(hold_dense(model, dense),
                                         activations))
        return kept[0]

    found = measure(path, options.prompt, options.tokens, options.repeats,
                    load=load)
    if options.long:
        longer = measure(path, options.long, 1, 1, load=load)
        found["prefill_of"] = {
            str(options.long): longer["prefill_tokens_per_second"]}
    if options.together:
        found["together"] = {
            kind: {str(n): together(load(path), n, options.tokens, kind)
                   for n in options.together} for kind in KINDS}
    return found


def together(model, n: int, tokens: int, kind: str) -> float:
    """Tokens a second of n texts that get so many tokens each."""
    import torch
    from rows import filled

    from gptoss.kernels.step import DecodeStep

    warm, same = 2, kind == "same"
    cache = filled(model, n, 0, same=same, room=tokens + warm)
    step = DecodeStep(model, cache)
    drawn = torch.randint(model.config.vocab_size, (tokens + warm, n, 1),
                          generator=torch.Generator().manual_seed(SEED))
    drawn = drawn[:, :1].repeat(1, n, 1) if same else drawn
    for now in drawn[:warm]:
        step(now)
    start = time.perf_counter()
    for now in drawn[warm:]:
        step(now)
    return n * tokens / (time.perf_counter() - start)


def run_transformers(path: Path, options) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, Mxfp4Config

    dtype = (torch.float32 if options.child == "transformers-fp32"
             else torch.bfloat16)
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=Mxfp4Config(dequantize=True), dtype=dtype,
        attn_implementation="eager").eval()
    load = time.perf_counter() - start
    ids = torch.tensor([prompt_ids(model.config.vocab_size, options.prompt)])

    def run() -> list[float]:
        start = time.perf_counter()
        out, times = model(ids, use_cache=True, logits_to_keep=1), []
        times.append(time.perf_counter() - start)
        for _ in range(options.tokens):
            chosen = out.logits[:, -1].argmax(-1)[:, None]
            out = model(chosen, use_cache=True,
                        past_key_values=out.past_key_values)
            times.append(time.perf_counter() - start)
        return times

    with torch.inference_mode():
        model(ids[:, :2], logits_to_keep=1)
        return raw(load, [run() for _ in range(options.repeats)])


def run_llama(path: Path, options) -> dict:
    import llama_cpp

    threads = int(os.environ["OMP_NUM_THREADS"])
    start = time.perf_counter()
    model = llama_cpp.Llama(
        str(options.gguf), n_ctx=options.prompt + options.tokens + 16,
        n_batch=512, n_threads=threads, n_threads_batch=threads,
        verbose=False)
    load = time.perf_counter() - start
    ids = prompt_ids(model.n_vocab(), options.prompt)
    new = prompt_ids(model.n_vocab(), options.tokens)

    def run() -> list[float]:
        model.reset()
        start, times = time.perf_counter(), []
        for tokens in (ids, *([token] for token in new)):
            model.eval(tokens)
            times.append(time.perf_counter() - start)
        return times

    model.eval(ids[:2])
    return raw(load, [run() for _ in range(options.repeats)])


# ---- the file of an engine that reads GGUF

def made_gguf(name: str, options) -> Path | str:
    """The file for an engine of llama.cpp, written if it is not there, or in
    words why there is none."""
    if not options.gguf:
        return "it needs --gguf FILE"
    small = name.endswith("q8_0")
    target = (options.gguf.with_name(f"{options.gguf.name}.q8_0") if small
              else options.gguf)
    if target.exists():
        return target
    place = subprocess.run(
        [options.llama_python, "-c", "import gguf, os; "
         "print(os.path.dirname(os.path.dirname(gguf.__file__)))"],
        capture_output=True, text=True).stdout.strip()
    sys.path.append(place)  # behind what is installed here
    part = target.with_name(f"{target.name}.part")
    try:
        from gguf_file import write_gguf

        write_gguf(options.path, part, "Q8_0" if small else "BF16")
    except ImportError as error:
        return f"the file cannot be written: {error}"
    part.rename(target)
    return target


# ---- one after the other

OURS = {"ours": (16, 16), "ours-compact": (12, 16), "ours-eight": (8, 16),
        "ours-coarse": (16, 8), "ours-coarse-eight": (8, 8)}  # bits
ENGINES = {**dict.fromkeys(OURS, run_ours),
           "transformers": run_transformers,
           "transformers-fp32": run_transformers,
           "llama.cpp": run_llama, "llama.cpp-q8_0": run_llama}
KINDS = ("distinct", "same")


def read_once(files: list[Path]) -> None:
    """Read the files, so that the system has them in memory."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def run_engine(name: str, options) -> dict | str:
    """The engine's report, or in words why there is none."""
    python, more = sys.executable, []
    files = sorted(options.path.glob("*.safetensors"))
    binary = options.binaries.get(name.removesuffix("-q8_0"))
    if binary or name.startswith("llama.cpp"):
        file = made_gguf(name, options)
        if isinstance(file, str):
            return file
        python, more = options.llama_python, ["--gguf", str(file)]
        files = [file]
    read_once(files)
    if binary:
        found = bench_binary(*binary, files[0], options, CONTEXT)
        if name.removesuffix("-q8_0") in options.distinct and (
                "together" in found):
            speeds, = found["together"].values()
            found["together"] = {"distinct": speeds}
        return found
    return run_child(name, options, python, more)


def run_child(name: str, options, python: str, more: list[str]
              ) -> dict | str:
    from gptoss.kernels.bench import summarise

    together = ",".join(map(str, options.together)) or "none"
    done = subprocess.run(
        [python, __file__, str(options.path), "--child", name, "--prompt",
         str(options.prompt), "--tokens", str(options.tokens), "--repeats",
         str(options.repeats), "--together", together, "--long",
         str(options.long), *more], capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(options.threads),
                          "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [
            f"ended with {done.returncode}"]
        return lines[-1]
    found = json.loads(done.stdout.splitlines()[-1])
    if "runs" in found:
        # how many bytes another engine reads for a token is not known here
        said = summarise(found.pop("runs"), options.prompt, 0, 1.0)
        found |= {"prompt_tokens": options.prompt} | {
            key: value for key, value in said.items()
            if "bytes" not in key and "bandwidth" not in key}
    return found


def best_of(before: dict, result: dict) -> dict:
    """The round with the faster decode, but the best of what is beside."""
    best = dict(max(before, result,
                    key=lambda each: each["decode_tokens_per_second"]))
    for part in ("prefill_of", "together"):
        if part in result:
            best[part] = merged(before[part], result[part])
    return best


def merged(before, result):
    """The larger of each number, as deep as they lie."""
    if not isinstance(result, dict):
        return max(before, result)
    return {key: merged(before[key], result[key]) for key in result}


def told(name: str, result: dict, ours: dict | None) -> str:
    speeds = [result[f"{part}_tokens_per_second"]
              for part in ("decode", "prefill")]
    load = (f"load {result['load_seconds']:6.1f} s"
            if "load_seconds" in result else " " * 13)
    line = (f"{name:18} {load}, peak "
            f"{result['peak_rss_bytes'] / 2 ** 30:5.1f} GiB, decode "
            f"{speeds[0]:7.2f}, prefill of {result['prompt_tokens']} "
            f"{speeds[1]:7.2f} tok/s")
    if "read_bandwidth_share" in result:
        share = result["read_bandwidth_share"]
        line += f"; decode reads at {share:.0%} of memory's speed"
    if name == "ours" or not ours:
        return line
    decode, prefill = (ours[f"{part}_tokens_per_second"] / speed for
                       part, speed in zip(("decode", "prefill"), speeds,
                                          strict=True))
    return line + (f"; ours {decode:.2f} and {prefill:.2f} times as fast")


def told_more(found: dict) -> list[str]:
    """Lines on texts together and on long prompts: tokens a second, and of
    each of ours over each of theirs, like with like."""
    lines, ours = [], [name for name in found if name.startswith("ours")]
    for name, result in found.items():
        numbers = {("prefill of", "", n): speed for n, speed
                   in result.get("prefill_of", {}).items()}
        numbers |= {("together", kind, n): speed for kind, speeds
                    in result.get("together", {}).items()
                    for n, speed in speeds.items()}
        for (part, kind, n), speed in numbers.items():
            line = f"{name:18} {part} {n:>4} {kind:8} {speed:7.2f} tok/s"
            if name in ours:
                one = result.get("together", {}).get(kind, {}).get("1")
                if one:
                    line += f"; {speed / one:.2f} times one"
            else:
                line += "".join(
                    f"; {mine} {other / speed:.2f} times as fast"
                    for mine in ours if (other := speed_of(
                        found[mine], part, kind, n)) is not None)
            lines.append(line)
    return lines


def speed_of(result: dict, part: str, kind: str, n: str) -> float | None:
    place = (result.get("together", {}).get(kind, {}) if part == "together"
             else result.get("prefill_of", {}))
    return place.get(n)


def named_binary(text: str) -> tuple[str, tuple[Path, list[str]]]:
    """"NAME=FOLDER OPTIONS" -> its parts."""
    name, sign, rest = text.partition("=")
    folder, *more = shlex.split(rest) or [""]
    if name in ENGINES:
        raise argparse.ArgumentTypeError(f"{name} is an engine's name already")
    if not (name and sign and folder):
        raise ValueError
    return name, (Path(folder), more)


def integers(text: str) -> list[int]:
    """"1,2,4" -> [1, 2, 4]; "none" -> []."""
    return [] if text == "none" else [int(part) for part in text.split(",")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--engines", help="default: ours, transformers, "
                        "llama.cpp and each --binary")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--binary", type=named_binary, action="append",
                        metavar="NAME=FOLDER", default=[])
    parser.add_argument("--distinct", action="append", default=[],
                        metavar="NAME")
    parser.add_argument("--together", type=integers, default=[])
    parser.add_argument("--long", type=int, default=0)
    parser.add_argument("--save", metavar="SHAPE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(ENGINES[options.child](options.path, options)))
        return
    options.binaries = dict(options.binary)
    names = (options.engines.split(",") if options.engines else
             ["ours", "transformers", "llama.cpp", *options.binaries])
    known = [*ENGINES, *(f"{name}{end}" for name in options.binaries
                         for end in ("", "-q8_0"))]
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"--engines: expected some of {', '.join(known)}, "
                     f"found {', '.join(unknown)}")
    found = {}
    for name in names * options.rounds:
        result = run_engine(name, options)
        if isinstance(result, str):
            print(f"{name}: left out, {result}", file=sys.stderr)
            continue
        if options.rounds > 1 or options.together:
            print(told(name, result, None), file=sys.stderr)
        found[name] = best_of(found[name], result) if name in found else result
    if options.save:
        from kernels import save

        save({options.save: found})
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, result in found.items():
        print(told(name, result, found.get("ours")))
    for line in told_more(found):
        print(line)


if __name__ == "__main__":
    main()
