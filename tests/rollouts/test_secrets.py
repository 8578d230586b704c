"""No key in any output: every setting that takes a key, an address or a mapping of them, given a
key in every wrong way."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import logging
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from marlora.agents.patterns.chain import Chain
from marlora.agents.text.secrecy import shown_key_name, shown_url
from marlora.agents.transcript import Call
from marlora.agents.types import AgentSpec, Message, PolicySpec, Sampling, SettingError
from marlora.recipes import grpo_team
from marlora.recipes.cli import doctor, main
from marlora.rollouts.engines.base import EngineError
from marlora.rollouts.engines.config import EngineConfig
from marlora.rollouts.engines.vllm.auth import read_key
from marlora.rollouts.engines.vllm.client import fresh_key
from marlora.rollouts.engines.vllm.discovery import key_from, read_endpoints, tidy
from marlora.rollouts.episodes.completers import APICompleter
from marlora.rollouts.http import Transient
from marlora.trainers.config import RunConfig
from marlora.trainers.loop.spec import RunSpec
from tests.repository import ROOT

SECRET = "sesame5ecret0f7he40thieves"
TYPED = (
    SECRET,
    f"sk-{SECRET}",
    f"/{SECRET}",
    f"{SECRET}\n",
    f"{SECRET}\x00",
    SECRET * 200,
    f"http://user:{SECRET}@127.0.0.1:9/v1",
    f"http://{SECRET}@127.0.0.1:9/v1",
    f"http://127.0.0.1:9/v1?api_key={SECRET}",
    f"http://127.0.0.1:9/v1#{SECRET}",
    f"http://127.0.0.1:{SECRET}/v1",
    f"http://[{SECRET}/v1",
    f"ftp://{SECRET}",
    f"{SECRET}@127.0.0.1:9",
)
# what each setting that takes a key, or an address where one may stand, is given: its value made of
# a text
TAKES: dict[str, Callable[[Any], Any]] = {
    "server_key": lambda text: text,
    "server_urls": lambda text: [text],
    "router_url": lambda text: text,
    "policies": lambda text: {"first": {"url": text}},
    "helpers": lambda text: {"critic": {"url": text}},
    "engine_args": lambda text: {"api_key": text},
}
# settings whose names sound like it, and that take none: a count, a file of addresses, numbers of
# tokens
TAKE_NONE = {"allow_open_server"} | {
    "evaluator_tokens",
    "inner_tokens",
    "max_proposal_tokens",
    "num_servers",
    "endpoints",
    "server_host",
    "server_port",
    "server_memory",
    "server_devices",
    "server_timeout",
    "tokens_per_batch",
}
SOUNDS = re.compile(
    r"key|token|secret|password|url|server|endpoint|policies|helpers|engine_args", re.IGNORECASE
)


def configs() -> set[type]:
    """The settings of every recipe."""
    for path in [*(ROOT / "trainers").glob("*.py"), *(ROOT / "trainers/methods").rglob("*.py")]:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        importlib.import_module(f"marlora.{name}")
    found, queue = set[type](), [EngineConfig]
    while queue:
        cls = queue.pop()
        found.add(cls)
        queue += cls.__subclasses__()
    return found


def test_every_setting_that_takes_a_key_is_tried_below() -> None:
    """A new setting that sounds as if it took one has to be put into one of the two lists."""
    names = {f.name for cls in configs() for f in dataclasses.fields(cls) if SOUNDS.search(f.name)}
    assert names - TAKE_NONE - set(TAKES) == set()
    assert set(TAKES) <= names


def told(error: BaseException) -> str:
    """All that a traceback would show, causes included."""
    return (
        "".join(traceback.format_exception(error, chain=True)).split("Traceback", 1)[0]
        + str(error)
        + repr(error.__cause__)
    )


@pytest.mark.parametrize("text", TYPED, ids=range(len(TYPED)))
@pytest.mark.parametrize("setting", TAKES)
def test_no_error_of_the_settings_shows_it(setting: str, text: str) -> None:
    """Refused when the settings are read, before anything is written, whatever its type."""
    value = TAKES[setting](text)
    classes = (
        (EngineConfig, RunConfig) if setting.startswith(("server", "router")) else (RunConfig,)
    )
    deeper = {
        "policies": {"first": {"url": [text]}},
        "helpers": {"critic": {"url": [text]}},
        "engine_args": {"x": value},
    }.get(setting, {"x": value})
    for cls in classes:
        for wrong in (value, [value], deeper, text, text.encode()):
            with pytest.raises(SettingError) as caught:
                cls(**{setting: wrong})
            assert SECRET not in told(caught.value) and setting in str(caught.value)


@pytest.mark.parametrize("setting", ["policies", "helpers"])
def test_a_key_in_place_of_its_name_is_not_shown(setting: str) -> None:
    """Nor one in place of a price, or under a name that is none of ours."""
    for text in TYPED:
        for wrong in (text, [text], {"x": text}, text.encode(), None):
            with pytest.raises(SettingError) as caught:
                RunConfig(**{setting: {"n": {"url": "http://h/v1", "key_env": wrong}}})
            assert SECRET not in told(caught.value)
            assert str(caught.value).startswith(f"{setting}.n.key_env: expected the name of an")
        for field in ("price", "key", "api_key"):
            with pytest.raises(SettingError) as caught:
                RunSpec.resolve(
                    RunConfig(
                        model="none", **{setting: {"first": {"url": "http://h/v1", field: text}}}
                    ),
                    Chain(["first" if setting == "policies" else "a"]),
                )
            assert SECRET not in told(caught.value) and f"{setting}.first" in str(caught.value)


def test_the_name_of_a_key_needs_an_outside_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUR_KEY", SECRET)
    for setting in ("policies", "helpers"):
        with pytest.raises(SettingError, match=rf"^{setting}\.a\.key_env: names the key of an out"):
            RunConfig(**{setting: {"a": {"key_env": "OUR_KEY"}}})
        config = RunConfig(**{setting: {"a": {"url": "http://h/v1", "key_env": "OUR_KEY"}}})
        assert getattr(config, setting)["a"]["key_env"] == "OUR_KEY"


@pytest.mark.parametrize("text", TYPED[:8], ids=range(8))
@pytest.mark.parametrize("setting", TAKES)
@pytest.mark.parametrize("how", ["flag", "yaml", "path"])
def test_no_recipe_prints_or_writes_it(
    setting: str,
    text: str,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    if "\x00" in text:
        text = SECRET[:-1] + "0" + SECRET
    settings = (ROOT / "recipes" / "grpo_team.yaml").read_text()
    config, value = tmp_path / "c" / "settings.yaml", TAKES[setting](text)
    config.parent.mkdir()
    flags = [
        f"--{setting}",
        *(
            value
            if isinstance(value, list)
            else [value if isinstance(value, str) else json.dumps(value)]
        ),
    ]
    if how == "path":
        flags = {
            "policies": ["--policies.first.url", text],
            "helpers": ["--helpers.critic.key_env", text],
            "engine_args": ["--engine_args.api_key", text],
        }.get(setting, flags)
    if how == "yaml":
        settings, flags = f"{settings}\n{setting}: {json.dumps(value)}\n", []
    config.write_text(settings)
    folder = tmp_path / "run"
    argv = [
        "grpo_team.py",
        "--config",
        str(config),
        *flags,
        "--output_dir",
        str(folder),
        "--engine",
        "vllm",
        "--model",
        str(tmp_path / "none"),
    ]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SettingError) as caught:
        grpo_team.main()
    out, err = capfd.readouterr()
    written = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert SECRET not in told(caught.value) + out + err + caplog.text + "".join(written)
    assert setting in str(caught.value)


@pytest.mark.parametrize("argv", [["--server_kye", SECRET], [f"--server_kye={SECRET}"], [SECRET]])
def test_a_mistyped_flag_does_not_show_what_follows_it(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main.main(["doctor", *argv])
    assert SECRET not in "".join(capsys.readouterr())
    monkeypatch.setattr("sys.argv", ["grpo_team.py", *argv])
    with pytest.raises(SettingError) as caught:
        grpo_team.main()
    assert SECRET not in told(caught.value)


def test_settings_that_are_no_yaml_are_not_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, line in enumerate(
        (
            f'server_key: "{SECRET}',
            f"server_key: {SECRET}: x",
            f"server_key: [{SECRET}",
            f"server_key: *{SECRET} x",
        )
    ):
        path = tmp_path / f"{number}.yaml"
        path.write_text(f"model: tiny\n{line}\n")
        monkeypatch.setattr("sys.argv", ["grpo_team.py", "--config", str(path)])
        with pytest.raises(SettingError) as caught:
            grpo_team.main()
        assert SECRET not in told(caught.value) and "line " in str(caught.value)


@pytest.mark.parametrize("command", ["play", "eval", "collect", "serve"])
@pytest.mark.parametrize("text", TYPED[:3])
def test_no_command_prints_it(
    command: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--output", str(tmp_path / "store")] if command == "collect" else []
    (tmp_path / "checkpoint").mkdir()
    for flag in ("--server_key", "--server_urls", "--router_url", "--engine_args"):
        with pytest.raises(SystemExit):
            main.main(
                [command, str(tmp_path / "checkpoint"), *more, "--engine", "vllm", flag, text]
            )
        assert SECRET not in "".join(capsys.readouterr())
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("text", TYPED, ids=range(len(TYPED)))
def test_the_doctor_hides_it(text: str) -> None:
    assert SECRET not in str(doctor.routes([text]))
    assert SECRET not in shown_url(text)
    with pytest.raises(SettingError) as caught:
        tidy(text)
    assert SECRET not in told(caught.value)


@pytest.mark.parametrize(
    "entry",
    [
        {"url": f"http://u:{SECRET}@h/v1"},
        {"url": [SECRET]},
        {"url": SECRET},
        {"key_file": SECRET},
        {"url": "http://h/v1", "key_file": [SECRET]},
        SECRET,
        [SECRET],
        {"url": "http://h/v1", "key": SECRET},
    ],
)
def test_a_file_of_endpoints_is_not_quoted(entry: Any, tmp_path: Path) -> None:
    path = tmp_path / "servers.json"
    path.write_text(json.dumps({"servers": [entry]}))
    with pytest.raises(SettingError) as caught:
        read_endpoints(path, "m")
    assert SECRET not in told(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("content", [f"{SECRET}\n{SECRET}", f"{SECRET}é", f"{SECRET}\x00", "short"])
def test_what_stands_in_a_key_file_is_not_shown(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key that no header can carry is refused in words of ours: those of `http.client` quote
    it."""
    path = tmp_path / "key"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(ValueError) as raw:
        read_key(path)
    with pytest.raises(SettingError) as caught:
        key_from(str(path))
    assert content[:10] not in told(raw.value) + told(caught.value).replace(str(path), "")
    if "\x00" not in content and content != "short":
        monkeypatch.setenv("MY_KEY", content)
        with pytest.raises(SettingError, match="MY_KEY") as caught:
            key_from("MY_KEY")
        assert SECRET not in told(caught.value)


def test_a_key_that_ends_its_line_is_taken_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", f" {SECRET}\n")
    assert key_from("MY_KEY") == SECRET
    path = tmp_path / "key"
    path.write_text(f"{SECRET}\n")
    path.chmod(0o600)
    assert key_from(str(path)) == SECRET == fresh_key(str(path))


def test_a_key_file_that_is_gone_is_not_named_as_a_key() -> None:
    with pytest.raises(Transient, match="No such file"):
        fresh_key("/nowhere/key")
    with pytest.raises(
        SettingError, match=r"endpoints: key_file.* text of 26 characters"
    ) as caught:
        key_from(SECRET, "endpoints: key_file")
    assert SECRET not in told(caught.value)


def test_an_outside_model_repeats_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some servers quote the key that they refuse."""
    from aiohttp import web

    async def refuse(request: web.Request) -> web.Response:
        return web.Response(status=401, text=f"wrong key: {request.headers['Authorization']}")

    async def go() -> str:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", refuse)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            speaker = APICompleter(PolicySpec("a", url=url), tries=1)
            with pytest.raises(EngineError) as caught:
                await speaker(Call(0, AgentSpec("a"), (Message("user", "x"),), Sampling()), "")
            return told(caught.value)
        finally:
            await runner.cleanup()

    monkeypatch.setenv("MARLORA_OUTSIDE_KEY", SECRET)
    said = asyncio.run(go())
    assert "refuses the key in MARLORA_OUTSIDE_KEY: 401 wrong key: Bearer ***" in said
    assert SECRET not in said
    monkeypatch.setenv("MARLORA_OUTSIDE_KEY", f"{SECRET}\r\nX: y")
    with pytest.raises(SettingError, match="MARLORA_OUTSIDE_KEY") as caught:
        asyncio.run(go())
    assert SECRET not in told(caught.value)


@pytest.mark.parametrize(
    "url", ["http://h:8000/v1", "https://api.example.com/v1", "http://[::1]:8000"]
)
def test_plain_addresses_are_taken_and_shown(url: str) -> None:
    assert EngineConfig(server_urls=[url]).server_urls == [url] and shown_url(url) == url


def test_what_a_checkpoint_would_send_is_named_and_no_key_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OUR_KEY", SECRET)
    assert shown_key_name("OUR_KEY") == "the key in OUR_KEY"
    assert shown_key_name("") == "the key in MARLORA_OUTSIDE_KEY, if it is set"
    assert shown_key_name(None) == shown_key_name("")
    for text in TYPED:
        assert SECRET not in shown_key_name(text) and "a key that is not here" in shown_key_name(
            text
        )


def test_an_address_without_its_scheme_is_still_shown() -> None:
    with pytest.raises(SettingError, match="got 'localhost:8000'"):
        EngineConfig(server_urls=["localhost:8000"])


def test_a_key_in_place_of_a_key_file_is_not_shown(tmp_path: Path) -> None:
    """Whether the file is there is asked when the server is: others write it at any time."""
    path = tmp_path / "servers.json"
    path.write_text(json.dumps({"servers": [{"url": "http://h/v1", "key_file": SECRET}]}))
    (found,) = read_endpoints(path, "m")
    assert SECRET not in repr(found)
    with pytest.raises(SettingError, match="not shown") as caught:
        key_from(found.key_file, "endpoints: key_file")
    assert SECRET not in told(caught.value)
