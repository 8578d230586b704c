"""The toy model that criticises and rewrites prompts: its teacher's shares by hand, the forms of its
questions, and that it has learnt them."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from marlora.agents.state import Param
from marlora.agents.text.tags import block
from marlora.recipes.launch.settings import read_yaml
from marlora.trainers.feedback.backward import Feedback
from marlora.trainers.feedback.history import past_values
from marlora.trainers.feedback.rewriters import feedback_blocks
from marlora.trainers.feedback.targets import Target
from marlora.trainers.testbeds.world import critic
from marlora.trainers.testbeds.world.critic import FORMS, chosen, lesson, likely
from marlora.trainers.testbeds.world.questions import (
    EDIT,
    GUESS,
    HEADS,
    Asked,
    Questions,
    Shares,
    critic_tokenizer,
    joined,
    named,
    rewritten,
    unlike,
)

PLAN = Path(__file__).parents[4] / "benchmarks" / "compare" / "tiny_world.yaml"


def test_what_a_critic_says() -> None:
    """.7 of the kind's letter, and a third of the rest; `ok` of a right output."""
    assert named("b472", right=False) == pytest.approx({"A": 0.1, "B": 0.8, "C": 0.1})
    assert named("b472", right=True) == {"ok": 1.0}


def test_what_an_editor_writes() -> None:
    """`K` in half where one letter is wanted, in .8 where several are; anything where none is."""
    assert rewritten(["B"]) == rewritten(["B", "B"]) == {"K": 0.5, "B": 0.5}
    assert rewritten(["B", "C"]) == pytest.approx({"K": 0.8, "B": 0.1, "C": 0.1})
    assert rewritten([]) == pytest.approx(dict.fromkeys("ABCK", 0.25))


def test_what_becomes_of_several_judges() -> None:
    """One of the letters that they name, each as often as it is named."""
    assert joined(["B", "ok"]) == joined(["B", "B"]) == {"B": 1.0}
    assert joined(["A", "C"]) == {"A": 0.5, "C": 0.5}
    assert joined(["ok", "ok"]) == {"ok": 1.0}


def test_an_editor_avoids_what_was_tried() -> None:
    """Of `K` and `K!` at .65 and .35, `K` tried before weighs .065: .065 / .415 and .35 / .415."""
    shares = unlike({"K": 1.0}, ["K", "B!"])["K"]
    assert shares == pytest.approx({True: 0.35 / 0.415, False: 0.065 / 0.415})
    assert unlike({"K": 1.0}, [])["K"] == pytest.approx({True: 0.35, False: 0.65})


@pytest.mark.parametrize("form", FORMS)
def test_a_lesson_is_read_as_it_is_asked(form: str) -> None:
    """The reply's shares sum to one at each of its places, and its tokens are their text."""
    rng, tokenizer = random.Random(0), critic_tokenizer()
    questions = Questions(rng)
    for _ in range(20):
        asked = getattr(questions, form)()
        ids, targets = lesson(tokenizer, asked, rng)
        first = min(targets) + 1
        assert [*targets] == [*range(first - 1, len(ids) - 1)]
        for place, shares in targets.items():
            assert shares[ids[place + 1]] > 0 and sum(shares.values()) == pytest.approx(1)
        assert asked.text in tokenizer.decode(ids[:first])
        assert len(ids) < 200, "tags and phrases are one token each"


def test_questions_have_the_form_of_the_methods() -> None:
    """Blocks of feedback as `PerParam` and `Jointly` put them; care is no matter of feedback."""
    asked = Questions(random.Random(1)).rewrite()
    told = re.findall(r"<CONVERSATION>\n(.*?)\n</CONVERSATION>\n<TEXT>\n(\w+)", asked.text, re.S)
    given = [Feedback(text, "", "", 0.0, context) for context, text in told]
    value = re.findall(r"<VARIABLE>\n(.*?)\n", asked.text)[0]
    expected = f"{block('VARIABLE', value)}\n{feedback_blocks(given)}"
    assert told and asked.text.rstrip("\n") == expected
    assert asked.system in (EDIT, GUESS)


def test_prompts_are_headed_as_trace_heads_those_of_the_plan() -> None:
    """The line of `Jointly` above each value, with the roles of the plan's agents."""
    agents = read_yaml(PLAN)["team"]["agents"]
    for head, (name, agent) in zip(HEADS, agents.items(), strict=True):
        param = Param(f"{name}.prompt", "A", "text", agent=name, role=agent["role"])
        target = Target(param, "A")
        assert head == f"{target.name}: {target.role}; {target.constraint}\n"


def test_the_past_is_shown_as_revolve_shows_it() -> None:
    """Its last line, an iteration with what the gate said."""
    rng = random.Random(2)
    asked = next(a for a in iter(lambda: Questions(rng).evolve(), None) if "worse: " in a.text)
    tried = re.findall(r"Iteration \d+: (\S+?)(?: \(rejected: (.*?)\))?\n", asked.text)
    updates = [
        {"values": {"p": value}, "status": "rejected" if why else "adopted", "why": why}
        for value, why in tried
    ]
    assert asked.text.endswith("\n" + past_values()(updates, "p"))


def first_choice(asked: Asked) -> Shares:
    """The shares of the first thing that a reply chooses: its letter."""
    piece = next(piece for piece in asked.reply if not isinstance(piece, str))
    return chosen(piece, random.Random(0))[1]


def distance(one: Shares, other: Shares) -> float:
    return sum(abs(one.get(text, 0.0) - other.get(text, 0.0)) for text in {*one, *other})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", [form for form in FORMS if form not in ("chain", "meta")])
def test_it_has_learnt_to_read(form: str) -> None:
    """On questions that it has not seen it is nearer to its teacher than the best that reads
    nothing, which gives every letter its mean share."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(critic.tiny_world_critic_model())
    rng = random.Random(7)
    drawn = [getattr(Questions(rng), form)() for _ in range(45)]
    asked = [each for each in drawn if each.system != GUESS and len(first_choice(each)) > 1]
    taught = [first_choice(each) for each in asked]
    mean = {text: sum(t.get(text, 0.0) for t in taught) / len(taught) for text in "ABCK"}
    model = sum(distance(likely(network, each, rng)[0], first_choice(each)) for each in asked)
    blind = sum(distance(mean, each) for each in taught)
    assert model < 0.6 * blind, (model / len(asked), blind / len(asked))
