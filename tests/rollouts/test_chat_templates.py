"""Chat templates of every kind: what ends an answer, today's date, and variables of users."""

from __future__ import annotations

import importlib.util
import json
import re
from datetime import datetime
from pathlib import Path

import pytest

from marlora.agents.types import Message, SettingError, Turn
from marlora.rollouts.engines.scripted import ScriptedEngine
from marlora.rollouts.renderer import ChatRenderer, base_renderer
from marlora.rollouts.template_variables import for_template
from tests.rollouts.asking import Asker, played
from tests.rollouts.templates import CHATML, ENDS, byte_tokenizer, family

GO, ON = Message("user", "go"), Message("user", "on")


def renderer(name: str) -> ChatRenderer:
    *parts, variables = ENDS[name]
    return ChatRenderer(byte_tokenizer(*parts), **variables)


def ids(tokens: ChatRenderer, text: str) -> tuple[int, ...]:
    return tuple(tokens.tokenizer.encode(text, add_special_tokens=False))


# what the model samples, how the chat goes on after it, and the end tokens
SAMPLED = {
    "llama2": (" 15 </s>", "<s>[INST] on [/INST]", ["</s>"], " 15"),
    "newline": ("15\n<|end|>", "\n<|user|>\non\n<|end|>\n<|assistant|>\n", ["<|end|>"], "15"),
    "phi3": ("15<|end|>", "\n<|user|>\non<|end|>\n<|assistant|>\n", ["<|end|>"], "15"),
    "harmony": (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>15"
        "<|return|>",
        "<|start|>user<|message|>on<|end|><|start|>assistant",
        ["<|return|>"],
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>15",
    ),
    "framed": (
        "15<|said|><|over|>",
        "<|turn|><|user|>on<|over|><|turn|><|bot|><|say|>",
        ["<|over|>"],
        "15",
    ),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_an_answer_ends_once(name: str) -> None:
    tokens = renderer(name)
    said, follow, ends, text = SAMPLED[name]
    prompt, sampled = tokens.prompt([GO]), ids(tokens, said)
    assert [tokens.show([tokens.end_of_turn])] == ends
    assert [tokens.show([i]) for i in tokens.eos_ids[:1]] == ends
    assert tokens.decode(sampled) == text
    turn = Turn(0, "a", (GO,), text=text, prompt_ids=prompt, token_ids=sampled)
    later = tokens.prompt([GO, Message("assistant", text), ON], turn)
    assert later == prompt + sampled + ids(tokens, follow)


@pytest.mark.parametrize("name", SAMPLED)
def test_an_answer_that_was_cut_off_is_ended_as_the_template_ends_it(name: str) -> None:
    tokens = renderer(name)
    prompt, sampled = tokens.prompt([GO]), ids(tokens, "15")
    turn = Turn(0, "a", (GO,), text="15", prompt_ids=prompt, token_ids=sampled)
    later = tokens.prompt([GO, Message("assistant", "15"), ON], turn)
    whole = tokens.show(tokens.prompt([GO, Message("assistant", "15"), ON]))
    after_answer = whole.rpartition("15")[2]
    assert tokens.show(later) == tokens.show(prompt) + "15" + after_answer


@pytest.mark.parametrize("name", SAMPLED)
def test_a_written_answer_has_the_templates_text_before_its_end(name: str) -> None:
    tokens = renderer(name)
    prompt = tokens.prompt([GO])
    written = tokens.write(prompt, "15")
    assert written.text == "15"
    expected = {"llama2": "15 </s>", "newline": "15\n<|end|>", "phi3": "15<|end|>"}
    expected |= {"harmony": "15<|return|>", "framed": "15<|said|><|over|>"}
    assert tokens.show(written.token_ids) == expected[name]
    turn = Turn(
        0, "a", (GO,), text="15", prompt_ids=prompt, token_ids=written.token_ids, source="written"
    )
    later = tokens.show(tokens.prompt([GO, Message("assistant", "15"), ON], turn))
    assert later == tokens.show(prompt) + expected[name] + SAMPLED[name][1]


def trl_templates() -> dict[str, Path]:
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).with_name("chat_templates") if spec and spec.origin else Path("none")
    images = ("idefics", "llava", "smolvlm")
    return {p.stem: p for p in sorted(folder.glob("*.jinja")) if not p.stem.startswith(images)}


def special_words(template: str) -> list[str]:
    return sorted(
        set(re.findall(r"<\|\w+\|>|<\|\w+>|<\w+\|>|<｜[^｜]+｜>|<(?:start|end)_of_turn>", template))
    )


@pytest.mark.parametrize("name", trl_templates())
def test_real_templates_end_an_answer_once(name: str) -> None:
    template = trl_templates()[name].read_text(encoding="utf-8")
    tokenizer = byte_tokenizer(template, ("<B>", "<E>", *special_words(template)), "<B>", "<E>")
    tokens = ChatRenderer(tokenizer, **for_template(template, {"strftime_now": "2024-07-26"}))
    assert tokens.end_of_turn is not None
    chat = [GO, Message("assistant", "15"), ON]
    written = tokens.write(tokens.prompt([GO]), "15")
    turn = Turn(
        0, "a", (GO,), text="15", prompt_ids=written.prompt_ids, token_ids=written.token_ids
    )
    ends = [i for i in tokens.prompt(chat, turn) if i in tokens.eos_ids]
    once = [i for i in tokens.prompt(chat) if i in tokens.eos_ids]
    assert len(ends) - ends.count(tokens.end_of_turn) == len(once) - once.count(tokens.end_of_turn)
    returned = tokens.facts.ending.sampled != tokens.facts.ending.written  # gpt-oss
    assert ends.count(tokens.end_of_turn) == once.count(tokens.end_of_turn) + (
        returned and tokens.append_only
    )
    if name.startswith("gptoss"):
        assert [tokens.show([i]) for i in tokens.eos_ids] == ["<|return|>", "<E>"]


# today's date

DATED = {
    "own variable": (
        CHATML + "{% if not date_string is defined %}{% set date_string ="
        " strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}",
        'chat_template_kwargs: {date_string: "26 Jul 2024"}',
        {"date_string": "26 Jul 2024"},
        "26 Jul 2024",
    ),
    "other name": (
        CHATML + "{{ current_date or strftime_now('%Y') }}",
        'chat_template_kwargs: {current_date: "2024"}',
        {"current_date": "2024"},
        "2024",
    ),
    "no variable": (
        "{{ 'On ' + strftime_now('%Y-%m-%d') }}" + CHATML,
        'chat_template_kwargs: {strftime_now: "2024-07-26"}',
        {"strftime_now": "2024-07-26"},
        "On 2024-07-26",
    ),
    "only without a system message": (
        "{% if messages[0].role != 'system' %}{{ strftime_now('%A') }}{% endif %}" + CHATML,
        'chat_template_kwargs: {strftime_now: "2024-07-26"}',
        {"strftime_now": "2024-07-26"},
        "Friday",
    ),
    "only with a system message": (
        "{% if messages[0].role == 'system' %}{{ strftime_now('%H:%M') }}{% endif %}" + CHATML,
        'chat_template_kwargs: {strftime_now: "2024-07-26"}',
        {"strftime_now": "2024-07-26T07:05"},
        "07:05",
    ),
}


@pytest.mark.parametrize("kind", DATED)
def test_a_template_that_writes_the_date_wants_it_set(kind: str) -> None:
    template, remedy, variables, shown = DATED[kind]
    tokenizer = byte_tokenizer(template, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    with pytest.raises(SettingError, match=re.escape(remedy)):
        ChatRenderer(tokenizer)
    tokens = ChatRenderer(tokenizer, **variables)
    chat = [Message("system", "s")] * ("with a" in kind) + [GO]
    assert shown in tokens.show(tokens.prompt(chat))


def test_a_template_that_reads_the_clock_for_nothing_is_taken() -> None:
    template = "{% set unused = strftime_now('%Y') %}" + CHATML
    tokenizer = byte_tokenizer(template, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    assert ChatRenderer(tokenizer).prompt([GO]) == ChatRenderer(family("chatml")).prompt([GO])


def test_a_set_date_stays_whatever_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import chat_template_utils

    template, _, variables, _ = DATED["no variable"]
    tokenizer = byte_tokenizer(template, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    prompts = set()
    for day in (datetime(2025, 1, 31), datetime(2026, 2, 1)):

        class Frozen(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return day  # noqa: B023

        monkeypatch.setattr(chat_template_utils, "datetime", Frozen)
        tokens = ChatRenderer(tokenizer, **variables)
        prompts.add((tokens.template_hash, tokens.prompt([GO])))
    assert len(prompts) == 1


@pytest.mark.parametrize(
    "variables, problem",
    [
        ({"enable_thinkin": False}, "enable_thinkin: .*did you mean 'enable_thinking'"),
        ({"messages": []}, "messages: set by the renderer"),
        ({"add_generation_prompt": False}, "add_generation_prompt: set by the renderer"),
        ({"chat_template": "x"}, "chat_template: set by the renderer"),
        ({"tools": []}, "tools: set by the renderer"),
        ({"strftime_now": "2024-07-26"}, "strftime_now: .*reads no such variable"),
    ],
)
def test_names_of_variables_are_checked(variables: dict[str, object], problem: str) -> None:
    template = CHATML + "{% if enable_thinking is defined and not enable_thinking %}-{% endif %}"
    tokenizer = byte_tokenizer(template, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    with pytest.raises(SettingError, match=f"chat_template_kwargs.{problem}"):
        ChatRenderer(tokenizer, **variables)


@pytest.mark.parametrize("value", ["26 Jul", 7, None])
def test_a_date_that_is_none_is_refused(value: object) -> None:
    template, *_ = DATED["no variable"]
    tokenizer = byte_tokenizer(template, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>")
    with pytest.raises(SettingError, match=r"strftime_now: expected a date such as 2024-07-26"):
        ChatRenderer(tokenizer, strftime_now=value)


def test_each_base_gets_the_variables_that_its_template_reads(tmp_path: Path) -> None:
    template = CHATML + "{{ '-' if enable_thinking else '' }}"
    byte_tokenizer(template, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>").save_pretrained(
        tmp_path
    )
    tokens = base_renderer(tmp_path, {"enable_thinking": True, "date_string": "today"})
    assert tokens.settings == {"enable_thinking": True}
    assert json.dumps(tokens.settings) and tokens.show(tokens.prompt([GO])).endswith("assistant\n-")


# chats that strict templates refuse


S, U, A, T = "system", "user", "assistant", "tool"
R = "<tool_response>\n{}\n</tool_response>"
CHATS = {  # roles, and what the template gets: the texts are a, b, c, ...
    "two users": ((U, U), [(U, "a\n\nb")]),
    "parallel tool results": (
        (U, A, T, T),
        [(U, "a"), (A, "b"), (U, R.format("c") + "\n" + R.format("d"))],
    ),
    "a user after a tool result": (
        (U, A, T, U),
        [(U, "a"), (A, "b"), (U, R.format("c") + "\n\nd")],
    ),
    "two answers": ((U, A, A, U), [(U, "a"), (A, "b\n\nc"), (U, "d")]),
    "three of each": ((U, U, U, A, A, A), [(U, "a\n\nb\n\nc"), (A, "d\n\ne\n\nf")]),
    "a later system message": ((U, A, S, U), [(U, "a"), (A, "b"), (U, "c\n\nd")]),
    "a system message between": ((U, S, U), [(U, "a\n\nb\n\nc")]),
    "two system messages": ((S, S, U), [(S, "a\n\nb"), (U, "c")]),
}


def strict(name: str) -> ChatRenderer:
    return renderer(name) if name in ENDS else ChatRenderer(family(name))


def messages_of(roles: tuple[str, ...]) -> list[Message]:
    return [Message(role, "abcdefgh"[i]) for i, role in enumerate(roles)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("name", ["gemma", "llama2"])
def test_neighbours_of_one_role_are_one_message(name: str, kind: str) -> None:
    tokens = strict(name)
    roles, merged = CHATS[kind]
    if merged[0][0] == S and not tokens.facts.system_kept:
        merged = [(U, f"{merged[0][1]}\n\n{merged[1][1]}"), *merged[2:]]
    own = tokens.tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in merged],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokens.show(tokens.prompt(messages_of(roles))) == own


@pytest.mark.parametrize("roles", [roles for roles, _ in CHATS.values()])
def test_other_templates_get_the_messages_as_they_are(roles: tuple[str, ...]) -> None:
    tokens = ChatRenderer(family("chatml"))
    chat = messages_of(tuple(U if role == T else role for role in roles))
    own = tokens.tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in chat],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert tokens.show(tokens.prompt(chat)) == own


@pytest.mark.parametrize("name", ["gemma", "llama2"])
def test_a_chat_goes_on_token_for_token_with_merged_messages(name: str) -> None:
    tokens = strict(name)
    prompt = tokens.prompt([GO])
    sampled = (*ids(tokens, "15"), tokens.end_of_turn)
    turn = Turn(0, "a", (GO,), text="15", prompt_ids=prompt, token_ids=sampled)  # type: ignore[arg-type]
    said = [GO, Message("assistant", "15")]
    for since, one in (
        ([Message("tool", "1"), Message("tool", "2")], R.format(1) + "\n" + R.format(2)),
        ([Message("tool", "1"), ON], R.format(1) + "\n\non"),
        ([ON, Message("user", "and on")], "on\n\nand on"),
        ([Message("system", "s"), ON], "s\n\non"),
    ):
        later = tokens.prompt([*said, *since], turn)
        assert later == tokens.prompt([*said, Message("user", one)], turn)
        assert later[: len(prompt + sampled)] == prompt + sampled
    # an answer of the program's own joins the sampled one: another prompt, not a longer one
    later = tokens.prompt([*said, Message("assistant", "16"), ON], turn)
    assert later == tokens.prompt([GO, Message("assistant", "15\n\n16"), ON])


@pytest.mark.parametrize("name", ["gemma", "llama2"])
def test_programs_are_answered_whatever_the_template_refuses(name: str) -> None:
    calls = "".join(
        f'<tool_call>\n{{"name": "f", "arguments": {{"x": {x}}}}}\n</tool_call>\n' for x in (1, 2)
    )
    engine = ScriptedEngine(
        lambda prompt, *_: "15" if "<tool_response>" in prompt else calls, tokens=strict(name)
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}

    async def body(asker: Asker) -> None:
        users = [{"role": "user", "content": text} for text in ("go", "now")]
        said = (await asker.ask("a", *users, tools=[tool]))["choices"][0]["message"]
        assert len(said["tool_calls"]) == 2
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": call["function"]["arguments"]}
            for call in said["tool_calls"]
        ]
        last = {"role": "user", "content": "what now?"}
        answer = await asker.ask("a", *users, said, *results, last, tools=[tool])
        assert answer["choices"][0]["message"]["content"] == "15"

    first, second = played(body, engine).turns
    start = first.prompt_ids + first.token_ids
    assert second.prompt_ids[: len(start)] == start
