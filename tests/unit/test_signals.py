"""Signals of commands that have started a cluster."""

import signal

import pytest

from sima_ray.runtime.signals import terminable, uninterrupted

ALL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("number", ALL)
def test_every_way_to_end_a_command_is_an_interrupt(number: signal.Signals) -> None:
    def another(number: int, frame: object) -> None: ...

    before = signal.signal(number, another)
    try:
        with pytest.raises(KeyboardInterrupt), terminable():
            signal.raise_signal(number)
        assert signal.getsignal(number) is another
    finally:
        signal.signal(number, before)


def test_what_must_be_finished_is_not_interrupted() -> None:
    before = [signal.getsignal(number) for number in ALL]
    with terminable(), uninterrupted():
        for number in ALL:
            signal.raise_signal(number)
    assert [signal.getsignal(number) for number in ALL] == before
