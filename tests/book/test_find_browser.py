"""tests/browser/find_browser.py, with stubs in place of every program."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "browser" / "find_browser.py"
SPEC = importlib.util.spec_from_file_location("find_browser", SCRIPT)
find_browser = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(find_browser)

BROWSER = "echo Chromium 150.0.1"
BROKEN = "echo 'error: libnss3.so is missing' >&2; exit 127"


class Machine:
    """A machine on which only the programs are that a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.home = folder / "bin", folder / "home"
        self.modules, self.log = folder / "modules", folder / "log"
        for path in (self.bin, self.home, self.modules):
            path.mkdir()
        self.playwright("sys.exit('Error: no network')")

    def program(self, name: str, script: str, folder: Path | None = None
                ) -> Path:
        path = (folder or self.bin) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def playwright(self, script: str) -> None:
        """What `python -m playwright` does here."""
        package = self.modules / "playwright"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text("")
        (package / "__main__.py").write_text(f"import sys\n{script}\n")

    def apt(self, script: str) -> None:
        """apt-get, and `env` by which it is started."""
        self.program("env", 'shift; exec "$@"')
        self.program("apt-get", f'echo "$@" >> {self.log}\n'
                                f'case "$*" in *update) exit 100;; esac\n'
                                f"{script}")

    @property
    def cached(self) -> Path:
        return self.home / ".cache/ms-playwright/chromium-12/chrome-linux64"


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Machine:
    machine = Machine(tmp_path)
    for name in ("CHROMIUM", "GPTOSS_NO_BROWSER", "XDG_CACHE_HOME",
                 "PLAYWRIGHT_BROWSERS_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{machine.bin}:/nowhere")
    monkeypatch.setenv("HOME", str(machine.home))
    monkeypatch.setenv("PYTHONPATH", str(machine.modules))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return machine


def outcome(capsys) -> tuple[int, str, str]:
    code = find_browser.main()
    return code, *capsys.readouterr()


@pytest.mark.parametrize("name", [
    "chromium", "chromium-browser", "google-chrome", "chrome"])
def test_one_in_path_is_taken(machine, capsys, name):
    path = machine.program(name, BROWSER)
    assert outcome(capsys) == (0, f"{path}\n", "")


def test_one_that_playwright_has_is_taken(machine, capsys, monkeypatch):
    path = machine.program("chrome", BROWSER, machine.cached)
    assert outcome(capsys) == (0, f"{path}\n", "")
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(machine.home / "own"))
    assert outcome(capsys)[0] == 1
    moved = machine.cached.parents[1].rename(machine.home / "own")
    assert outcome(capsys) == (
        0, f"{moved}/chromium-12/chrome-linux64/chrome\n", "")


def test_one_that_does_not_start_is_passed_over(machine, capsys):
    machine.program("chromium", BROKEN)
    machine.program("chromium-browser", "echo 'install the snap'; exit 1")
    machine.program("google-chrome", "echo 'another program 1.0'")
    good = machine.program("chrome", BROWSER)
    assert outcome(capsys) == (0, f"{good}\n", "")


def test_the_named_one_is_taken_or_refused(machine, capsys, monkeypatch):
    machine.program("chromium", BROWSER)
    machine.apt("exit 0")
    mine = machine.program("mine", BROWSER, machine.home)
    monkeypatch.setenv("CHROMIUM", str(mine))
    assert outcome(capsys) == (0, f"{mine}\n", "")
    monkeypatch.setenv("CHROMIUM", "~/mine")
    assert outcome(capsys) == (0, f"{mine}\n", "")
    for script, why in ((BROKEN, "libnss3"), (None, "no such program")):
        mine.unlink()
        if script:
            machine.program("mine", script, machine.home)
        code, out, err = outcome(capsys)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert f"CHROMIUM=~/mine: {'error: ' * bool(script)}{why}" in err
    assert not machine.log.exists()  # nothing was installed instead


def test_root_asks_apt_although_the_lists_are_not_fresh(machine, capsys):
    path = machine.bin / "chromium"
    machine.apt(f"printf '#!/bin/sh\\n{BROWSER}\\n' > {path}\n"
                f"/bin/chmod 755 {path}")
    code, out, err = outcome(capsys)
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "no browser: apt-get is asked for Chromium (once)", str(path)]
    update, install = machine.log.read_text().splitlines()
    assert update.endswith("update") and install.endswith("chromium")
    assert " -y " in install


@pytest.mark.parametrize("sudo", [None, "exit 1", 'shift; exec "$@"'])
def test_others_ask_apt_through_a_sudo_that_is_silent(
        machine, capsys, monkeypatch, sudo):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    machine.apt("echo 'E: no such package'; exit 100")
    machine.program("true", "exit 0")
    if sudo:
        machine.program("sudo", sudo)
    code, out, err = outcome(capsys)
    assert code == 1 and err.count("\n") == 1
    asked = sudo is not None and "exec" in sudo
    assert machine.log.exists() == asked
    assert ("apt-get: E: no such package" in err) == asked
    assert "Playwright: Error: no network" in err
    assert "apt install chromium" in err and "GPTOSS_NO_BROWSER=1" in err


def test_playwright_is_the_last_to_be_asked(machine, capsys):
    machine.apt("exit 100")
    path = machine.cached / "chrome"
    machine.playwright(f"""
from pathlib import Path
assert sys.argv[1:] == ["install", "chromium"]
path = Path({str(path)!r})
path.parent.mkdir(parents=True)
path.write_text("#!/bin/sh\\n{BROWSER}\\n")
path.chmod(0o755)""")
    code, out, err = outcome(capsys)
    assert (code, err) == (0, "") and out.splitlines()[-1] == str(path)
    path.write_text(f"#!/bin/sh\n{BROKEN}\n")
    machine.playwright("")
    code, out, err = outcome(capsys)
    assert code == 1 and "Playwright: error: libnss3.so is missing" in err


def test_it_can_be_left_out_and_says_so(machine, capsys, monkeypatch):
    monkeypatch.setenv("GPTOSS_NO_BROWSER", "1")
    machine.apt("exit 0")
    code, out, err = outcome(capsys)
    assert (code, err) == (0, "") and "GPTOSS_NO_BROWSER" in out
    assert not machine.log.exists()


def test_a_program_that_hangs_is_given_up(machine, monkeypatch):
    path = machine.program("chromium", "/bin/sleep 30")
    monkeypatch.setattr(find_browser, "MINUTE", 0.2)
    assert find_browser.starts(str(path)) == (False, "not done after 0 s")


def test_make_looks_before_it_tests(machine):
    """`make test` knows at once that no browser can be had."""
    make = Path(__file__).parents[2] / "Makefile"
    steps = next(line for line in make.read_text("utf-8").splitlines()
                 if line.startswith("test:")).split()[1:]
    assert steps[0] == "find-browser" and steps[-1] == "browser"
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
