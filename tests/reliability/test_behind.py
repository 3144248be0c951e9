# SPDX-License-Identifier: Apache-2.0
"""Work behind the main thread: what goes wrong there is never lost."""

import threading

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


def test_as_many_at_once_as_were_asked_for():
    meet = threading.Barrier(2)
    with Behind(2) as behind:
        behind.do(lambda: meet.wait(60))
        behind.do(lambda: meet.wait(60))  # one after the other, they would wait for ever
        behind.wait()


def test_there_are_never_more_at_once():
    under_way, most, lock = 0, 0, threading.Lock()
    go_on = threading.Event()

    def work():
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        go_on.wait(0.01)
        with lock:
            under_way -= 1

    with Behind(2) as behind:
        for _ in range(8):
            behind.do(work)
            assert len(behind._doing) <= 2
        behind.wait()
    assert most <= 2 and not under_way


def test_errors_of_all_pieces_go_with_the_one_in_front():
    with pytest.raises(ValueError, match="NaN") as raised, Behind(2) as behind:
        behind.do(fail)
        behind.do(fail)
        raise ValueError("layer 3 has become NaN")
    assert len(raised.value.__notes__) == 2
