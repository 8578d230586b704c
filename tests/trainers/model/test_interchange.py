"""A checkpoint's adapters outside marlora: plain transformers with PEFT, plain vLLM, and an
evaluation framework of somebody else's."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.transformers import TransformersEngine
from marlora.rollouts.http import fetch
from marlora.trainers.testbeds.tiny import tiny_random_model
from tests.live_server import Live
from tests.repository import clean_environment
from tests.trainers import small_run

PROMPT = [3, *range(40, 60), 1, 4]


def adapters_of(folder: Path, model: Path) -> dict[str, Path]:
    """The adapter folders in the checkpoint of a run of two steps, untouched."""
    small_run.trainer(folder, model, max_steps=2, learning_rate=0.05).train()
    return {
        path.name: path for path in (folder / "checkpoints" / "step-000002" / "adapters").iterdir()
    }


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """log p of ids[1:], as anyone would compute it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_plain_transformers_and_peft_load_a_checkpoints_adapters(tmp_path: Path) -> None:
    model = tiny_random_model(tmp_path / "model")
    folders = adapters_of(tmp_path / "run", model)

    async def ours() -> dict[str, list[float]]:
        engine = TransformersEngine(model, dtype="float32")
        try:
            versions = await engine.publish(
                {name: Path(folder) for name, folder in folders.items()}
            )
            return {
                name: await engine.score(PROMPT, ModelRef(name, versions[name])) for name in folders
            }
        finally:
            await engine.close()

    expected = asyncio.run(ours())
    bare = logprobs(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), PROMPT)
    for name, folder in folders.items():
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), folder
        )
        found = logprobs(plain, PROMPT)
        assert torch.allclose(found, torch.tensor(expected[name]), atol=1e-5)
        assert (found - bare).abs().max() > 1e-3, "the adapter does something"


@pytest.mark.server
@pytest.mark.timeout(900)
def test_plain_vllm_serves_a_checkpoints_adapters(server: Live, tmp_path: Path) -> None:
    folders = adapters_of(tmp_path / "run", server.model)
    url, key = server.server.url, server.server.key
    for name, folder in folders.items():
        served = f"interchange-{name}"
        status, body = fetch(
            f"{url}/v1/load_lora_adapter",
            key,
            "POST",
            {"lora_name": served, "lora_path": str(folder)},
            60,
        )
        assert status == 200, body
        ask = {
            "model": served,
            "prompt": PROMPT,
            "max_tokens": 6,
            "temperature": 0,
            "logprobs": 0,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        status, body = fetch(f"{url}/v1/completions", key, "POST", ask, 60)
        assert status == 200, body
        (choice,) = json.loads(body)["choices"]
        ids = choice["token_ids"]
        assert len(ids) == 6
        plain = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32), folder
        )
        expected = logprobs(plain, [*PROMPT, *ids])[-6:]
        bare = logprobs(
            AutoModelForCausalLM.from_pretrained(server.model, dtype=torch.float32), [*PROMPT, *ids]
        )[-6:]
        found = torch.tensor(choice["logprobs"]["token_logprobs"])
        assert torch.allclose(found, expected, atol=1e-3) and (found - bare).abs().max() > 5e-3
        assert (
            fetch(f"{url}/v1/unload_lora_adapter", key, "POST", {"lora_name": served}, 60)[0] == 200
        )


TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate

@task
def sums():
    return Task(dataset=[Sample(input="1+2", target="3"), Sample(input="2+2", target="4")], solver=generate(), scorer=includes())
"""


@pytest.mark.server
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inspect_ai_evaluates_a_served_checkpoint(server: Live, tmp_path: Path) -> None:
    """In an environment of its own, with the commands that README shows."""
    folder = adapters_of(tmp_path / "run", server.model)["first"]
    url, key = server.server.url, server.server.key
    served = {"lora_name": "inspect-first", "lora_path": str(folder)}
    assert fetch(f"{url}/v1/load_lora_adapter", key, "POST", served, 60)[0] == 200
    python, env = (
        tmp_path / "env" / "bin" / "python",
        clean_environment(MARLORA_API_KEY=key, NO_PROXY="127.0.0.1"),
    )
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True, env=env)
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "-q",
        "--no-compile",
        "inspect-ai>=0.3.200,<0.4",
        "openai",
    ]
    done = subprocess.run(install, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    (tmp_path / "sums.py").write_text(TASK)
    command = [
        str(python.with_name("inspect")),
        "eval",
        "sums.py",
        "--model",
        "openai-api/marlora/inspect-first",
    ]
    options = [
        "--model-base-url",
        f"{url}/v1",
        "--max-tokens",
        "8",
        "--log-format",
        "json",
        "--log-dir",
        "logs",
        "--display",
        "none",
    ]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (log,) = (json.loads(path.read_text()) for path in (tmp_path / "logs").glob("*.json"))
    assert log["status"] == "success" and len(log["samples"]) == 2, log.get("error")
    assert all(
        sample["output"]["choices"] and sample["output"]["usage"]["output_tokens"]
        for sample in log["samples"]
    )
    assert (
        fetch(f"{url}/v1/unload_lora_adapter", key, "POST", {"lora_name": "inspect-first"}, 60)[0]
        == 200
    )
