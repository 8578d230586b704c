"""The suites of `marlora bench` by name. Each gives what was measured and the table that is
printed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .agents import agents
from .ahead import ahead
from .gpu.hour import gpu
from .load.fleet import fleet
from .load.store import store
from .loop import loop
from .measure import Options
from .proxy import proxy
from .publish import publish
from .rollout import rollout
from .sandbox import sandbox
from .serve import serve
from .update import update

SUITES: dict[str, Callable[[Options], dict[str, Any]]] = {
    "update": update,
    "agents": agents,
    "serve": serve,
    "publish": publish,
    "loop": loop,
    "rollout": rollout,
    "sandbox": sandbox,
    "proxy": proxy,
    "ahead": ahead,
    "gpu": gpu,
    "fleet": fleet,
    "store": store,
}
