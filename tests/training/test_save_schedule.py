"""Saves by steps and by minutes, and that all processes save after the same step."""

import pytest

from looped_jax.runtime import distributed
from looped_jax.training.save_schedule import SaveSchedule


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def saved(schedule, clock, steps, *, seconds=1.0, start=0):
    """Steps that are due when each takes `seconds`."""
    found = []
    for step in range(start + 1, start + steps + 1):
        clock.now += seconds
        if schedule.due(step):
            found.append(step)
    return found


def test_by_steps_alone_no_clock_is_asked(monkeypatch):
    monkeypatch.setattr(distributed, "gather_json", None)
    clock = Clock()
    assert saved(SaveSchedule(4, 0, start=6, clock=clock), clock, 8, start=6) == [8, 12]
    assert saved(SaveSchedule(0, 0, start=0, clock=clock), clock, 8) == []


@pytest.mark.parametrize("every", [0, 1000])
def test_by_minutes_with_few_questions(monkeypatch, every):
    asked = []
    monkeypatch.setattr(distributed, "gather_json", lambda mine: asked.append(mine) or [mine])
    clock = Clock()
    assert saved(SaveSchedule(every, 2, start=0, clock=clock), clock, 400) == [120, 240, 360]
    assert len(asked) < 40


def test_a_save_by_steps_begins_the_minutes_anew():
    clock = Clock()
    assert saved(SaveSchedule(100, 2, start=0, clock=clock), clock, 330) == [100, 200, 300]


def test_steps_that_become_slow_are_saved_soon():
    clock = Clock()
    schedule = SaveSchedule(0, 2, start=0, clock=clock)
    assert not saved(schedule, clock, 20)
    (first, *_) = saved(schedule, clock, 100, seconds=30.0, start=20)
    assert first < 20 + 60  # looked ahead at most half of the 100 steps that seemed to be left


def test_the_clock_of_the_first_process_decides(monkeypatch):
    clocks = [Clock(), Clock()]
    schedules = [SaveSchedule(0, 1, start=0, clock=clock) for clock in clocks]
    heard = []
    found = [[], []]
    for step in range(1, 200):
        for process, (clock, schedule) in enumerate(zip(clocks, schedules, strict=True)):
            clock.now += (1.0, 3.7)[process]

            def gather(mine, process=process):
                if process == 0:
                    heard.append(mine)
                return [heard[-1], mine]

            monkeypatch.setattr(distributed, "gather_json", gather)
            if schedule.due(step):
                found[process].append(step)
        assert schedules[0]._ask == schedules[1]._ask  # or one would wait for the other for ever
    assert found[0] == found[1] == [60, 120, 180]
