"""What is said of a setting that may hold a key: never its value."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

HIDDEN = "***"


def may_be_key(setting: str, value: str) -> str:
    """How an error speaks of a value that should have been the name of a variable or of a file."""
    return f"{setting}: its value (of {len(value)} characters, not shown, because it may be a key)"


def shown_url(url: str) -> str:
    """An address as it may be shown: without user, password, query and fragment, where keys stand."""
    try:
        parts = urlsplit(url)
        host = parts.netloc.rpartition("@")[2]
        if not (parts.scheme and host):
            return f"(an address of {len(url)} characters, not shown, because it may be a key)"
        user = f"{HIDDEN}@" if "@" in parts.netloc else ""
        tail = f"?{HIDDEN}" if parts.query or parts.fragment else ""
        return urlunsplit((parts.scheme, user + host, parts.path, "", "")) + tail
    except ValueError:
        return f"(an address of {len(url)} characters, not shown, because it may be a key)"
