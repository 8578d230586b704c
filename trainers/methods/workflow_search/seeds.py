"""The seven programs that ADAS begins with (arXiv:2408.08435), in our operators."""

from __future__ import annotations

from collections.abc import Collection, Mapping

THINK = "Think step by step, then end with a line `Answer: ` and the answer alone."
CHAIN_OF_THOUGHT = f'THINK = "{THINK}"\nawait custom(THINK)'
SELF_CONSISTENCY = f"""THINK = "{THINK}"
solutions = [await custom(THINK) for _ in range(5)]
await ensemble(solutions)"""
SELF_REFINE = f"""THINK = "{THINK}"
solution = await custom(THINK)
for _ in range(2):
    feedback = await review(solution)
    solution = await revise(solution, feedback)
solution"""
DEBATE = f"""THINK = "{THINK}"
ROLES = ["a patient teacher", "a strict examiner", "a doubting colleague"]
answers = [await custom("You are " + role + ". " + THINK) for role in ROLES]
others = "\\n\\n".join(answers)
again = [await custom("You are " + role + ". Others say:\\n\\n" + others + "\\n\\n" + THINK)
         for role in ROLES]
await ensemble(again)"""
STEP_BACK = f"""THINK = "{THINK}"
BACK = "Do not solve it yet. Which principles does the solution rest on?"
principles = await custom(BACK)
await custom("Keep in mind:\\n\\n" + principles + "\\n\\n" + THINK)"""
QUALITY_DIVERSITY = f"""THINK = "{THINK}"
OTHER = "Here are earlier solutions; find another way to solve it."
solutions = [await custom(THINK)]
for _ in range(2):
    earlier = "\\n\\n".join(solutions)
    solutions.append(await custom(OTHER + "\\n\\n" + earlier + "\\n\\n" + THINK))
await ensemble(solutions)"""
ROLE_ASSIGNMENT = f"""THINK = "{THINK}"
CHOOSE = "Do not solve it. Name the expert who should, in a few words."
expert = await custom(CHOOSE)
await custom("You are this expert: " + expert + ". " + THINK)"""

SEEDS: Mapping[str, str] = {
    "chain of thought": CHAIN_OF_THOUGHT,
    "self-consistency": SELF_CONSISTENCY,
    "self-refine": SELF_REFINE,
    "debate": DEBATE,
    "step-back": STEP_BACK,
    "quality-diversity": QUALITY_DIVERSITY,
    "role assignment": ROLE_ASSIGNMENT,
}
NEEDS: Mapping[str, Collection[str]] = {
    "chain of thought": {"custom"},
    "self-consistency": {"custom", "ensemble"},
    "self-refine": {"custom", "review", "revise"},
    "debate": {"custom", "ensemble"},
    "step-back": {"custom"},
    "quality-diversity": {"custom", "ensemble"},
    "role assignment": {"custom"},
}  # the operators that each calls
