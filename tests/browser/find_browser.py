"""Finds a Chromium or Chrome for the last check, or gets one.

`python tests/browser/find_browser.py` looks, in this order, at $CHROMIUM,
at the names in PATH, and at what Playwright has downloaded; then it asks
apt-get (as root, or through a sudo that asks for no password); then
Playwright's own installer. It prints the browser's path and ends with 0, or
says in one line what to do and ends with 1. With GPTOSS_NO_BROWSER=1 it
looks for nothing. It needs nothing but Python (and Playwright for the last).
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome",
         "google-chrome-stable", "chrome")
DOWNLOADED = ("chromium-*/chrome-*/chrome",
              "chromium-*/chrome-*/*.app/Contents/MacOS/*",
              "chromium_headless_shell-*/*/*headless[-_]shell")
MINUTE = 60  # seconds
TO_DO = ("install Chromium or Chrome (Debian: `apt install chromium`) or name "
         "one in $CHROMIUM; GPTOSS_NO_BROWSER=1 leaves out the checks that "
         "need it")


def run(argv: list[str], limit: float) -> tuple[bool, str]:
    """Whether a program ended with 0 in time, and what it wrote."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=limit)
    except subprocess.TimeoutExpired:
        return False, f"not done after {limit:.0f} s"
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout.decode(errors="replace")


def gist(text: str) -> str:
    """The line of what a program wrote that says why it failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if re.match(r"(E|[Ee]rror):", line)]
    return (wrong or lines or ["it said nothing"])[-1]


def starts(path: str) -> tuple[bool, str]:
    """Whether this is a browser that starts here: Ubuntu's chromium-browser
    may be a script that only tells where to get one, and one that was
    downloaded may lack its libraries."""
    good, text = run([path, "--version"], MINUTE)
    return good and "chrom" in text.lower(), gist(text)


def downloads() -> Path:
    """The folder into which Playwright puts its browsers."""
    named = os.environ.get("PLAYWRIGHT_BROWSERS_PATH")
    if named and named != "0":
        return Path(named)
    if named == "0":
        import playwright

        return Path(playwright.__file__).parent.joinpath(
            "driver", "package", ".local-browsers")
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(Path.home() / "Library" / "Caches"
                if sys.platform == "darwin" else caches) / "ms-playwright"


def candidates() -> Iterator[str]:
    """Paths of what may be a browser, the likeliest first."""
    yield from filter(None, map(shutil.which, NAMES))
    for pattern in DOWNLOADED:
        yield from sorted(map(str, downloads().glob(pattern)), reverse=True)


def find() -> str | None:
    """Path of a browser that starts, if there is one. The one in $CHROMIUM
    is taken or refused (LookupError), never replaced by another."""
    named = os.environ.get("CHROMIUM")
    if not named:
        return next((path for path in candidates() if starts(path)[0]), None)
    path = shutil.which(os.path.expanduser(named))
    good, said = starts(path) if path else (False, "no such program")
    if not good:
        raise LookupError(f"CHROMIUM={named}: {said}")
    return path


def installers() -> Iterator[tuple[str, list[list[str]]]]:
    """What may bring a browser: its name, and its commands, of which the
    last one counts."""
    if shutil.which("apt-get"):
        root = [] if os.geteuid() == 0 else ["sudo", "-n"]
        if not root or run([*root, "true"], MINUTE)[0]:
            apt = [*root, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get",
                   "-q", "-o", "DPkg::Lock::Timeout=300"]
            yield "apt-get", [[*apt, "update"], [
                *apt, "install", "-y", "--no-install-recommends", "chromium"]]
    yield "Playwright", [
        [sys.executable, "-m", "playwright", "install", "chromium"]]


def install() -> str:
    """Path of a browser that was not there; LookupError names each try."""
    failed = []
    for name, commands in installers():
        print(f"no browser: {name} is asked for Chromium (once)", flush=True)
        *_, (good, text) = [run(argv, 15 * MINUTE) for argv in commands]
        path = find() if good else None
        if path:
            return path
        broken = [why for fine, why in map(starts, candidates()) if not fine]
        why = gist(text) if not good else (broken or ["brought none"])[0]
        failed.append(f"{name}: {why}")
    raise LookupError("; ".join(failed))


def main() -> int:
    """Exit code: 0, or 1 if there is no browser and none can be had."""
    if os.environ.get("GPTOSS_NO_BROWSER") == "1":
        print("GPTOSS_NO_BROWSER=1: the web book will not be opened")
        return 0
    try:
        print(find() or install())
    except LookupError as error:
        print(f"no browser: {TO_DO} ({error})", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
