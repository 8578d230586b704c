"""Alarms of training metrics, per policy: mismatch of engine and trainer, entropy collapse, most
tokens clipped, replies truncated, constant groups.

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
OF_UPDATE = ("clipped",)  # shares of an update; the others are of the step's episodes
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
        self,
        rows: Mapping[str, Mapping[str, Any]],
        stale: bool = False,
        advice: Mapping[str, str] | None = None,
    ) -> tuple[list[str], str]:
        """(warnings, reason to stop or "") for one step's metrics by policy. `first_mismatch_kl` is
        of the pass before any update.

        `stale`: the episodes were played by earlier versions. Then that distance holds what was
        learnt since, and is not judged: that the server speaks as the trainer does is the live
        proof's to show. `advice`: by metric, which setting to change.
        """
        warnings: list[str] = []
        stop = ""
        for policy, row in rows.items():
            trained = bool(row.get("tokens")) and bool(row.get("applied", True))
            if trained:
                kl, change = float(row["first_mismatch_kl"]), (advice or {}).get("mismatch", "")
                warned, reason = self._mismatch(policy, kl, stale, change)
                warnings += warned
                stop = reason or stop
            warnings += _shares(policy, row, trained, advice or {})
        return warnings, stop

    def _mismatch(self, policy: str, kl: float, stale: bool, change: str) -> tuple[list[str], str]:
        """(warnings, reason to stop or "") for one step's distance of engine and trainer; `change`:
        which setting to change, or ""."""
        change = f"; {change}" if change else ""
        noise = self.noise.setdefault(policy, min(kl, WARN_KL))
        warnings: list[str] = []
        if not stale and kl > max(WARN_KL, 10 * noise):
            warnings.append(
                f"policy {policy!r}: engine and trainer disagree by {kl:.1e} nat per token (k3"
                f" KL); it was {noise:.1e} at the start{change}"
            )
        beyond = not stale and kl > max(STOP_KL, 100 * noise)
        self.beyond[policy] = self.beyond.get(policy, 0) + 1 if beyond else 0
        if self.beyond[policy] < PATIENCE:
            return warnings, ""
        return warnings, (
            f"policy {policy!r}: engine and trainer disagreed by {kl:.1e} nat per token for"
            f" {PATIENCE} steps; the served adapter is not the trained one{change}"
        )

    def to_json(self) -> dict[str, Any]:
        return {"noise": self.noise, "beyond": self.beyond}


def _shares(
    policy: str, row: Mapping[str, Any], trained: bool, advice: Mapping[str, str]
) -> list[str]:
    """Warnings of a policy's shares and entropy in one step. What describes an update is judged
    only where there was one; truncated replies and constant groups always, for at 1.0 they leave
    nothing to update from."""
    warnings = []
    for name, limit in LIMITS.items():
        if (trained or name not in OF_UPDATE) and float(row.get(name, 0.0)) > limit:
            said = f"policy {policy!r}: {name.replace('_', ' ')} {row[name]:.2f}"
            change = advice.get(name)
            warnings.append(
                f"{said}: {change} (alarm above {limit})" if change else f"{said} (above {limit})"
            )
    if trained and float(row.get("entropy", 1.0)) < ENTROPY_FLOOR:
        change = f"; {advice['entropy']}" if "entropy" in advice else ""
        warnings.append(
            f"policy {policy!r}: entropy {row['entropy']:.4f} nat per token (below"
            f" {ENTROPY_FLOOR}): it hardly explores any more{change}"
        )
    return warnings
