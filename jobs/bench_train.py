"""Measures LoRA training against TRL's SFTTrainer, as it comes and at its best, on the same rows; prints one table.

python jobs/bench_train.py --device cpu [--base smollm2-135m] [--steps 12] [--repeats 3] [--methods lora,qlora]

Each run is a process of its own, and the arms take turns. What counts is supervised tokens per second of steady steps
(the first are left out); memory is the highest PSS of the process tree, or what the GPU's allocator held.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
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

ROWS_PER_STEP = {"cpu": 8, "cuda": 128}
WARM = {"cpu": 2, "cuda": 10}
"""Steps that are left out; on a GPU some kernels are compiled during the first ones."""
RANK = 16
PROBE_STEPS = 5
# (rows at a time, packed to that many tokens or None)
CANDIDATES: dict[str, list[tuple[int, int | None]]] = {
    "cpu": [(1, None), (2, None), (4, None), (1, 512), (1, 1024), (2, 1024)],
    "cuda": [(32, None), (4, 2048), (8, 2048), (16, 2048)],
}
DEFAULT: tuple[int, int | None] = (8, None)


def ours(run: dict[str, Any]) -> dict[str, Any]:
    """Our verb, as the command line calls it: Ray Train and DeepSpeed with one worker."""
    import logging

    stages: list[tuple[float, str]] = []

    class Note(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            stages.append((time.time() - run["began"], record.getMessage()))

    logger = logging.getLogger("raytune_ft")
    logger.addHandler(Note())
    logger.setLevel(logging.INFO)
    from raytune_ft.training.config import FineTuningConfig
    from raytune_ft.training.run import train

    imported = time.time() - run["began"]
    config = FineTuningConfig(
        model_path=run["base"], dataset_path=run["dataset"], output_dir=run["out"], method=run["method"],
        max_steps=run["steps"], per_device_train_batch_size=run["rows"], lora_r=RANK, lora_alpha=2 * RANK,
        lora_dropout=0.0, lora_target_modules="all-linear", learning_rate=5e-4, lr_scheduler_type="linear",
        warmup_steps=2, eval_strategy="no", save_strategy="no", logging_steps=1, **run["options"],
    )  # fmt: skip
    if run["in_process"]:
        alone(config)
    else:
        train(config)
    rows = [json.loads(line) for line in (Path(run["out"]) / "history.jsonl").read_text().splitlines()]
    parts = {"imports": imported}
    for name, words in (("ray", "Ray cluster"), ("plan", "Resource plan"), ("worker and model", "training starts")):
        parts[name] = next((at for at, text in stages if text.startswith(words)), float("nan"))
    parts["first step"] = next((at for at, text in stages if text.startswith("step 1/")), float("nan"))
    return {
        "seconds": [row["step_s"] for row in rows],
        "supervised": [row["supervised"] for row in rows],
        "tokens": [row["tokens"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "gpu_mb": max((row.get("cuda_peak_gib", 0.0) for row in rows), default=0.0) * 1073.741824,
        "until": parts,
    }


def alone(config: Any) -> None:
    """The same training in this process, under DeepSpeed still, but without Ray."""
    import torch

    from raytune_ft.core.storage import Location
    from raytune_ft.training.session import Seat, train_in_process

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29531"}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    on_gpu = torch.cuda.is_available()
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", rank=0, world_size=1)
    files = {"train": sorted(map(str, Path(config.dataset_path, "train").glob("*.parquet")))}
    seat = Seat(device="cuda:0" if on_gpu else "cpu", deepspeed=True)
    train_in_process(config, files, seat, output=Location.at(config.output_dir), golden=False)
    torch.distributed.destroy_process_group()


def peer(run: dict[str, Any]) -> dict[str, Any]:
    """TRL's trainer on a PEFT model, on the same tokens with the same labels."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    if "threads" in run:
        torch.set_num_threads(run["threads"])
    on_gpu = run["device"] == "cuda"
    at_once, packed = run["candidate"]
    files = sorted(map(str, Path(run["dataset"], "train").glob("*.parquet")))
    rows = datasets.Dataset.from_parquet(files)
    tokens = {"input_ids": rows["input_ids"]}
    if packed:
        tokens["completion_mask"] = [[int(kept) for kept in row] for row in rows["supervised"]]
    else:
        tokens["labels"] = [
            [token if kept else -100 for token, kept in zip(row["input_ids"], row["supervised"], strict=True)]
            for row in rows
        ]
    quantized = None
    if run["method"] == "qlora":
        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        run["base"], dtype=torch.bfloat16 if on_gpu else torch.float32, quantization_config=quantized,
        device_map={"": 0} if on_gpu else None,
    )  # fmt: skip
    steps = run["steps"] * (1 if packed is None or on_gpu else 2)  # packed steps hold other numbers of rows
    trainer = SFTTrainer(
        model=base,
        processing_class=AutoTokenizer.from_pretrained(run["base"]),
        args=SFTConfig(
            output_dir=run["out"], max_steps=steps, per_device_train_batch_size=at_once,
            gradient_accumulation_steps=1 if packed else max(1, run["rows"] // at_once), learning_rate=5e-4,
            lr_scheduler_type="linear", warmup_steps=2, seed=0, save_strategy="no", logging_steps=1, report_to="none",
            disable_tqdm=True, use_cpu=not on_gpu, bf16=on_gpu, gradient_checkpointing=False,
            remove_unused_columns=False, packing=packed is not None, max_length=packed,
            completion_only_loss=True if packed else None,
            dataset_kwargs=None if packed else {"skip_prepare_dataset": True},
        ),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        train_dataset=datasets.Dataset.from_dict(tokens),
    )  # fmt: skip
    collate = trainer.data_collator
    batches: list[tuple[int, int]] = []

    def counted(examples: Any) -> Any:
        batch = collate(examples)
        lengths = [len(example["input_ids"]) for example in examples]
        batches.append((sum(lengths), int((batch["labels"][:, 1:] != -100).sum())))
        return batch

    trainer.data_collator = counted
    marks: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers' classes count as Any
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            if "together" in run:
                wait_for_others(Path(run["together"]["folder"]), run["together"]["count"])

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(now())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(now())

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.time()

    trainer.add_callback(Clock())
    trainer.train()
    per_step = 1 if packed else max(1, run["rows"] // at_once)
    grouped = [batches[at : at + per_step] for at in range(0, steps * per_step, per_step)]
    # From one step's end to the next one's: collation is part of the work.
    ends = marks[1::2]
    return {
        "seconds": [ends[0] - marks[0], *(b - a for a, b in itertools.pairwise(ends))],
        "supervised": [sum(s for _, s in group) for group in grouped],
        "tokens": [sum(t for t, _ in group) for group in grouped],
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "gpu_mb": torch.cuda.max_memory_allocated() / 1e6 if on_gpu else 0.0,
        "until": {"first step": ends[0] - run["began"]},
    }


def wait_for_others(folder: Path, count: int) -> None:
    """Returns when so many processes are here."""
    (folder / f"ready-{os.getpid()}").touch()
    until = time.monotonic() + 300
    while len(list(folder.glob("ready-*"))) < count:
        if time.monotonic() > until:
            raise TimeoutError(f"fewer than {count} runs came to their first step in five minutes")
        time.sleep(0.05)


def one_run(run: dict[str, Any], folder: Path, turn: str) -> dict[str, Any]:
    """A run in a process of its own; an arm that fails (out of memory) says so and counts for nothing."""
    out = folder / turn
    out.mkdir(parents=True)
    result = out / "result.json"
    asked = json.dumps({**run, "out": str(out / "out"), "began": time.time()})
    log = (out / "log").open("w")
    with Watch() as watch:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--one", asked, "--result", str(result)],
            check=False, stdout=log, stderr=log,
        )  # fmt: skip
    if done.returncode:
        words = (out / "log").read_text()[-1500:]
        print(f"{turn}: failed\n{words}", flush=True)
        return {"failed": words.splitlines()[-1] if words else "no words"}
    found: dict[str, Any] = json.loads(result.read_text())
    warm = min(WARM[run["device"]], len(found["seconds"]) - 1)
    spent = sum(found["seconds"][warm:])
    found["supervised_per_s"] = sum(found["supervised"][warm:]) / spent
    found["tokens_per_s"] = sum(found["tokens"][warm:]) / spent
    found["peak_mb"] = found["gpu_mb"] or watch.peak_mb
    return found


def named(candidate: tuple[int, int | None]) -> str:
    """A peer's settings in words."""
    at_once, packed = candidate
    return f"{at_once} x {packed} packed" if packed else f"batch {at_once}"


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Finds the peer's best settings, then runs the arms in turn."""
    from jobs.bench_sweep import make_base, prepare_rows, scratch_folder
    from raytune_ft.core.cluster import disconnect

    with scratch_folder(options.folder) as kept, tempfile.TemporaryDirectory(prefix="bench-train-") as runs_in:
        base = make_base(options.base, kept / options.base)
        dataset = prepare_rows(base, kept)
        disconnect()
        folder = Path(runs_in)
        extra = json.loads(options.options)
        common = {"base": base, "dataset": str(dataset), "device": options.device, "steps": options.steps}
        common |= {
            "method": "lora",
            "options": extra,
            "in_process": options.in_process,
            "rows": options.rows or ROWS_PER_STEP[options.device],
        }
        probes = {}
        candidates = [] if options.only_ours else CANDIDATES[options.device]
        for candidate in candidates[slice(*options.candidates)] if options.candidates else candidates:
            asked = {**common, "arm": "peer", "candidate": candidate, "steps": PROBE_STEPS}
            probe = one_run(asked, folder, f"probe {named(candidate)}")
            if "failed" not in probe:
                probes[candidate] = probe["supervised_per_s"]
                print(f"TRL {named(candidate)}: {probes[candidate]:.0f} supervised tokens/s", flush=True)
        best = max(probes, key=lambda candidate: probes[candidate], default=DEFAULT)
        arms: dict[str, dict[str, Any]] = {}
        for method in options.methods.split(","):
            arms[f"raytune-ft {method}"] = {**common, "arm": "ours", "method": method}
            if not options.only_ours:
                asked = {**common, "arm": "peer", "method": method}
                arms[f"TRL {method}, default ({named(DEFAULT)})"] = {**asked, "candidate": DEFAULT}
                arms[f"TRL {method}, best ({named(best)})"] = {**asked, "candidate": best}
        runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
        for turn in range(options.repeats):
            for arm, asked in arms.items():
                found = one_run(asked, folder, f"{arm} {turn}")
                if "failed" not in found:
                    runs[arm].append(found)
                    print(f"{arm}: {found['supervised_per_s']:.0f} supervised tokens/s", flush=True)
    return table(runs, {named(candidate): speed for candidate, speed in probes.items()}, options)


def table(
    runs: dict[str, list[dict[str, Any]]], probes: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Prints and returns the figures: medians over the turns."""
    figures: dict[str, dict[str, Any]] = {}
    for arm, found in runs.items():
        if found:
            keys = ("supervised_per_s", "tokens_per_s", "peak_mb")
            figures[arm] = {key: statistics.median(run[key] for run in found) for key in keys}
            figures[arm]["last_losses"] = statistics.fmean(found[-1]["losses"][-3:])
            figures[arm]["until"] = found[-1]["until"]
            figures[arm]["seconds"] = found[-1]["seconds"]
            figures[arm]["all_supervised_per_s"] = [run["supervised_per_s"] for run in found]
    about = f"base {options.base}, {options.device}, {options.repeats} turn(s)"
    print(f"\nLoRA of rank {RANK} on all linear layers, {about}; medians")
    print(f"{'':44}{'supervised/s':>13}{'tokens/s':>10}{'MB':>9}{'loss':>8}{'first step s':>14}{'ours is':>9}")
    for arm, f in figures.items():
        mine = figures.get(f"raytune-ft {'qlora' if 'qlora' in arm else 'lora'}", f)
        ratio = mine["supervised_per_s"] / f["supervised_per_s"]
        f["ours_is"] = ratio
        print(
            f"{arm:44}{f['supervised_per_s']:13.0f}{f['tokens_per_s']:10.0f}{f['peak_mb']:9.0f}{f['last_losses']:8.3f}"
            f"{f['until']['first step']:14.1f}{ratio:8.2f}x"
        )
    for arm, f in figures.items():
        if len(f["until"]) > 1:
            parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in f["until"].items())
            print(f"{arm}: seconds from the command until {parts}")
    return {"base": options.base, "device": options.device, "probes": probes, "arms": figures}


def main() -> int:
    """Runs the benchmark; 2 if the machine was busy."""
    parser = options_of(__doc__)
    parser.add_argument("--base", choices=["small", "1b", "8b", "smollm2-135m"], default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", default="lora", help="lora, qlora, or both with a comma between")
    parser.add_argument("--options", default="{}", help="more of our training settings, as JSON")
    parser.add_argument("--folder", help="where base and rows are kept for the next benchmark")
    parser.add_argument("--in-process", action="store_true", help="ours without Ray: for a machine lent by the minute")
    parser.add_argument("--rows", type=int, help="of a step; 8 on a CPU and 128 on a GPU by default")
    parser.add_argument("--candidates", type=int, nargs=2, metavar=("FROM", "TO"), help="of the peer's settings")
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run = json.loads(options.one)
        Path(options.result).write_text(json.dumps({"ours": ours, "peer": peer}[run["arm"]](run)))
        return 0
    name = f"bench_train_{options.base}_{options.device}"
    return measured(name, lambda: compare(options), allow_busy=options.allow_busy)


if __name__ == "__main__":
    sys.exit(main())
