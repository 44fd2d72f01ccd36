"""Every fault of the table: the user sees what it was, nothing good is lost, and the run that goes on is the same run.

``make faults`` runs all of them and writes docs/reliability.md's table; without it a few representatives run.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.cases import CASES, Case
from tests.ranks import ROOT, run_bounded

PAGE = ROOT / "docs" / "reliability.md"
MARKS = ("<!-- faults: written by make faults -->", "<!-- end of faults -->")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All cases with ``--all-faults``, else those that are marked for every change."""
    if "case" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--all-faults")
        chosen = [case for case in CASES.values() if whole or case.in_ci]
        metafunc.parametrize("case", chosen, ids=[case.name for case in chosen])


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one JSON file per case, all made by one process."""
    folder = tmp_path_factory.mktemp("faults")
    whole = request.config.getoption("--all-faults")
    names = [case.name for case in CASES.values() if whole or case.in_ci]
    command = [sys.executable, "-m", "tests.faults.harness", str(folder), *names]
    code = run_bounded(command, folder / "harness.log", timeout_s=3000 if whole else 400)
    assert code == 0, (folder / "harness.log").read_text()[-3000:]
    return folder


def read(folder: Path, name: str) -> dict[str, Any]:
    """One case's outcome."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found


@pytest.mark.timeout(3100)
def test_the_run_that_nothing_happens_to_is_sound(outcomes: Path) -> None:
    whole = read(outcomes, "whole")
    assert whole["starts"][0]["code"] == 0, whole["starts"][0]["said"]
    assert list(whole["steps"]) == ["1", "2", "3", "4", "5", "6"]
    assert whole["checkpoints"] == ["step_000002", "step_000004", "step_000006"]
    losses = [step["loss/total"] for step in whole["steps"].values()]
    assert len(set(losses)) == 6


def test_a_fault_is_named_and_the_run_goes_on_as_if_it_had_not_been(outcomes: Path, case: Case) -> None:
    seen, whole = read(outcomes, case.name), read(outcomes, "whole")
    starts = seen["starts"]
    said = [starts[0]["agent"] + starts[0]["said"][0], *starts[0]["said"][1:], *(s["said"][0] for s in starts[1:])]
    assert re.search(case.sees, said[0]), said[0][-3000:]
    assert starts[-1]["code"] == 0, said[-1][-3000:]
    if case.how == "stops":
        assert starts[0]["code"] == 0
    elif case.how == "refuses":
        assert starts[0]["code"] == 1
    assert len(said) == 2, "the first start failed, the second finished"
    went_on = f"continuing after step {case.continues_after} from" if case.continues_after else "step 0/6"
    assert went_on in said[1], said[1][-3000:]
    assert seen["steps"] == whole["steps"]
    assert seen["adapter"] == whole["adapter"]
    assert not [name for name in seen["checkpoints"] if not re.fullmatch(r"step_\d{6}", name)]


def test_a_hang_leaves_every_ranks_stacks(outcomes: Path) -> None:
    stacks = read(outcomes, "hang-generate-1")["stacks"]
    assert sorted(stacks) == ["stacks_rank0.txt", "stacks_rank1.txt"]
    assert "in run_on_leader" in stacks["stacks_rank0.txt"]
    assert "in hang" in stacks["stacks_rank1.txt"]


def test_the_page_lists_every_case(request: pytest.FixtureRequest, outcomes: Path) -> None:
    """With ``--all-faults`` the table is written first."""
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    if request.config.getoption("--all-faults"):
        PAGE.write_text(f"{before}{MARKS[0]}\n{table(outcomes)}{MARKS[1]}{after}")
    assert len(CASES) >= 40
    page = PAGE.read_text()
    assert [case.name for case in CASES.values() if f"| {case.what} |" not in page] == []


ENDS = {
    "restarts": "torchrun's restart continues after {}",
    "stops": "exit code 0; the next start continues after {}",
    "refuses": "the start is refused; without that folder it continues after {}",
}


def table(folder: Path) -> str:
    """Markdown, one row per case, from what was seen."""
    lines = ["| what happens | what the user sees | how it goes on | seconds |", "|---|---|---|---|"]
    for case in CASES.values():
        starts = read(folder, case.name)["starts"]
        said = starts[0]["agent"] + starts[0]["said"][0]
        match = re.search(case.sees, said)
        words = " ".join(match.group().split()) if match else "?"
        words = re.sub(r"/\S*/(run/)", r"\1", words).replace("|", "\\|")
        after = f"step {case.continues_after}" if case.continues_after else "nothing: a new beginning"
        seconds = sum(start["seconds"] for start in starts)
        lines.append(f"| {case.what} | `{words[:160]}` | {ENDS[case.how].format(after)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"
