"""The workflow files, the page for ports, and the package's metadata."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import webbook
import yaml

from gptoss.kernels.build import library_path

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(FOLDER.glob("*.yml"))
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PORT = ROOT / "book" / "port.md"


def schema(*files: Path) -> subprocess.CompletedProcess:
    """GitHub's schema of workflows, which check-jsonschema brings along."""
    return subprocess.run(
        [sys.executable, "-m", "check_jsonschema", "--builtin-schema",
         "vendor.github-workflows", *map(str, files)],
        capture_output=True, text=True, timeout=60)


def port_workflow() -> str:
    return re.search(r"```yaml\n(.*?)```", PORT.read_text(), re.DOTALL)[1]


def commands(text: str) -> list[str]:
    jobs = yaml.safe_load(text)["jobs"].values()
    return [step["run"] for job in jobs for step in job["steps"]
            if "run" in step]


def test_workflows_fit_the_schema(tmp_path):
    (tmp_path / "port.yml").write_text(port_workflow())
    done = schema(*WORKFLOWS, tmp_path / "port.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_schema_finds_a_fault(tmp_path):
    text = WORKFLOWS[0].read_text().replace("runs-on:", "run-on:")
    (tmp_path / "bad.yml").write_text(text)
    assert schema(tmp_path / "bad.yml").returncode == 1


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_make_targets_exist(file):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(),
                         re.MULTILINE)
    named = [word for command in commands(file.read_text())
             for word in shlex.split(command)[1:] if "=" not in word]
    assert named and set(named) <= {*targets, ".venv/installed"}


def test_every_stage_of_make_test_is_a_step():
    test = re.search(r"^test: (.*)", (ROOT / "Makefile").read_text(),
                     re.MULTILINE)[1]
    steps = " ".join(commands((FOLDER / "tests.yml").read_text())).split()
    # the browser stage looks for one itself
    assert set(test.split()) - {"find-browser"} <= set(steps)


def test_the_matrix_is_what_the_metadata_promise():
    jobs = yaml.safe_load((FOLDER / "tests.yml").read_text())["jobs"]
    promised = re.findall(r"Python :: (3\.\d+)",
                          "\n".join(METADATA["classifiers"]))
    assert jobs["checks"]["strategy"]["matrix"]["python"] == promised


@pytest.mark.parametrize("spelled", [
    "https://github.com/owner/name", "https://github.com/owner/name/",
    "https://github.com/owner/name.git"])
def test_where_the_colab_button_leads(tmp_path, monkeypatch, spelled):
    file = tmp_path / "pyproject.toml"
    file.write_text(f'[project.urls]\nRepository = "{spelled}"\n')
    monkeypatch.delenv("GPTOSS_REPOSITORY", raising=False)
    assert webbook.home_address(file) == "https://github.com/owner/name"
    monkeypatch.setenv("GPTOSS_REPOSITORY", "fork/of")
    assert webbook.home_address(file) == "https://github.com/fork/of"


def test_a_repository_without_an_address(monkeypatch, tmp_path):
    file = tmp_path / "pyproject.toml"
    file.write_text('[project.urls]\nElsewhere = "https://example.org"\n')
    monkeypatch.delenv("GPTOSS_REPOSITORY", raising=False)
    assert webbook.home_address(file) == ""


def test_the_commands_of_the_port_page_work(tmp_path):
    """With our port in numpy in the place of the reader's own program."""
    python = shlex.quote(sys.executable)
    ours = f"{python} {ROOT}/tests/parity/numpy_vectors.py"
    run = [line.replace("./my-port", ours).replace("python -m",
                                                   f"{python} -m")
           for line in commands(port_workflow()) if "pip" not in line]
    assert len(run) == 3
    done = subprocess.run(["bash", "-ec", "\n".join(run)], cwd=tmp_path,
                          env={"PYTHONPATH": str(ROOT),
                               "PATH": "/usr/bin:/bin",
                               "HOME": str(tmp_path),
                               # the kernels are compiled once for all tests
                               "XDG_CACHE_HOME": str(
                                   library_path().parents[1])},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every case passes" in done.stdout
