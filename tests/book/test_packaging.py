"""What `pip install` and the source distribution bring."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PARTS = ("gptoss", "book", "tests", "bench")
BUILD = """
import setuptools.build_meta as backend
print(backend.build_sdist("dist"), backend.build_wheel("dist"))
"""


def whole(folder: Path) -> set[str]:
    """The files of the repository's own folders and of its top, by path."""
    files = [path for part in PARTS for path in (folder / part).rglob("*")]
    files += [path for path in folder.iterdir()
              if not path.name.startswith(".")]
    made = ("__pycache__", "_build", ".ipynb_checkpoints")
    return {path.relative_to(folder).as_posix() for path in files
            if path.is_file() and not set(path.parts) & set(made)}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, str]:
    """A copy of the repository with dist/, and what the build said."""
    copy = tmp_path_factory.mktemp("packaging") / "copy"
    for name in whole(ROOT) | {".gitignore", ".ci/run",
                              ".github/workflows/tests.yml"}:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return copy, done.stdout + done.stderr


def test_the_wheel_is_what_runs_and_no_more(built):
    copy, said = built
    (wheel,) = (copy / "dist").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist()
             if ".dist-info/" not in name}
    wanted = {name for name in whole(ROOT) if name.startswith("gptoss/")}
    assert wanted - names == {"gptoss/pocket/train_log.json"}
    assert names <= wanted and "gptoss/py.typed" in names
    assert "would be ignored" not in said and "Deprecat" not in said


def test_the_source_distribution_is_the_repository(built):
    copy, _ = built
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    # LICENSE, README and pyproject.toml come by themselves
    assert whole(ROOT) | {".ci/run", "tests/conftest.py",
                          ".github/workflows/tests.yml"} <= names
    assert not [name for name in names if name.endswith((".pyc", ".so"))]


def test_what_is_installed_needs_no_book(built, tmp_path):
    """The wheel alone, unpacked: every module loads, commands work."""
    copy, _ = built
    (wheel,) = (copy / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = ("import gptoss, importlib, pkgutil\n"
            "assert gptoss.__file__.startswith(r'%s')\n"
            "names = [module.name for module in pkgutil.walk_packages("
            "gptoss.__path__, 'gptoss.')]\n"
            "assert len(names) > 70\n"
            "for name in names: importlib.import_module(name)\n"
            "from gptoss.cli.commands import main\n"
            "assert main(['generate', '--max-new-tokens', '2']) == 0")
    done = subprocess.run(
        [sys.executable, "-c", code % tmp_path], cwd=tmp_path, timeout=120,
        capture_output=True, text=True, env={
            "PYTHONPATH": str(tmp_path), "GPTOSS_KERNELS": "torch",
            "HOME": str(tmp_path), "PATH": ""})
    assert done.returncode == 0 and done.stderr == "", done.stderr
