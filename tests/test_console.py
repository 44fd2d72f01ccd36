"""The console's line per step."""

from __future__ import annotations

import pytest

from framework.console import ConsoleSink


def test_a_step_is_one_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(every=1, num_steps=60, first_step=2)
    metrics = {"reward/mean": 0.4123, "reward/std": 0.21, "loss/total": -0.0123, "time/step_s": 12.34}
    sink.log(3, {**metrics, "time/generate_s": 7.1, "time/push_s": 0.004, "time/tokens_per_s": 900.0})
    line = capsys.readouterr().out
    assert line.startswith(
        "step  3/60   5%  reward 0.412 ±0.21  loss -0.0123  12.3 s (generate 7.1, push 0.004)  left 0:0"
    )
    assert line.count("\n") == 1


def test_only_every_nth_step_the_last_and_evaluations_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    sink = ConsoleSink(every=5, num_steps=12, first_step=0)
    sink.log(0, {"eval/accuracy": 0.25})
    for step in range(1, 13):
        sink.log(step, {"reward/mean": 1.0})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in lines] == ["step  0", "step  5", "step 10", "step 12"]
    assert "accuracy 0.25" in lines[0]
    assert "left" not in lines[3]
