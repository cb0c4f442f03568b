"""A port is kept for its test while nobody listens there."""

import socket

import pytest

from tests.standins.ports import reserved_port

HOST = "127.0.0.1"


def test_a_reserved_port_refuses_connections_and_is_only_for_who_asks_for_it() -> None:
    with reserved_port(HOST) as keeper:
        port = keeper.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port))
        with socket.socket() as another, pytest.raises(OSError, match="Address already in use"):
            another.bind((HOST, port))
        for _ in range(2):  # a server, and the same one when it is started again
            with socket.create_server((HOST, port)), socket.create_connection((HOST, port)):
                pass
