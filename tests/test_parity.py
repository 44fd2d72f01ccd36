"""The mismatch gate: what it measures, when it warns, and that real faults are beyond the limits meant for them."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from framework.config import ParityConfig
from framework.errors import MismatchError
from framework.parity import check_parity, measure_parity
from framework.trainer.base import ForwardResult
from framework.types import Datum

GATE = ParityConfig()
NAMES = ("logprob_abs_diff_mean", "logprob_abs_diff_max", "gen_kl_error", "token_mult_prob_error")


class OneRank:
    """The part of a Mesh that measuring needs."""

    def global_sum(self, values: list[float]) -> list[float]:
        return list(values)

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


def measured(trained: np.ndarray[Any, Any], sampled: np.ndarray[Any, Any]) -> dict[str, float]:
    """``parity/*`` of one completion after a prompt of two tokens."""
    datum = Datum(
        token_ids=(1, 2, *range(len(sampled))),
        loss_mask=(False, False, *(True,) * len(sampled)),
        fields={"sampling_logprobs": (0.0, 0.0, *sampled.tolist())},
    )
    values = trained.astype(np.float32)
    return measure_parity([datum], ForwardResult(logprobs=(values,), entropy=(values,)), OneRank())  # type: ignore[arg-type]


def logprobs(logits: np.ndarray[Any, Any], tokens: np.ndarray[Any, Any], temperature: float) -> np.ndarray[Any, Any]:
    scaled = logits / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    whole = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    return whole[np.arange(len(tokens)), tokens]


@pytest.fixture
def case() -> dict[str, Any]:
    """256 tokens sampled at temperature 0.7 from logits as spread as a language model's."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(256, 500), scale=2.5)
    p = np.exp(logits / 0.7 - (logits / 0.7).max(-1, keepdims=True))
    tokens = np.array([rng.choice(500, p=row / row.sum()) for row in p])
    return {"rng": rng, "logits": logits, "tokens": tokens, "sampled": logprobs(logits, tokens, 0.7)}


def test_equal_logprobs_measure_nothing() -> None:
    values = measured(np.array([-1.0, -2.0]), np.array([-1.0, -2.0]))
    assert values == {
        "parity/logprob_abs_diff_mean": 0.0,
        "parity/gen_kl_error": 0.0,
        "parity/token_mult_prob_error": 1.0,
        "parity/logprob_abs_diff_max": 0.0,
    }
    check_parity(values, GATE, step=1)


def test_the_noise_of_bf16_passes_without_a_word(case: dict[str, Any]) -> None:
    noisy = logprobs(case["logits"] + case["rng"].normal(size=case["logits"].shape, scale=0.03), case["tokens"], 0.7)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_parity(measured(noisy, case["sampled"]), GATE, step=1)
    assert said == []


def test_raw_logprobs_at_temperature_0_7_abort_at_that_step(case: dict[str, Any]) -> None:
    values = measured(case["sampled"], logprobs(case["logits"], case["tokens"], 1.0))
    assert values["parity/logprob_abs_diff_mean"] > 2 * GATE.abort_abs_diff_mean
    with pytest.raises(MismatchError, match=r"^step 12: parity/logprob_abs_diff_mean=0\.\d+ is beyond the limit 0\.15"):
        check_parity(values, GATE, step=12)


def test_a_stale_adapter_aborts_at_that_step(case: dict[str, Any]) -> None:
    moved = case["logits"] + case["rng"].normal(size=case["logits"].shape, scale=0.4)
    with pytest.raises(MismatchError, match=r"^step 3: parity/"):
        check_parity(measured(logprobs(moved, case["tokens"], 0.7), case["sampled"]), GATE, step=3)


@pytest.mark.parametrize("name", NAMES)
def test_every_quantity_warns_and_aborts_on_its_own(name: str) -> None:
    key = name.removeprefix("logprob_")
    warn, abort = getattr(GATE, f"warn_{key}"), getattr(GATE, f"abort_{key}")
    sound = {f"parity/{other}": 1.0 if other == "token_mult_prob_error" else 0.0 for other in NAMES}
    with pytest.warns(RuntimeWarning, match=f"step 2: parity/{name}="):
        check_parity({**sound, f"parity/{name}": (warn + abort) / 2}, GATE, step=2)
    with pytest.raises(MismatchError, match=f"step 2: parity/{name}="):
        check_parity({**sound, f"parity/{name}": abort * 1.01}, GATE, step=2)
    with pytest.raises(MismatchError, match=f"step 2: parity/{name}=nan"):
        check_parity({**sound, f"parity/{name}": float("nan")}, GATE, step=2)


def test_one_absurd_token_among_thousands_aborts() -> None:
    """A mask that is off by one at a single place hides in every mean."""
    sampled = np.full(4000, -0.5)
    trained = sampled.copy()
    trained[77] = -15.0
    values = measured(trained, sampled)
    assert values["parity/logprob_abs_diff_mean"] < GATE.warn_abs_diff_mean
    with pytest.raises(MismatchError, match=r"logprob_abs_diff_max=14\.5"):
        check_parity(values, GATE, step=1)


def test_exact_numerics_allow_no_difference_at_all() -> None:
    from framework.config import to_typed

    gate = to_typed({"numerics": "exact"}).parity_gate
    logprobs = np.log(np.linspace(0.1, 0.9, 50))
    check_parity(measured(logprobs, logprobs.astype(np.float32).astype(float)), gate, step=1)
    off = logprobs.copy()
    off[7] += 1e-6
    with pytest.raises(MismatchError, match="logprob_abs_diff_mean"):
        check_parity(measured(off, logprobs.astype(np.float32).astype(float)), gate, step=1)
    assert to_typed({}).parity_gate == ParityConfig()
