"""Settings that may hold a key, or an address with one: checked when they are read, never shown.

A key typed where the name of a file belongs would otherwise stand in an error, a log,
`config.yaml`, a tracker or a checkpoint. So what cannot be such a name is refused before anything
is written, and the error tells of the value's length only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from ..types import SettingError

HIDDEN = "***"
MAY_HOLD_KEYS = (  # settings
    "server_key",
    "server_urls",
    "router_url",
    "policies",
    "helpers",
    "engine_args",
)
OUTSIDE_KEY = "MARLORA_OUTSIDE_KEY"  # the environment variable of outside models without `key_env`
_HOST = re.compile(
    r"[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?:\d{1,5}(/v1)?/?", re.IGNORECASE
)  # an address that lacks its http://
_SECRET_ARGUMENT = re.compile(r"(^|[-_])(key|token|secret|password)$", re.IGNORECASE)


def not_shown(value: Any) -> str:
    """The words of an error in place of a value that may be a key."""
    size = (
        f"a text of {len(value)} characters"
        if isinstance(value, str)
        else f"a {type(value).__name__}"
    )
    return f"got {size} (not shown, because it may be a key)"


def shown_value(setting: str, value: Any) -> str:
    """The words of an error for a setting's wrong value: the value, unless it may hold a key."""
    return not_shown(value) if setting.partition(".")[0] in MAY_HOLD_KEYS else f"got {value!r}"


def names_a_key(name: Any) -> bool:
    """Is this "", an environment variable that is set, or a file that is there?"""
    try:
        return isinstance(name, str) and (not name or name in os.environ or Path(name).is_file())
    except (OSError, ValueError):  # no file can have such a name
        return False


def check_key_name(setting: str, name: Any) -> None:
    """Raise `SettingError` unless this is "", an environment variable that is set, or a file that
    is there."""
    if not names_a_key(name):
        raise SettingError(
            f"{setting}: expected the name of an environment variable that is set, or of a file"
            f" that is there and holds the key; {not_shown(name)}"
        )


def usable_key(setting: str, key: str) -> str:
    """A key without the white space around it. Raises `SettingError` for one that no header can
    carry."""
    key = key.strip()
    if not (key.isascii() and key.isprintable()):
        raise SettingError(f"{setting}: a key is one line of printable ASCII; {not_shown(key)}")
    return key


def check_url(setting: str, url: Any) -> str:
    """An address without user, password, query and fragment, where keys would stand. Raises
    `SettingError`."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        usable = (
            parts is not None
            and parts.scheme in ("http", "https")
            and parts.hostname is not None
            and parts.port != 0
        )
        secret = parts is not None and ("@" in parts.netloc or parts.query or parts.fragment)
    except ValueError:
        usable, secret = False, True
    if not usable or secret:
        known = isinstance(url, str) and _HOST.fullmatch(url)
        shown = f"got {url!r}" if known else not_shown(url)
        raise SettingError(
            f"{setting}: expected http://HOST:PORT/v1 without user, password, query or fragment;"
            f" {shown}"
        )
    return str(url)


def shown_url(url: Any) -> str:
    """An address as it may be shown: without the parts that may be a key."""
    try:
        parts = urlsplit(url)
        plain = (
            parts.scheme in ("http", "https") and parts.port != 0
        )  # a port that is no number raises
    except (ValueError, AttributeError, TypeError):
        plain = False
    if not plain:
        return f"an address ({not_shown(url)})"
    host = parts.netloc.rpartition("@")[2]
    tail = f"?{HIDDEN}" if parts.query or parts.fragment else ""
    return (
        urlunsplit(
            (parts.scheme, f"{HIDDEN}@{host}" if "@" in parts.netloc else host, parts.path, "", "")
        )
        + tail
    )


def check_addresses(server_urls: Any, router_url: Any, server_key: Any) -> None:
    """The settings of an engine that take addresses and keys."""
    if isinstance(server_urls, Sequence) and not isinstance(server_urls, str):
        for url in server_urls:
            check_url("server_urls", url)
    elif server_urls:
        raise SettingError(f"server_urls: expected a list of addresses; {not_shown(server_urls)}")
    if router_url != "":
        check_url("router_url", router_url)
    check_key_name("server_key", server_key)


def check_policies(policies: Any, setting: str = "policies") -> None:
    """The addresses of outside models, and where their keys are, in a setting that describes
    policies by name."""
    for name, given in policies.items() if isinstance(policies, Mapping) else ():
        where = f"{setting}.{name}"
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise SettingError(f"{where}: expected a mapping, {not_shown(given)}")
        if given.get("url") is not None:
            check_url(f"{where}.url", given["url"])
        check_key_name(f"{where}.key_env", given.get("key_env", ""))
        if not isinstance(given.get("price", {}), Mapping):
            raise SettingError(f"{where}.price: expected a mapping, {not_shown(given['price'])}")
        if given.get("key_env") and not given.get("url"):
            raise SettingError(
                f"{where}.key_env: names the key of an outside model; give its url, or leave"
                " key_env out"
            )


def shown_key_name(name: Any) -> str:
    """Where the key of an outside model is, as it may be shown: a name under which there is no key
    may be one itself."""
    if not name:
        return f"the key in {OUTSIDE_KEY}, if it is set"
    return (
        f"the key in {name}" if names_a_key(name) else f"a key that is not here ({not_shown(name)})"
    )


def check_arguments(arguments: Any) -> None:
    """Keys among `engine_args`: they would stand in the list of processes, in logs and in
    `config.yaml`."""
    for name, value in arguments.items() if isinstance(arguments, Mapping) else ():
        check_arguments(value)
        if _SECRET_ARGUMENT.search(str(name)):
            raise SettingError(
                f"engine_args.{name}: keys are not given here, where the list of processes and"
                " config.yaml would show them; set the environment variable that vLLM reads, such"
                " as HF_TOKEN"
            )


def without(text: str, key: str) -> str:
    """A server's error text without the key that it was sent, which some servers repeat."""
    return text.replace(key, HIDDEN) if key else text
