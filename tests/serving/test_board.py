"""What replicas agree by: adapters loaded while serving reach all of them, and outlive the board."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from raytune_ft.models.config import DecodingConfig
from raytune_ft.serving import board as boards
from raytune_ft.serving.board import Board, Posting
from raytune_ft.serving.config import ServingConfig
from raytune_ft.serving.keys import hashed
from raytune_ft.serving.start import start_service
from raytune_ft.serving.tickets import GenerationRequest


def test_a_board_tells_its_adapters_and_the_other_replicas_series():
    board = Board({"a": "/a"})
    series: Any = [("n", "t", "counter", [])]
    first = asyncio.run(board.report("r1", None, {}, series))
    assert (first.adapters, first.others) == ({"a": "/a"}, [])
    asyncio.run(board.post("b", "/b"))
    second = asyncio.run(board.report("r2", None, {}, []))
    assert (second.adapters, second.others) == ({"a": "/a", "b": "/b"}, [series])
    asyncio.run(board.take_down("a"))
    assert asyncio.run(board.report("r1", first.epoch, {}, [])).adapters == {"b": "/b"}


def test_a_replica_that_is_silent_is_forgotten(monkeypatch: Any):
    board = Board({})
    asyncio.run(board.report("r1", None, {}, [("n", "t", "counter", [])]))
    monkeypatch.setattr(boards, "_FORGOTTEN_AFTER_S", 0.0)
    assert asyncio.run(board.report("r2", None, {}, [])).others == []


def test_a_new_board_learns_from_the_replicas_what_was_loaded():
    old, new = Board({"a": "/a"}), Board({"a": "/a"})
    b = {"b": asyncio.run(old.post("b", "/b"))}
    assert asyncio.run(new.report("fresh", None, {"c": Posting("/c", 1)}, [])).adapters == {"a": "/a"}
    assert asyncio.run(new.report("r1", old.epoch, b, [])).adapters == {"a": "/a", "b": "/b"}
    asyncio.run(new.take_down("b"))
    assert asyncio.run(new.report("r2", old.epoch, b, [])).adapters == {"a": "/a"}


def test_a_new_board_learns_what_was_dropped_and_the_last_word_counts():
    old, new = Board({"a": "/a"}, "s"), Board({"a": "/a"}, "s")
    dropped = {"a": asyncio.run(old.take_down("a"))}
    again = {"a": asyncio.run(old.post("a", "/other"))}
    assert asyncio.run(new.report("r1", old.epoch, dropped, [])).adapters == {}
    assert asyncio.run(new.report("r2", old.epoch, again, [])).adapters == {"a": "/other"}
    assert asyncio.run(new.report("r3", old.epoch, dropped, [])).adapters == {"a": "/other"}


def test_what_new_settings_name_is_there_whatever_was_dropped_under_the_old_ones():
    old, new = Board({"a": "/a"}, "old"), Board({"a": "/a"}, "new")
    known = {"a": asyncio.run(old.take_down("a")), "b": asyncio.run(old.post("b", "/b"))}
    assert asyncio.run(new.report("r1", old.epoch, known, [])).adapters == {"a": "/a", "b": "/b"}


def test_replicas_keep_in_step_through_loads_drops_and_a_new_board(tiny_model: Path, adapters: Path):
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", adapters={"a": str(adapters / "a")}, adapters_path=str(adapters),
        admin_keys=[hashed("root")],
    )  # fmt: skip
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
        successor = Board(config.adapters)
        for service in (one, other):
            service.catalogue._board = successor
        for service in (one, other):
            await service.catalogue.keep_in_step()
        assert one.engine.adapters.names == other.engine.adapters.names == ["b"]

    asyncio.run(story())
    one.close()
    other.close()


def test_an_adapter_dropped_and_loaded_again_is_loaded_again_by_the_others(
    tiny_model: Path, adapters: Path, tmp_path: Path
):
    """Other weights lie under the name by then, and no replica looked at the board between the two."""
    shutil.copytree(adapters / "a", tmp_path / "x")
    config = ServingConfig(
        model_path=str(tiny_model), name="tiny", adapters_path=str(tmp_path), admin_keys=[hashed("root")]
    )
    board = Board({})
    one, other = (start_service(config, str(tiny_model), "cpu", replica=name, board=board) for name in ("r1", "r2"))

    async def answers() -> list[str]:
        request = GenerationRequest([5, 6, 7], DecodingConfig(max_new_tokens=6), "x")
        return [(await service.engine.answer(request))[-1].text for service in (one, other)]

    async def story() -> None:
        await one.catalogue.load("x")
        await other.catalogue.keep_in_step()
        before = await answers()
        shutil.rmtree(tmp_path / "x")
        shutil.copytree(adapters / "b", tmp_path / "x")
        await one.catalogue.drop("x")
        await one.catalogue.load("x")
        await other.catalogue.keep_in_step()
        after = await answers()
        assert before[0] == before[1] != after[0] == after[1]
        held = other.engine.adapters.take("x")
        await other.catalogue.keep_in_step()
        assert not held.dropped, "what is up to date stays"

    asyncio.run(story())
    one.close()
    other.close()
