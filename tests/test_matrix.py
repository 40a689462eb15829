"""A matrix stores finished results, records failures, and continues."""

from __future__ import annotations

from pathlib import Path

import pytest

from pard_train.config import Config
from pard_train.evaluation.matrix import Matrix


def open_matrix(folder: Path) -> Matrix:
    """The matrix of an output folder."""
    return Matrix(Config(output_dir=str(folder)))


def test_a_finished_result_is_not_computed_again_and_keeps_its_provenance(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[int]:
        calls.append(1)
        return [len(calls)]

    first = open_matrix(tmp_path).result("replay", {"k": 1}, compute)
    again = open_matrix(tmp_path)
    assert again.has_result("replay", {"k": 1})
    assert not again.has_result("replay", {"k": 2})
    again.provenance["time"] = "later"
    assert again.result("replay", {"k": 1}, compute) == first
    assert again.result("replay", {"k": 2}, compute)[0] == [2]
    assert again.result("live", {"k": 1}, compute) == ([3], again.provenance)


def test_a_measurement_that_fails_leaves_nothing_and_is_computed_the_next_time(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory\nand more")

    matrix = open_matrix(tmp_path)
    with matrix.keep_going(target="t", benchmark="b"):
        matrix.result("replay", {}, fail)
    assert matrix.failures == [{"draft": None, "target": "t", "benchmark": "b", "reason": "out of memory"}]
    assert "and more" in (tmp_path / "failures.log").read_text()
    assert matrix.result("replay", {}, lambda: 7)[0] == 7


def test_what_fails_several_times_for_one_reason_is_one_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = open_matrix(tmp_path)
    for reason in ("torn", "torn", "out of memory"):
        with matrix.keep_going(target="t", draft="d"):
            raise RuntimeError(reason)
    assert [failure["reason"] for failure in matrix.failures] == ["torn", "out of memory"]
    assert capsys.readouterr().out.count("FAILED") == 2


def test_an_interrupt_is_not_survived(tmp_path: Path) -> None:
    matrix = open_matrix(tmp_path)
    with pytest.raises(KeyboardInterrupt), matrix.keep_going(target="t"):
        raise KeyboardInterrupt
    assert matrix.failures == []


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"result": \xff'])
def test_a_damaged_result_is_computed_again(tmp_path: Path, damage: bytes) -> None:
    matrix = open_matrix(tmp_path)
    matrix.result("replay", {"k": 1}, lambda: [1])
    (cell,) = (tmp_path / "cells").iterdir()
    cell.write_bytes(damage)
    assert matrix.result("replay", {"k": 1}, lambda: [2])[0] == [2]
    assert matrix.result("replay", {"k": 1}, lambda: [3])[0] == [2]
