"""Alarms of training metrics, per policy: mismatch of engine and trainer, entropy collapse, most
tokens clipped, replies cut off, no signal.

The engine's log-probs differ from the trainer's even with equal weights (bfloat16, kernels, batch
sizes). How far is measured on the first step, where both hold the same weights; alarms compare with
that. What is too much for noise there is warned of at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# (metric, worse when above, threshold): shares of trained tokens or turns, nats per token
LIMITS = {"clipped": 0.5, "truncated": 0.5, "constant_groups": 0.9}
ENTROPY_FLOOR = 0.01
# k3 KL per token: about x * x / 2 where log-probs are off by x. bfloat16's 0.04 nat gives 8e-4; no
# first step may calibrate more away.
WARN_KL, STOP_KL, PATIENCE = 1e-3, 1e-2, 3


@dataclass
class Alarms:
    """Keeps the noise of the first step per policy, and how often the mismatch was beyond all
    bounds. Its state goes to checkpoints."""

    noise: dict[str, float] = field(default_factory=dict)
    beyond: dict[str, int] = field(default_factory=dict)

    def check(
        self, rows: Mapping[str, Mapping[str, Any]], stale: bool = False
    ) -> tuple[list[str], str]:
        """(warnings, reason to stop or "") for one step's metrics by policy. `first_mismatch_kl` is
        of the pass before any update.

        `stale`: the episodes were played by earlier versions. Then that distance holds what was
        learnt since, and is not judged: that the server speaks as the trainer does is the live
        proof's to show.
        """
        warnings: list[str] = []
        stop = ""
        for policy, row in rows.items():
            if not row.get("tokens") or not row.get("applied", True):
                continue
            kl = float(row["first_mismatch_kl"])
            noise = self.noise.setdefault(policy, min(kl, WARN_KL))
            if not stale and kl > max(WARN_KL, 10 * noise):
                warnings.append(
                    f"policy {policy!r}: engine and trainer disagree by {kl:.1e} nat per token (k3"
                    f" KL); it was {noise:.1e} at the start"
                )
            self.beyond[policy] = (
                self.beyond.get(policy, 0) + 1
                if not stale and kl > max(STOP_KL, 100 * noise)
                else 0
            )
            if self.beyond[policy] >= PATIENCE:
                stop = (
                    f"policy {policy!r}: engine and trainer disagreed by {kl:.1e} nat per token for"
                    f" {PATIENCE} steps; the served adapter is not the trained one"
                )
            for name, limit in LIMITS.items():
                if float(row.get(name, 0.0)) > limit:
                    warnings.append(
                        f"policy {policy!r}: {name.replace('_', ' ')} {row[name]:.2f} (above"
                        f" {limit})"
                    )
            if float(row.get("entropy", 1.0)) < ENTROPY_FLOOR:
                warnings.append(
                    f"policy {policy!r}: entropy {row['entropy']:.4f} nat per token (below"
                    f" {ENTROPY_FLOOR}): it hardly explores any more"
                )
        return warnings, stop

    def to_json(self) -> dict[str, Any]:
        return {"noise": self.noise, "beyond": self.beyond}
