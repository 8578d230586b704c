"""The shipped pool of MAS-GPT: systems as programs in our operators, by name.

The seven that ADAS begins with (`workflow_search/seeds.py`), and others known from the literature:
fewer and more votes, reviews, debates, decomposition, and programs that are run. MAS-GPT's own pool
(arXiv:2503.03686) has more than 40, which are not published.
"""

from __future__ import annotations

from collections.abc import Mapping

from ...workflow_search.seeds import SEEDS, THINK

_THINK = f'THINK = "{THINK}"\n'
DIRECT = 'await custom("Give the answer alone.")'
ANSWER = "await answer_generate()"
VOTE_OF_THREE = f"""{_THINK}solutions = [await custom(THINK) for _ in range(3)]
await ensemble(solutions)"""
PLAN = f"""{_THINK}PLAN = "Do not solve it yet. Write a plan of at most five steps."
plan = await custom(PLAN)
await custom("Follow this plan:\\n\\n" + plan + "\\n\\n" + THINK)"""
DECOMPOSITION = f"""{_THINK}PARTS = "Do not solve it yet. Which smaller questions come first?"
parts = await custom(PARTS)
answers = await custom("Answer these questions, one after the other:\\n\\n" + parts)
await custom("These parts are solved:\\n\\n" + answers + "\\n\\n" + THINK)"""
REVIEW = f"""{_THINK}solution = await custom(THINK)
feedback = await review(solution)
await revise(solution, feedback)"""
VERIFIED_VOTE = f"""{_THINK}solutions = []
for _ in range(3):
    solution = await custom(THINK)
    feedback = await review(solution)
    solutions.append(await revise(solution, feedback))
await ensemble(solutions)"""
EXPERTS = f"""{_THINK}ROLES = ["a mathematician", "a programmer", "a physicist"]
solutions = [await custom("You are " + role + ". " + THINK) for role in ROLES]
await ensemble(solutions)"""
SUMMARY = f"""{_THINK}solutions = [await custom(THINK) for _ in range(3)]
shown = "\\n\\n".join(solutions)
await custom("Several solutions:\\n\\n" + shown + "\\n\\nCompare them, then decide. " + THINK)"""
ONE_PROGRAM = 'await programmer("Work it out exactly.")'
PLANNED_PROGRAM = """PLAN = "Do not solve it. What is known, and how does the answer follow?"
plan = await custom(PLAN)
await programmer(plan)"""
PROGRAM_VOTE = f"""{_THINK}exact = await programmer("Work it out exactly.")
solutions = [exact, await custom(THINK), await custom(THINK)]
await ensemble(solutions)"""
EXPLAINED_PROGRAM = f"""{_THINK}result = await programmer("Work it out exactly.")
await custom("A program printed:\\n\\n" + result + "\\n\\nIs this plausible? " + THINK)"""
TESTED = """WRITE = "Write the function."
solution = await custom(WRITE)
await test(solution)"""
TESTED_REVIEW = """WRITE = "Write the function."
solution = await custom(WRITE)
feedback = await review(solution)
better = await revise(solution, feedback)
await test(better)"""

POOL: Mapping[str, str] = {
    "direct answer": DIRECT,
    "short answer": ANSWER,
    **SEEDS,
    "vote of three": VOTE_OF_THREE,
    "plan and solve": PLAN,
    "decomposition": DECOMPOSITION,
    "review": REVIEW,
    "vote of reviewed solutions": VERIFIED_VOTE,
    "three experts": EXPERTS,
    "solutions and a summary": SUMMARY,
    "program": ONE_PROGRAM,
    "planned program": PLANNED_PROGRAM,
    "program and vote": PROGRAM_VOTE,
    "program and explanation": EXPLAINED_PROGRAM,
    "tested code": TESTED,
    "reviewed and tested code": TESTED_REVIEW,
}
