"""Policy losses: by hand from the papers' equations, then against TRL, verl and OpenRLHF, value and gradient."""

from __future__ import annotations

import math

import pytest

from framework.algorithms.base import LossFn
from framework.algorithms.losses import (
    CISPO,
    DRO,
    GSPO,
    GSPOToken,
    ImportanceSampling,
    PPOClip,
    Reinforce,
)
from framework.errors import ConfigError
from tests.algorithms.loss_cases import assert_loss, assert_same_as, by_hand, peer, recorded_inputs, value_and_gradient

LOG = math.log


def test_ppo_clip_by_hand() -> None:
    """Schulman et al. 2017 eq. 7 with DAPO's two bounds, 0.8 and 1.28; L = -min(r A, clip(r) A), dL/dlp = -r A or 0."""
    # r:        1.5 (above)   0.5 (below)  1.1 (inside)  1.5 (above)   0.5 (below)
    # A:        2             2            2             -1            -1
    # r A:      3             1            2.2           -1.5          -0.5
    # clip A:   2.56          1.6          2.2           -1.28         -0.8
    # L:        -2.56         -1           -2.2          1.5           0.8
    # dL/dlp:   0 (clipped)   -1           -2.2          1.5           0 (clipped)
    inputs = by_hand(
        [[LOG(1.5), LOG(0.5), LOG(1.1)], [LOG(1.5), LOG(0.5)]],
        sampling_logprobs=[[0.0, 0.0, 0.0], [0.0, 0.0]],
        advantages=[[2.0, 2.0, 2.0], [-1.0, -1.0]],
    )
    loss, gradient = value_and_gradient(PPOClip(clip_low=0.2, clip_high=0.28), inputs)
    assert loss == pytest.approx([-2.56, -1.0, -2.2, 1.5, 0.8])
    assert gradient == pytest.approx([0.0, -1.0, -2.2, 1.5, 0.0])
    metrics = PPOClip(clip_low=0.2, clip_high=0.28)(inputs).metrics
    assert float(metrics["loss/clip_high_fraction"].sum) == 1.0
    assert float(metrics["loss/clip_low_fraction"].sum) == 1.0
    assert metrics["loss/ratio"].count == 5.0
    assert float(metrics["loss/ratio"].sum) == pytest.approx(1.5 + 0.5 + 1.1 + 1.5 + 0.5)


def test_dual_clip_by_hand() -> None:
    """Ye et al. 2020: where A < 0 the objective is max(min(r A, clip(r) A), c A), here c = 3."""
    # r = 5, A = -2: min(-10, -2.4) = -10, max(-10, -6) = -6, L = 6 and no gradient.
    # r = 2, A = -2: min(-4, -2.4) = -4, max(-4, -6) = -4, L = 4, dL/dlp = -r A = 4.
    # r = 5, A = +2: untouched by the dual clip: L = -min(10, 2.4) = -2.4.
    inputs = by_hand([[LOG(5.0), LOG(2.0), LOG(5.0)]], sampling_logprobs=[[0.0] * 3], advantages=[[-2.0, -2.0, 2.0]])
    loss, gradient = value_and_gradient(PPOClip(dual_clip=3.0), inputs)
    assert loss == pytest.approx([6.0, 4.0, -2.4])
    assert gradient == pytest.approx([0.0, 4.0, 0.0])
    assert float(PPOClip(dual_clip=3.0)(inputs).metrics["loss/dual_clip_fraction"].sum) == 1.0


def test_ratio_is_against_the_proximal_logprobs_when_there_are_some() -> None:
    fields = {"sampling_logprobs": [[-9.0]], "advantages": [[1.0]]}
    on_sampling, _ = value_and_gradient(ImportanceSampling(), by_hand([[-1.0]], **fields))
    on_proximal, _ = value_and_gradient(ImportanceSampling(), by_hand([[-1.0]], proximal_logprobs=[[-1.5]], **fields))
    assert on_sampling == pytest.approx([-math.exp(8.0)])
    assert on_proximal == pytest.approx([-math.exp(0.5)])


def test_gspo_by_hand() -> None:
    """GSPO eq. 5 and 7: s = exp(mean log ratio); with sequence_mean weights the loss is the mean over sequences."""
    # Sequence 0: log ratios ln 1.2 and ln 0.9: s = sqrt(1.08) = 1.0392, inside [0.9, 1.1], A = 2: L = -2.0785.
    #   d(-2 s)/dlp_t = -2 s / 2 for each of the two tokens' share; summed over both tokens' weights of 1: -2 s each.
    # Sequence 1: one token, ratio 2, A = 1: clipped at 1.1, no gradient.
    s = math.sqrt(1.08)
    inputs = by_hand(
        [[LOG(1.2), LOG(0.9)], [LOG(2.0)]],
        sampling_logprobs=[[0.0, 0.0], [0.0]],
        advantages=[[2.0, 2.0], [1.0]],
    )
    loss, gradient = value_and_gradient(GSPO(clip_low=0.1, clip_high=0.1), inputs)
    assert loss == pytest.approx([-2 * s, -2 * s, -1.1])
    assert gradient == pytest.approx([-2 * s, -2 * s, 0.0])


def test_gspo_token_by_hand() -> None:
    """GSPO-token eq. 13 and 14: the value is s_i, the gradient of token t is that of its own logprob times s_i A_t."""
    # s = sqrt(1.08) as above, token advantages 2 and -1: L = (-2 s, s), gradient (-2 s, s).
    s = math.sqrt(1.08)
    inputs = by_hand([[LOG(1.2), LOG(0.9)]], sampling_logprobs=[[0.0, 0.0]], advantages=[[2.0, -1.0]])
    loss, gradient = value_and_gradient(GSPOToken(clip_low=0.1, clip_high=0.1), inputs)
    assert loss == pytest.approx([-2 * s, s])
    assert gradient == pytest.approx([-2 * s, s])
    # The sequence form mixes them: each token's loss moves both logprobs by half, (-2 s + s) / 2 each.
    _, mixed = value_and_gradient(GSPO(clip_low=0.1, clip_high=0.1), inputs)
    assert mixed == pytest.approx([-s / 2, -s / 2])


def test_cispo_by_hand() -> None:
    """MiniMax-M1 eq. 4 and 5: -sg(clip(r, 0, 5)) A lp, gradient -clip(r) A for every token."""
    # lp = -1, q chosen so that r = 8, 2, 0.1 -> clipped 5, 2, 0.1; A = 1, -1, 3.
    inputs = by_hand(
        [[-1.0, -1.0, -1.0]],
        sampling_logprobs=[[-1.0 - LOG(8.0), -1.0 - LOG(2.0), -1.0 - LOG(0.1)]],
        advantages=[[1.0, -1.0, 3.0]],
    )
    loss, gradient = value_and_gradient(CISPO(), inputs)
    assert loss == pytest.approx([5.0, -2.0, 0.3])
    assert gradient == pytest.approx([-5.0, 2.0, -0.3])


def test_reinforce_and_importance_sampling_by_hand() -> None:
    """-A lp has gradient -A; -r A has gradient -r A."""
    inputs = by_hand([[-2.0, -0.5]], sampling_logprobs=[[-2.0, -1.5]], advantages=[[3.0, -1.0]])
    assert_loss(Reinforce(), inputs, loss=[6.0, -0.5], gradient=[-3.0, 1.0])
    assert_loss(ImportanceSampling(), inputs, loss=[-3.0, math.e], gradient=[-3.0, math.e])


def test_dro_by_hand() -> None:
    """-(A lp - beta / 2 (lp - q)^2): gradient -A + beta (lp - q)."""
    # lp = -1, q = -3, A = 2, beta = 0.5: A lp = -2, beta / 2 * 4 = 1 -> -(-2 - 1) = 3; gradient -2 + 0.5 * 2 = -1.
    inputs = by_hand([[-1.0]], sampling_logprobs=[[-3.0]], advantages=[[2.0]])
    assert_loss(DRO(beta=0.5), inputs, loss=[3.0], gradient=[-1.0])


def test_an_absurd_ratio_gives_no_nan() -> None:
    """exp(200) is infinite in float32 and inf * 0 is nan; the clamp at e^20 keeps a clipped gradient 0."""
    inputs = by_hand([[-0.1]], sampling_logprobs=[[-200.0]], advantages=[[1.0]])
    loss, gradient = value_and_gradient(PPOClip(), inputs)
    assert loss == pytest.approx([-1.2])
    assert gradient == [0.0]


PPO = PPOClip(clip_low=0.2, clip_high=0.28)
GSPO_WIDE = GSPO(clip_low=0.1, clip_high=0.15)


@pytest.mark.parametrize(
    ("package", "case", "loss"),
    [
        ("trl", "loss/ppo_clip/token_mean", PPO),
        ("verl", "loss/ppo_clip/token_mean", PPO),
        ("openrlhf", "loss/ppo_clip/token_mean", PPO),
        ("trl", "loss/ppo_clip/sequence_mean", PPO),
        ("verl", "loss/ppo_clip/sequence_mean", PPO),
        ("openrlhf", "loss/ppo_clip/sequence_mean", PPO),
        ("trl", "loss/ppo_clip/constant", PPO),
        ("verl", "loss/ppo_clip/constant", PPO),
        ("trl", "loss/gspo/sequence_mean", GSPO_WIDE),
        ("verl", "loss/gspo/sequence_mean", GSPO_WIDE),
        ("openrlhf", "loss/gspo/sequence_mean", GSPO_WIDE),
        ("trl", "loss/gspo/sequence_mean", GSPOToken(clip_low=0.1, clip_high=0.15)),
        ("verl", "loss/gspo/token_mean", GSPO_WIDE),
        ("verl", "loss/gspo/token_mean", GSPOToken(clip_low=0.1, clip_high=0.15)),
        # TRL's epsilon_high is the bound itself and there is no lower one; verl's are distances from 1.
        ("trl", "loss/cispo/token_mean", CISPO(clip_low=1.0, clip_high=0.28)),
        ("verl", "loss/cispo/token_mean", CISPO(clip_low=0.2, clip_high=0.28)),
        ("verl", "loss/dro/token_mean", DRO(beta=0.3)),
        ("verl", "loss/reinforce/token_mean", Reinforce()),
        ("trl", "loss/reinforce/token_mean", Reinforce()),
    ],
)
def test_against_peers(package: str, case: str, loss: LossFn) -> None:
    aggregation = case.rsplit("/", 1)[1]
    assert aggregation in ("token_mean", "sequence_mean", "constant")
    assert_same_as(peer(package)[case], loss, recorded_inputs(aggregation))  # type: ignore[arg-type]


@pytest.mark.parametrize("package", ["verl", "openrlhf"])
def test_importance_sampling_against_peers(package: str) -> None:
    """PPO with the ratio bounded by 0 and 1e9 clips nothing; GRPO's losses without clip are this."""
    case = peer(package)["loss/ppo_clip/importance_sampling"]
    assert_same_as(case, ImportanceSampling(), recorded_inputs("token_mean"))


@pytest.mark.parametrize("package", ["trl", "verl", "openrlhf"])
def test_dual_clip_against_peers(package: str) -> None:
    """TRL writes it as an upper bound of the ratio (delta) before the minimum, which is the same thing."""
    loss = PPOClip(clip_low=0.2, clip_high=0.28, dual_clip=1.5)
    assert_same_as(peer(package)["loss/ppo_clip/dual_clip"], loss, recorded_inputs("token_mean"))


def test_refuses_impossible_bounds() -> None:
    with pytest.raises(ConfigError, match=r"algorithm\.clip_low=1\.5"):
        PPOClip(clip_low=1.5)
    with pytest.raises(ConfigError, match=r"algorithm\.dual_clip=1\.0: must be greater than 1"):
        PPOClip(dual_clip=1.0)
    with pytest.raises(ConfigError, match=r"beta=0\.0"):
        DRO(beta=0.0)
