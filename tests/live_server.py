"""A real vLLM server on a small random model, and adapters for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from marlora.agents.types import AdapterSpec, PolicySpec
from marlora.rollouts.engines.vllm.engine import VLLMEngine
from marlora.rollouts.engines.vllm.server import VLLMServer
from marlora.rollouts.engines.vllm.server_args import ServerSettings
from marlora.rollouts.renderer import ChatRenderer, load_tokenizer
from marlora.trainers.testbeds.tiny import tiny_random_model

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
POLICIES = tuple(
    PolicySpec(name, adapter=AdapterSpec(r=4, alpha=8.0, targets=TARGETS))
    for name in ("solver", "critic")
)
CONTEXT = 512

# What a model folder may carry; none of it may reach a run. Token 40 is an ordinary byte here, and
# no end of a reply.
HOSTILE = {
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.5,
    "repetition_penalty": 1.7,
    "eos_token_id": [1, 40],
}


def make_model(folder: Path) -> Path:
    """The small random model, with a generation_config.json of the worst kind."""
    tiny_random_model(folder, hidden_size=64)
    (folder / "generation_config.json").write_text(json.dumps(HOSTILE))
    return folder


class SharedServer(VLLMServer):
    """Outlives the engines of single tests."""

    def stop(self) -> None:
        if not self.alive:
            super().stop()

    def end(self) -> None:
        super().stop()


@dataclass
class Live:
    """The running server, its model, and where adapters for it are written."""

    server: VLLMServer
    model: Path
    root: Path
    tokens: ChatRenderer

    def engine(self, **settings: Any) -> VLLMEngine:
        """A new engine on the server; closing it leaves the server running."""
        return VLLMEngine([self.server], self.tokens, adapter_root=self.root, **settings)

    def adapter(self, name: str, seed: int, r: int = 4) -> Path:
        """A PEFT folder with random A and B. Names are used once: a server never forgets what it
        cached under one."""
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        folder = self.root / name
        assert not folder.exists(), f"adapter {name} is another test's"
        base = AutoModelForCausalLM.from_pretrained(self.model)
        torch.manual_seed(seed)
        config = LoraConfig(
            r=r, lora_alpha=2 * r, target_modules=list(TARGETS), init_lora_weights=False
        )
        get_peft_model(base, config).save_pretrained(folder)
        (folder / "README.md").unlink()
        return folder


def settings_for(model: Path, folder: Path, **more: Any) -> ServerSettings:
    return ServerSettings(str(model), folder, policies=POLICIES, staleness=1, memory=1, **more)


def start(folder: Path) -> Live:
    model = make_model(folder / "model")
    root = folder / "run" / "versions"
    root.mkdir(parents=True)
    server = SharedServer(settings_for(model, folder / "run"))
    try:
        server.start()
    except BaseException:
        server.end()
        raise
    return Live(server, model, root, ChatRenderer(load_tokenizer(str(model))))
