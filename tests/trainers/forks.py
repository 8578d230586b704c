"""Programs in processes of their own that pay no imports: they are forked from one that has made
them.

`forked(MODULE, ARGV...)` runs a module as `python -m` would, `two_ranks(MODULE, ARGV...)` on two
ranks as torchrun would (tests/trainers/distributed/test_ranks.py has the real one). Importing torch,
transformers and peft takes longer than most of what the tests' programs do.

`python -m tests.trainers.forks` is the process that forks: it reads an order per line as JSON from
stdin and answers with the exit codes; -9 is a SIGKILL.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.repository import ROOT, clean_environment

SECONDS = 280  # of a program at most


# who asks


@functools.cache
def _server() -> subprocess.Popen[str]:
    """Ends with this process, when its stdin does."""
    env = clean_environment(
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
        TOKENIZERS_PARALLELISM="false",
        PYTHONPATH=os.environ.get("PYTHONPATH", ""),
    )
    command = [sys.executable, "-m", "tests.trainers.forks"]
    return subprocess.Popen(
        command, cwd=ROOT, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _run(module: str, argv: Sequence[Any], ranks: Sequence[dict[str, str]]) -> list[Any]:
    """Exit codes, and all that was written to stdout and stderr."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        logs = [str(Path(folder, name)) for name in ("stdout", "stderr")]
        order = {"module": module, "argv": list(map(str, argv)), "ranks": ranks, "logs": logs}
        server.stdin.write(json.dumps(order) + "\n")
        server.stdin.flush()
        # the import of everything, once, is on this clock too
        if not select.select([server.stdout], [], [], SECONDS)[0]:
            server.kill()
            _server.cache_clear()
            raise TimeoutError(f"{module}: not done after {SECONDS} s")
        codes = json.loads(server.stdout.readline())
        return [codes, *(Path(log).read_text(encoding="utf-8") for log in logs)]


def forked(module: str, *argv: Any) -> subprocess.CompletedProcess[str]:
    """What `python -m MODULE ARGV...` does, in a process that has imported it all."""
    codes, stdout, stderr = _run(module, argv, [{}])
    return subprocess.CompletedProcess([module], codes[0], stdout, stderr)


def two_ranks(module: str, *argv: Any) -> subprocess.CompletedProcess[str]:
    """The same on two ranks. The exit code is 0 if both ended well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [
        {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in "01"
    ]
    codes, stdout, stderr = _run(module, argv, ranks)
    failed = next((code for code in codes if code), 0)
    return subprocess.CompletedProcess([module], failed, stdout, stderr)


# who forks


def _child(order: dict[str, Any], env: dict[str, str]) -> int:
    """Play it in this process; what it says goes to files."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, log in zip((1, 2), order["logs"], strict=True):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), target)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env)
    sys.argv = [order["module"], *order["argv"]]
    try:
        runpy.run_module(order["module"], run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            return 1
        return int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _fork(order: dict[str, Any], env: dict[str, str]) -> int:
    pid = os.fork()
    if pid == 0:
        code = _child(order, env)
        with contextlib.suppress(ValueError):  # closed by the program
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    return pid


def _codes(pids: Sequence[int]) -> list[int]:
    """Of these processes; when one fails the others are ended, as torchrun does."""
    found: dict[int, int] = {}
    while len(found) < len(pids):
        pid, status = os.waitpid(-1, 0)
        found[pid] = os.waitstatus_to_exitcode(status)
        if found[pid]:
            for other in set(pids) - set(found):
                os.kill(other, signal.SIGTERM)
    return [found[pid] for pid in pids]


def serve() -> None:
    """Fork until stdin ends."""
    import peft
    import transformers

    from marlora.recipes.launch import launch

    assert launch and peft and transformers.AutoModelForCausalLM
    gc.freeze()  # a collection in a child would copy all pages of the parent's objects
    for line in sys.stdin:
        order = json.loads(line)
        sys.stdout.flush()
        print(json.dumps(_codes([_fork(order, env) for env in order["ranks"]])), flush=True)


if __name__ == "__main__":
    serve()
