"""Requests that name this machine, and those that another site's page makes."""

from __future__ import annotations

import pytest

from raytune_ft.core.loopback import asked_by_own_name


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "127.0.0.1:8000", "127.9.9.9", "[::1]:8000", "LOCALHOST", "llm.localhost:80",
     "0.0.0.0:8000", None],
)  # fmt: skip
def test_programs_ask_by_any_of_this_machines_names_and_at_any_port(host: str | None):
    assert asked_by_own_name(host, None)


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost", "",
     "10.1.2.3:8000", "[::2]:8000", "localhost:x", "[::1"],
)  # fmt: skip
def test_a_name_that_was_made_to_lead_here_is_refused(host: str):
    assert not asked_by_own_name(host, None)


def test_pages_of_this_machine_may_ask_and_those_of_others_may_not():
    for origin in ("http://localhost:3000", "http://127.0.0.1:8000", "https://localhost", "http://[::1]:8000"):
        assert asked_by_own_name("localhost:8000", origin)
    for origin in ("http://evil.example", "https://localhost.evil.example", "null", "localhost:8000", "file://"):
        assert not asked_by_own_name("localhost:8000", origin)


def test_where_the_port_counts_it_is_in_both_and_browsers_leave_80_out():
    assert asked_by_own_name("localhost:8000", "http://127.0.0.1:8000", port=8000)
    assert asked_by_own_name("localhost", "http://localhost", port=80)
    assert not asked_by_own_name("localhost", None, port=8000)
    assert not asked_by_own_name("localhost:8000", "http://localhost:8001", port=8000)
