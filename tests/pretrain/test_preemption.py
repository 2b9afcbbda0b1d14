"""A signal is remembered, not acted on: the ranks agree at the next step."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from pretrain.preemption import STOP_SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def handlers_are_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_remembered(number: signal.Signals) -> None:
    stop = StopRequest()
    assert stop.received is None
    os.kill(os.getpid(), number)
    assert stop.received is number


def test_a_second_interrupt_ends_at_once() -> None:
    StopRequest()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
