"""What is kept on disk: read by others, never trusted where others could have written it, and never in the way."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flashcore import disk
from flashcore.disk import DiskCache, Untrusted
from flashcore.errors import EnvironmentProblem, FlashCoreWarning

NOBODY = 65534

pytestmark = pytest.mark.filterwarnings("error")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files that are somebody else's")


@pytest.fixture(autouse=True)
def _nothing_was_warned_of(monkeypatch):
    monkeypatch.setattr(disk, "_warned", set())


@pytest.fixture
def root():
    """A cache folder whose parents everybody can enter (tmp_path's are the user's own)."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder, "flashcore")


@pytest.fixture
def as_nobody():
    os.seteuid(NOBODY)
    yield
    os.seteuid(0)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def filled(root: Path) -> DiskCache:
    cache = DiskCache(root)
    cache.put("key", b"machine code")
    return cache


@pytest.fixture
def warmed(root) -> DiskCache:
    return filled(root)


def test_an_entry_comes_back_and_is_replaced(warmed, recwarn):
    assert warmed.get("key") == b"machine code"
    warmed.put("key", b"other")
    assert warmed.get("key") == b"other"
    assert warmed.get("another") is None
    assert os.listdir(warmed.path / "kernels") == ["key"]
    assert not recwarn.list


@needs_root
def test_what_root_warms_others_use(warmed, as_nobody, recwarn):
    assert warmed.get("key") == b"machine code"
    with warmed.lock("key"):
        pass
    assert not recwarn.list


@needs_root
def test_where_another_user_cannot_write_one_warning_says_so(warmed, as_nobody):
    with warmed.lock("new"), pytest.warns(FlashCoreWarning, match="cannot be written.*FLASHCORE_CACHE_DIR"):
        warmed.put("new", b"")
    warmed.put("new", b"")  # a second warning would be an error
    assert warmed.get("key") == b"machine code"


@needs_root
def test_a_home_that_cannot_be_entered_costs_one_warning(root, as_nobody):
    os.seteuid(0)
    root.parent.chmod(0o700)
    os.seteuid(NOBODY)
    cache = DiskCache(root)
    with pytest.warns(FlashCoreWarning, match="Permission denied.*FLASHCORE_CACHE_DIR"):
        assert cache.get("key") is None
    with cache.lock("key"):
        cache.put("key", b"")


@pytest.mark.parametrize("mask", [0o002, 0o022, 0o077])
def test_any_umask_makes_what_can_be_trusted(root, umask, mask):
    umask(mask)
    assert filled(root).get("key") == b"machine code"
    mode = stat.S_IMODE(os.stat(root / "kernels" / "key").st_mode)
    assert mode == 0o644 & ~mask


PARTS = ("kernels/key", "kernels", "")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("mode", [0o020, 0o002])
def test_what_others_may_write_is_not_used(warmed, part, mode):
    path = warmed.path / part
    path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)
    with pytest.raises(Untrusted, match=f"can be written by other users.*chmod go-w {path}"):
        disk.read(warmed.path, "kernels", "key")
    with pytest.warns(FlashCoreWarning, match="not used.*chmod go-w"):
        assert warmed.get("key") is None


@needs_root
@pytest.mark.parametrize("part", PARTS)
def test_what_somebody_else_owns_is_not_used(warmed, part):
    os.chown(warmed.path / part, 1234, 1234)
    with pytest.raises(Untrusted, match="belongs to user 1234"):
        disk.read(warmed.path, "kernels", "key")


@needs_root
def test_what_another_user_warmed_root_does_not_use(warmed):
    for path in (warmed.path, *warmed.path.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    with pytest.raises(Untrusted, match=f"belongs to user {NOBODY}"):
        disk.read(warmed.path, "kernels", "key")


@pytest.mark.parametrize("part", ["kernels/key", "kernels"])
def test_links_are_not_followed(warmed, part):
    path = warmed.path / part
    path.rename(warmed.path / "elsewhere")
    path.symlink_to(warmed.path / "elsewhere")
    with pytest.raises(Untrusted, match="symbolic link"):
        disk.read(warmed.path, "kernels", "key")


def test_the_folder_itself_may_be_a_link_of_ones_own(warmed):
    link = warmed.path.with_name("link")
    link.symlink_to(warmed.path)
    assert DiskCache(link).get("key") == b"machine code"
    DiskCache(link).put("more", b"")
    assert warmed.get("more") == b""


@needs_root
def test_the_folder_itself_may_not_be_a_link_of_somebody_elses(warmed):
    link = warmed.path.with_name("link")
    link.symlink_to(warmed.path)
    os.chown(link, NOBODY, NOBODY, follow_symlinks=False)
    with pytest.raises(Untrusted, match="symbolic link"):
        disk.read(link, "kernels", "key")


def test_what_is_no_file_is_not_waited_for(warmed):
    (warmed.path / "kernels" / "key").unlink()
    os.mkfifo(warmed.path / "kernels" / "key", 0o644)
    with pytest.raises(Untrusted, match="no regular file"):
        disk.read(warmed.path, "kernels", "key")


def test_an_entry_that_is_not_trusted_is_replaced(warmed):
    entry = warmed.path / "kernels" / "key"
    entry.chmod(0o666)
    with pytest.warns(FlashCoreWarning):
        assert warmed.get("key") is None
    warmed.put("key", b"mine")
    assert warmed.get("key") == b"mine"


def test_writing_does_not_follow_links(root):
    disk.write(root, "sources", "one.cu", data=b"")
    precious = root / "precious"
    precious.write_bytes(b"precious")
    (root / "sources" / "one.cu").unlink()
    (root / "sources" / "one.cu").symlink_to(precious)
    disk.write(root, "sources", "one.cu", data=b"source")
    assert precious.read_bytes() == b"precious"
    assert disk.read(root, "sources", "one.cu") == b"source"
    (root / "sources").rename(root / "elsewhere")
    (root / "sources").symlink_to(root / "elsewhere")
    with pytest.raises(Untrusted, match="symbolic link"):
        disk.write(root, "sources", "two.cu", data=b"source")


def test_a_failed_write_leaves_nothing(warmed, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(FlashCoreWarning, match="No space left"):
        warmed.put("key", b"longer machine code")
    assert os.listdir(warmed.path / "kernels") == ["key"]
    assert warmed.get("key") == b"machine code"


# ---- locks


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_without_locks_one_goes_on(warmed, monkeypatch, number):
    def flock(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(FlashCoreWarning, match="no file locks"), warmed.lock("key"):
        pass
    with warmed.lock("key"):  # a second warning would be an error
        pass


def test_locks_that_are_not_implemented(warmed, monkeypatch):
    """As filelock says it, where it does not make do with a lock of another kind."""
    import filelock

    def acquire(self, *args, **kwargs):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with pytest.warns(FlashCoreWarning, match="no file locks"), warmed.lock("key"):
        pass


HOLD = """
import sys, time
from pathlib import Path
from flashcore.disk import DiskCache
with DiskCache(Path(sys.argv[1])).lock("key"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_process_that_hangs_is_not_waited_for_for_ever(warmed, monkeypatch):
    monkeypatch.setattr(disk, "_PATIENCE", 0.3)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(warmed.path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.warns(FlashCoreWarning, match="no longer waiting"), warmed.lock("key"):
                pass
            with warmed.lock("another"):
                pass
        finally:
            other.kill()
    monkeypatch.setattr(disk, "_warned", set())
    with warmed.lock("key"):  # the system gave it back
        pass


def test_an_error_inside_the_lock_is_the_callers(warmed):
    with pytest.raises(PermissionError, match="mine"), warmed.lock("key"):
        raise PermissionError("mine")


def test_nobody_else_can_hold_a_lock(warmed, umask):
    with warmed.lock("key"):
        (lock,) = (warmed.path / "locks").iterdir()
        assert stat.S_IMODE(lock.stat().st_mode) == 0o600


# ---- facts and clear


@pytest.fixture
def facts(root, monkeypatch):
    monkeypatch.setenv("FLASHCORE_CACHE_DIR", str(root))
    monkeypatch.delenv("FLASHCORE_CACHE", raising=False)
    return disk.facts


def test_facts_touch_nothing(root, facts):
    expected = {"path": str(root), "enabled": True, "writable": True, "shared": None, "problem": None}
    assert facts() == {**expected, "entries": 0, "bytes": 0}
    assert not root.exists()


def test_facts(root, facts, umask):
    filled(root)
    found = facts()
    assert (found["entries"], found["bytes"], found["shared"], found["problem"]) == (1, 12, True, None)
    (root / "kernels" / "key").chmod(0o600)
    assert facts()["shared"] is False
    (root / "kernels" / "key").chmod(0o666)
    assert facts()["entries"] == 0
    assert "chmod go-w" in facts()["problem"]
    root.chmod(0o777)
    assert f"{root} can be written by other users" in facts()["problem"]


@pytest.mark.parametrize(
    ("variable", "value"), [("FLASHCORE_CACHE", "maybe"), ("FLASHCORE_CACHE_DIR", "~no-such-user/kernels")]
)
def test_facts_say_which_variable_is_wrong(facts, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    assert f"{variable}={value!r}" in facts()["problem"]


@needs_root
def test_facts_of_another_users_home(root, facts, as_nobody):
    os.seteuid(0)
    root.parent.chmod(0o700)
    os.seteuid(NOBODY)
    assert "Permission denied" in facts()["problem"]
    assert not facts()["writable"]


def test_clear(warmed):
    warmed.clear()
    assert warmed.get("key") is None
    warmed.clear()
    filled(warmed.path)
    (warmed.path / "kernels").rename(warmed.path / "elsewhere")
    (warmed.path / "kernels").symlink_to(warmed.path / "elsewhere")
    with pytest.raises(EnvironmentProblem, match="cannot be cleared"):
        warmed.clear()
    assert (warmed.path / "elsewhere" / "key").exists()
    warmed.path.chmod(0o777)
    with pytest.raises(EnvironmentProblem, match="chmod go-w"):
        warmed.clear()
