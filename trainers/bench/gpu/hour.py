"""`marlora bench gpu`: what has published neighbours, in at most ten minutes of one H100 or H200,
with random weights and no network.

Every part has a process and a time limit of its own (and what earlier parts left of theirs), and
the JSON is written after each: a part that fails, hangs or runs out of time takes nothing with it
but what it had not yet measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ..measure import Options, machine, table
from .parts import PARTS, RESULT, Part, command
from .work import work_of

MOST = 590.0  # seconds of all parts together
GRACE = 15.0  # seconds to end in, for a part whose time is over


def gpu(options: Options) -> dict[str, Any]:
    """All parts one after the other; `parts` by name: status (done, left out, failed, out of time,
    not begun), seconds, results and the error. `failed` names those that should have run."""
    work_of(options)  # raises before anything runs
    end = time.monotonic() + MOST
    report: dict[str, Any] = {"suite": "gpu", "size": options.size, **machine(), "parts": {}}
    for number, part in enumerate(PARTS):
        left = end - time.monotonic()
        later = sum(other.limit for other in PARTS[number + 1 :])
        report["parts"][part.name] = (
            run_part(part, options, max(min(part.limit, left), left - later))
            if left > GRACE
            else {"status": "not begun", "seconds": 0.0, "results": {}, "error": "no time was left"}
        )
        if options.json not in ("", "-"):
            Path(options.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = [
        [name, part["status"], f"{part['seconds']:.0f}", what, result.get("says", "")]
        for name, part in report["parts"].items()
        for what, result in (part["results"] or {"": {"says": part["error"][-200:]}}).items()
    ]
    failed = [n for n, p in report["parts"].items() if p["status"] not in ("done", "left out")]
    columns = ["part", "status", "s", "what", "result"]
    return {**report, "failed": failed, **table(f"gpu: {options.size}", columns, rows)}


def run_part(part: Part, options: Options, limit: float) -> dict[str, Any]:
    """A part in a process group of its own, which is ended with all it started after `limit`
    seconds; what it had printed until then counts."""
    begun = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command(part, options),
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        in_time = True
        try:
            output, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            in_time = False
            output = _end(process)
        except BaseException:  # Ctrl-C ends the part too
            _end(process)
            raise
        log.seek(0)
        errors = log.read().decode("utf-8", "replace")[-2000:]
    results = dict(
        json.loads(line.removeprefix(RESULT))
        for line in output.splitlines()
        if line.startswith(RESULT)
    )
    status = {0: "done", 3: "left out"}.get(process.returncode, "failed")
    if not in_time:
        status, errors = "out of time", f"not done after {limit:.0f} s\n{errors}"
    return {
        "status": status,
        "seconds": time.monotonic() - begun,
        "results": results,
        "error": "" if status in ("done", "left out") else errors,
    }


def _end(process: subprocess.Popen[str]) -> str:
    """End a part and all it started; what it printed."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        output, _ = process.communicate(timeout=GRACE)
        return output
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
    return output
