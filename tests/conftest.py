"""What holds for every test."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples in every run, and no limit of time on one: a busy machine must not fail a test.
settings.register_profile("marlora", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("marlora")
