"""What replicas agree by: adapters loaded while serving reach all of them, and outlive the board."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from raytune_ft.serving import board as boards
from raytune_ft.serving.board import Board
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.start import start_service


def test_a_board_tells_its_adapters_and_the_other_replicas_series():
    board = Board({"a": "/a"})
    series: Any = [("n", "t", "counter", [])]
    first = asyncio.run(board.report("r1", None, {}, series))
    assert (first.adapters, first.others) == ({"a": "/a"}, [])
    asyncio.run(board.post("b", "/b"))
    second = asyncio.run(board.report("r2", None, {}, []))
    assert (second.adapters, second.others) == ({"a": "/a", "b": "/b"}, [series])
    asyncio.run(board.take_down("a"))
    assert asyncio.run(board.report("r1", first.epoch, {"b": "/b"}, [])).adapters == {"b": "/b"}


def test_a_replica_that_is_silent_is_forgotten(monkeypatch: Any):
    board = Board({})
    asyncio.run(board.report("r1", None, {}, [("n", "t", "counter", [])]))
    monkeypatch.setattr(boards, "_FORGOTTEN_AFTER_S", 0.0)
    assert asyncio.run(board.report("r2", None, {}, [])).others == []


def test_a_new_board_learns_from_the_replicas_what_was_loaded():
    old, new = Board({"a": "/a"}), Board({"a": "/a"})
    asyncio.run(old.post("b", "/b"))
    assert asyncio.run(new.report("fresh", None, {"c": "/c"}, [])).adapters == {"a": "/a"}
    assert asyncio.run(new.report("r1", old.epoch, {"b": "/b"}, [])).adapters == {"a": "/a", "b": "/b"}
    asyncio.run(new.take_down("b"))
    assert asyncio.run(new.report("r2", old.epoch, {"b": "/b"}, [])).adapters == {"a": "/a"}


def test_replicas_keep_in_step_through_loads_drops_and_a_new_board(tiny_model: Path, adapters: Path):
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", adapters={"a": str(adapters / "a")}, adapters_path=str(adapters)
    )
    board = Board(config.adapters)
    one, other = (start_service(config, str(tiny_model), "cpu", replica=name, board=board) for name in ("r1", "r2"))

    async def story() -> None:
        for service in (one, other):
            await service.catalogue.keep_in_step()
        await asyncio.gather(one.catalogue.load("b"), *(one.catalogue.keep_in_step() for _ in range(3)))
        assert one.engine.adapters.names == ["a", "b"]
        assert await other.catalogue.adapter_of("tiny:b") == "b", "asked for before the next look at the board"
        await other.catalogue.drop("a")
        await one.catalogue.keep_in_step()
        assert one.engine.adapters.names == other.engine.adapters.names == ["b"]
        successor = Board({})
        for service in (one, other):
            service.catalogue._board = successor
            await service.catalogue.keep_in_step()
        assert one.engine.adapters.names == other.engine.adapters.names == ["b"]

    asyncio.run(story())
    one.close()
    other.close()
