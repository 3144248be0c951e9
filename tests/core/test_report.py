# SPDX-License-Identifier: Apache-2.0
"""What a group's report says of its gains."""

import pytest

from awq_jax.report import GroupReport


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
