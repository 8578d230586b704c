"""The conformance suite of systems; it ships with the library, so that anyone's system can be
checked."""

from __future__ import annotations

from marlora.agents.testing import check, check_system

__all__ = ["check", "check_system"]
