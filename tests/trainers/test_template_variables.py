"""`chat_template_kwargs` from the settings to the prompts, the checkpoint and those who load it."""

from __future__ import annotations

import asyncio
import datetime
import json
from pathlib import Path

import pytest

from marlora.agents.types import Message, SettingError
from marlora.rollouts.checkpoints.team import LoadOptions, load_team
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.episodes.store import Store
from marlora.trainers.methods.policy_gradient.grpo import GRPOTrainer
from marlora.trainers.testbeds.tiny import tiny_chain, tiny_random_model
from tests.trainers.small_run import bytes_mod_7, config


def dated_model(folder: Path) -> Path:
    """A model whose template begins a chat with the date."""
    model = tiny_random_model(folder)
    template = model / "chat_template.jinja"
    text = template.read_text(encoding="utf-8")
    date = "{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}"
    template.write_text(date + text, encoding="utf-8")
    return model


def trainer(folder: Path, model: Path, **settings: object) -> GRPOTrainer:
    args = config(folder, model, **settings)
    return GRPOTrainer(system=tiny_chain(), rewards=[bytes_mod_7], args=args)


def test_variables_of_a_run_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    model, run = dated_model(tmp_path / "model"), tmp_path / "run"
    with pytest.raises(SettingError, match=r'chat_template_kwargs: \{date_string: "26 Jul 2024"'):
        trainer(tmp_path / "undated", model, max_steps=1).train()
    day = {"date_string": "01 Feb 2025"}
    trainer(run, model, max_steps=1, chat_template_kwargs=day).train()
    checkpoint = run / "checkpoints" / "step-000001"
    data = json.loads((checkpoint / "system.json").read_text(encoding="utf-8"))
    (entry,) = data["bases"].values()
    assert entry["chat_template_kwargs"] == day

    async def prompts() -> list[str]:
        options = LoadOptions(scratch=tmp_path / "scratch", rewards=["correct"])
        team = await load_team(checkpoint, EngineConfig(engine="transformers"), options)
        try:
            assert team.engines[0].tokens.settings == day  # type: ignore[attr-defined]
            renderers = {of[1] for of in team._team_engines.of_policy.values()}
            return [each.show(each.prompt([Message("user", "x")])) for each in renderers]
        finally:
            await team.close()

    shown = asyncio.run(prompts())
    assert shown and all(text.startswith("01 Feb 2025") for text in shown)
    stored = [turn for episode in Store(run / "episodes").read() for turn in episode.turns]
    assert len({turn.prompt_ids[:11] for turn in stored}) == 1

    other = {"date_string": "02 Feb 2025"}
    with pytest.raises(SettingError, match=r"chat_template_kwargs: .*02 Feb.*01 Feb"):
        trainer(run, model, max_steps=2, resume=True, chat_template_kwargs=other).train()
    with pytest.raises(SettingError, match=r"date_strin: .*did you mean 'date_string'"):
        trainer(
            tmp_path / "typo", model, max_steps=1, chat_template_kwargs={**day, "date_strin": "x"}
        ).train()


def test_the_setting_takes_what_yaml_gives(tmp_path: Path) -> None:
    day = datetime.date(2025, 1, 31)
    args = config(tmp_path / "run", tmp_path, chat_template_kwargs={"strftime_now": day})
    assert args.chat_template_kwargs == {"strftime_now": "2025-01-31"}
    args = config(tmp_path / "run", tmp_path, chat_template_kwargs='{"enable_thinking": false}')
    assert args.chat_template_kwargs == {"enable_thinking": False}
    with pytest.raises(SettingError, match="chat_template_kwargs: expected a mapping"):
        config(tmp_path / "run", tmp_path, chat_template_kwargs="thinking")
