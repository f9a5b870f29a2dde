"""Files that FlashCore keeps: others may read them, nobody else may have written them.

What is read here becomes machine code in this process. So a file counts only if it and the folders of the cache around
it belong to root or to this process's user, nobody else may write to them, and none is a symbolic link. (The cache
folder itself may be one that root or this user made.) Each is opened inside the one before and examined when it is
open, so nothing can be exchanged in between.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flashcore import env
from flashcore.errors import EnvironmentProblem, FlashCoreWarning

_PATIENCE = 120  # seconds to wait for another process that compiles the same kernel
_OWN_FOLDER = "Set FLASHCORE_CACHE_DIR to a directory that is yours and that you can write to."


class Untrusted(OSError):
    """Somebody else could have written it. The message says why, and what to do."""


# ---- files ---------------------------------------------------------------------------------------------------------


def read(root: Path, *names: str) -> bytes:
    """The content of a file in the cache folder `root`, or in a folder of it: ``read(root, "kernels", key)``.

    :raises FileNotFoundError: it does not exist.
    :raises Untrusted: somebody else could have written it.
    :raises OSError: it cannot be read.
    """
    *folders, name = names
    with _folder(root, *folders) as inside, os.fdopen(_open(name, root.joinpath(*names), inside), "rb") as file:
        return file.read()


def write(root: Path, *names: str, data: bytes) -> None:
    """Replace a file like those that :func:`read` reads; readers see the old content or the new. Makes its folders.

    Others may read it, unless the umask forbids.

    :raises OSError: as `read`, or it cannot be written.
    """
    *folders, name = names
    with _folder(root, *folders, create=True) as inside:
        temporary = f".{name}.{secrets.token_hex(8)}"
        with open(temporary, "xb", opener=lambda path, flags: os.open(path, flags, 0o644, dir_fd=inside)) as file:
            try:
                file.write(data)
                file.flush()
                os.replace(temporary, name, src_dir_fd=inside, dst_dir_fd=inside)
            except BaseException:
                os.unlink(temporary, dir_fd=inside)
                raise


@contextlib.contextmanager
def _folder(root: Path, *names: str, create: bool = False) -> Iterator[int]:
    """A descriptor of the cache folder `root`, or of a folder of it."""
    with contextlib.ExitStack() as opened:
        if create:
            root.parent.mkdir(parents=True, exist_ok=True)
        path, inside = root, None
        for name in (None, *names):
            path = path / name if name else path
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name or path, 0o755, dir_fd=inside)
            inside = _open(name or _target(root), path, inside, folder=True)
            opened.callback(os.close, inside)
        yield inside


def _target(root: Path) -> Path:
    """Where the cache folder is, if its path is a link of root's or of this user's own."""
    link = os.lstat(root)
    return Path(os.path.realpath(root)) if stat.S_ISLNK(link.st_mode) and link.st_uid in _trusted() else root


def _trusted() -> tuple[int, int]:
    return 0, os.geteuid()


def _open(name: str | Path, path: Path, inside: int | None, folder: bool = False) -> int:
    """A descriptor to read a file or folder, which `path` names in messages, if nobody else can have written it."""
    if stat.S_ISLNK(os.stat(name, dir_fd=inside, follow_symlinks=False).st_mode):
        raise Untrusted(f"{path} is a symbolic link, and anybody may have made what it points to: delete it")
    descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=inside)
    try:
        _examine(os.fstat(descriptor), path, folder)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _examine(found: os.stat_result, path: Path, folder: bool) -> None:
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(found.st_mode):
        raise NotADirectoryError(f"{path} is no directory") if folder else Untrusted(f"{path} is no regular file")
    if found.st_uid not in _trusted():
        raise Untrusted(
            f"{path} belongs to user {found.st_uid}, and only what root or this process's user ({os.geteuid()}) wrote "
            "is trusted"
        )
    if found.st_mode & 0o022:
        raise Untrusted(
            f"{path} can be written by other users (mode {stat.S_IMODE(found.st_mode):04o}): chmod go-w {path}, "
            "if you trust what is in it"
        )


# ---- compiled kernels ----------------------------------------------------------------------------------------------

_warned: set[Path] = set()


class DiskCache:
    """Compiled kernels on disk, shared by processes and read by other users. What fails warns once and is missing."""

    def __init__(self, path: Path):
        self.path = path

    def get(self, key: str) -> bytes | None:
        """The entry, or None if there is none that can be trusted."""
        try:
            return read(self.path, "kernels", key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._warn(f"kernels on disk are not used, every process compiles its own: {error}. {_OWN_FOLDER}")
            return None

    def put(self, key: str, entry: bytes) -> None:
        """Keep an entry, for all who can read the directory."""
        try:
            write(self.path, "kernels", key, data=entry)
        except OSError as error:
            self._warn(
                f"kernels are not kept on disk, every process compiles its own: {self.path} cannot be written "
                f"({error}). {_OWN_FOLDER}"
            )

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold off other processes that want to compile the same kernel; where that cannot be, go on without."""
        from filelock import FileLock

        # Whoever can open a file can lock it: these are the owner's alone.
        lock = FileLock(self.path / "locks" / f"{key}.lock", timeout=_PATIENCE, mode=0o600)
        with contextlib.ExitStack() as held:
            try:
                if self._can_lock():
                    lock.acquire()
                    held.callback(lock.release)
            except TimeoutError:
                self._warn(f"no longer waiting for the process that has locked {lock.lock_file} for {_PATIENCE} s")
            except (OSError, NotImplementedError) as error:
                self._warn(
                    f"{self.path} has no file locks ({error}): processes that start together may all compile the same "
                    "kernel. Set FLASHCORE_CACHE_DIR to a directory on a local disk."
                )
            yield

    def _can_lock(self) -> bool:
        try:
            with _folder(self.path, "locks", create=True) as inside:
                return os.access(".", os.W_OK | os.X_OK, dir_fd=inside, effective_ids=True)
        except OSError:  # `put` says why
            return False

    def clear(self) -> None:
        """Delete all entries.

        :raises EnvironmentProblem: they are not this user's to delete.
        """
        try:
            with _folder(self.path):
                shutil.rmtree(self.path / "kernels")
        except FileNotFoundError:
            pass
        except OSError as error:
            raise EnvironmentProblem(f"{self.path} cannot be cleared: {error}.") from None

    def _warn(self, message: str) -> None:
        if self.path not in _warned:
            _warned.add(self.path)
            warnings.warn(message, FlashCoreWarning, stacklevel=2)


# ---- what there is -------------------------------------------------------------------------------------------------


def facts() -> dict[str, Any]:
    """What there is to know about the cache, without touching it: for ``flashcore doctor``.

    ``problem`` is the first reason why something in it is not used, or None. ``shared`` says whether other users can
    read all of it. Never raises.
    """
    found: dict[str, Any] = dict.fromkeys(("path", "enabled", "writable", "entries", "bytes", "shared", "problem"))
    try:
        path = env.cache_dir()
        found["path"] = str(path)
        found["enabled"] = env.cache_enabled()
        found["entries"] = found["bytes"] = 0
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        found["writable"] = existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)
        if found["enabled"]:
            _count(path, found)
    except (OSError, EnvironmentProblem) as error:
        found["problem"] = str(error)
    return found


def _count(root: Path, found: dict[str, Any]) -> None:
    """Examine the entries one by one; what begins with a dot is being written."""
    try:
        with _folder(root, "kernels") as inside:
            modes = [os.stat(root).st_mode, os.fstat(inside).st_mode]
            for name in sorted(os.listdir(inside)):
                with contextlib.suppress(FileNotFoundError):  # deleted or completed meanwhile
                    status = os.stat(name, dir_fd=inside, follow_symlinks=False)
                    if stat.S_ISDIR(status.st_mode) or name.startswith("."):
                        continue
                    try:
                        os.close(_open(name, root / "kernels" / name, inside))
                    except Untrusted as error:
                        found["problem"] = found["problem"] or str(error)
                        continue
                    modes.append(status.st_mode)
                    found["entries"] += 1
                    found["bytes"] += status.st_size
    except FileNotFoundError:
        return
    found["shared"] = all(mode & 0o004 for mode in modes)
