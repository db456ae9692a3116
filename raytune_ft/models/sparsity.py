"""Pruned models: what marks one, the zeros that must stay zero, and a form on disk that leaves the zeros out.

In the compact form each sparse matrix is a bit per weight (1 where it is not zero) and the values that are left, in
order; everything else is as in the dense file. `expand` makes the Hugging Face folder again, bit for bit but for the
sign of zeros.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raytune_ft.core.errors import ModelError, first_line
from raytune_ft.models.references import COMPACT

MARK = "pruning.json"
"""File of a pruned model's folder that says how it was pruned."""
_FORMAT = "raytune-ft compact 1"
_LEAST_ZEROS = 1 / 16


def is_pruned(folder: str | Path) -> bool:
    """Whether the model in a folder was pruned, so that its zeros are to stay."""
    return (Path(folder) / MARK).exists()


def carry_mark(source: str | Path, target: Path) -> None:
    """Marks what was made from a pruned model, and kept its zeros, as pruned."""
    if is_pruned(source):
        shutil.copy2(Path(source) / MARK, target / MARK)


def fused_experts(model: Any) -> dict[str, Tensor]:
    """The matrices of a mixture's experts that lie in one parameter, [experts, rows, columns], by their names."""
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if "experts" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and parameter.is_floating_point()
    }


def zeros_of(model: Any) -> dict[str, Tensor]:
    """Where the matrices of a model's linear layers and experts are zero, by name: booleans of the weight's shape.

    Matrices without zeros are left out, and so is the output head, which is never pruned.
    """
    head = model.get_output_embeddings()
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if module is head or isinstance(module, torch.nn.Embedding) or not isinstance(weight, Tensor):
            continue
        if weight.dim() == 2 and weight.is_floating_point():
            zeros = weight.detach() == 0
            if bool(zeros.any()):
                found[f"{name}.weight"] = zeros
    for name, experts in fused_experts(model).items():
        zeros = experts.detach() == 0
        if bool(zeros.any()):
            found[name] = zeros
    return found


def hold_zeros(model: Any, zeros: Mapping[str, Tensor]) -> None:
    """Lets training pass over the weights under `zeros`: their gradients become zero, and AdamW leaves zeros alone."""
    weights = dict(model.named_parameters())
    for name, where in zeros.items():
        weights[name].register_hook(lambda gradient, where=where: gradient.masked_fill(where, 0))


@torch.no_grad()
def zero_again(model: Any, zeros: Mapping[str, Tensor]) -> int:
    """Sets the weights under `zeros` back to zero; how many had become something else."""
    changed = 0
    weights = dict(model.named_parameters())
    for name, where in zeros.items():
        changed += int((weights[name][where] != 0).sum())
        weights[name][where] = 0
    return changed


def write_compact(folder: Path) -> int:
    """Replaces the weight files of a Hugging Face folder by the compact one; its size in bytes.

    Raises:
        ModelError: if there is no safetensors file.
    """
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: has no safetensors file to make compact")
    stored: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for file in files:
        for name, tensor in load_file(file).items():
            kept = tensor != 0
            if tensor.dim() == 2 and tensor.is_floating_point() and float(kept.float().mean()) <= 1 - _LEAST_ZEROS:
                stored[f"{name}.bits"] = _packed(kept)
                stored[f"{name}.values"] = tensor[kept].contiguous()
                shapes[name] = list(tensor.shape)
            else:
                stored[name] = tensor
    metadata = {"format": _FORMAT, "shapes": json.dumps(shapes)}
    save_file(stored, folder / COMPACT, metadata=metadata)
    for file in files:
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return (folder / COMPACT).stat().st_size


def expand(folder: Path, target: Path) -> None:
    """Writes the Hugging Face folder that a compact one stands for.

    Raises:
        ModelError: if the compact file is of another format, or damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(folder / COMPACT, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ModelError(f"{folder / COMPACT}: expected format {_FORMAT!r}, found {metadata.get('format')!r}")
            shapes = json.loads(metadata["shapes"])
            for name in file.keys():  # noqa: SIM118 - safetensors' handle is no mapping
                stem, _, part = name.rpartition(".")
                if stem not in shapes or part not in {"bits", "values"}:
                    tensors[name] = file.get_tensor(name)
            for name, shape in shapes.items():
                values = file.get_tensor(f"{name}.values")
                dense = torch.zeros(shape, dtype=values.dtype)
                dense[_unpacked(file.get_tensor(f"{name}.bits"), shape)] = values
                tensors[name] = dense
    except (SafetensorError, ValueError, KeyError, IndexError, RuntimeError, OSError) as error:
        raise ModelError(f"{folder / COMPACT}: is damaged: {first_line(error)}") from None
    for path in folder.iterdir():
        if path.is_file() and path.name != COMPACT:
            shutil.copy2(path, target / path.name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def _packed(kept: Tensor) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.packbits(kept.flatten().numpy()))


def _unpacked(bits: Tensor, shape: list[int]) -> Tensor:
    import numpy as np

    count = shape[0] * shape[1]
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(np.bool_)).view(*shape)
