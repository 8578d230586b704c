"""The demo: two agents with a LoRA each learn to add three numbers, on a real model and a real
vLLM server.

make demo                   (two CPU cores: SmolLM2-135M; a GPU: Qwen2.5-0.5B; times and three seeds
                            in recipes/RESULTS.md)
python -m marlora.recipes.demo --model PATH-OR-HUB-NAME --output_dir runs/mine
"""

from __future__ import annotations

import sys

from marlora.recipes.launch.launch import train
from marlora.recipes.launch.settings import parse, run
from marlora.rollouts.engines.hardware import has_gpu
from marlora.trainers.methods.policy_gradient.grpo import GRPOConfig, GRPOTrainer

GPU_MODEL, CPU_MODEL = "Qwen/Qwen2.5-0.5B-Instruct", "smollm2-135m"


def choose_model(setting: str) -> tuple[str, str]:
    """(model, why) for the setting; `auto` looks at this machine and asks the hub only if there is
    a GPU."""
    if setting != "auto":
        return setting, "as set"
    if not has_gpu():
        return CPU_MODEL, "no GPU here; it comes with a Python package"
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        snapshot_download(GPU_MODEL, allow_patterns=["*.json", "*.txt", "*.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        return CPU_MODEL, f"the hub did not give {GPU_MODEL} ({type(error).__name__})"
    return GPU_MODEL, "a GPU is here and the hub answers"


def main() -> None:
    config = parse(GRPOConfig, __file__)
    config.model, why = choose_model(config.model)
    print(f"model: {config.model} ({why})", file=sys.stderr)
    train(GRPOTrainer, config, "demo")


if __name__ == "__main__":
    run(main)
