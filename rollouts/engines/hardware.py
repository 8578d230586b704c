"""Probes of this machine: the dtype its CPU multiplies, and whether it has a GPU."""

from __future__ import annotations

from pathlib import Path

from ...agents.types import SettingError


def cpu_has_bfloat16() -> bool:
    """Does this CPU multiply bfloat16 itself? Without it bfloat16 is about nine times slower than
    float32 (measured, AVX2)."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(word in flags for word in ("avx512_bf16", "amx_bf16", " bf16"))


def choose_dtype(model: str, setting: str, *, on_gpu: bool) -> str:
    """`auto` becomes the dtype that the model's config names, but float32 on a CPU that would have
    to emulate bfloat16. Raises `SettingError` for a config that cannot be read."""
    if setting != "auto":
        if setting not in ("float32", "bfloat16"):
            raise SettingError(f"dtype: expected auto, float32 or bfloat16; got {setting!r}")
        return setting
    if not on_gpu and not cpu_has_bfloat16():
        return "float32"
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"model {model!r}: its config.json cannot be read ({str(error).splitlines()[0]})"
        ) from error
    named = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return named if named in ("float32", "bfloat16") else "bfloat16" if on_gpu else "float32"


def has_gpu() -> bool:
    """Is there an NVIDIA device on this machine? Asked without torch."""
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/gpus").is_dir()
