"""Runs a command beside a server that forks Jupyter kernels named `warm`.

    python tests/warm_kernels.py python -m pytest --nbval \\
        --nbval-kernel-name warm book

A kernel spends three seconds on importing torch and IPython, and there are
some ninety notebooks. The server imports both once, nothing of the package and
nothing else that a notebook imports, starts no thread, and forks. So a kernel
is a process of its own, with the command's environment and hash seed. Where
there is no Linux, `warm` is the ordinary kernel; `python3` always is.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path


def kernel(request: dict) -> None:
    """Become the kernel that was asked for."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path.remove(str(Path(__file__).parent))
    sys.argv = ["ipykernel_launcher", "-f", request["connection_file"],
                # the keeper; read from the environment at import otherwise
                f"--IPKernelApp.parent_handle={os.getppid()}"]
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance()


def keep(client: socket.socket) -> None:
    """Fork a kernel, and end with it or with who asked for it."""
    data, files, *_ = socket.recv_fds(client, 1 << 20, 3)
    while not data.endswith(b"\n"):
        data += client.recv(1 << 20)
    child = os.fork()
    if not child:
        client.close()
        for n, file in enumerate(files):
            os.dup2(file, n)
            os.close(file)
        kernel(json.loads(data))
        os._exit(0)
    client.sendall(b"%d\n" % child)
    while not os.waitpid(child, os.WNOHANG)[0]:
        if select.select([client], [], [], 0.1)[0] and not client.recv(1):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
    client.close()
    os._exit(0)


def serve(path: str) -> None:
    """A keeper for each who connects; ends when its stdin does."""
    import ipykernel.kernelapp  # noqa: F401
    import IPython  # noqa: F401
    import torch  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if not os.fork():
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                keep(client)
            client.close()


def ask(path: str, connection_file: str) -> int:
    """What Jupyter starts, and takes for the kernel: has one forked, hands
    signals on, and ends with it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        request = {"connection_file": connection_file, "cwd": os.getcwd(),
                   "env": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode() + b"\n"],
                        [0, 1, 2])
        lines = server.makefile("rb")
        child = int(lines.readline())
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: os.kill(child, number))
        lines.read()
    return 0


def run(command: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/socket"
        warm = sys.platform == "linux"
        spec = Path(folder) / "kernels" / "warm"
        spec.mkdir(parents=True)
        (spec / "kernel.json").write_text(json.dumps({
            "argv": [sys.executable,
                     *([__file__, "--ask", path] if warm else
                       ["-m", "ipykernel_launcher", "-f"]),
                     "{connection_file}"],
            "display_name": "warm", "language": "python"}))
        paths = [folder, *filter(None, [os.environ.get("JUPYTER_PATH")])]
        env = os.environ | {"JUPYTER_PATH": os.pathsep.join(paths)}
        if not warm:
            return subprocess.call(command, env=env)
        with subprocess.Popen(
                [sys.executable, __file__, "--serve", path], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
            try:
                if server.stdout.readline() != "ready\n":
                    return 1
                return subprocess.call(command, env=env)
            finally:
                server.stdin.close()


if __name__ == "__main__":
    first, *rest = sys.argv[1:]
    if first == "--serve":
        serve(*rest)
    elif first == "--ask":
        sys.exit(ask(*rest))
    else:
        sys.exit(run([first, *rest]))
