"""A method's memory: JSON that a run keeps between steps and a team never sees."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .parts import JsonPart, json_copy


class Memory(JsonPart):
    """Entries by name that are saved with every checkpoint and put back on resume: trials,
    histories, counters.

    A value is copied when it is set, so a resumed run and one that was never stopped hold the same;
    changing a list or mapping in place afterwards is fine. What is not JSON is refused with its
    path (`SettingError`): when it is set, or when the memory is saved if it was put in later.
    (`values()` is a Part's: {}, for a team sees nothing of it. The entries are `memory[key]`.)
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._entries: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        return self._entries[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._entries.update(json_copy({key: value}, self.name))

    def __delitem__(self, key: str) -> None:
        del self._entries[key]

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"Memory({self.name!r}, {self._entries!r})"

    def get(self, key: str, default: Any = None) -> Any:
        """The entry, or `default` if there is none."""
        return self._entries.get(key, default)

    def setdefault(self, key: str, default: Any) -> Any:
        """The entry, after setting it to `default` if there was none."""
        if key not in self:
            self[key] = default
        return self[key]

    def state_dict(self) -> dict[str, Any]:
        return json_copy(self._entries, self.name)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._entries = json_copy(state, self.name)
