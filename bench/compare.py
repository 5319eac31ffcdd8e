"""Ours, transformers and llama.cpp on one checkpoint, one after the other.

    python bench/compare.py PATH [--engines ours,transformers,llama.cpp]
        [--prompt 512] [--tokens 32] [--repeats 3] [--rounds 1]
        [--gguf FILE] [--save SHAPE] [--json]

Every engine runs in a process of its own, alone, on the same random tokens
(ours-compact: with a copy of the dense matrices in twelve bits); printed are
load seconds, peak resident memory, prefill and decode speed (medians), and
each one's ratio to ours. PATH is a folder in the released layout
(bench/make_checkpoint.py writes one of random weights). transformers decodes
the experts (bf16, or float32 with transformers-fp32). llama.cpp needs its
Python binding (llama-cpp-python) in --llama-python's interpreter and the
checkpoint as GGUF, written on first use with the package `gguf`: to --gguf
with dense matrices in bf16, and for llama.cpp-q8_0 beside it, as FILE.q8_0,
with dense matrices in Q8_0. Without them it is left out, and a line says so.
--rounds: how often the engines take turns; of each, the round with the
fastest decode counts, since a machine's memory is not always equally fast.
--save keeps the result for kernels/measured.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

SEED = 0


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
    from gptoss.kernels.compact import make_compact
    from gptoss.model.transformer import GptOss

    def load(path: Path) -> GptOss:
        model = GptOss.from_pretrained(path)
        return (make_compact(model) if options.child == "ours-compact"
                else model)

    return measure(path, options.prompt, options.tokens, options.repeats,
                   load=load)


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


# ---- the checkpoint as GGUF

def write_gguf(path: Path, target: Path, dense: str = "BF16") -> None:
    """The folder as a GGUF file: experts MXFP4, matrices BF16 or Q8_0, no
    tokens.

    GGUF keeps one expert's gate and up apart, and a block as one scale byte
    and 16 bytes whose low nibbles are the first sixteen values.
    """
    import gguf
    import numpy as np
    import torch

    from gptoss.weights.checkpoint import Checkpoint

    def block_bytes(blocks, scales):
        values = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
        mixed = values[..., :16] | values[..., 16:] << 4
        return torch.cat([scales[..., None], mixed], -1).flatten(-2)

    with Checkpoint.open(path) as file:
        c = file.config
        out = gguf.GGUFWriter(str(target), "gpt-oss", use_temp_file=True)
        out.add_name("random")
        out.add_vocab_size(c.vocab_size)
        out.add_tokenizer_model("none")
        out.add_context_length(c.max_position_embeddings)
        out.add_embedding_length(c.hidden_size)
        out.add_block_count(c.num_hidden_layers)
        out.add_feed_forward_length(c.intermediate_size)
        out.add_expert_feed_forward_length(c.intermediate_size)
        out.add_head_count(c.num_attention_heads)
        out.add_head_count_kv(c.num_key_value_heads)
        out.add_key_length(c.head_dim)
        out.add_value_length(c.head_dim)
        out.add_layer_norm_rms_eps(c.rms_norm_eps)
        out.add_expert_count(c.num_local_experts)
        out.add_expert_used_count(c.num_experts_per_tok)
        out.add_sliding_window(c.sliding_window)
        out.add_rope_freq_base(c.rope_theta)
        out.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        out.add_rope_scaling_factor(c.rope_factor)
        out.add_rope_scaling_orig_ctx_len(c.initial_context_length)

        def floats(name, source, rows=None, wide=False):
            tensor = file.read(source)
            tensor = tensor if rows is None else tensor[:, rows]
            if wide or tensor.ndim == 1 or source.endswith("bias"):
                out.add_tensor(name, tensor.float().contiguous().numpy())
                return
            kind = gguf.GGMLQuantizationType[dense]
            data = (tensor.contiguous().view(torch.uint8).numpy()
                    if dense == "BF16"
                    else gguf.quants.quantize(tensor.float().numpy(), kind))
            out.add_tensor(name, data, raw_dtype=kind)

        def packed(name, source, rows):
            data = block_bytes(*(file.read(f"{source}_{part}")[:, rows]
                                 for part in ("blocks", "scales")))
            out.add_tensor(name, np.ascontiguousarray(data.numpy()),
                           raw_dtype=gguf.GGMLQuantizationType.MXFP4)

        floats("token_embd.weight", "model.embed_tokens.weight")
        floats("output.weight", "lm_head.weight")
        floats("output_norm.weight", "model.norm.weight")
        for n in range(c.num_hidden_layers):
            here, there = f"model.layers.{n}", f"blk.{n}"
            floats(f"{there}.attn_norm.weight",
                   f"{here}.input_layernorm.weight")
            floats(f"{there}.post_attention_norm.weight",
                   f"{here}.post_attention_layernorm.weight")
            for ours, theirs in (("q", "q"), ("k", "k"), ("v", "v"),
                                 ("o", "output")):
                for part in ("weight", "bias"):
                    floats(f"{there}.attn_{theirs}.{part}",
                           f"{here}.self_attn.{ours}_proj.{part}")
            floats(f"{there}.attn_sinks.weight", f"{here}.self_attn.sinks")
            floats(f"{there}.ffn_gate_inp.weight",
                   f"{here}.mlp.router.weight", wide=True)
            floats(f"{there}.ffn_gate_inp.bias", f"{here}.mlp.router.bias")
            experts = f"{here}.mlp.experts"
            for name, source, rows in (
                    ("gate", "gate_up_proj", slice(0, None, 2)),
                    ("up", "gate_up_proj", slice(1, None, 2)),
                    ("down", "down_proj", slice(None))):
                packed(f"{there}.ffn_{name}_exps.weight",
                       f"{experts}.{source}", rows)
                floats(f"{there}.ffn_{name}_exps.bias",
                       f"{experts}.{source}_bias", rows)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_tensors_to_file()
        out.close()


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
        write_gguf(options.path, part, "Q8_0" if small else "BF16")
    except ImportError as error:
        return f"the file cannot be written: {error}"
    part.rename(target)
    return target


# ---- one after the other

ENGINES = {"ours": run_ours, "ours-compact": run_ours,
           "transformers": run_transformers,
           "transformers-fp32": run_transformers,
           "llama.cpp": run_llama, "llama.cpp-q8_0": run_llama}


def read_once(files: list[Path]) -> None:
    """Read the files, so that the system has them in memory."""
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.read(1 << 24):
                pass


def run_child(name: str, options) -> dict | str:
    """The engine's report, or in words why there is none."""
    from gptoss.kernels.bench import summarise

    python, more = sys.executable, []
    files = sorted(options.path.glob("*.safetensors"))
    if name.startswith("llama.cpp"):
        file = made_gguf(name, options)
        if isinstance(file, str):
            return file
        python, more = options.llama_python, ["--gguf", str(file)]
        files = [file]
    read_once(files)
    done = subprocess.run(
        [python, __file__, str(options.path), "--child", name, "--prompt",
         str(options.prompt), "--tokens", str(options.tokens), "--repeats",
         str(options.repeats), *more], capture_output=True, text=True,
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


def told(name: str, result: dict, ours: dict | None) -> str:
    speeds = [result[f"{part}_tokens_per_second"]
              for part in ("decode", "prefill")]
    line = (f"{name:18} load {result['load_seconds']:6.1f} s, peak "
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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--engines", default="ours,transformers,llama.cpp")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--save", metavar="SHAPE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(ENGINES[options.child](options.path, options)))
        return
    names = options.engines.split(",")
    unknown = [name for name in names if name not in ENGINES]
    if unknown:
        parser.error(f"--engines: expected some of {', '.join(ENGINES)}, "
                     f"found {', '.join(unknown)}")
    found = {}
    for name in names * options.rounds:
        result = run_child(name, options)
        if isinstance(result, str):
            print(f"{name}: left out, {result}", file=sys.stderr)
            continue
        if options.rounds > 1:
            print(told(name, result, None), file=sys.stderr)
        best = found.get(name, result)
        found[name] = max(best, result, key=lambda each:
                          each["decode_tokens_per_second"])
    if options.save:
        from kernels import save

        save({options.save: found})
    if options.json:
        print(json.dumps(found, indent=1))
        return
    for name, result in found.items():
        print(told(name, result, found.get("ours")))


if __name__ == "__main__":
    main()
