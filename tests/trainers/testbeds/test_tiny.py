"""The tiny model: its task, its teacher, and that it is made once and the same every time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from marlora.agents.testing import check_system
from marlora.agents.types import Message, Turn
from marlora.rollouts.engines.scripted import ByteTokenizer
from marlora.rollouts.renderer import ChatRenderer, load_tokenizer
from marlora.rollouts.tasks.registry import load_tasks
from marlora.rollouts.tasks.toy import tiny_tasks
from marlora.trainers.testbeds import tiny


def test_tasks_are_all_sums_split_by_the_rule() -> None:
    train, held = tiny_tasks("train"), tiny_tasks("eval")
    assert (len(train), len(held)) == (800, 200)
    assert {t.id for t in train} | {t.id for t in held} == {f"{n:03}" for n in range(1000)}
    assert all((31 * t.meta["a"] + 17 * t.meta["b"] + 7 * t.meta["c"]) % 5 == 0 for t in held)
    task = next(t for t in train + held if t.id == "785")
    assert (task.prompt, task.answer, task.public().meta) == (
        "7+8+5",
        "20",
        {"a": 7, "b": 8, "c": 5},
    )
    assert [t.id for t in train] != sorted(t.id for t in train) and tiny_tasks("train") == train
    assert {t.id for t in load_tasks("marlora.rollouts.tasks.toy:tiny_tasks", split="eval")} == {
        t.id for t in held
    }


def test_the_teacher_slips_in_each_role_in_its_own_way() -> None:
    assert tiny.teacher("first", 3, 4) == [("7", 1.0)]
    assert tiny.teacher("first", 2, 7) == [("9", 1.0)]
    assert tiny.teacher("first", 7, 8) == [("5", 0.6), ("15", 0.4)]
    assert tiny.teacher("last", 15, 8) == [("24", 0.6), ("23", 0.4)]
    assert tiny.teacher("last", 3, 5) == [("9", 0.6), ("8", 0.4)]
    assert tiny.teacher("last", 17, 4) == [("21", 1.0)]


def test_the_chain_hands_on_the_sum() -> None:
    chain = tiny.tiny_chain()
    task = next(t for t in tiny_tasks() + tiny_tasks("eval") if t.id == "785")
    assert [spec.policy for spec in chain.specs] == ["first", "last"]
    said = Turn(0, "first", text="15")
    assert chain.prompt_of("first", task, []) == ("7+8+5", []) and chain.prompt_of(
        "last", task, [said]
    ) == ("15+5", [said])
    check_system(chain, [task])


def test_its_tokenizer_is_the_fakes(tmp_path: Path) -> None:
    tokens, fake = ChatRenderer(tiny.tiny_tokenizer()), ChatRenderer(ByteTokenizer())
    text = "".join(map(chr, range(300))) + "👍<|end|>"
    messages = [Message("system", "first"), Message("user", text)]
    assert tokens.prompt(messages) == fake.prompt(messages)
    assert (
        tokens.probe()["append_only"]
        and tokens.template_hash == fake.template_hash
        and tokens.eos_ids == fake.eos_ids
    )
    folder = tiny.tiny_random_model(tmp_path / "random")
    assert ChatRenderer(load_tokenizer(folder)).prompt(messages) == tokens.prompt(messages)


def test_geometry_and_random_model(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    assert sum(p.numel() for p in tiny.tiny_network().parameters()) == 624_512
    one, two = (
        tiny.tiny_random_model(tmp_path / "a"),
        tiny.tiny_random_model(tmp_path / "b", seed=1),
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    names = {path.name for path in one.iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert (one / "model.safetensors").read_bytes() != (two / "model.safetensors").read_bytes()
    assert (one / "model.safetensors").read_bytes() == (
        tiny.tiny_random_model(tmp_path / "c") / "model.safetensors"
    ).read_bytes()
    assert AutoModelForCausalLM.from_pretrained(one).dtype == torch.float32


def test_training_repeats_lowers_the_loss_and_refuses_to_fail_silently() -> None:
    config = tiny.TinyConfig(steps=3, batch_size=16, warmup=2, max_loss=100.0)
    lines: list[str] = []
    one, two = tiny.train(config, lines.append), tiny.train(config, lines.append)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    lessons = tiny._lessons()[0][:16]
    with torch.no_grad():
        assert float(tiny.answer_loss(one, lessons)) < 0.9 * float(
            tiny.answer_loss(tiny.tiny_network(), lessons)
        )
    with pytest.raises(RuntimeError, match=r"expected at most 0\.1"):
        tiny.train(tiny.TinyConfig(steps=1, batch_size=8, max_loss=0.1), lines.append)


def test_loss_weighs_both_answers() -> None:
    """Worked by hand on a flat model: every answer token costs log 264, whatever the weights."""
    flat = tiny.tiny_network()
    with torch.no_grad():
        for parameter in flat.parameters():
            parameter.zero_()
        lessons = [tiny._lessons()[1][0], next(x for x in tiny._lessons()[1] if len(x[1]) == 2)]
        assert float(tiny.answer_loss(flat, lessons)) == pytest.approx(
            float(torch.log(torch.tensor(264.0))), rel=1e-6
        )


def test_a_model_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    monkeypatch.setattr(
        tiny,
        "train",
        lambda config, say: (trained.append(1), tiny.tiny_network(hidden_size=32, layers=1))[1],
    )
    monkeypatch.setattr(tiny.ToyModel, "recipe_hash", lambda self: "abc")
    folder = tiny.tiny_model(tmp_path)
    assert tiny.tiny_model(tmp_path) == folder == tmp_path / "tiny-abc" and trained == [1]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny-abc"]
    monkeypatch.setenv("MARLORA_CACHE", str(tmp_path))
    assert tiny.tiny_model() == folder


@pytest.mark.slow
def test_the_trained_model_slips_dependably_and_can_do_better() -> None:
    network = AutoModelForCausalLM.from_pretrained(tiny.tiny_model())
    greedy, sampled = tiny.accuracy(network, 0.0), tiny.accuracy(network, 1.0)
    assert 0.15 <= greedy["team"] <= 0.5 and 0.3 <= sampled["team"] <= 0.65
    assert 0.45 <= greedy["first"] <= 0.75 and 0.6 <= sampled["first"] <= 0.85
