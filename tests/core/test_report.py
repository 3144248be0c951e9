# SPDX-License-Identifier: Apache-2.0
"""What a group's report says of its gains."""

import csv
import io

import pytest

from awq_jax.compare import Compared, to_csv
from awq_jax.report import GroupReport, LayerReport, LinearReport, Report


def a_group(loss: float | None, written: float | None, nearest: float | None) -> GroupReport:
    return GroupReport(
        sinks=("layers/0/mlp/down",),
        producer=None,
        rule="identity",
        power=0.0,
        loss=loss,
        rtn_loss=nearest,
        losses=(nearest, loss),
        written_loss=written,
    )


def test_gains_are_ratios_to_round_to_nearest():
    group = a_group(3.0, 2.0, 4.0)
    assert group.gain == 0.75 and group.written_gain("gram") == 0.5


@pytest.mark.parametrize("written, nearest", [(None, 4.0), (2.0, None), (2.0, 0.0)])
def test_no_ratio_is_made_of_what_is_not_known(written: float | None, nearest: float | None):
    assert a_group(3.0, written, nearest).written_gain("gram") is None


def test_losses_of_another_unit_are_not_compared():
    """The block objective counts the attention's or MLP's output error, `written_loss` that of the linears."""
    assert a_group(3.0, 2.0, 4.0).written_gain("block") is None


def test_a_spreadsheet_has_every_group_and_leaves_out_what_is_no_number():
    linear = LinearReport(path="layers/0/mlp/down", method="awq", bits=3)
    layer = LayerReport(
        index=0,
        error=0.125,
        rtn_error=None,
        fell_back=True,
        groups=(a_group(3.0, None, 4.0), a_group(1.0, 0.1, 2.0)),
        linears=(linear,),
    )
    report = Report(
        layers=(layer,),
        outside=(),
        recipe={},
        calibration={},
        seconds={},
        peak_memory_bytes=0,
        bytes_before=0,
        bytes_after=0,
    )
    rows = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert [(row["linears"], row["bits"]) for row in rows] == [("layers/0/mlp/down", "3")] * 2
    assert [row["loss_written"] for row in rows] == ["", "0.1"]
    assert all(float(row["layer_error"]) == 0.125 and row["layer_error_nearest"] == "" for row in rows)
    assert all(row["fell_back"] == "1" for row in rows)


def test_the_spreadsheet_of_a_comparison_has_all_digits_and_a_column_for_each_layer():
    numbers = {"perplexity": 9.0, "perplexity_stderr": 0.5, "top1": 0.9, "nbytes": 10, "seconds": 1.0}
    dense = Compared(bits=16, method="dense", kl=0.0, **numbers)
    third = Compared(bits=4, method="awq", kl=1 / 3, layers=(0.1, None), **numbers)
    rows = list(csv.DictReader(io.StringIO(to_csv([dense, third]))))
    assert float(rows[1]["kl"]) == 1 / 3
    assert (rows[1]["error_of_layer_0"], rows[1]["error_of_layer_1"]) == ("0.1", "")
    assert rows[0]["method"] == "dense" and not rows[0]["error_of_layer_0"]
