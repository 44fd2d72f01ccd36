"""Prometheus metrics of one service, in a registry of their own."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Names begin with ``tandem_``; durations are in seconds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.http_seconds = Histogram(
            "tandem_http_request_seconds", "HTTP requests", ["method", "path", "status"], registry=r, buckets=_SECONDS
        )
        self.op_seconds = Histogram(
            "tandem_op_seconds", "Time of an op's quanta on the trainer", ["op"], registry=r, buckets=_SECONDS
        )
        self.step_seconds = Histogram("tandem_engine_step_seconds", "Engine steps", registry=r, buckets=_SECONDS)
        self.outcomes = Counter("tandem_requests_finished", "Requests by outcome", ["kind", "failed"], registry=r)
        self.sampled_tokens = Counter("tandem_sampled_tokens", "Tokens sampled", registry=r)
        self.trained_tokens = Counter("tandem_trained_tokens", "Tokens of finished forward_backwards", registry=r)
        self.in_flight = Gauge("tandem_in_flight", "Completions in the engine", registry=r)
        self.waiting = Gauge("tandem_waiting", "Requests accepted and not finished", registry=r)
        self.trainer_adapters = Gauge("tandem_trainer_adapters", "Adapters in the trainer", registry=r)
        self.engine_versions = Gauge("tandem_engine_versions", "Versions in engine slots", registry=r)

    def observe_http(self, method: str, path: str, status: int, seconds: float) -> None:
        self.http_seconds.labels(method, path, str(status)).observe(seconds)

    def text(self) -> bytes:
        """The exposition format."""
        return bytes(generate_latest(self.registry))
