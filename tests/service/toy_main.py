"""The toy service as a process of its own, for tests that kill it: ``python -m tests.service.toy_main PORT DIR``."""

from __future__ import annotations

import sys

from framework.service.launch import serve
from framework.service.settings import ServiceConfig
from tests.service.toy import ToyTrainer
from tests.service.toy_pair import toy_backend

if __name__ == "__main__":
    port, data_dir, snapshot_after_s, seconds_per_call = sys.argv[1:]
    trainer = ToyTrainer(seconds_per_call=float(seconds_per_call))
    config = ServiceConfig(port=int(port), data_dir=data_dir, snapshot_after_s=float(snapshot_after_s), poll_s=5.0)
    serve(config, toy_backend(trainer=trainer))
