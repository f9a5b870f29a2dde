"""The environment variables that FlashCore reads: all of them, and nowhere else.

==========================  =============================  ==========================================================
variable                    default                        meaning
==========================  =============================  ==========================================================
``FLASHCORE_CACHE_DIR``     ``$XDG_CACHE_HOME/flashcore``  where compiled kernels are kept; any number of processes
                            or ``~/.cache/flashcore``;     may share it
                            ``/tmp/flashcore-<user id>``
                            for a user without a home
``FLASHCORE_CACHE``         ``1``                          ``0``: neither read nor write compiled kernels on disk
``FLASHCORE_KEEP_SOURCES``  ``0``                          ``1``: keep each kernel's source beside its cubin
``FLASHCORE_CHECK_LENGTHS`` ``0``                          ``1``: wait for the device and raise where a length on it
                                                           is beyond a KV cache's capacity, or a table names no page
                                                           of it; not in CUDA graphs
``FLASHCORE_COMMIT``        the clone's HEAD               the commit that ``flashcore bench`` records
``FLASHCORE_FA3_SO``        none                           a shared object with vLLM's FlashAttention-3 operator, one
                                                           more peer for ``flashcore bench``
==========================  =============================  ==========================================================

The last two stand in for options of the command line. The others are read at each call, so a test or a notebook may
change ``os.environ`` at any time.
"""

import os
from pathlib import Path

from flashcore.errors import EnvironmentProblem

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


def cache_dir() -> Path:
    """The directory for compiled kernels. It need not exist, and need not be this user's: see ``disk.py``.

    :raises EnvironmentProblem: FLASHCORE_CACHE_DIR names the home of a user that does not exist.
    """
    if chosen := os.environ.get("FLASHCORE_CACHE_DIR"):
        try:
            return Path(chosen).expanduser()
        except RuntimeError:
            raise EnvironmentProblem(
                f"FLASHCORE_CACHE_DIR={chosen!r}: there is no such home directory. Set it to an absolute path."
            ) from None
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "flashcore"
    try:
        return Path.home() / ".cache" / "flashcore"
    except RuntimeError:  # neither HOME nor an entry in passwd, as in containers with a user id of their own
        return Path("/tmp") / f"flashcore-{os.getuid()}"


def cache_enabled() -> bool:
    """Whether compiled kernels are read from and written to disk."""
    return _flag("FLASHCORE_CACHE", default=True)


def keep_sources() -> bool:
    """Whether the generated source of every compiled kernel is kept, not only that of one that failed."""
    return _flag("FLASHCORE_KEEP_SOURCES", default=False)


def check_lengths() -> bool:
    """Whether lengths and tables of KV caches that lie on the device are read back and checked."""
    return _flag("FLASHCORE_CHECK_LENGTHS", default=False)


def _flag(name: str, *, default: bool) -> bool:
    value = os.environ.get(name, "").strip().lower()
    if not value:
        return default
    if value in _TRUE:
        return True
    if value in _FALSE:
        return False
    raise EnvironmentProblem(f"{name}={os.environ[name]!r} is not a switch. Set it to 1 or 0, or unset it.")
