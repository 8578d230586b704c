"""Registry of an engine's adapter versions: what is loaded, for which policy, from where, and which
names are used up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ...agents.types import BASE, SettingError, nearest
from .base import EngineError, ModelRef

FILES = ("adapter_config.json", "adapter_model.safetensors")  # of a PEFT adapter folder


def check_files(folder: Path) -> None:
    """Raises `SettingError` for a folder that holds no adapter."""
    missing = [name for name in FILES if not (folder.resolve() / name).is_file()]
    if missing:
        raise SettingError(
            f"adapter {folder.resolve()}: no {' and no '.join(missing)}; expected a folder that"
            " PEFT saved"
        )


class AdapterRegistry:
    """The adapter versions of one engine, named in errors.

    Counts open requests per version, so that none is retired while a request uses it. `foreign`:
    another process publishes, so that any name of a version may be asked for.
    """

    def __init__(self, engine: str, foreign: bool = False) -> None:
        self.engine, self.foreign = engine, foreign
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
        if not ref.version or self.foreign:
            return
        if ref.version not in self.folders:
            reason = (
                "was retired"
                if ref.version in self._used
                else f"was never published; {nearest(ref.version, self.folders)}"
            )
            raise EngineError(
                f"{self.engine} engine: adapter version {ref.version!r} of policy"
                f" {ref.policy!r} {reason}"
            )
        owner = self._policies[ref.version]
        if owner != ref.policy:
            raise EngineError(
                f"{self.engine} engine: adapter version {ref.version!r} belongs to policy"
                f" {owner!r}, not to {ref.policy!r}"
            )

    def reserve(
        self,
        adapters: Mapping[str, Path],
        check_folder: Callable[[Path], None] = check_files,
        reserved: tuple[str, ...] = (BASE,),
    ) -> dict[str, Path]:
        """The absolute folders to load, by policy; their names are used up from now on.

        Raises what `check_folder` raises, and `EngineError` for a name that was used before or is
        in `reserved`.
        """
        self.check(ModelRef(BASE))
        for folder in adapters.values():
            check_folder(Path(folder))
        folders = {policy: Path(folder).resolve() for policy, folder in adapters.items()}
        names = [folder.name for folder in folders.values()]
        for name in names:
            if name in self._used or names.count(name) > 1 or name in reserved:
                raise EngineError(
                    f"{self.engine} engine: the version name {name!r} was used before; every"
                    " version needs a new one"
                )
        self._used.update(names)
        return folders

    def add(self, policy: str, folder: Path) -> None:
        """Requests for the version of this folder are accepted from now on."""
        self.folders[folder.name], self._policies[folder.name] = folder, policy

    async def forget(self, ref: ModelRef) -> None:
        """Accept no new requests for this version, then wait for the open ones."""
        self.check(ref)
        if not ref.version:
            raise EngineError(f"{self.engine} engine: the bare base cannot be retired")
        del self.folders[ref.version], self._policies[ref.version]
        if self._open.get(ref.version):
            await asyncio.wait(self._open[ref.version])
        self._open.pop(ref.version, None)

    def asked(self) -> set[str]:
        """The versions that open requests need."""
        return {version for version, requests in self._open.items() if version and requests}

    @contextmanager
    def request(self, ref: ModelRef) -> Iterator[None]:
        """Count a request for this version as open. Raises like `check`."""
        self.check(ref)
        ended = asyncio.get_running_loop().create_future()
        requests = self._open.setdefault(ref.version, set())
        requests.add(ended)
        try:
            yield
        finally:
            ended.set_result(None)
            requests.discard(ended)

    def listed(self, replica: str, loaded: Collection[str] | None = None) -> dict[str, str]:
        """{version: folder}, of those in `loaded` (None: of all). Raises `EngineError` for another
        replica than `local`."""
        if replica != "local":
            raise EngineError(f"{self.engine} engine: no replica {replica!r}; it has one, 'local'")
        return {
            name: str(folder)
            for name, folder in self.folders.items()
            if loaded is None or name in loaded
        }
