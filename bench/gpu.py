"""Everything that only a GPU can tell, in one command, within nine minutes.

    python bench/gpu.py [bench/gpu.json] [--dry] [--only STAGE,STAGE]
        [--folder DIR]

Needs a machine with one CUDA GPU, Python 3.11 to 3.13, torch >= 2.11, triton
and this tree; no network. Every operator and Triton kernel against float64,
the pocket model's text beside the CPU's, two ranks on the one card, and the
speed of a random 20b (13.8 GB, in a temporary folder) by plain torch, Triton
kernels, CUDA graph and torch.compile, beside transformers and OpenAI's Triton
code where they are installed. A stage that fails or runs out of its time is
recorded, and the others go on. The results are JSON, tracebacks included.
--dry takes the same paths on a CPU with tiny shapes, the kernels in Triton's
interpreter. Ends with 1 if a stage has failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the tree, installed or not

# stage, the seconds it may take, what it says
STAGES = (
    ("machine", 40, "versions, device, memory speed of a copy"),
    ("operators", 40, "every operator against float64"),
    ("kernels", 90, "each Triton kernel against float64, and its speed"),
    ("pocket", 60, "the pocket model's greedy text equal to the CPU's"),
    ("ranks", 60, "two ranks on the one card, over gloo"),
    ("write", 110, "a random 20b on disk"),
    ("speed", 90, "prefill and decode: plain, Triton, CUDA graph"),
    ("compiled", 110, "prefill and decode by torch.compile"),
    ("openai", 60, "OpenAI's Triton code"),
    ("transformers", 80, "transformers, experts in bf16"))
TOTAL = 525  # seconds for all of them: "within nine minutes"
BAD = ("failed", "out of time")


def dump(file: Path, value: dict) -> None:
    """Whole or not at all: whoever reads it may come at any time."""
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    os.replace(part, file)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- in the process of a stage

def tried(work) -> dict:
    """Figures of a case, and what became of it."""
    from gpu_stages import Missing, Off

    start = time.perf_counter()
    try:
        found = {"state": "passed", **work()}
    except Missing as error:
        found = {"state": "left out", "why": first_line(error)}
    except Off as error:
        found = {"state": "failed", "why": first_line(error),
                 **error.figures}
    except Exception as error:
        found = {"state": "failed", "why": first_line(error),
                 "traceback": traceback.format_exc()}
    return found | {"seconds": round(time.perf_counter() - start, 3)}


def child(options) -> None:
    """Write figures after every case: a stage may be ended at any time."""
    from gpu_stages import WORK, Run

    run = Run(options.dry, options.folder, options.copied)
    cases: dict[str, dict] = {}
    work = WORK[options.child](run)
    while True:
        found = tried(lambda: {"case": next(work, None)})
        case = found.get("case")
        if case:
            cases[case[0]] = tried(case[1])
        elif found["state"] != "passed":  # what the stage itself does
            cases["preparation"] = found
        dump(options.figures, cases)
        if not case:
            return


# ---- in the process that starts them

def state_of(states: Iterable[str]) -> str:
    """Of a stage, by its cases' states."""
    found = set(states)
    if not found or found & set(BAD):
        return "failed"
    return "passed" if "passed" in found else "left out"


def environment(dry: bool) -> dict[str, str]:
    more = {"TRITON_INTERPRET": "1"} if dry else {}
    if dry:
        more["CUDA_VISIBLE_DEVICES"] = ""
    return os.environ | more | {
        "GPTOSS_KERNELS": "torch",  # no compiler is needed for C++
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def end(process: subprocess.Popen) -> None:
    """The stage and the ranks that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def finished(command: list[str], dry: bool, seconds: float, log: Path
             ) -> int | None:
    """The command's status; None if its time was over."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out,
                                   stdin=subprocess.DEVNULL,
                                   env=environment(dry),
                                   start_new_session=True)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            end(process)


def stage(name: str, seconds: float, folder: Path, copied: float, dry: bool
          ) -> dict:
    """Run it; its state, figures, and what it said if it broke."""
    figures, log = folder / f"{name}.json", folder / f"{name}.log"
    start = time.perf_counter()
    status = finished(
        [sys.executable, str(HERE / "gpu.py"), "--child", name, "--figures",
         str(figures), "--folder", str(folder), "--copied", str(copied),
         *(["--dry"] if dry else [])], dry, seconds, log)
    cases = json.loads(figures.read_text()) if figures.exists() else {}
    found = {"state": state_of(case["state"] for case in cases.values()),
             "seconds": round(time.perf_counter() - start, 1),
             "cases": cases}
    if status is None:
        found |= {"state": "out of time",
                  "why": f"it had {seconds:.0f} seconds"}
    elif status:
        said = log.read_text(errors="replace").strip()
        found |= {"state": "failed", "traceback": said[-4000:],
                  "why": (said.splitlines() or [f"status {status}"])[-1]}
    elif found["state"] != "passed":
        found["why"] = next((case["why"] for case in cases.values()
                             if case["state"] == found["state"]),
                            "it tried nothing")
    return found


def told(name: str, found: dict) -> None:
    """A line for the stage, and one for each case that has failed."""
    failed = {case: each["why"] for case, each in found["cases"].items()
              if each["state"] == "failed"}
    why = (f": {found['why'][:150]}" if "why" in found
           and found["why"] not in failed.values() else "")
    print(f"{name:12} {found['state']:11} {found['seconds']:6.1f} s{why}",
          flush=True)
    for case, words in failed.items():
        print(f"    {case}: {words[:150]}", flush=True)


def all_stages(options, folder: Path, results: dict) -> None:
    began = time.perf_counter()
    for name, seconds, _ in STAGES:
        if name not in options.only and name != "machine":
            continue
        left = TOTAL - (time.perf_counter() - began)
        copied = results["stages"].get("machine", {}).get("cases", {}).get(
            "copy", {}).get("bytes_per_second", 0.0)
        results["stages"][name] = found = (
            stage(name, min(seconds, left), folder, copied, options.dry)
            if left > 5 else {"state": "out of time", "seconds": 0.0,
                              "why": "the nine minutes are over",
                              "cases": {}})
        results["seconds"] = round(time.perf_counter() - began, 1)
        dump(options.out, results)
        told(name, found)
        if name == "machine" and found["state"] != "passed":
            return  # nothing else can be tried


def parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py", description=__doc__.partition("\n")[0],
        epilog="stages: " + "; ".join(f"{name} ({seconds} s): {words}"
                                      for name, seconds, words in STAGES))
    parser.add_argument("out", nargs="?", type=Path, default=HERE / "gpu.json",
                        help="the JSON file (default: bench/gpu.json)")
    parser.add_argument("--dry", action="store_true",
                        help="on a CPU, tiny, in Triton's interpreter")
    parser.add_argument("--only", help="stages, with commas between them")
    parser.add_argument("--folder", type=Path,
                        help="where the temporary folder is made")
    for hidden, kind in (("--child", str), ("--figures", Path),
                         ("--copied", float)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.copied = options.copied or 1.0
    known = [name for name, _, _ in STAGES]
    options.only = options.only.split(",") if options.only else known
    for name in options.only:
        if name not in known:
            parser.error(f"--only: expected some of {', '.join(known)}, "
                         f"found {name}")
    if find_spec("torch") is None:
        parser.error(f"torch is not installed for {sys.executable}")
    for where in (options.out.absolute().parent, options.folder):
        if where and not where.is_dir():
            parser.error(f"{where}: expected a folder, found none")
    return options


def main(argv=None) -> int:
    options = parse(argv)
    if options.child:
        child(options)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: dict = {"dry": options.dry, "began": time.strftime(
        "%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": 0.0, "stages": {}}
    try:
        with tempfile.TemporaryDirectory(prefix="gptoss-gpu-",
                                         dir=options.folder) as folder:
            all_stages(options, Path(folder), results)
    except KeyboardInterrupt:
        print("gpu.py: interrupted; what was measured is in "
              f"{options.out}", file=sys.stderr)
        return 130
    failed = [name for name, found in results["stages"].items()
              if found["state"] in BAD]
    print(f"{options.out}: {results['seconds']:.0f} s, "
          + (f"not passed: {', '.join(failed)}" if failed else "none failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
