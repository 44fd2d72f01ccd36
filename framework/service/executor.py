"""The lockstep loop: the leader plans, every rank executes the same actions on the same trainer and engine.

After each action the ranks compare how it went. Failed alike everywhere: that action's request fails. Failed on some
only: the ranks no longer hold the same state, so all of them stop (torchrun starts them again and the registry brings
everything back).
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Any, Protocol

from framework.engine.base import StepOutput
from framework.errors import FrameworkError, LockstepError
from framework.service.plan import Action, Failure, Plan, Restore, Run
from framework.service.worker import Worker

log = logging.getLogger(__name__)


class Lockstep(Protocol):
    """What the service needs of ``framework.distributed.Mesh``."""

    @property
    def tp_rank(self) -> int: ...

    def broadcast(self, value: Any) -> Any: ...

    def all_gather(self, value: Any) -> list[Any]: ...


class Planner(Protocol):
    """Rank 0's side of the loop (:class:`framework.service.leader.Leader`)."""

    def plan(self) -> Plan: ...

    def report(self, plan: Plan, results: list[Any], seconds: list[float]) -> None: ...

    def stepped(self, output: StepOutput, seconds: float) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """One per rank."""

    worker: Worker
    mesh: Lockstep
    planner: Planner | None
    """On rank 0 only."""

    def run(self) -> None:
        """Turns until a plan says stop. All ranks call it; it returns on all of them together."""
        while not self.turn():
            pass

    def turn(self) -> bool:
        """One plan: True if it was the last."""
        plan: Plan = self.mesh.broadcast(self.planner.plan() if self.planner else None)
        results: list[Any] = []
        seconds: list[float] = []
        for action in plan.actions:
            start = time.perf_counter()
            failed = next((result for result in results if isinstance(result, Failure)), None)
            if failed is not None and isinstance(action, Restore | Run):  # what it needs did not come about
                results.append(failed)
            else:
                results.append(self._attempt(action))
            seconds.append(time.perf_counter() - start)
        if self.planner:
            self.planner.report(plan, results, seconds)
        if plan.step:
            start = time.perf_counter()
            output = self.worker.engine.step()
            if self.planner:
                self.planner.stepped(output, time.perf_counter() - start)
        self.worker.keep()
        return plan.stop

    def _attempt(self, action: Action) -> Any:
        result: Any
        try:
            result = self.worker.execute(action)
        except Exception as error:
            # whatever it was, the request fails and the service goes on
            user = isinstance(error, FrameworkError) and isinstance(error, ValueError)
            if not user:
                log.exception("%s failed", type(action).__name__)
            text = str(error) if user else f"{type(error).__name__}: {error}"
            result = Failure(message=text, category="user" if user else "server")
        statuses = self.mesh.all_gather(result if isinstance(result, Failure) else None)
        if any(statuses) and None in statuses:
            raise LockstepError(f"{type(action).__name__} failed on some ranks only: {statuses}")
        return result
