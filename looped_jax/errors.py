"""What a user can put right: every message names the setting or file, its value and the mend.

Programs print such an error as one line and end; LOOPED_JAX_TRACEBACK=1 shows where it came from.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

STOPPED_EARLY = 75  # exit code of what a signal stopped: EX_TEMPFAIL, the same command goes on


class UserError(Exception):
    """Base of all of them."""


class ConfigError(UserError, ValueError):
    """A setting that cannot work."""


class ArgumentError(UserError, ValueError):
    """An argument of a library call, or of a program, that cannot work."""


class DataError(UserError, ValueError):
    """Text, a shard or a tokenizer that cannot be read or used."""


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written, read or continued."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot go on; the message says where it stopped and how to go on."""


@contextlib.contextmanager
def printed(code: int = 1) -> Iterator[None]:
    """End the program with one line and exit code `code` for a UserError inside the block."""
    try:
        yield
    except UserError as error:
        if os.environ.get("LOOPED_JAX_TRACEBACK", "0") not in ("", "0"):
            raise
        told = [str(error), *getattr(error, "__notes__", ())]
        sys.stderr.write(f"error: {'; '.join(told)}\n")
        raise SystemExit(code) from None
