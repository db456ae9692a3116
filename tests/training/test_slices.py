"""Tensors that any number of ranks wrote are read by any other number, each value once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from raytune_ft.core.storage import Location
from raytune_ft.training import checkpoint
from raytune_ft.training.peers import Peers
from raytune_ft.training.slices import Piece, Slice, Stored, pieces, share
from raytune_ft.training.tensor_file import TensorFile, write_tensors


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_shares_follow_one_another_and_cover_all(world_size: int) -> None:
    shares = [share(20, rank, world_size) for rank in range(world_size)]
    assert [start for start, _ in shares] == [sum(count for _, count in shares[:n]) for n in range(world_size)]
    assert sum(count for _, count in shares) == 20
    assert max(count for _, count in shares) - min(count for _, count in shares) <= 1


def test_a_wanted_range_is_put_together_from_the_slices_that_overlap_it() -> None:
    stored = [Stored("b", 4, 4), Stored("a", 0, 4), Stored("c", 8, 2)]
    assert pieces(stored, 3, 6) == [Piece("a", 3, 1, 0), Piece("b", 0, 4, 1), Piece("c", 0, 1, 5)]
    assert pieces(stored, 4, 4) == [Piece("b", 0, 4, 0)]
    assert pieces(stored, 5, 0) == []
    with pytest.raises(ValueError, match="values 10 to 11 are in no file"):
        pieces(stored, 9, 2)
    with pytest.raises(ValueError, match="values 4 to 10"):
        pieces([stored[1], stored[2]], 2, 8)


@pytest.mark.parametrize("written_by", [1, 2, 3])
@pytest.mark.parametrize("read_by", [1, 2, 3])
def test_another_number_of_ranks_reads_the_same_values(written_by: int, read_by: int, tmp_path: Path) -> None:
    tensors = {"weights.a": torch.arange(10.0).view(2, 5), "exp_avg.a": torch.randn(10), "weights.b": torch.ones(1)}
    target, files = Location.at(tmp_path / "step-00000003"), {}
    for rank in range(written_by):
        slices = {}
        for key, tensor in tensors.items():
            start, count = share(tensor.numel(), rank, written_by)
            if count:
                slices[key] = Slice(tuple(tensor.shape), start, tensor.flatten()[start : start + count])
        files |= checkpoint.write_rank(target, slices, Peers(rank, written_by))
    checkpoint.publish(target, 3, files | checkpoint.write_progress(target, {"x": 1}))
    stored = checkpoint.opened(target)
    assert stored.shapes("weights.") == {"a": (2, 5), "b": (1,)}
    for key, tensor in tensors.items():
        shares = [share(tensor.numel(), rank, read_by) for rank in range(read_by)]
        assert torch.equal(torch.cat([stored.read(key, *mine) for mine in shares]), tensor.flatten())
    whole = checkpoint.read(target)
    assert torch.equal(whole.weights["a"], tensors["weights.a"])
    assert whole.step == 3
    assert whole.progress == {"x": 1}


def test_a_tensor_file_is_what_the_safetensors_library_reads_and_writes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).to(torch.bfloat16),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "none": torch.empty(0),
    }
    path = tmp_path / "x.safetensors"
    written = write_tensors(Location.at(path), tensors, {"note": json.dumps([1, 2])})
    assert written.size == path.stat().st_size
    assert written.sha256 == Location.at(path).sha256()
    loaded = load_file(path)
    assert {name: (t.dtype, t.shape) for name, t in loaded.items()} == {
        n: (t.dtype, t.shape) for n, t in tensors.items()
    }
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "[1, 2]"}
    back = TensorFile(Location.at(path))
    assert torch.equal(back.read("a", 5, 4), tensors["a"].flatten()[5:9])
    assert torch.equal(back.read("half", 1, 3), tensors["half"][1:4])
    assert back.read("none", 0, 0).numel() == 0
