"""Measures preference training (DPO, LoRA) against TRL's DPOTrainer on the same pairs; prints one table.

python jobs/bench_align.py [--device cpu] [--base small] [--steps 10] [--repeats 2]

Each run is a process of its own, and the arms take turns. What counts is pairs per second of steady steps (the first
two are left out); ours scores the reference beforehand, and that time is added in proportion, as if each pair were
seen once. TRL's batch sizes are tried first; it runs as it comes, and at its best.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.bench_machine import Watch, measured, options_of

PAIRS, PAIRS_PER_STEP, RANK, WARM, PROBE_STEPS = 240, 8, 16, 2, 4
CANDIDATES = (1, 2, 4, 8)
DEFAULT = 8
"""Pairs at a time that TRL takes as it comes."""


def ours(run: dict[str, Any]) -> dict[str, Any]:
    """Our trainer in this process, under DeepSpeed, without Ray, which the peer does without, too."""
    import logging

    import torch

    from jobs.bench_train import alone
    from raytune_ft.training.config_alignment import PreferenceConfig

    times: dict[str, float] = {}

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            times.setdefault(record.getMessage().partition(":")[0], time.time())

    logger = logging.getLogger("raytune_ft")
    logger.addHandler(Note())
    logger.setLevel(logging.INFO)
    torch.set_num_threads(run["threads"])
    alone(
        PreferenceConfig(
            model_path=run["base"], dataset_path=run["dataset"], output_dir=run["out"], max_steps=run["steps"],
            per_device_train_batch_size=PAIRS_PER_STEP, per_device_eval_batch_size=PAIRS_PER_STEP, lora_r=RANK,
            lora_alpha=2 * RANK, lora_target_modules="all-linear", learning_rate=1e-4, lr_scheduler_type="linear",
            warmup_steps=2, eval_strategy="no", save_strategy="no", report_to=[], seed=0,
        )
    )  # fmt: skip
    rows = [json.loads(line) for line in (Path(run["out"]) / "history.jsonl").read_text().splitlines()]
    scored = min(run["steps"] * PAIRS_PER_STEP, PAIRS)
    return {
        "seconds": [row["step_s"] for row in rows],
        "reference_s_per_pair": (times["training starts"] - times["reference"]) / scored,
        "losses": [row["loss"] for row in rows],
    }


def peer(run: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer on a PEFT model, which scores the reference in every step, by the model without its adapter."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    from jobs.bench_sweep import pair_rows

    datasets.disable_progress_bars()
    torch.set_num_threads(run["threads"])
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers' classes count as Any
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.time())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.time())

    on_gpu = run["device"] == "cuda"
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(run["base"], dtype=torch.bfloat16 if on_gpu else torch.float32),
        args=DPOConfig(
            output_dir=run["out"], max_steps=run["steps"], per_device_train_batch_size=run["at_once"],
            gradient_accumulation_steps=PAIRS_PER_STEP // run["at_once"], learning_rate=1e-4, warmup_steps=2,
            lr_scheduler_type="linear", seed=0, save_strategy="no", logging_steps=1, report_to="none",
            disable_tqdm=True, use_cpu=not on_gpu, bf16=on_gpu, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(pair_rows(PAIRS)),
        processing_class=AutoTokenizer.from_pretrained(run["base"]),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    ends = marks[1::2]  # from one step's end to the next one's: collation is part of the work
    return {
        "seconds": [ends[0] - marks[0], *(b - a for a, b in itertools.pairwise(ends))],
        "reference_s_per_pair": 0.0,
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }


def one_run(run: dict[str, Any], folder: Path, turn: str) -> dict[str, Any]:
    """A run in a process of its own; None counts where it failed."""
    out = folder / turn
    out.mkdir(parents=True)
    asked, result = json.dumps({**run, "out": str(out / "out")}), out / "result.json"
    command = [sys.executable, str(Path(__file__).resolve()), "--one", asked, "--result", str(result)]
    with (out / "log").open("w") as log, Watch() as watch:
        done = subprocess.run(command, check=False, stdout=log, stderr=log)
    if done.returncode:
        raise SystemExit(f"{turn}: failed\n{(out / 'log').read_text()[-2000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    steady = statistics.fmean(found["seconds"][WARM:]) / PAIRS_PER_STEP
    found["step_pairs_per_s"] = 1 / steady
    found["pairs_per_s"] = 1 / (steady + found["reference_s_per_pair"])
    found["peak_mb"] = watch.peak_mb
    return found


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Finds the peer's best batch size, then runs the arms in turn."""
    import psutil

    from jobs.bench_sweep import make_base, pair_rows, scratch_folder
    from raytune_ft.core.cluster import connect, disconnect
    from raytune_ft.data.config import DataCollectionConfig
    from raytune_ft.data.run import prepare

    with scratch_folder(None) as kept, tempfile.TemporaryDirectory(prefix="bench-align-") as runs_in:
        base, source = make_base(options.base, kept / options.base), kept / "pairs.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in pair_rows(PAIRS)), encoding="utf-8")
        connect()
        settings = {"sources": (str(source),), "output_path": str(kept / "pairs"), "model_path": base}
        prepare(DataCollectionConfig(**settings, validation_split=0.0, test_split=0.0, near_duplicates="keep"))
        disconnect()
        common = {"base": base, "dataset": str(kept / "pairs"), "device": options.device, "steps": options.steps}
        common["threads"] = psutil.cpu_count(logical=False) or 1
        folder, probes = Path(runs_in), {}
        for at_once in CANDIDATES:
            asked = {**common, "arm": "peer", "at_once": at_once, "steps": WARM + PROBE_STEPS}
            probes[at_once] = one_run(asked, folder, f"probe {at_once}")["pairs_per_s"]
            print(f"TRL, {at_once} pairs at a time: {probes[at_once]:.2f} pairs/s", flush=True)
        best = max(probes, key=lambda at_once: probes[at_once])
        arms = {"raytune-ft": {**common, "arm": "ours"}}
        arms[f"TRL, default ({DEFAULT} pairs at a time)"] = {**common, "arm": "peer", "at_once": DEFAULT}
        arms[f"TRL, best ({best} at a time)"] = {**common, "arm": "peer", "at_once": best}
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for turn in range(options.repeats):
            for arm, asked in arms.items():
                runs[arm].append(one_run(asked, folder, f"{arm} {turn}"))
                print(f"{arm}: {runs[arm][-1]['pairs_per_s']:.2f} pairs/s", flush=True)
    return table(runs, probes, options)


def table(runs: dict[str, list[dict[str, Any]]], probes: dict[int, float], options: argparse.Namespace) -> Any:
    """Prints and returns the figures: medians over the turns."""
    figures: dict[str, dict[str, Any]] = {}
    for arm, found in runs.items():
        keys = ("pairs_per_s", "step_pairs_per_s", "reference_s_per_pair", "peak_mb")
        figures[arm] = {key: statistics.median(run[key] for run in found) for key in keys}
        figures[arm] |= {"losses": found[-1]["losses"], "all_pairs_per_s": [run["pairs_per_s"] for run in found]}
    mine = figures["raytune-ft"]
    print(f"\nDPO with LoRA of rank {RANK}, base {options.base}, {options.device}, {options.repeats} turn(s); medians")
    print(f"{'':36}{'pairs/s':>9}{'in steps':>10}{'MB':>8}{'loss':>8}{'ours is':>9}")
    for arm, f in figures.items():
        f["ours_is"] = mine["pairs_per_s"] / f["pairs_per_s"]
        last = statistics.fmean(f["losses"][-3:])
        print(
            f"{arm:36}{f['pairs_per_s']:9.2f}{f['step_pairs_per_s']:10.2f}{f['peak_mb']:8.0f}{last:8.3f}"
            f"{f['ours_is']:8.2f}x"
        )
    return {"base": options.base, "device": options.device, "probes": probes, "arms": figures}


def main() -> int:
    """Runs the benchmark; 2 if the machine was busy."""
    parser = options_of(__doc__)
    parser.add_argument("--base", choices=["small", "1b", "smollm2-135m"], default="small")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run = json.loads(options.one)
        Path(options.result).write_text(json.dumps({"ours": ours, "peer": peer}[run["arm"]](run)))
        return 0
    return measured(
        f"bench_align_{options.base}_{options.device}", lambda: compare(options), allow_busy=options.allow_busy
    )


if __name__ == "__main__":
    sys.exit(main())
