"""One trainer a run directory.

The lock is `flock` on `<run>/.lock`: the kernel frees it with the process, so a killed run can be resumed at once. Beside it
`<run>/lock.json` says who holds it, for the one who is refused; its modification time is the heartbeat (touching a file
works on a full disk). Where `flock` cannot tell (another host on a file system without it), the heartbeat decides.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maxpretrain.errors import UserError

_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_held: weakref.WeakSet[RunLock] = weakref.WeakSet()


class RunLock:
    """The right to write in a run directory; a context manager. In a job of several processes, process 0 alone takes it.

    Args:
        run_dir: the run directory; made if it is not there.
        stale_minutes: a heartbeat of another host that is older is taken for dead.
        heartbeat_seconds: time between two heartbeats.
        warn: called with a sentence when a dead holder's lock is taken over; None: `warnings.warn`.
    """

    def __init__(
        self,
        run_dir: Path | str,
        *,
        stale_minutes: float = 10.0,
        heartbeat_seconds: float = 30.0,
        warn: Callable[[str], None] | None = None,
    ):
        self.run_dir = Path(run_dir).absolute()
        self.stale_seconds, self.heartbeat_seconds = 60 * stale_minutes, heartbeat_seconds
        self._warn = warn or (lambda text: warnings.warn(text, stacklevel=3))
        self._info = self.run_dir / "lock.json"
        self._descriptor: int | None = None
        self._mine: dict[str, Any] = {}
        self._ended = threading.Event()
        self._lost = ""

    def acquire(self) -> RunLock:
        """Take the lock, or take over that of a holder that has died.

        Raises:
            UserError: another trainer holds it, or the directory cannot be written.
        """
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write in the run directory {self.run_dir}: {error.strerror}; choose another --root or mend its permissions"
            ) from error
        try:
            self._take(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        _held.add(self)
        self._ended.clear()
        threading.Thread(target=self._beat, args=(self._ended,), name="run lock", daemon=True).start()
        return self

    def _take(self, descriptor: int) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(self._read()) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise UserError(
                    f"cannot lock {self.run_dir / '.lock'}: {error.strerror}; choose another --root"
                ) from error
            self._warn(
                f"the file system of {self.run_dir} has no locks: two trainers are told apart by heartbeat alone"
            )
        holder = self._read()
        if holder is not None:
            if not self._is_dead(holder):
                raise self._refusal(holder)
            self._warn(
                f"the trainer before, process {holder['pid']} on {holder['host']}, ended without giving back {self.run_dir}; "
                "its lock is taken over"
            )
        try:
            self._write()
        except OSError as error:
            raise UserError(
                f"cannot write {self._info}: {error.strerror}; free space or mend its permissions"
            ) from error

    def release(self) -> None:
        """Give the lock back. Nothing happens where it is not held."""
        if self._descriptor is None:
            return
        self._ended.set()
        if not self._taken_over():
            with contextlib.suppress(OSError):
                self._info.unlink()
        os.close(self._descriptor)  # `.lock` stays: removing it would let two processes lock two files of one name
        self._descriptor = None
        _held.discard(self)

    def check(self) -> None:
        """Raise if another trainer has taken the run over, as it may when this host was suspended for long.

        Raises:
            UserError: naming the other.
        """
        if self._lost:
            raise UserError(self._lost)

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _write(self) -> None:
        host, pid = socket.gethostname(), os.getpid()
        self._mine = {"host": host, "pid": pid, "started": time.time(), "process_start": _process_start(pid)}
        temporary = self._info.with_name(f".lock.json.{host}.{pid}")
        temporary.write_text(json.dumps(self._mine), encoding="utf-8")
        os.replace(temporary, self._info)

    def _read(self) -> dict[str, Any] | None:
        """Who holds the lock, with the age of the heartbeat in seconds as `age`; None where nobody says so."""
        try:
            age = time.time() - self._info.stat().st_mtime
            holder = json.loads(self._info.read_text(encoding="utf-8"))
            return {**holder, "host": str(holder["host"]), "pid": int(holder["pid"]), "age": max(age, 0.0)}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, UnicodeDecodeError, OSError):
            return None  # cut short by a full disk: then flock alone decides

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether a holder that left its note, but not the lock, is gone."""
        if holder["host"] != socket.gethostname():
            return holder["age"] > self.stale_seconds
        if holder["pid"] == os.getpid():
            return True  # this process holds no lock here, or flock would have refused it
        start = _process_start(holder["pid"])
        if start is None:
            return not _exists(holder["pid"])
        return start != holder.get("process_start")  # the number was given to another process

    def _refusal(self, holder: dict[str, Any] | None) -> UserError:
        out = "wait for it, end it, or give this run another name"
        if holder is None:
            return UserError(f"another trainer holds the run directory {self.run_dir}; {out}")
        who = f"process {holder['pid']} on {holder['host']}"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.get("started", time.time() - holder["age"])))
        if holder["host"] == socket.gethostname() and self._is_dead(holder) and holder["pid"] != os.getpid():
            return UserError(
                f"{who} has ended but a child of it still holds the run directory {self.run_dir}; end that child"
            )
        if holder["host"] != socket.gethostname():
            out += f", or try again when it has been silent for {self.stale_seconds / 60:g} minutes"
        return UserError(
            f"{self.run_dir} is being trained by {who} since {since} (last sign of life {holder['age']:.0f} s ago); {out}"
        )

    def _taken_over(self) -> bool:
        holder = self._read()
        return holder is not None and any(holder.get(key) != self._mine[key] for key in ("host", "pid", "started"))

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(self.heartbeat_seconds):
            if self._taken_over():
                holder = self._read()
                if holder is not None:
                    self._lost = (
                        f"{self.run_dir} was taken over by process {holder['pid']} on {holder['host']}; this one stops "
                        "so that it does not write over the other's checkpoints"
                    )
                return
            with contextlib.suppress(OSError):
                os.utime(self._info)

    def _forget(self) -> None:
        """In a forked child: let go of the inherited descriptor, or an orphan would keep the lock of a killed trainer."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _after_fork() -> None:
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_after_fork)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _process_start(pid: int) -> int | None:
    """When a process began, in clock ticks since boot: with the number it names a process. None without /proc."""
    try:
        # The second field is the command in parentheses and may hold anything, so count from the last one.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
