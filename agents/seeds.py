"""Seeds of requests, derived from names so that they are equal on every machine."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def derive_seed(*parts: Any) -> int:
    """A 62-bit seed from JSON values, equal on every machine. Siblings of one request use the
    numbers that follow it."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big") >> 2
