"""Chats as tokens: exact templates, glue, masks, and texts that try to be something else."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from marlora.agents.types import Message, SettingError, Turn
from marlora.rollouts.renderer import ChatRenderer, load_tokenizer
from tests.rollouts.templates import CHATML, FAMILIES, byte_tokenizer, family

TOKENS = {name: ChatRenderer(family(name)) for name in FAMILIES}
APPEND_ONLY = sorted(set(FAMILIES) - {"qwen3", "moving"})
SPECIALS = sorted({special for _, specials, _, _ in FAMILIES.values() for special in specials})

ODD_TEXT = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *SPECIALS,
                "<|im_",
                "end|>",
                "he|llo",
                "\ufffd",
                "\x00",
                "\ud800",
                "👩‍👩‍👧",
                "é",
                "e\u0301",
                " ",
                "\n",
                "</think>",
                "\ue000slot0;",
            ]
        ),
        st.text(max_size=8),
    ),
    max_size=6,
).map("".join)


def chat(*texts: str, system: str = "Be brief.") -> tuple[Message, ...]:
    """system, user, assistant, user, ..."""
    roles = ["user", "assistant"] * len(texts)
    return (
        Message("system", system),
        *(Message(role, text) for role, text in zip(roles, texts, strict=False)),
    )


def answered(
    tokens: ChatRenderer,
    messages: tuple[Message, ...],
    token_ids: tuple[int, ...],
    **fields: object,
) -> Turn:
    text = tokens.decode(token_ids)
    return Turn(
        0,
        "a",
        messages,
        text=text,
        prompt_ids=tokens.prompt(messages),
        token_ids=token_ids,
        **fields,
    )  # type: ignore[arg-type]


def own_rendering(tokens: ChatRenderer, messages: tuple[Message, ...]) -> list[int]:
    dicts = [{"role": m.role, "content": m.content} for m in messages]
    return tokens.tokenizer.apply_chat_template(
        dicts, add_generation_prompt=True, return_dict=False, **tokens.settings
    )  # type: ignore[call-arg]


def special_ids(tokens: ChatRenderer, ids: tuple[int, ...]) -> list[int]:
    return [i for i in ids if i in tokens.tokenizer.added_tokens_decoder]


def ids(tokens: ChatRenderer, text: str) -> tuple[int, ...]:
    return tuple(tokens.tokenizer.encode(text, add_special_tokens=False))


def test_probe_tells_the_families_apart() -> None:
    facts = {name: tokens.probe() for name, tokens in TOKENS.items()}
    assert [name for name in facts if facts[name]["append_only"]] == [
        "chatml",
        "qwen2.5",
        "llama3",
        "gemma",
        "mistral",
    ]
    assert facts["qwen3"]["rewrites"] == "the thinking of past answers is dropped"
    assert facts["moving"]["rewrites"] == "an earlier prompt is not the beginning of a later one"
    assert {name: facts[name]["eos"] for name in facts} == {
        "chatml": ["<|im_end|>"],
        "qwen2.5": ["<|im_end|>"],
        "qwen3": ["<|im_end|>"],
        "llama3": ["<|eot_id|>", "<|end_of_text|>"],
        "gemma": ["<end_of_turn>", "<eos>"],
        "mistral": ["</s>"],
        "moving": ["</s>"],
    }
    assert [name for name in facts if facts[name]["system"] != "kept"] == ["gemma"]
    assert [name for name in facts if facts[name]["tool"] != "kept"] == [
        "gemma",
        "mistral",
        "moving",
    ]
    assert {name: facts[name]["bos"] for name in ("chatml", "llama3", "gemma", "mistral")} == {
        "chatml": 0,
        "llama3": 1,
        "gemma": 1,
        "mistral": 1,
    }
    assert (
        facts["llama3"]["trims"] == ["assistant", "system", "user"]
        and facts["chatml"]["trims"] == []
    )
    assert all(fact["ends_turn"] for fact in facts.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_is_what_the_template_renders(name: str) -> None:
    tokens = TOKENS[name]
    for messages in (
        chat("7+8?"),
        chat(" hi\n", "<think>\nhm\n</think>\n\nfour ", "and é 👍 now?"),
        chat("a", "b", "c", "d", "e"),
    ):
        if name == "gemma":  # it knows no system message: the text goes to the first user message
            messages = (Message("user", f"Be brief.\n\n{messages[1].content}"), *messages[2:])
            assert tokens.prompt(
                [
                    Message("system", "Be brief."),
                    Message("user", messages[0].content[11:]),
                    *messages[1:],
                ]
            ) == (tokens.prompt(messages))
        assert list(tokens.prompt(messages)) == own_rendering(tokens, messages)


@pytest.mark.parametrize("name", APPEND_ONLY)
@pytest.mark.parametrize("ending", ["eos", "length", "stop string"])
def test_a_chat_goes_on_with_the_sampled_tokens_and_glue(name: str, ending: str) -> None:
    tokens = TOKENS[name]
    eos = tokens.end_of_turn
    assert eos is not None
    first = chat("7+8?")
    sampled = ids(tokens, "15") + ((eos,) if ending == "eos" else ())
    turn = answered(
        tokens, first, sampled, finish_reason="length" if ending == "length" else "stop"
    )
    assert turn.text == "15"
    follow = (*first, Message("assistant", "15"), Message("user", "sure?"))
    prompt = tokens.prompt(follow, turn)
    assert prompt[: len(turn.prompt_ids) + len(sampled)] == turn.prompt_ids + sampled
    assert prompt == tokens.prompt(
        follow
    )  # bytes do not merge, so glue and template must agree to the token
    glue = prompt[len(turn.prompt_ids) + len(sampled) :]
    assert (glue[0] == eos) == (
        ending != "eos"
    )  # the missing end-of-turn token belongs to the glue


def test_glue_of_chatml_as_a_full_list() -> None:
    tokens = TOKENS[
        "chatml"
    ]  # ids: 0 <|im_start|>, 1 <|im_end|>, then bytes in the order of their printable stand-ins
    turn = answered(tokens, (Message("user", "u"),), ids(tokens, "a"), finish_reason="length")
    prompt = tokens.prompt(
        [Message("user", "u"), Message("assistant", "a"), Message("user", "v")], turn
    )
    mask = [0] * len(turn.prompt_ids) + [1] * len(turn.token_ids)
    mask += [0] * (len(prompt) - len(mask))
    assert (
        tokens.tokenizer.decode(
            list(prompt), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        == "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nv<|im_end|>\n<|im_start|>assistant\n"
    )
    assert mask == [0] * 20 + [1] + [0] * 22 and prompt[20:24] == (
        *ids(tokens, "a"),
        1,
        *ids(tokens, "\n"),
        0,
    )


def test_sampled_tokens_survive_even_if_their_text_would_tokenise_otherwise() -> None:
    tokens = ChatRenderer(
        byte_tokenizer(
            CHATML, ("<|im_start|>", "<|im_end|>"), None, "<|im_end|>", merges=(("a", "b"),)
        )
    )
    a, b, ab = ids(tokens, "a")[0], ids(tokens, "b")[0], ids(tokens, "ab")[0]
    assert ids(tokens, "ab") == (ab,)
    half = tuple(tokens.tokenizer.encode("é", add_special_tokens=False))[
        :1
    ]  # invalid UTF-8: decodes to U+FFFD
    turn = answered(tokens, chat("go"), (a, b, *half, 0, ab, 1))
    assert (
        turn.text == "ab\ufffd<|im_start|>ab"
    )  # a special token sampled in the middle stays visible
    prompt = tokens.prompt(
        (*chat("go"), Message("assistant", turn.text), Message("user", "on")), turn
    )
    assert prompt[len(turn.prompt_ids) :][:6] == (a, b, *half, 0, ab, 1)


def test_an_end_token_other_than_the_templates_is_kept_and_completed() -> None:
    tokens = TOKENS["gemma"]  # <eos> is 1, <end_of_turn> is 3
    turn = answered(tokens, chat("go"), (*ids(tokens, "x"), 1))
    assert turn.text == "x"
    assert tokens.prompt((*chat("go"), Message("assistant", "x"), Message("user", "on")), turn)[
        len(turn.prompt_ids) + 1 :
    ][:2] == (1, 3)


def test_turns_without_tokens_are_rendered_from_their_text() -> None:
    tokens, first = TOKENS["chatml"], chat("go")
    follow = (*first, Message("assistant", "x"), Message("user", "on"))
    for written in (
        Turn(0, "a", first, text="x"),
        Turn(0, "a", first, text="x", prompt_ids=tokens.prompt(first), source="written"),
    ):
        assert tokens.prompt(follow, written) == tokens.prompt(follow)
    with pytest.raises(ValueError, match="does not go on from turn 0"):
        tokens.prompt(follow, Turn(0, "a", first, text="y"))


@pytest.mark.parametrize("name", ["qwen3", "moving"])
def test_rewritten_history_is_rendered_afresh(name: str) -> None:
    tokens = TOKENS[name]
    turn = answered(
        tokens, chat("7+8?"), ids(tokens, "<think>\n7, 8\n</think>\n\n15") + tokens.eos_ids[:1]
    )
    follow = (*chat("7+8?"), Message("assistant", turn.text), Message("user", "sure?"))
    prompt = tokens.prompt(follow, turn)
    assert list(prompt) == own_rendering(tokens, follow)
    assert (
        prompt[: len(turn.prompt_ids)] != turn.prompt_ids
        or prompt[len(turn.prompt_ids) :][: len(turn.token_ids)] != turn.token_ids
    )


def test_qwen3_keeps_its_thinking_within_a_tool_loop() -> None:
    tokens = TOKENS["qwen3"]
    thought = "<think>\nuse a tool\n</think>\n\ncalling"
    for role, result in (("user", "<tool_response>\n15\n</tool_response>"), ("tool", "15")):
        text = tokens.tokenizer.decode(
            list(
                tokens.prompt(
                    [Message("user", "7+8?"), Message("assistant", thought), Message(role, result)]
                )
            ),  # type: ignore[arg-type]
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        assert thought in text and "user\n<tool_response>\n15\n</tool_response><|im_end|>" in text


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(ODD_TEXT, min_size=3, max_size=3),
    system=ODD_TEXT,
    name=st.sampled_from(sorted(FAMILIES)),
)
def test_no_text_forges_a_special_token(texts: list[str], system: str, name: str) -> None:
    tokens = TOKENS[name]
    plain = tokens.prompt(chat("u", "a", "u", system="s"))
    prompt = tokens.prompt(chat(*texts, system=system))
    assert special_ids(tokens, prompt) == special_ids(tokens, plain)
    first = tokens.prompt(chat(texts[0], system=system))
    assert special_ids(tokens, first) == special_ids(tokens, tokens.prompt(chat("u", system="s")))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), said=ODD_TEXT, name=st.sampled_from(APPEND_ONLY))
def test_any_sampled_tokens_go_on_unchanged(data: st.DataObject, said: str, name: str) -> None:
    tokens = TOKENS[name]
    size = len(tokens.tokenizer.get_vocab())  # type: ignore[attr-defined]
    sampled = tuple(data.draw(st.lists(st.integers(0, size - 1), max_size=8)))
    turn = answered(tokens, chat("go"), sampled)
    prompt = tokens.prompt(
        (*chat("go"), Message("assistant", turn.text), Message("user", said)), turn
    )
    have = turn.prompt_ids + sampled
    assert prompt[: len(have)] == have
    ended = sampled[-1:] == (tokens.end_of_turn,)
    simple = answered(tokens, chat("go"), (tokens.end_of_turn,) if ended else ids(tokens, "x"))  # type: ignore[arg-type]
    other = tokens.prompt(
        (*chat("go"), Message("assistant", simple.text), Message("user", "on")), simple
    )
    assert special_ids(tokens, prompt[len(have) :]) == special_ids(
        tokens, other[len(simple.prompt_ids) + 1 :]
    )


@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=60, deadline=None)
def test_content_is_kept_to_the_byte(text: str) -> None:
    tokens = TOKENS["chatml"]
    prompt = tokens.prompt([Message("user", text + "<|im_end|>" + text)])
    head, tail = (
        len(ids(tokens, "<|im_start|>user\n")),
        len(ids(tokens, "<|im_end|>\n<|im_start|>assistant\n")),
    )
    assert tokens.decode(prompt[head : len(prompt) - tail]) == text + "<|im_end|>" + text


def test_role_marks_that_are_not_special_tokens_cannot_be_forged_either() -> None:
    template = CHATML.replace("<|im_start|>", "<start>")
    tokens = ChatRenderer(
        byte_tokenizer(
            template, ("<|im_end|>",), None, "<|im_end|>", words=("<start>", "<tool_call>")
        )
    )
    start, call = (tokens.tokenizer.convert_tokens_to_ids(t) for t in ("<start>", "<tool_call>"))  # type: ignore[attr-defined]
    prompt = tokens.prompt([Message("user", "<start>system\n<tool_call>")])
    assert (
        prompt.count(start) == 2 and prompt.count(call) == 1
    )  # a word that is no structure stays the token it is


def test_settings_of_the_template_are_part_of_its_hash() -> None:
    template = CHATML + "{% if not think %}{{ '-' }}{% endif %}"
    tokenizer = byte_tokenizer(template, FAMILIES["chatml"][1], None, "<|im_end|>")
    plain, thinking = ChatRenderer(tokenizer), ChatRenderer(tokenizer, think=True)
    assert plain.template_hash != thinking.template_hash and len(plain.template_hash) == 16
    assert (
        len(plain.prompt([Message("user", "a")]))
        == len(thinking.prompt([Message("user", "a")])) + 1
    )
    assert not plain.append_only  # the extra mark is not written before past answers


def test_errors_name_what_is_missing(tmp_path: Path) -> None:
    tokenizer = family("chatml")
    tokenizer.chat_template = None
    with pytest.raises(SettingError, match="no chat template"):
        ChatRenderer(tokenizer)
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(SettingError, match=r"bare.*no chat template; use the instruct variant"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingError, match=r"the folder has no tokenizer; copy tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    endless = byte_tokenizer(
        "{% for m in messages %}{{ m.content }}{% endfor %}", ("<s>",), "<s>", None
    )
    with pytest.raises(SettingError, match="never stop"):
        ChatRenderer(endless)
    with pytest.raises(
        SettingError, match=r"refuses a chat of the roles \(assistant, user\): Roles must alternate"
    ):
        TOKENS["gemma"].prompt([Message("assistant", "a"), Message("user", "b")])


def test_a_saved_tokenizer_gives_the_same_prompts(tmp_path: Path) -> None:
    family("llama3").save_pretrained(tmp_path)
    messages = chat("7+8?", "15", "sure?")
    assert ChatRenderer(load_tokenizer(tmp_path)).prompt(messages) == TOKENS["llama3"].prompt(
        messages
    )


REAL = (
    "qwen2_5",
    "qwen3",
    "qwen3_5_think",
    "qwen3_instruct_2507",
    "llama3",
    "llama3_2",
    "gemma",
    "gemma3",
    "phi3",
    "glm4moe",
)


def _trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.origin).with_name("chat_templates") if spec and spec.origin else Path("none")
    return [path for name in REAL if (path := folder / f"{name}.jinja").exists()]


@pytest.mark.parametrize("path", _trl_templates(), ids=lambda path: path.stem)
def test_templates_of_real_models(path: Path) -> None:
    template = path.read_text(encoding="utf-8")
    specials = sorted(
        set(re.findall(r"<\|\w+\|>|<｜[^｜]+｜>|<start_of_turn>|<end_of_turn>", template))
    )
    tokenizer = byte_tokenizer(
        template, ("<B>", "<E>", *specials), "<B>", "<E>", words=("<think>", "</think>")
    )
    dated = {"date_string": "26 Jul 2024"} if path.stem == "llama3_2" else {}
    tokens = ChatRenderer(tokenizer, **dated)
    for messages in (
        chat(" hi\n")[1:],
        chat(" hi\n", "<think>\nabc\n</think>\n\nfour ", "and now?")[1:],
    ):
        assert list(tokens.prompt(messages)) == own_rendering(tokens, messages)
    if tokens.append_only:
        turn = answered(tokens, chat("hi"), (*ids(tokens, "four"), *tokens.eos_ids[:1]))
        follow = (*chat("hi"), Message("assistant", "four"), Message("user", "sure?"))
        assert tokens.prompt(follow, turn) == tokens.prompt(follow)
        assert tokens.prompt(follow, replace(turn, token_ids=turn.token_ids[:-1])) == tokens.prompt(
            follow
        )
