"""Fetching from the hub, against a stand-in on the loopback.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is
imported, so each case runs in a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.config import GptOssConfig
from gptoss.weights.hub import is_repo_id, resolve
from gptoss.weights.layout import CheckpointError
from gptoss.weights.write import random_tensors, write_checkpoint

TINY = GptOssConfig(
    num_hidden_layers=2, num_local_experts=4, num_experts_per_tok=2,
    vocab_size=64, hidden_size=32, intermediate_size=32, head_dim=8,
    num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
REPO, SHA = "someone/tiny-oss", "0123456789abcdef" * 2 + "01234567"


class Hub:
    """As much of huggingface.co as `snapshot_download` asks for."""

    def __init__(self, folder: Path) -> None:
        self.files = {p.relative_to(folder).as_posix(): p.read_bytes()
                      for p in folder.rglob("*") if p.is_file()}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cut: dict[str, int] = {}  # file -> bytes before the line drops
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def do_GET(self) -> None:
                hub.answer(self, body=True)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        span = request.headers.get("Range")
        self.requests.append((request.command, path, span))
        api, file = f"/api/models/{REPO}", f"/{REPO}/resolve/"
        if path.startswith("/api/models/someone/locked"):
            send(request, 403, {"X-Error-Code": "GatedRepo"}, body, b"{}")
        elif not path.startswith((api, file)):
            send(request, 404, {"X-Error-Code": "RepoNotFound"}, body, b"{}")
        elif path.startswith(api):
            rest = path[len(api):].strip("/").split("/")
            if rest[1:] and rest[1] not in ("main", SHA):
                send(request, 404, {"X-Error-Code": "RevisionNotFound"},
                     body, b"{}")
            elif rest[0] == "tree":
                tree = [{"type": "file", "path": name, "size": len(data),
                         "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in self.files.items()]
                send(request, 200, {}, body, json.dumps(tree).encode())
            else:
                send(request, 200, {}, body, json.dumps({
                    "id": REPO, "sha": SHA, "siblings": [
                        {"rfilename": name} for name in self.files]}
                ).encode())
        else:
            self.send_file(request, path[len(file):].split("/", 1)[1], span,
                           body)

    def send_file(self, request, name: str, span: str | None,
                  body: bool) -> None:
        data = self.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                   "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if body and self.cut.get(name):
            request.send_response(200)
            for key, value in headers.items():
                request.send_header(key, value)
            request.send_header("Content-Length", str(len(data)))
            request.end_headers()
            request.wfile.write(data[:self.cut.pop(name)])
            request.close_connection = True
            return
        start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
        if span:
            headers["Content-Range"] = (f"bytes {start}-{len(data) - 1}/"
                                        f"{len(data)}")
        send(request, 206 if span else 200, headers, body, data[start:])

    def got(self, command: str = "GET") -> list[str]:
        """The files asked for so far, without repetition."""
        marker = f"/{REPO}/resolve/{SHA}/"
        return sorted({path.removeprefix(marker) for method, path, _
                       in self.requests
                       if method == command and path.startswith(marker)})


def send(request, status: int, headers: dict, body: bool,
         data: bytes) -> None:
    request.send_response(status)
    for key, value in headers.items():
        request.send_header(key, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    if body:
        request.wfile.write(data)


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    """What lies on the hub: three shards, and what nobody wants."""
    folder = tmp_path_factory.mktemp("hub") / "repository"
    write_checkpoint(folder, TINY, random_tensors(TINY),
                     max_shard_bytes=18_000)
    assert len(list(folder.glob("*.safetensors"))) == 3
    (folder / "generation_config.json").write_text('{"eos_token_id": [1]}')
    for name in ("original/model.safetensors", "original/config.json",
                 "metal/model.bin", "pytorch_model.bin", "README.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not wanted")
    return folder


@pytest.fixture
def hub(repository):
    hub = Hub(repository)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


SCRIPT = """
import os
import sys
import huggingface_hub.constants
if "CHUNK" in os.environ:
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = int(os.environ["CHUNK"])
from gptoss.weights.checkpoint import Checkpoint
from gptoss.weights.layout import CheckpointError
from gptoss.weights.hub import resolve
for job in sys.argv[1:]:
    try:
        folder = resolve(*job.split("@"))
        with Checkpoint.open(folder) as checkpoint:
            print(folder, len(checkpoint.names()))
    except CheckpointError as error:
        print("CheckpointError", error)
"""


def run(home: Path, url: str, *jobs: str, offline: bool = False,
        **env: str) -> tuple[str, str]:
    """(stdout, stderr) of resolving and opening each NAME[@REVISION]."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *jobs], text=True, timeout=100,
        capture_output=True, cwd=home.parent, env={
            **os.environ, "HF_ENDPOINT": url, "HF_HOME": str(home),
            "HF_HUB_OFFLINE": str(int(offline)), "NO_PROXY": "127.0.0.1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH":
            os.pathsep.join(filter(None, sys.path)), **env})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


def test_download_then_cache_then_offline(hub, repository, tmp_path):
    home = tmp_path / "home"
    first, bar = run(home, hub.url, REPO)
    folder, count = first.split()
    assert folder.startswith(str(home)) and folder.endswith(SHA)
    assert int(count) == 41
    wanted = sorted(p.name for p in repository.iterdir()
                    if p.suffix in (".json", ".safetensors"))
    assert hub.got() == wanted
    assert sorted(os.listdir(folder)) == wanted
    for name in wanted:
        assert (Path(folder, name).read_bytes()
                == (repository / name).read_bytes())
    assert "100%" in bar  # huggingface_hub's progress

    hub.requests.clear()
    again, _ = run(home, hub.url, REPO)
    assert again == first
    assert hub.got() == []  # asked, but fetched nothing

    hub.requests.clear()
    assert run(home, hub.url, REPO, offline=True)[0] == first
    assert hub.requests == []  # not even asked

    # without a network what lies in the cache is as good
    assert run(home, "http://127.0.0.1:9", REPO)[0] == first


SECOND = "model-00002-of-00003.safetensors"


def test_a_file_that_broke_off_is_resumed(hub, repository, tmp_path):
    size = (repository / SECOND).stat().st_size
    hub.cut[SECOND] = size // 2
    found, _ = run(tmp_path / "home", hub.url, REPO, CHUNK="1024")
    assert found.split()[1] == "41"
    spans = [span for method, path, span in hub.requests
             if method == "GET" and path.endswith(SECOND)]
    assert len(spans) == 2 and spans[0] in (None, "bytes=0-")
    resumed = int(spans[1].removeprefix("bytes=").rstrip("-"))
    assert size // 2 - 1024 <= resumed <= size // 2


def test_a_second_try_fetches_only_what_is_missing(hub, repository,
                                                   tmp_path):
    answer, hub.answer = hub.answer, lambda request, body: (
        answer(request, body) if not request.path.endswith(SECOND) else
        send(request, 403, {}, body, b""))
    error, _ = run(tmp_path / "home", hub.url, REPO)
    assert error.startswith(f"CheckpointError {REPO}: no such directory")
    assert "\n" not in error
    hub.answer = answer
    hub.requests.clear()
    found, _ = run(tmp_path / "home", hub.url, REPO)
    assert found.split()[1] == "41"
    assert SECOND in hub.got()
    assert "model-00001-of-00003.safetensors" not in hub.got()


def test_revisions_and_what_the_hub_refuses(hub, tmp_path):
    found, _ = run(tmp_path / "home", hub.url, f"{REPO}@{SHA}", f"{REPO}@v9",
                   "someone/absent", "someone/locked")
    good, *bad = found.splitlines()
    assert good.split()[1] == "41"
    assert bad == [
        f"CheckpointError {REPO} at revision v9: no such directory, and the "
        "hub knows no such revision",
        "CheckpointError someone/absent: no such directory, and the hub "
        "knows no such repository",
        "CheckpointError someone/locked: no such directory, and the hub "
        "wants a token with access (hf auth login)"]


@pytest.mark.parametrize("offline, why", [
    (False, "the hub cannot be reached"),
    (True, "HF_HUB_OFFLINE is set and the cache has none")])
def test_no_network_and_nothing_cached(tmp_path, offline, why):
    error, _ = run(tmp_path / "home", "http://127.0.0.1:9", REPO,
                   offline=offline)
    assert "\n" not in error
    assert error.startswith(f"CheckpointError {REPO}: no such directory, "
                            f"and {why}")


def test_a_server_that_fails(tmp_path, repository):
    hub = Hub(repository)
    hub.answer = lambda request, body: send(request, 501, {}, body, b"{}")
    error, _ = run(tmp_path / "home", hub.url, REPO)
    hub.server.shutdown()
    hub.server.server_close()
    assert "\n" not in error and error.startswith("CheckpointError")
    assert REPO in error


PATHS = ["./someone/tiny-oss", "/someone/tiny-oss", "../tiny-oss",
         "~/tiny-oss", "someone/tiny/oss", "tiny-oss", "someone/", "/",
         "", "a b/c", "someone\\tiny", "https://hf.co/a", "a/..", "./x",
         "someone/tiny-oss/", "-x/y"]


@pytest.mark.parametrize("text", PATHS)
def test_a_path_is_never_a_repository(text):
    assert not is_repo_id(text)


def test_a_path_is_never_sent_to_the_hub(hub, tmp_path):
    here = tmp_path / "work"
    here.mkdir()
    texts = [text for text in PATHS if text not in ("", "/")]
    found, _ = run(here / "home", hub.url, *texts)
    for text, error in zip(texts, found.splitlines(), strict=True):
        assert error.startswith(f"CheckpointError {text}: no such directory")
    assert hub.requests == []


SETTINGS = [
    ("HF_ENDPOINT", "nonsense", "nonsense cannot be asked"),
    ("HF_ENDPOINT", "ftp://127.0.0.1", "ftp://127.0.0.1 cannot be asked"),
    ("HF_ENDPOINT", "http://[::1", "Invalid IPv6"),
    ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "'soon'"),
    ("HTTP_PROXY", "foo://127.0.0.1", "foo://127.0.0.1")]
EACH = """
import os, sys
import gptoss.weights.hub
from gptoss.cli.commands import main
for setting in sys.argv[2:]:
    pid = os.fork()  # huggingface_hub reads its settings but once
    if not pid:
        name, _, value = setting.partition("=")
        os.environ[name] = value
        sys.stderr.write(setting + " ")
        os._exit(main(["convert", sys.argv[1], "there", "--layout", "hf"]))
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_setting_that_makes_no_sense_is_told_in_a_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", EACH, REPO,
         *(f"{name}={value}" for name, value, _ in SETTINGS)],
        capture_output=True, text=True, timeout=100, cwd=tmp_path,
        env=os.environ | {
            "HF_ENDPOINT": "http://localhost:9", "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path), "NO_PROXY": "", "PYTHONPATH":
            os.pathsep.join(filter(None, sys.path))})
    lines = done.stderr.splitlines()
    for line, (name, value, why) in zip(lines, SETTINGS, strict=True):
        assert line.startswith(f"{name}={value} gptoss: error: {REPO}: no "
                               "such directory, and ") and why in line
    assert done.stdout == "2\n" * len(SETTINGS)


@pytest.mark.parametrize("text", [
    "~nobody-is-called-so/x", "~nobody-is-called-so", "a\0b", "x" * 300])
def test_a_path_that_cannot_be_is_told_in_a_line(text, monkeypatch):
    for path in (text, Path(text)):
        with pytest.raises((CheckpointError, OSError)) as caught:
            resolve(path)
        assert text[:30] in str(caught.value)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(CheckpointError, match="~/y: no such"):
        resolve("~/y")  # no home at all


def test_a_local_folder_comes_before_the_hub(hub, repository, tmp_path,
                                             monkeypatch):
    local = tmp_path / "someone" / "tiny-oss"
    local.parent.mkdir()
    local.symlink_to(repository)
    found, _ = run(tmp_path / "home", hub.url, REPO)
    assert found == f"{REPO} 41" and hub.requests == []
    monkeypatch.chdir(tmp_path)
    assert resolve(REPO) == Path(REPO)
    assert resolve(str(local)) == resolve(local) == local
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/someone/tiny-oss") == local


def test_a_path_object_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="someone/absent: no such dir"):
        resolve(Path("someone/absent"))


def test_a_snapshot_of_links_opens(repository, tmp_path):
    """The hub's cache links each file to a blob elsewhere."""
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in repository.glob("*.*"):
        (folder / file.name).symlink_to(file)
    with Checkpoint.open(folder) as checkpoint:
        assert len(checkpoint.names()) == 41
