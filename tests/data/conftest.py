"""The server that misbehaves, for every test of downloads."""

from tests.data.faulty_server import server  # noqa: F401
