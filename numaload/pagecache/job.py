"""Prewarm in a thread of this process, which goes on with other things: ``prewarm_async``."""

from __future__ import annotations

import concurrent.futures.thread  # noqa: F401 - what it does at the end comes after this module's
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextvars import copy_context
from typing import Any

from numaload.errors import NotCopyable, UsageError
from numaload.files.reader import Progress
from numaload.files.reading_lock import check_free, holding
from numaload.machine.stopping import CancelToken, check_process
from numaload.machine.threads import no_thread
from numaload.pagecache.choice import Source, located
from numaload.pagecache.prewarm import prewarm
from numaload.pagecache.report import PrewarmReport

_program = CancelToken()  # cancelled when the program begins to end
try:
    # Pools' threads are waited for by such a function too, the last one first; atexit's come later.
    threading._register_atexit(_program.cancel)  # type: ignore[attr-defined]  # noqa: SLF001
except RuntimeError:  # it ends already
    _program.cancel()


class _Token(CancelToken):
    """Cancelled by the program's end too: that waits for its threads, and not for minutes."""

    def cancelled(self) -> bool:
        return super().cancelled() or _program.cancelled()


class PrewarmJob(NotCopyable):
    """Prewarming that goes on. It ends with the program, and with the block of a ``with``."""

    def __init__(self, what: Source | Sequence[Source], options: dict[str, Any]) -> None:
        self._callback: Progress | None = options.pop("progress", None)
        self._token = _Token()
        self._step = (0, 0)
        self._future: Future[PrewarmReport] = Future()
        # In the context of its caller: its turn, if it has one, and how long it waits for networks.
        run = copy_context().run
        self._thread = threading.Thread(
            target=run, args=(self._run, located(what), options), name="numaload-prewarm"
        )
        self._pid, self._in_turn = os.getpid(), holding()
        try:
            self._thread.start()
        except RuntimeError as error:
            raise no_thread(error) from error

    def progress(self) -> tuple[int, int]:
        """Return (bytes read, bytes to be read); (0, 0) until that is known."""
        return self._step

    def done(self) -> bool:
        """Return whether it has ended, in success or failure."""
        return self._future.done()

    def cancel(self) -> None:
        """End it after the reads that are under way: ``result`` raises CancelledError then.

        What waits for a network file system gives up at once.
        """
        self._token.cancel()

    def result(self, timeout: float | None = None) -> PrewarmReport:
        """Wait for the report. Raises: what ``prewarm`` raises; TimeoutError after ``timeout`` s.

        Ctrl-C ends the waiting alone; ``cancel`` ends the work. UsageError in the callback of this
        job, in that of a prewarm that may read what it reads, and in a forked child.
        """
        check_process(self._pid)
        if self._thread is threading.current_thread():
            raise UsageError(
                "result() in the progress callback of this job: it would wait for itself"
            )
        if not self._in_turn and self._thread.is_alive():
            check_free()
        self._thread.join(timeout)
        if self._thread.is_alive():
            raise TimeoutError(f"prewarming has not ended within {timeout} s")
        return self._future.result()

    def _run(self, what: Source | Sequence[Source], options: dict[str, Any]) -> None:
        try:
            with self._token:
                self._future.set_result(prewarm(what, progress=self._look, **options))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._future.set_exception(error)

    def _look(self, done: int, total: int) -> bool:
        self._step = done, total
        return self._callback is None or self._callback(done, total) is not False

    def __enter__(self) -> PrewarmJob:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()
        if self._thread is not threading.current_thread():
            self._thread.join()


def prewarm_async(what: Source | Sequence[Source], **options: Any) -> PrewarmJob:
    """Begin to prewarm in a thread, with the options of ``prewarm``; its errors are in ``result``.

    progress: is called in a thread of the prewarming.
    Raises: NumaError where no thread can be started.
    """
    return PrewarmJob(what, options)
