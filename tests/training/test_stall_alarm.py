"""The alarm of a run that stands still: when it comes, what it says, and that it leaves nothing."""

import pytest

from looped_jax.training.stall_alarm import FOR_DEVICES, StallAlarm

NAMES = [f"process {i} on h{i}" for i in range(4)]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def alarms(tmp_path, monkeypatch):
    """Those of four processes, without their threads, and what process 0 has said."""
    clock, said = Clock(), []
    made = [
        StallAlarm(tmp_path, 0, NAMES, said.append, process=i, clock=clock) for i in range(4)
    ]  # fmt: skip
    for alarm in made:
        alarm._limit = alarm._due = 600.0
    return clock, made, said


def look(clock, alarms, *, at):
    clock.now = at
    for alarm in reversed(alarms):  # process 0 last, as it waits for the others
        alarm.look()


def test_it_names_who_is_behind_and_who_says_nothing_and_again_after_twice_the_time(alarms):
    clock, made, said = alarms
    for alarm, step, doing in zip(made, (12, 12, 11, 12), [FOR_DEVICES, "rows", *[FOR_DEVICES] * 2],
                                  strict=True):  # fmt: skip
        alarm.at(step, doing)
    alive = made[:3]  # the host of the fourth is lost
    for minute in range(0, 10):
        look(clock, alive, at=60 * minute)
    assert said == []
    for minute in range(10, 31):
        look(clock, alive, at=60 * minute)
    expected = (
        "process 2 on h2 at step 11, waiting for devices; process 1 on h1 at step 12, rows; "
        "process 0 on h0 at step 12, waiting for devices; no word from process 3 on h3"
    )
    assert said == [f"no progress for {minutes}.0 minutes: {expected}" for minutes in (10, 20)]


def test_it_goes_on_quietly_and_clears_up(alarms, tmp_path):
    clock, made, said = alarms
    for step in range(1, 5):
        for doing in ("rows", "devices", "in validation"):
            clock.now += 500
            for alarm in made:
                alarm.at(step, doing)
            look(clock, made, at=clock.now)
    assert said == [] and not list(tmp_path.iterdir())
    look(clock, made, at=clock.now + 700)
    assert len(said) == 1
    assert len(list((tmp_path / "stalls").iterdir())) == 3  # process 0 tells its own
    for alarm in made:
        alarm.at(5, "rows")
    look(clock, made, at=clock.now)
    assert "goes on, after 11.7 minutes" in said[1]
    for alarm in made:
        alarm.close()
    assert not list(tmp_path.iterdir())
