"""Ports that belong to one test, also while nobody listens there."""

from __future__ import annotations

import socket


def reserved_port(host: str) -> socket.socket:
    """A socket that keeps a free port, the second part of its `getsockname()`, until it is closed.

    It does not listen: connections are refused as those to any dead server, and who asks for the port by its number
    may listen on it. Nobody else is given it by the system. Without this, another test's server could be given the port
    of a server that is down for a moment, and get, and charge, what was meant for that one.
    """
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # both must have it, the keeper and who listens
    keeper.bind((host, 0))
    return keeper
