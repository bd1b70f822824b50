"""One trainer a run directory: refusal, release by death, takeover of stale locks."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from maxpretrain.errors import UserError
from maxpretrain.runlock import RunLock

HOLD = """
import sys, time
from maxpretrain.runlock import RunLock
RunLock(sys.argv[1]).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of tmp_path / "run"."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def lock(path, notes, **options):
    return RunLock(path, warn=notes.append, **options)


def write_info(path, **changes):
    """A note as another trainer would have left it."""
    path.mkdir(exist_ok=True)
    info = {"host": "elsewhere", "pid": 4242, "started": 0.0, "process_start": 1, **changes}
    (path / "lock.json").write_text(json.dumps(info))


def test_taken_and_given_back_without_a_word(tmp_path):
    notes = []
    with lock(tmp_path / "run", notes):
        info = json.loads((tmp_path / "run" / "lock.json").read_text())
        assert (info["host"], info["pid"]) == (socket.gethostname(), os.getpid())
    assert not (tmp_path / "run" / "lock.json").exists()
    with lock(tmp_path / "run", notes):
        pass
    assert notes == []


def test_second_process_is_refused_with_host_and_process(tmp_path, holder):
    with pytest.raises(
        UserError, match=rf"being trained by process {holder.pid} on {socket.gethostname()} since 20"
    ) as info:
        lock(tmp_path / "run", []).acquire()
    assert info.value.exit_status == 2
    assert (tmp_path / "run" / "lock.json").exists()  # the refused one touches nothing


def test_same_process_is_refused_too(tmp_path):
    with lock(tmp_path, []), pytest.raises(UserError, match=f"process {os.getpid()}"):
        lock(tmp_path, []).acquire()


def test_killed_holder_frees_the_lock_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    notes = []
    with lock(tmp_path / "run", notes):
        assert len(notes) == 1
        assert f"process {holder.pid}" in notes[0]
        assert "taken over" in notes[0]


def test_forked_child_does_not_keep_a_killed_trainers_lock(tmp_path):
    code = HOLD.replace(
        'print("held"', 'import os\nif os.fork() == 0:\n    time.sleep(5)\n    os._exit(0)\nprint("held"'
    )
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    time.sleep(0.2)
    process.kill()
    process.wait()
    with lock(tmp_path, []) as held:
        held.check()
        assert json.loads(tmp_path.joinpath("lock.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize(("age", "stale"), [(9 * 60, False), (11 * 60, True)])
def test_other_host_is_judged_by_its_heartbeat(tmp_path, age, stale):
    notes = []
    write_info(tmp_path)
    os.utime(tmp_path / "lock.json", (time.time() - age,) * 2)
    if not stale:
        with pytest.raises(UserError, match=r"process 4242 on elsewhere .* silent for 10 minutes"):
            lock(tmp_path, notes).acquire()
        assert notes == []
        return
    with lock(tmp_path, notes):
        assert "process 4242 on elsewhere" in notes[0]


def test_process_number_of_another_process_is_not_the_holder(tmp_path):
    """After a reboot the number may belong to anyone: the start time tells."""
    notes = []
    write_info(tmp_path, host=socket.gethostname(), pid=os.getppid(), process_start=1)
    with lock(tmp_path, notes):
        assert len(notes) == 1


def test_live_process_without_flock_is_refused(tmp_path):
    """The note alone refuses, where the file system has no flock: here the parent process is the holder."""
    from maxpretrain.runlock import _process_start

    write_info(tmp_path, host=socket.gethostname(), pid=os.getppid(), process_start=_process_start(os.getppid()))
    with pytest.raises(UserError, match=f"process {os.getppid()}"):
        lock(tmp_path, []).acquire()


def test_heartbeat_touches_the_note(tmp_path):
    with lock(tmp_path, [], heartbeat_seconds=0.02):
        os.utime(tmp_path / "lock.json", (0, 0))
        deadline = time.time() + 5
        while (tmp_path / "lock.json").stat().st_mtime < 1 and time.time() < deadline:
            time.sleep(0.02)
        assert (tmp_path / "lock.json").stat().st_mtime > 1


def test_a_run_taken_over_is_noticed(tmp_path):
    held = lock(tmp_path, [], heartbeat_seconds=0.02).acquire()
    held.check()
    write_info(tmp_path)
    deadline = time.time() + 5
    while not held._lost and time.time() < deadline:
        time.sleep(0.02)
    with pytest.raises(UserError, match="taken over by process 4242 on elsewhere"):
        held.check()
    held.release()
    assert (tmp_path / "lock.json").exists()  # the other's


def test_garbled_note_does_not_stop_a_run(tmp_path):
    tmp_path.joinpath("lock.json").write_text('{"host": ')
    with lock(tmp_path, []) as held:
        held.check()
        assert json.loads(tmp_path.joinpath("lock.json").read_text())["pid"] == os.getpid()


def test_unwritable_directory_is_one_sentence(tmp_path):
    tmp_path.joinpath("file").write_text("")
    with pytest.raises(
        UserError, match=r"cannot write in the run directory .*file/run: Not a directory; choose another --root"
    ):
        lock(tmp_path / "file" / "run", []).acquire()
