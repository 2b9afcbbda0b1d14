"""A signal is remembered, not acted on: the ranks agree at the next step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.preemption import STATUS_INTERRUPTED, STOP_SIGNALS, StopRequest

# A main thread that waits where no Python handler runs: a mutex taken twice, in C, as in a collective.
HANGING = """
import ctypes, os, signal, sys, threading, time
from pretrain.preemption import StopRequest
stop = StopRequest()
def others():
    for number in sys.argv[1:]:
        time.sleep(0.2)
        os.kill(os.getpid(), int(number))
    time.sleep(0.5)
    print("noticed" if stop.is_set() else "not noticed", flush=True)
    os._exit(3)
threading.Thread(target=others).start()
mutex = (ctypes.c_char * 64)()
libc = ctypes.CDLL(None)
libc.pthread_mutex_lock(mutex)
libc.pthread_mutex_lock(mutex)
"""


@pytest.fixture
def handlers_are_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    wakeup = signal.set_wakeup_fd(-1)
    yield
    signal.set_wakeup_fd(wakeup)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers_are_restored")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_is_remembered(number: signal.Signals) -> None:
    stop = StopRequest()
    assert stop.received is None
    assert not stop.is_set()
    os.kill(os.getpid(), number)
    assert stop.received is number
    assert stop.is_set()


@pytest.mark.usefixtures("handlers_are_restored")
def test_hearing_of_another_ranks_signal_is_being_asked_to_stop() -> None:
    stop = StopRequest()
    stop.set()
    assert stop.is_set()
    assert stop.received is None


@pytest.mark.parametrize(
    ("numbers", "status", "said"),
    [
        ((signal.SIGTERM,), 3, "noticed"),
        ((signal.SIGINT, signal.SIGTERM), 3, "noticed"),
        ((signal.SIGINT, signal.SIGINT), STATUS_INTERRUPTED, ""),
    ],
)
def test_signals_are_noticed_while_the_main_thread_hangs_and_a_second_interrupt_ends_at_once(
    repository_root: Path, numbers: tuple[signal.Signals, ...], status: int, said: str
) -> None:
    command = [sys.executable, "-c", HANGING, *(str(int(number)) for number in numbers)]
    done = subprocess.run(command, cwd=repository_root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (status, said), done.stderr
