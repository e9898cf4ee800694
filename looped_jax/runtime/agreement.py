"""What the processes of one run have to agree on, or else all end, with the same reason."""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from looped_jax.errors import ConfigError, UserError
from looped_jax.runtime import distributed

SHOWN = 5  # differences that are spelt out


def this_process() -> str:
    return f"process {jax.process_index()} on {socket.gethostname()}"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Run the block in all processes; an UserError in one of them ends it in all.

    Whoever has none of its own raises one that names the process and host it came from: nobody
    waits for a process that has ended. The block itself may not ask the others anything.
    """
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    told = distributed.gather_json(failure and f"{this_process()}: {failure}")
    if failure is not None:
        raise failure
    if others := [text for text in told if text]:
        raise UserError(others[0])


def check_alike(seen: Mapping[str, Any]) -> None:
    """Raise ConfigError in all processes unless what each has `seen`, by name, is the same.

    Values are ready for JSON. Differences from process 0 are named, with process and host.
    """
    text = json.dumps(seen, sort_keys=True)
    digests = distributed.gather_json(hashlib.sha256(text.encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    (first, expected), *others = distributed.gather_json([this_process(), seen])
    told = [
        f"{name} is {_difference(found.get(name, 'absent'), expected.get(name, 'absent'))}"
        f" in {process}"
        for process, found in others
        for name in sorted(expected | found)
        if found.get(name, "absent") != expected.get(name, "absent")
    ]
    raise ConfigError(
        f"the processes of this run differ from {first}: {'; '.join(told[:SHOWN])}"
        + (f"; and {len(told) - SHOWN} more" if len(told) > SHOWN else "")
        + "; start all with the same command, text and versions"
    )


def _difference(found: Any, expected: Any) -> str:
    """In words; of lists of what has a name, as files, by these."""
    if all(isinstance(each, list) and _named(each) for each in (found, expected)):
        here, there = ({item["name"]: item for item in each} for each in (found, expected))
        kinds = {
            "without": there.keys() - here.keys(),
            "with": here.keys() - there.keys(),
            "with another": {n for n in here.keys() & there.keys() if here[n] != there[n]},
        }
        parts = [f"{kind} {_few(sorted(names))}" for kind, names in kinds.items() if names]
        return " and ".join(parts) or "in another order"
    return f"{_short(found)}, not {_short(expected)},"


def _named(items: list[Any]) -> bool:
    return all(isinstance(item, dict) and "name" in item for item in items)


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
