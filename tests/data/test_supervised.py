"""Rows to datums: masks on the answers only, pairs that share their prompt, errors that name the row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from framework.data.chat import Chat
from framework.data.datasets import open_rows
from framework.data.supervised import Demonstrations, LengthReport, Preferences, length_report
from framework.errors import DataError
from framework.types import Datum
from tests.fakes import tiny_tokenizer

ASK = {"role": "user", "content": "2+2"}
FOUR = {"role": "assistant", "content": "4"}
FIVE = {"role": "assistant", "content": "5"}


@pytest.fixture
def chat() -> Chat:
    return Chat(tiny_tokenizer())


def write(folder: Path, *rows: Mapping[str, object]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def trained(chat: Chat, datum: Datum) -> str:
    return chat.decode([token for token, mask in zip(datum.token_ids, datum.loss_mask, strict=True) if mask])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASK, FOUR]},
        {"prompt": "2+2", "completion": "4"},
        {"prompt": [ASK], "completion": [FOUR]},
    ],
)
def test_a_demonstration_in_any_form_is_the_same_datum(tmp_path: Path, chat: Chat, row: Mapping[str, object]) -> None:
    data = Demonstrations(open_rows(write(tmp_path, row)), chat, max_tokens=100)
    datum = data.datum(0)
    assert chat.decode(datum.token_ids) == "<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert trained(chat, datum) == "4<|im_end|>"
    assert (datum.adapter, datum.fields, len(data), data.blocks) == (None, {}, 1, None)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2", "chosen": "4", "rejected": "5"},
        {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]},
        {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
    ],
)
def test_a_preference_in_any_form_is_the_same_pair(tmp_path: Path, chat: Chat, row: Mapping[str, object]) -> None:
    pair = Preferences(open_rows(write(tmp_path, row)), chat, max_tokens=100).pair(0)
    assert (trained(chat, pair.chosen), trained(chat, pair.rejected)) == ("4<|im_end|>", "5<|im_end|>")
    start = pair.chosen.loss_mask.index(True)
    assert pair.chosen.token_ids[:start] == pair.rejected.token_ids[:start] == chat.prompt([ASK]).token_ids


def test_earlier_answers_of_a_preference_are_not_trained_on(tmp_path: Path, chat: Chat) -> None:
    row = {"chosen": [ASK, FIVE, ASK, FOUR], "rejected": [ASK, FIVE, ASK, FIVE]}
    pair = Preferences(open_rows(write(tmp_path, row)), chat, max_tokens=100).pair(0)
    assert (trained(chat, pair.chosen), trained(chat, pair.rejected)) == ("4<|im_end|>", "5<|im_end|>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, r"row 2: needs 'prompt'; it has the keys \['text'\]"),
        ({"prompt": "x"}, "row 2: needs 'completion'"),
        ({"prompt": "", "completion": "x"}, "row 2: 'prompt' is empty"),
        ({"messages": [ASK, {"role": "assistant"}]}, r"row 2: messages\[1\] must have 'content'"),
        ({"messages": [ASK]}, "row 2: the conversation has no message of the assistant"),
        ({"messages": [ASK, FOUR], "tools": "add"}, "row 2: 'tools' must be a list of JSON schemas, is a str"),
        (
            {"messages": [ASK, {"role": "assistant", "content": "4" * 100}]},
            "row 2: the conversation has 113 tokens, at most",
        ),
    ],
)
def test_a_malformed_demonstration_names_its_row(
    tmp_path: Path, chat: Chat, row: Mapping[str, object], message: str
) -> None:
    data = Demonstrations(open_rows(write(tmp_path, {"messages": [ASK, FOUR]}, row)), chat, max_tokens=100)
    with pytest.raises(DataError, match=message):
        data.datum(1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "4", "rejected": "5"}, "row 1: without 'prompt', 'chosen' and 'rejected' must begin alike"),
        ({"chosen": [ASK, FOUR], "rejected": [ASK, FOUR]}, "must begin alike and end differently"),
        ({"prompt": "x", "chosen": "4"}, "row 1: needs 'rejected'"),
    ],
)
def test_a_malformed_preference_names_its_row(
    tmp_path: Path, chat: Chat, row: Mapping[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Preferences(open_rows(write(tmp_path, row)), chat, max_tokens=100).pair(0)


def test_a_long_conversation_is_cut_when_asked(tmp_path: Path, chat: Chat) -> None:
    rows = open_rows(write(tmp_path, {"messages": [ASK, FOUR, ASK, FIVE]}))
    whole = Demonstrations(rows, chat, max_tokens=100).datum(0)
    cut = Demonstrations(rows, chat, max_tokens=20, too_long="truncate").datum(0)
    assert (cut.token_ids, cut.loss_mask) == (whole.token_ids[:20], whole.loss_mask[:20])


def datums(lengths: Sequence[int]) -> list[Datum]:
    return [Datum(token_ids=(1,) * n, loss_mask=(False, *([True] * (n - 1)))) for n in lengths]


def test_the_length_report_counts_what_the_trainer_will_pack() -> None:
    # Inputs of 9, 6, 4, 1 tokens into budgets of 10: [9, 1] and [6, 4].
    report = length_report(datums([10, 7, 5, 2]), max_tokens=10, max_tokens_per_microbatch=10)
    assert report == LengthReport(
        num_datums=4,
        num_tokens=24,
        num_trained_tokens=20,
        shortest=2,
        median=5,
        p95=10,
        longest=10,
        num_at_limit=1,
        num_microbatches=2,
        fill=1.0,
    )
    assert str(report) == (
        "4 datums, 24 tokens (20 trained); length 2 to 10, median 5, 95% up to 10, 1 at the limit; "
        "2 microbatches, 100% full"
    )
