"""What `marlora doctor` tries: ports, the host's address, routes without a key, chat templates."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from marlora.agents.text.secrecy import shown_url
from marlora.recipes.cli import doctor
from marlora.rollouts.engines.vllm import auth
from tests.rollouts.fake_vllm import FakeVLLM


def rows(found: list[doctor.Row]) -> dict[str, tuple[str, str]]:
    return {part: (what, todo) for part, what, todo in found}


def test_ports_and_the_hosts_address(monkeypatch: pytest.MonkeyPatch) -> None:
    found = rows(doctor.network())
    assert (
        found["ports"][0].startswith("free ones can be had on 127.0.0.1, such as ")
        and found["ports"][1] == ""
    )

    def unknown(name: str) -> str:
        raise socket.gaierror("unknown")

    def none(host: str) -> int:
        raise PermissionError("not allowed")

    monkeypatch.setattr(doctor.socket, "gethostbyname", unknown)
    monkeypatch.setattr(doctor, "free_port", none)
    found = rows(doctor.network())
    assert "has no address" in found["host"][0] and "/etc/hosts" in found["host"][1]
    assert "none on 127.0.0.1" in found["ports"][0] and "engine transformers" in found["ports"][1]


def test_our_own_routes_are_tried_and_a_hole_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(doctor.past_the_guard()) == []
    monkeypatch.setattr(auth, "OPEN", {("POST", "/invocations"), ("GET", "/health")})
    assert asyncio.run(doctor.past_the_guard()) == ["POST /invocations"]
    [(part, found, todo)] = doctor.routes([])
    assert (part, found) == (
        "routes of our servers",
        "open: POST /invocations",
    ) and "do not serve" in todo


def test_other_peoples_servers_are_tried_without_a_key() -> None:
    with (
        FakeVLLM(key="k" * 20) as closed,
        FakeVLLM(key="k" * 20, open_routes={"/invocations"}) as open_,
        FakeVLLM() as gone,
    ):
        gone.stop()
        found = rows(doctor.routes([closed.url, f"{open_.url}/v1", gone.url, "nonsense"]))
    assert found[f"routes of {closed.url}"] == ("closed without the key", "")
    assert (
        found[f"routes of {open_.url}/v1"][0] == "open: POST /invocations"
        and "guard" in found[f"routes of {open_.url}/v1"][1]
    )
    assert (
        "no answer" in found[f"routes of {gone.url}"][0]
        and "expected http://" in found[f"routes of {shown_url('nonsense')}"][0]
    )


def test_templates_of_the_cache_and_of_named_models(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARLORA_CACHE", str(model.parent))
    (tmp_path / "empty").mkdir()
    found = rows(doctor.templates([str(tmp_path / "empty")]))
    assert found["template of tiny"] == (
        "append-only, system kept, ends its turns, stops at <|end|>",
        "",
    )
    assert (
        "has no tokenizer" in found["template of empty"][0]
        and "instruct" in found["template of empty"][1]
    )
    template = model / "chat_template.jinja"
    before = template.read_text()
    try:
        template.write_text(
            before.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")
        )
        assert "drops the" in doctor.template(str(model))[0]
    finally:
        template.write_text(before)


def test_what_vllm_takes_of_adapters_is_said() -> None:
    assert (
        "ranks up to 512; P policies, S versions behind: P x (S + 1) + 1 at once"
        in rows(doctor.engine())["adapters in vLLM"][0]
    )
