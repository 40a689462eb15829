"""A matrix keeps what is finished, notes what fails, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from pard_train.evaluation.matrix import Matrix


def test_a_finished_cell_is_not_computed_again_and_keeps_what_it_was_made_by(tmp_path: Path) -> None:
    calls = []

    def compute() -> list[int]:
        calls.append(1)
        return [len(calls)]

    first = Matrix(tmp_path).cell("replay", {"k": 1}, compute)
    again = Matrix(tmp_path)
    assert again.is_finished("replay", {"k": 1})
    assert not again.is_finished("replay", {"k": 2})
    again.made_by["time"] = "later"
    assert again.cell("replay", {"k": 1}, compute) == first
    assert again.cell("replay", {"k": 2}, compute)[0] == [2]
    assert again.cell("live", {"k": 1}, compute) == ([3], again.made_by)


def test_a_cell_that_fails_leaves_nothing_and_is_computed_the_next_time(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory\nand more")

    matrix = Matrix(tmp_path)
    with matrix.surviving(target="t", benchmark="b"):
        matrix.cell("replay", {}, fail)
    assert matrix.failures == [{"draft": None, "target": "t", "benchmark": "b", "reason": "out of memory"}]
    assert "and more" in (tmp_path / "failures.log").read_text()
    assert matrix.cell("replay", {}, lambda: 7)[0] == 7


def test_what_fails_several_times_for_one_reason_is_one_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = Matrix(tmp_path)
    for reason in ("torn", "torn", "out of memory"):
        with matrix.surviving(target="t", draft="d"):
            raise RuntimeError(reason)
    assert [failure["reason"] for failure in matrix.failures] == ["torn", "out of memory"]
    assert capsys.readouterr().out.count("FAILED") == 2


def test_an_interrupt_is_not_survived(tmp_path: Path) -> None:
    matrix = Matrix(tmp_path)
    with pytest.raises(KeyboardInterrupt), matrix.surviving(target="t"):
        raise KeyboardInterrupt
    assert matrix.failures == []
