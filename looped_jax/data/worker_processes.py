"""Processes that read ahead, beside the one that trains."""

from __future__ import annotations

import signal

import grain


def in_workers(elements: grain.IterDataset, count: int) -> grain.IterDataset:
    """`elements`, in their order, made in `count` processes, each one element ahead."""
    options = grain.MultiprocessingOptions(num_workers=count, per_worker_buffer_size=1)
    return elements.mp_prefetch(options, worker_init_fn=_leave_interrupts_to_the_run)


def _leave_interrupts_to_the_run(index: int, count: int) -> None:
    """Ctrl-C goes to every process of a terminal: the run ends its step, saves and ends these.

    They would print a traceback each, and the step could wait for rows in vain.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
