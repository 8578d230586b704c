"""The teacher of the toy model `tiny-critic` as a scripted engine: runs of the feedback methods on
its task without the model."""

from __future__ import annotations

import random
import re

from marlora.agents.types import Sampling
from marlora.rollouts.engines.base import ModelRef
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.trainers.testbeds.critic.teacher import replies
from tests.trainers.feedback_run import CHAT

DIGITS = re.compile(r"\d+(?:\.\d+)?")
KIND = re.compile(r"[abc](?=0)")


def asked(prompt: str) -> tuple[str, str]:
    """System message and message of a prompt."""
    messages = dict(CHAT.findall(prompt))
    return messages.get("system", ""), messages["user"]


def answer(prompt: str, ref: ModelRef, sampling: Sampling, k: int) -> str:
    """A reply of the teacher: its likeliest one at temperature 0, else a drawn one."""
    shares = replies(*asked(prompt))
    if sampling.temperature == 0:
        return max(shares, key=lambda reply: shares[reply])
    rng = random.Random(f"{sampling.seed} {k} {prompt}")
    return rng.choices([*shares], [*shares.values()])[0]


def teacher_engine() -> ScriptedEngine:
    return ScriptedEngine(answer, context=16_384)


def form(question: tuple[str, str]) -> str:
    """A question with `?` for all numbers and kinds of problems."""
    return KIND.sub("?", DIGITS.sub("0", " | ".join(question)))
