"""Files that are written behind the loop's back, by one thread per rank: no sample waits for a disk.

Only the newest content of a folder is of interest, so one that is waiting is replaced. Whoever reads or relies on the
files flushes first; a snapshot does, so that after a restart a replay writes whatever was lost.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)
Job = Callable[[], object]
DELAY_S = 0.1
"""What comes next, the first sample of a new version say, has the processors for itself for so long."""
MAX_WAITING = 8
"""More wait for the disk: what they would write is in memory."""


class Writer:
    """A queue of folders to write, and its thread."""

    def __init__(self, delay_s: float = DELAY_S) -> None:
        """Starts the thread, which begins ``delay_s`` after what is put."""
        self._delay_s = delay_s
        self._waiting: dict[Path, Job] = {}
        self._failed: dict[Path, Job] = {}
        self._begin_at = 0.0
        self._changed = threading.Condition()
        self._busy = False
        threading.Thread(target=self._run, name="writer", daemon=True).start()

    def put(self, folder: Path, job: Job) -> None:
        """Runs ``job``, which writes ``folder``, soon; what it writes must not change any more."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < MAX_WAITING or folder in self._waiting)
            self._failed.pop(folder, None)
            if not self._waiting:
                self._begin_at = time.monotonic() + self._delay_s
            self._waiting[folder] = job
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when everything put so far is written.

        Raises:
            Exception: what a job raised, when it failed a second time; the next flush tries it again.
        """
        with self._changed:
            self._begin_at = 0.0
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._busy)
            for folder, job in list(self._failed.items()):
                job()
                del self._failed[folder]

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                while (left := self._begin_at - time.monotonic()) > 0 and len(self._waiting) < MAX_WAITING:
                    self._changed.wait(left)
                folder, job = next(iter(self._waiting.items()))
                del self._waiting[folder]
                self._busy = True
            try:
                job()
            except Exception:
                log.exception("a folder could not be written; the next flush tries again", extra={"folder": folder})
                self._failed[folder] = job
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
