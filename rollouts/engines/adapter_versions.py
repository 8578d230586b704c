"""The book of an engine's adapter versions: what is loaded, for whom, from where, and which names
are spent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...agents.types import BASE, SettingError, nearest
from .base import EngineError, ModelRef

FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterRegistry:
    """`engine` is named in errors. Counts open requests per version, so that none is retired under
    a request's feet."""

    def __init__(self, engine: str) -> None:
        self.engine = engine
        self.folders: dict[str, Path] = {}
        self.closed = False
        self._policies: dict[str, str] = {}
        self._used: set[str] = set()
        self._open: dict[str, set[asyncio.Future[None]]] = {}

    def check(self, ref: ModelRef) -> None:
        """Raises `EngineError` if the engine is closed or the version is not loaded for this
        policy."""
        if self.closed:
            raise EngineError(f"{self.engine} engine: it is closed")
        if not ref.version:
            return
        if ref.version not in self.folders:
            raise EngineError(
                f"{self.engine} engine: no version {ref.version!r} is loaded;"
                f" {nearest(ref.version, self.folders)}"
            )
        owner = self._policies[ref.version]
        if owner != ref.policy:
            raise EngineError(
                f"{self.engine} engine: version {ref.version!r} belongs to policy {owner!r}, not to"
                f" {ref.policy!r}"
            )

    def checked(self, adapters: Mapping[str, Path]) -> dict[str, Path]:
        """The absolute folders to load, by policy; their names are spent from now on.

        Raises `SettingError` for a folder that holds no adapter, `EngineError` for a name that was
        used before.
        """
        self.check(ModelRef(BASE))
        found = {policy: Path(folder).resolve() for policy, folder in adapters.items()}
        names = [folder.name for folder in found.values()]
        for folder in found.values():
            missing = [name for name in FILES if not (folder / name).is_file()]
            if missing:
                raise SettingError(
                    f"adapter {folder}: no {' and no '.join(missing)}; expected a folder that PEFT"
                    " saved"
                )
            if folder.name in self._used or names.count(folder.name) > 1 or folder.name == BASE:
                raise EngineError(
                    f"{self.engine} engine: the version name {folder.name!r} was used before; each"
                    " needs a new one"
                )
        self._used.update(names)
        return found

    def add(self, policy: str, folder: Path) -> None:
        self.folders[folder.name], self._policies[folder.name] = folder, policy

    async def forget(self, ref: ModelRef) -> None:
        """Take no new requests for this version, then wait for the open ones."""
        self.check(ref)
        if not ref.version:
            raise EngineError(f"{self.engine} engine: the bare base cannot be retired")
        del self.folders[ref.version], self._policies[ref.version]
        if self._open.get(ref.version):
            await asyncio.wait(self._open[ref.version])

    @contextmanager
    def request(self, ref: ModelRef) -> Iterator[None]:
        """A request for this version is open. Raises like `check`."""
        self.check(ref)
        ended = asyncio.get_running_loop().create_future()
        self._open.setdefault(ref.version, set()).add(ended)
        try:
            yield
        finally:
            ended.set_result(None)
            self._open[ref.version].discard(ended)

    def listed(self, replica: str, loaded: Mapping[str, object] | None = None) -> dict[str, str]:
        """{version: folder}, of those in `loaded` (None: of all). Raises `EngineError` for another
        replica than `local`."""
        if replica != "local":
            raise EngineError(f"{self.engine} engine: no replica {replica!r}; it has one, 'local'")
        return {
            name: str(folder)
            for name, folder in self.folders.items()
            if loaded is None or name in loaded
        }
