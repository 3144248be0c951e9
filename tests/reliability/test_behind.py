# SPDX-License-Identifier: Apache-2.0
"""Work behind the main thread: what goes wrong there is never lost."""

import pytest

from awq_jax.behind import Behind


def fail():
    raise OSError("disk full")


def test_the_next_piece_of_work_says_that_the_last_one_failed():
    with pytest.raises(OSError, match="disk full"), Behind() as behind:
        behind.do(fail)
        behind.do(lambda: None)


def test_an_error_in_front_carries_the_one_behind():
    with pytest.raises(ValueError, match="NaN") as raised, Behind() as behind:
        behind.do(fail)
        raise ValueError("layer 3 has become NaN")
    assert raised.value.__notes__ == ["What was done behind it failed too: OSError: disk full"]


def test_an_error_in_front_alone_stays_as_it_is():
    with pytest.raises(ValueError) as raised, Behind() as behind:
        behind.do(lambda: None)
        raise ValueError("layer 3 has become NaN")
    assert not hasattr(raised.value, "__notes__")
