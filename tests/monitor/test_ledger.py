import pytest

from maxpretrain.monitor.ledger import Ledger


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_parts_add_up_to_the_wall_time():
    clock = Clock()
    ledger = Ledger(clock)
    clock.now += 1
    with ledger("compile"):
        clock.now += 6
    for _ in range(3):
        with ledger("train"):
            clock.now += 2
    clock.now += 0.5
    assert ledger.seconds() == {"compile": 6.0, "train": 6.0, "other": 1.5}


def test_a_part_inside_a_part_is_taken_from_the_outer_one():
    clock = Clock()
    ledger = Ledger(clock)
    with ledger("evaluate"):
        clock.now += 3
        with ledger("data_wait"):
            clock.now += 1
            with ledger("evaluate"):
                clock.now += 0.25
        clock.now += 2
    assert ledger.seconds() == {"evaluate": 5.25, "data_wait": 1.0, "other": 0.0}


def test_an_open_part_counts_up_to_now():
    clock = Clock()
    ledger = Ledger(clock)
    with ledger("train"):
        clock.now += 4
        assert ledger.seconds() == {"train": 4.0, "other": 0.0}
        clock.now += 1
    assert ledger.seconds() == {"train": 5.0, "other": 0.0}


def test_an_exception_closes_its_part():
    clock = Clock()
    ledger = Ledger(clock)
    with pytest.raises(ZeroDivisionError), ledger("train"):
        clock.now += 1 / 0
    clock.now += 2
    assert ledger.seconds() == {"train": 0.0, "other": 2.0}


def test_other_is_no_part():
    with pytest.raises(ValueError, match="give the part another name"), Ledger()("other"):
        pass


def test_the_real_clock_adds_up():
    ledger = Ledger()
    with ledger("train"):
        pass
    seconds = ledger.seconds()
    assert set(seconds) == {"train", "other"}
    assert all(value >= 0 for value in seconds.values())
