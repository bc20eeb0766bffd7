"""The hidden folder beside an output in which it grows: a lock, a manifest, a journal, and the unfinished files.

Nothing appears under the output's name before the whole of it is on the disk and verified. The manifest holds what a
run was asked to do; the journal, unit by unit, what of it is done, each line written after the unit's bytes. So a run
that ended anywhere, even between two bytes of a line, can be resumed by the next.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from masksolve.checkpoint._file import CheckpointError, parse_json

_MANIFEST, _JOURNAL, _LOCK = "manifest.json", "journal", "lock"


class AnotherRunError(CheckpointError):
    """Another run writes the same output."""


@dataclass(frozen=True)
class Workspace:
    """The hidden folder of the run that writes `target`."""

    target: Path

    @property
    def folder(self) -> Path:
        """The folder itself."""
        return folder_of(self.target)

    def read_manifest(self) -> dict[str, Any] | None:
        """Return the manifest of an unfinished run, or None."""
        try:
            return self._parse((self.folder / _MANIFEST).read_bytes())
        except FileNotFoundError:
            return None

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Put the manifest in its place, whole: from now on the run can be resumed."""
        unfinished = self.folder / f"{_MANIFEST}.tmp"
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        (self.folder / _JOURNAL).touch()
        unfinished.replace(self.folder / _MANIFEST)
        sync_folder(self.folder)

    def new_data_folder(self) -> Path:
        """Make a folder for the unfinished files, with a name of its own.

        A worker that outlives a killed run never writes into the files of a later one.
        """
        data = self.folder / f"data-{secrets.token_hex(4)}"
        data.mkdir()
        return data

    def read_journal(self) -> list[dict[str, Any]]:
        """Return the entries of the journal, but for an unfinished last line: the run ended while it was written."""
        content = (self.folder / _JOURNAL).read_bytes()
        return [self._parse(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]

    def _parse(self, text: bytes) -> dict[str, Any]:
        try:
            return parse_json(text, self.folder)
        except CheckpointError as error:
            raise CheckpointError(
                f"what an earlier run has left is corrupt; remove it to begin again: {error}"
            ) from None

    def is_verified(self) -> bool:
        """Return whether all that an unfinished run had left to do is to name its files."""
        return self.read_manifest() is not None and any("verified" in entry for entry in self.read_journal())

    @contextmanager
    def journal(self) -> Iterator[Journal]:
        """Open the journal for more entries, behind the last whole one."""
        with (self.folder / _JOURNAL).open("r+b", buffering=0) as file:
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
            yield Journal(file)

    def clear(self) -> None:
        """Remove all but the lock: the run is finished, or given up."""
        with suppress(FileNotFoundError):
            # First, so that what is half removed is not resumed.
            (self.folder / _MANIFEST).unlink()
        for entry in self.folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != _LOCK:
                entry.unlink()


class Journal:
    """The journal, open for more entries at its end."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def add(self, entry: dict[str, Any]) -> None:
        """Write an entry, and wait until it is on the disk."""
        line = memoryview(json.dumps(entry).encode() + b"\n")
        while len(line):
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())


def folder_of(target: Path) -> Path:
    """Return the hidden folder of the runs that write `target`."""
    return target.with_name(f".{target.name}.masksolve")


@contextmanager
def open_workspace(target: Path) -> Iterator[Workspace]:
    """Enter the hidden folder of `target`, which no other run may do meanwhile; keep it only if it has a manifest.

    Raises
    ------
    AnotherRunError
        If another run is in it.
    OSError
        If it cannot be made.
    """
    workspace = Workspace(target)
    workspace.folder.mkdir(exist_ok=True)
    lock = FileLock(workspace.folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except (Timeout, FileNotFoundError):  # not found: the other has just removed the folder
        raise AnotherRunError(
            f"another run is writing {target}; wait until it has ended, or name another output"
        ) from None
    try:
        yield workspace
    finally:
        if not (workspace.folder / _MANIFEST).exists():
            workspace.clear()
            # Removed while it is held: filelock refuses a run that opened it just before, as its lock is of no file.
            (workspace.folder / _LOCK).unlink()
            with suppress(OSError):
                workspace.folder.rmdir()
        lock.release()


def check_room(folder: Path, size: int) -> None:
    """Refuse what a disk says it has no room for; `allocate` comes later, and knows.

    Raises
    ------
    OSError
        If there is no room.
    """
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, f"no room for {size} bytes: {os.strerror(errno.ENOSPC)}", str(folder))


def allocate(path: Path, size: int) -> None:
    """Make a file of a size, its room on the disk included where the system can do that.

    Raises
    ------
    OSError
        If there is no room.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        if size == 0:
            return
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except AttributeError:  # neither on macOS nor on Windows
            file.truncate(size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise OSError(error.errno, f"no room for {size} bytes: {error.strerror}", str(path)) from None
            file.truncate(size)


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk; a system that cannot open folders does so by itself."""
    with suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
