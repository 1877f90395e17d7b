from pathlib import Path

import pytest

from callbacks.compression import CompressionMonitor
from tests.callbacks.tiny_run import (
    VOCABULARY,
    WIDTH,
    PlainModule,
    TinyModule,
    fit,
    logged_rows,
    make_batch,
    tiny_trainer,
)

_RANK = 3


def test_the_figures_of_the_budget_are_one_row_at_step_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_trainer(tmp_path, [CompressionMonitor()]), TinyModule(_RANK), [make_batch()] * 2)
    rows = [row for row in logged_rows(tmp_path) if "compression/parameters" in row]
    assert len(rows) == 1
    row = {key.partition("/")[2]: value for key, value in rows[0].items() if "/" in key}
    dense_block, block, rest = WIDTH**2, 2 * WIDTH * _RANK, 2 * VOCABULARY * WIDTH
    stored, dense = block + rest, dense_block + rest
    assert rows[0]["step"] == 0
    assert row["parameters"] == stored
    assert row["dense_parameters"] == dense
    assert row["block_parameter_ratio"] == pytest.approx(dense_block / block)
    assert row["total_parameter_ratio"] == pytest.approx(dense / stored)
    assert row["linear_parameter_share"] == 1
    assert row["linear_flop_share"] == 1
    for bits in (32, 16, 8, 4):
        assert row[f"total_mib_at_{bits}_bits"] == pytest.approx(stored * bits / 8 / 2**20)
        assert row[f"dense_mib_at_{bits}_bits"] == pytest.approx(dense * bits / 8 / 2**20)
    assert len(row) == 6 + 8
    assert "dense baseline" in capsys.readouterr().out


def test_without_a_logger_the_table_is_printed_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = tiny_trainer(tmp_path, [CompressionMonitor()], logger=False)
    fit(trainer, TinyModule(), [make_batch()])
    assert "dense baseline" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_module_without_a_budget_has_its_parameters_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(tiny_trainer(tmp_path, [CompressionMonitor()]), PlainModule(_RANK), [make_batch()])
    (row,) = [row for row in logged_rows(tmp_path) if "compression/parameters" in row]
    stored = 2 * WIDTH * _RANK + 2 * VOCABULARY * WIDTH
    assert {key: value for key, value in row.items() if "/" in key} == {
        "compression/parameters": stored,
        **{
            f"compression/total_mib_at_{bits}_bits": pytest.approx(stored * bits // 8 / 2**20)
            for bits in (32, 16, 8, 4)
        },
    }
    assert "Parameters of PlainModule" in capsys.readouterr().out
