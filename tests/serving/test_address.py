"""Addresses that an endpoint listens on."""

from __future__ import annotations

import socket
import threading
import time

from raytune_ft.serving.address import free_port, wait_until_free


def test_a_port_that_is_let_go_of_is_waited_for_and_one_that_is_kept_is_not_waited_for_for_ever():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        began = time.monotonic()
        wait_until_free("127.0.0.1", port, 0.2)
        assert time.monotonic() - began >= 0.2
        threading.Timer(0.3, holder.close).start()
        wait_until_free("127.0.0.1", port, 60)
    assert free_port("127.0.0.1", port) == port
