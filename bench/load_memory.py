"""What loading a checkpoint costs in memory and time.

    python bench/load_memory.py PATH [--tokens 8] [--dense]

A process of its own loads PATH (experts packed, or decoded with --dense),
generates a few tokens and reports its peak resident memory (VmHWM, Linux),
file pages included, beside the bytes of the files. Two bars: after loading,
at most 1.1 times the files; after generating from the 20b, below 16 GiB.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

GIB = 2 ** 30


def memory():
    """Resident bytes of this process: peak now, and how much is anonymous."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    kib = {name: int(fields[name].split()[0])
           for name in ("VmHWM", "VmRSS", "RssAnon")}
    return {name: 1024 * value for name, value in kib.items()}


def child(path, tokens, dense):
    """Load and generate; the measurements as a dict."""
    import torch

    from gptoss.model.transformer import GptOss
    from gptoss.text.generate import generate
    from gptoss.text.sampling import Sampler

    report = {"imports": memory()}
    start = time.perf_counter()
    model = GptOss.from_pretrained(path, packed=not dense)
    report["load_seconds"] = time.perf_counter() - start
    report["loaded"] = memory()
    prompt = torch.randint(0, model.config.vocab_size, (16,),
                           generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    found = list(generate(model, prompt.tolist(), max_new_tokens=tokens,
                          sampler=Sampler(temperature=0.0)))
    report["generate_seconds"] = time.perf_counter() - start
    report["tokens"] = len(found)
    report["generated"] = memory()
    return report


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--dense", action="store_true",
                        help="decode the experts to bfloat16 while loading")
    parser.add_argument("--json", action="store_true",
                        help="print the raw measurements")
    parser.add_argument("--child", action="store_true",
                        help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        print(json.dumps(child(options.path, options.tokens, options.dense)))
        return
    files = sum(file.stat().st_size
                for file in options.path.glob("*.safetensors"))
    if not files:
        parser.error(f"{options.path}: expected *.safetensors, found none")
    command = [sys.executable, __file__, str(options.path), "--child",
               "--tokens", str(options.tokens)]
    command += ["--dense"] if options.dense else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{options.path}: the loading process ended with "
                 f"{done.returncode}"
                 + (", killed (out of memory?)" if done.returncode == -9
                    else ""))
    report = {"files": files, **json.loads(done.stdout.splitlines()[-1])}
    if options.json:
        print(json.dumps(report, indent=1))
        return
    print(f"files              {files:>16,} bytes")
    for stage in ("imports", "loaded", "generated"):
        peak = report[stage]["VmHWM"]
        print(f"peak, {stage:10}   {peak:>16,} bytes "
              f"({peak / GIB:.2f} GiB, {peak / files:.3f} x files; "
              f"anonymous now {report[stage]['RssAnon'] / GIB:.2f} GiB)")
    print(f"loading took {report['load_seconds']:.2f} s; "
          f"{report['tokens']} tokens after a prompt of 16 took "
          f"{report['generate_seconds']:.2f} s")


if __name__ == "__main__":
    main()
