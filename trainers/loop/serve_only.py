"""`serve_only`: a node that only serves. It starts the servers that a run needs and writes where
they are; trainers elsewhere find them.

On every server node:

    python recipes/grpo_team.py --config my.yaml --serve_only true --endpoints RUN/endpoints \\
        --server_host $(hostname)

On the trainers' node:

    python recipes/grpo_team.py --config my.yaml --output_dir RUN --endpoints RUN/endpoints \\
        --num_servers 2
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from ...agents.types import SettingError
from ...rollouts.engines.hardware import choose_dtype, has_gpu
from ...rollouts.engines.vllm.discovery import serve_endpoints
from ...rollouts.engines.vllm.engine import server_settings
from ..collection.background import handled
from ..errors import Stopped
from ..model.base_models import group_by_base
from ..model.local_models import local_model
from .spec import RunSpec


def serve(spec: RunSpec) -> None:
    """Serve until SIGINT, SIGTERM or SIGUSR1. Logs and keys lie beside the endpoints. Raises
    `EngineError` when a server keeps dying."""
    config, node = spec.config, socket.gethostname()
    if not config.endpoints:
        raise SettingError(
            "serve_only: endpoints expected, a folder that the trainers see; servers write there"
            " where they are"
        )
    folder = Path(config.endpoints)
    if folder.suffix == ".json":
        raise SettingError(
            f"endpoints {folder}: serve_only writes one file per node, so a folder is expected"
        )
    servers = []
    bases = group_by_base(dict(spec.policies), config.model)
    if not bases:
        raise SettingError(
            "serve_only: every policy is an outside model (url), so there is no base to serve here"
        )
    for name, policies in bases.items():
        path = local_model(name)
        settings = dataclasses.replace(
            config, engine_dtype=choose_dtype(path, config.engine_dtype, on_gpu=has_gpu())
        )
        servers.append(
            server_settings(
                path,
                policies,
                settings,
                folder,
                say,
                f"{node}-{os.getpid()}",
                staleness=config.max_staleness,
            )
        )

    def end(number: int, frame: FrameType | None) -> None:
        raise Stopped

    with handled(end, (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)):
        try:
            serve_endpoints(servers, folder / f"{node}-{os.getpid()}.json", say)
        except Stopped:
            say("stopped")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
