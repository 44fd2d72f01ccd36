"""PEFT folders of the simple client's adapters, written behind the loop's back by one thread on rank 0.

Only the newest state of a folder is of interest, so one that is waiting is replaced. Whoever reads, removes or relies
on the folders flushes first; a snapshot does, so that after a restart a replay writes whatever was lost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from framework.errors import FrameworkError
from framework.lora.peft_io import save_peft
from framework.lora.spec import LoraSpec

log = logging.getLogger(__name__)
Export = tuple[LoraSpec, Mapping[str, npt.NDArray[np.float32]]]


class Exports:
    """A queue of folders to write, and its thread."""

    def __init__(self, base_model: str) -> None:
        """Starts the thread.

        Args:
            base_model: for PEFT's ``base_model_name_or_path``.
        """
        self._base_model = base_model
        self._waiting: dict[Path, Export] = {}
        self._changed = threading.Condition()
        self._busy = False
        threading.Thread(target=self._run, name="exports", daemon=True).start()

    def put(self, folder: Path, spec: LoraSpec, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Writes the folder soon; the tensors must not change any more."""
        with self._changed:
            self._waiting[folder] = (spec, tensors)
            self._changed.notify_all()

    def flush(self) -> None:
        """Returns when everything put so far is written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._busy)

    def write(self, folder: Path, spec: LoraSpec, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
        """Writes a folder at once."""
        save_peft(folder, spec=spec, tensors=tensors, base_model=self._base_model, dtype=torch.float32)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting))
                folder, (spec, tensors) = next(iter(self._waiting.items()))
                del self._waiting[folder]
                self._busy = True
            try:
                self.write(folder, spec, tensors)
            except (FrameworkError, OSError):
                log.exception("the adapter's folder could not be written", extra={"folder": str(folder)})
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
