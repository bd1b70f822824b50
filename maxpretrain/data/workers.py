"""Worker processes that answer tasks in order.

Not `multiprocessing`: its spawned children import the user's main module again, which fails in a script without the
`__main__` guard, and they outlive a parent that is killed. These are plain interpreters that read tasks from a pipe; the
kernel ends them when the thread that started them is gone, and the closed pipe does where the kernel cannot.
"""

from __future__ import annotations

import collections
import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, BinaryIO

from maxpretrain.errors import UserError

_BOOT = "import sys, pickle; sys.path[:] = pickle.load(sys.stdin.buffer); from maxpretrain.data.workers import serve; serve()"


class Workers:
    """`count` processes that all hold `function`; a context manager.

    Args:
        function: picklable; called with one task at a time.
        count: processes, at least 1.
    """

    def __init__(self, function: Callable[[Any], Any], count: int):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        # Started here, in the calling thread: the kernel ties a child's life to the thread that started it.
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", _BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            for _ in range(count)
        ]
        self._idle = collections.deque(self._processes)
        self._threads = ThreadPoolExecutor(count, "prepare")
        opening = pickle.dumps(sys.path) + pickle.dumps((os.getpid(), function))
        for process in self._processes:
            with contextlib.suppress(BrokenPipeError):  # its first task will find that it is gone
                _send(process, opening)

    def map(self, tasks: Iterable[Any]) -> Iterator[Any]:
        """Results in the order of the tasks; tasks are taken only a little ahead, so that they may be made as they are needed."""
        waiting: collections.deque[Future[Any]] = collections.deque()
        for task in tasks:
            waiting.append(self._threads.submit(self._ask, task))
            if len(waiting) > 2 * len(self._processes):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _ask(self, task: Any) -> Any:
        process = self._idle.popleft()  # as many threads as processes: there is always one
        try:
            _send(process, pickle.dumps(task, protocol=5))
            good, answer = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            status = process.wait()
            raise UserError(
                f"a worker of the preparation was ended (status {status}), perhaps for lack of memory; use fewer with data.workers"
            ) from None
        self._idle.append(process)
        if not good:
            raise answer
        return answer

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()  # they hold nothing that needs an orderly end
        for process in self._processes:
            process.wait()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # what was still to be written
                    pipe.close()


def _send(process: subprocess.Popen[bytes], data: bytes) -> None:
    process.stdin.write(data)
    process.stdin.flush()


def serve() -> None:
    """The life of a worker: tasks from standard input, (True, result) or (False, error) to standard output."""
    tasks: BinaryIO = sys.stdin.buffer
    # Whatever a library prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    function = _function(tasks)
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        try:
            answer = (True, function(task))
        except Exception as error:
            answer = (False, _sendable(error))
        pickle.dump(answer, answers, protocol=5)
        answers.flush()


def _function(tasks: BinaryIO) -> Callable[[Any], Any]:
    """Ties this process to its parent before any work, then unpacks the function."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    parent, function = pickle.load(tasks)
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)
    return function


def _sendable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
