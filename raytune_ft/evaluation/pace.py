"""How fast and how large a model runs: measured in a process of its own, so that one model's memory is not another's.

``python -m raytune_ft.evaluation.pace ARGUMENTS.json`` writes the figures as JSON.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytune_ft.core.errors import DataError, RaytuneError, RunError
from raytune_ft.core.records import Record


@dataclass(frozen=True)
class Pace:
    """What one model takes.

    Times are medians over prompts that are answered one at a time; `tokens_per_s` is of a batch. `top_tokens` are the
    likeliest tokens at the reference's tokens, row after row.
    """

    megabytes: float
    load_s: float
    peak_megabytes: float
    first_token_ms: float
    per_token_ms: float
    tokens_per_s: float
    top_tokens: list[list[int]]
    too_long: int
    """Prompts that were passed over, since they leave no room for an answer in the model's context."""
    device: str


def measure_apart(path: str, records: Sequence[Record], settings: dict[str, Any]) -> dict[str, Any]:
    """The `Pace` of a model as a mapping, measured in a fresh process on this machine.

    Args:
        path: the model.
        records: rows whose prompts are answered, and whose references are looked at.
        settings: of `PaceConfig`, with the `precision` of the weights.

    Raises:
        RunError: with the last words of the process.
    """
    with tempfile.TemporaryDirectory(prefix="raytune-ft-pace-") as scratch:
        folder = Path(scratch)
        asked = {"path": path, "rows": [record.to_row() for record in records], "settings": settings}
        (folder / "asked.json").write_text(json.dumps(asked), encoding="utf-8")
        command = [sys.executable, "-m", "raytune_ft.evaluation.pace", str(folder / "asked.json")]
        done = subprocess.run([*command, str(folder / "found.json")], check=False, capture_output=True, text=True)
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise RunError(f"{path}: its speed could not be measured: {words[-1] if words else 'it ended silently'}")
        found: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
        return found


def measure(path: str, records: Sequence[Record], settings: dict[str, Any]) -> Pace:
    """Loads a model, here, and measures it; see `measure_apart`."""
    import torch

    from raytune_ft.models.config import DecodingConfig, Precision
    from raytune_ft.models.generation import generate
    from raytune_ft.models.loading import load_model

    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    began = time.perf_counter()
    loaded = load_model(path, precision=Precision(settings["precision"]))
    load_s = time.perf_counter() - began
    prompts, too_long = _fitting_prompts(loaded, records, settings["prompts"])
    count = settings["new_tokens"]

    def timed(some: Sequence[list[int]], limit: int) -> tuple[float, int]:
        """Seconds, and the tokens that were made in them: fewer than asked for where the context ends."""
        budget = len(some) * (max(map(len, some)) + limit)
        began = time.perf_counter()
        found = generate(loaded, some, DecodingConfig(max_new_tokens=limit), token_budget=budget, stop_ids=())
        if loaded.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began, sum(len(answer.token_ids) for answer in found)

    with torch.inference_mode():
        timed(prompts[:1], 2)  # the first pass lays out what later ones find
        firsts = [timed([prompt], 1)[0] for prompt in prompts]
        wholes = [timed([prompt], count) for prompt in prompts]
        batch = [prompts[number % len(prompts)] for number in range(settings["batch_size"])]
        batch_s, made = timed(batch, count)
        top = top_tokens(loaded, records[: settings["agreement_rows"]])
    steps = [(whole - first) / max(1, tokens - 1) for (whole, tokens), first in zip(wholes, firsts, strict=True)]
    return Pace(
        megabytes=weight_bytes(path) / 1e6,
        load_s=load_s,
        peak_megabytes=_peak_bytes(loaded.device) / 1e6,
        first_token_ms=1000 * statistics.median(firsts),
        per_token_ms=1000 * statistics.median(steps),
        tokens_per_s=made / batch_s,
        top_tokens=top,
        too_long=too_long,
        device=loaded.device,
    )


def _fitting_prompts(loaded: Any, records: Sequence[Record], count: int) -> tuple[list[list[int]], int]:
    """Token ids of the first so many prompts with room for two tokens behind them, and how many had none.

    Raises:
        DataError: if none has.
    """
    from raytune_ft.models.scoring import context_tokens

    context = context_tokens(loaded.model)
    found: list[list[int]] = []
    too_long = 0
    for record in records:
        if len(found) == count:
            break
        ids = loaded.chat.prompt_ids(record.prompt, tools=record.tools)
        if context is not None and len(ids) + 2 > context:
            too_long += 1
        else:
            found.append(ids)
    if not found:
        raise DataError(
            f"none of {len(records)} prompts leaves room for an answer in the model's context of {context} tokens; "
            "shorten them, or put rows with shorter ones first"
        )
    return found, too_long


def top_tokens(loaded: Any, records: Sequence[Record]) -> list[list[int]]:
    """For each row the likeliest token at each of its supervised ones, all before it given.

    A row that is longer than the model's context is looked at in windows, as it is scored.
    """
    import torch

    from raytune_ft.evaluation.scorer import with_reference
    from raytune_ft.models.attention import SEGMENTS, attention
    from raytune_ft.models.chat import encode_record
    from raytune_ft.models.collate import pack
    from raytune_ft.models.scoring import CausalParts, context_tokens, target_states, windows_of

    parts, context = CausalParts.of(loaded.model), context_tokens(loaded.model)
    found: list[list[int]] = []
    with attention(loaded.model, SEGMENTS), torch.inference_mode():
        for record in records:
            found.append([])
            for window in windows_of(encode_record(loaded.chat, with_reference(record)), context):
                states = target_states(parts, pack([window]).to(loaded.device))
                found[-1] += parts.head(states).argmax(-1).tolist()
    return found


def weight_bytes(path: str) -> int:
    """Bytes of the weight files of a model; of an adapter, with its base's; of a hub id, in this machine's cache."""
    from raytune_ft.models.references import resolve_model
    from raytune_ft.models.size import stored_bytes

    resolved = resolve_model(path)
    if resolved.adapter is not None:
        folders = [_weight_folder(resolved.base), resolved.adapter]
    else:
        folders = [Path(resolved.artifact.local()) if resolved.artifact else _weight_folder(resolved.base)]
    return sum(map(stored_bytes, folders))


def _weight_folder(base: str) -> Path:
    """The folder of what `from_pretrained` takes: itself, or the snapshot of a hub id that was loaded before."""
    if Path(base).exists():
        return Path(base)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(base, local_files_only=True))


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """The process: reads what was asked, writes what was found."""
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        pace = measure(asked["path"], [Record.from_row(row) for row in asked["rows"]], asked["settings"])
    except RaytuneError as error:
        sys.stderr.write(" ".join(str(error).split()) + "\n")
        return error.exit_code
    Path(sys.argv[2]).write_text(json.dumps(asdict(pace)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
