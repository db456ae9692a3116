"""Profiles the adapter bank alone, without Ray: where a trial-step's time goes, and what grows with the trials.

python jobs/bench_bank.py --device cpu|cuda [--base small] [--trials 2,16,32] [--tokens 256] [--steps 10] [--peers]

Trials differ in rank and rate and have rows of ``--tokens`` tokens in all. Printed for each number of trials:
milliseconds a trial-step, tokens a second, the share of the device's peak in matrix products that the usual count of
operations comes to, and calls a step: kernels launched on CUDA, operators called on a CPU.

With ``--peers`` the same rows are trained by TRL's trainer on a PEFT model, too: one trial on the whole device, and as
many at the same time as `bench_sweep` lets share it. Rows are of one length, so the peer pads nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.bench_machine import measured, options_of, profiled
from jobs.bench_sweep import RANKS, RATES, SHAPES, make_base, scratch_folder, side_by_side
from jobs.bench_train import one_run

KINDS = {
    "attention": ("scaled_dot_product", "attention", "flash", "varlen"),  # first: its kernels name cutlass, too
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "grouped_mm", "gemm", "nvjet", "cutlass", "cublas"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "optimizer": ("adamw", "adam", "norm_"),
}


def profile_bank(options: argparse.Namespace) -> dict[str, Any]:
    """Times and profiles each number of trials; prints a table and the operators of the largest."""
    import torch

    from raytune_ft.training.bank.base import load_frozen_base
    from raytune_ft.training.micro_batches import release_memory
    from raytune_ft.training.utilization import Work, device_peak

    with scratch_folder(options.folder) as folder:
        where = make_base(options.base, folder / options.base)
        base = load_frozen_base(trial_settings(where, 0, options), options.device)
        dtype = next(base.model.parameters()).dtype
        work, peak = Work.count(base.model), device_peak(options.device, dtype)
        if options.device == "cpu":
            print(f"{torch.get_num_threads()} threads; peak {peak.flops / 1e9:.0f} GFLOP/s ({peak.source})")
        found = {}
        print(f"{'trials':>8}{'ms/trial-step':>16}{'tokens/s':>12}{'of peak':>9}{'calls/step':>12}")
        for trials in map(int, options.trials.split(",")):
            figures = found[str(trials)] = figures_of(base, where, trials, options)
            release_memory()
            tokens = options.tokens
            operations = work.of(tokens, tokens // 2)
            figures["of_peak"] = operations / (figures["ms_per_trial_step"] / 1000) / peak.flops
            print(
                f"{trials:8}{figures['ms_per_trial_step']:16.2f}{1000 * tokens / figures['ms_per_trial_step']:12.0f}"
                f"{figures['of_peak']:9.1%}{figures['calls_per_step']:12}"
            )
        del base
        release_memory()
        peers = peers_of(where, folder, options) if options.peers else {}
    largest = found[max(found, key=int)]
    print(
        "\nTime of the largest by kind: " + ", ".join(f"{kind} {share:.0%}" for kind, share in largest["kinds"].items())
    )
    for name, share in largest["operators"].items():
        print(f"  {share:6.1%}  {name}")
    for arm, figures in peers.items():
        figures["bank_is"] = figures["ms_per_trial_step"] / largest["ms_per_trial_step"]
        print(f"{arm}: {figures['ms_per_trial_step']:.2f} ms/trial-step, the bank is {figures['bank_is']:.2f}x")
    about = {"base": options.base, "device": options.device, "tokens": options.tokens}
    return {**about, "trials": found, "peers": peers}


def rows_at_a_time(tokens: int) -> int:
    """Rows of a trial's step: two, or more where each would be longer than 1,024 tokens."""
    return max(2, tokens // 1024)


def even_rows(vocabulary: int, tokens: int) -> tuple[list[list[int]], list[bool]]:
    """Rows of one length, and the places of theirs that are supervised: the second half."""
    import torch

    length = tokens // rows_at_a_time(tokens)
    generator = torch.Generator().manual_seed(0)
    some: list[list[int]] = torch.randint(3, vocabulary, (64, length), generator=generator).tolist()
    return some, [False] * (length // 2) + [True] * (length - length // 2)


def peers_of(base: str, folder: Path, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The peer's milliseconds of a trial-step: a trial that has the device to itself, and trials that share it.

    An arm that fails says so and is left out.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoConfig

    rows, supervised = even_rows(AutoConfig.from_pretrained(base).vocab_size, options.tokens)
    kept = folder / f"even-{options.tokens}"
    (kept / "train").mkdir(parents=True, exist_ok=True)
    columns = {"input_ids": rows, "supervised": [supervised] * len(rows)}
    pq.write_table(pa.table(columns), kept / "train" / "0.parquet")
    at_a_time = rows_at_a_time(options.tokens)
    asked = {
        "arm": "peer", "base": base, "dataset": str(kept), "device": options.device, "method": "lora",
        "steps": options.peer_steps, "candidate": (at_a_time, None), "rows": at_a_time,
    }  # fmt: skip
    found = {}
    for arm in ("peer-one", "peer-shared"):
        at_once = side_by_side(arm, options)
        took = together(asked, arm, at_once)
        if took:
            found[arm] = {"at_once": float(at_once), "ms_per_trial_step": 1000 * statistics.fmean(took) / at_once}
    return found


def together(asked: dict[str, Any], arm: str, at_once: int) -> list[float]:
    """Seconds of a step (median of the second half) of each of so many processes that step at the same time."""
    with tempfile.TemporaryDirectory(prefix="bench-bank-") as folder, ThreadPoolExecutor(at_once) as pool:
        threads = max(1, (os.cpu_count() or 1) // at_once)
        run = {**asked, "threads": threads, "together": {"folder": folder, "count": at_once}}
        runs = list(pool.map(lambda number: one_run(run, Path(folder), f"{arm} {number}"), range(at_once)))
    if any("failed" in found for found in runs):
        return []
    return [statistics.median(found["seconds"][len(found["seconds"]) // 2 :]) for found in runs]


def trial_settings(base: str, number: int, options: argparse.Namespace) -> Any:
    """A LoRA trial on all linear layers; rank and rate go round."""
    from raytune_ft.training.config import FineTuningConfig

    ranks, rates = RANKS[options.device], RATES[options.device]
    rank = ranks[number % len(ranks)]
    return FineTuningConfig(
        model_path=base, dataset_path="none", output_dir="none", max_steps=100_000,
        per_device_train_batch_size=rows_at_a_time(options.tokens),
        eval_strategy="no", save_strategy="no", lora_dropout=0.0, lora_target_modules="all-linear", lora_r=rank,
        lora_alpha=2 * rank, learning_rate=rates[number // len(ranks) % len(rates)], seed=number,
        use_gpu=options.device == "cuda", precision=options.precision,
    )  # fmt: skip


def figures_of(base: Any, where: str, trials: int, options: argparse.Namespace) -> dict[str, Any]:
    """Median time of a step of all trials, and one step under torch's profiler.

    The profiler sees one thread; on a CPU the bank that it looks at has no other.
    """
    import torch

    on_gpu = options.device == "cuda"
    once = stepper(base, where, trials, options)
    once(), once()
    seconds = statistics.median(once() for _ in range(options.steps))
    if not on_gpu:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        once = stepper(base, where, trials, options)
        once()
    events, spent = profiled(once, on_gpu=on_gpu)
    if not on_gpu:
        torch.set_num_threads(threads)
    total = sum(spent.values()) or 1
    kinds = {kind: sum(t for key, t in spent.items() if of_kind(key) == kind) / total for kind in [*KINDS, "rest"]}
    largest = sorted(spent, key=lambda key: -spent[key])[:12]
    return {
        "ms_per_trial_step": 1000 * seconds / trials,
        "calls_per_step": sum(
            e.count for e in events if ("CUDA" in str(e.device_type) if on_gpu else e.key.startswith("aten::"))
        ),
        "host_ms_per_step": sum(e.self_cpu_time_total for e in events) / 1000,
        "kinds": kinds,
        "operators": {key[:80]: spent[key] / total for key in largest},
    }


def stepper(base: Any, where: str, trials: int, options: argparse.Namespace) -> Callable[[], float]:
    """A bank of so many trials, behind a function that makes a step of each and returns the seconds it took."""
    import torch

    from raytune_ft.models.chat import Encoded
    from raytune_ft.training.bank.bank import AdapterBank

    on_gpu = options.device == "cuda"
    some, supervised = even_rows(base.model.config.vocab_size, options.tokens)
    budget = options.budget or trials * options.tokens
    bank = AdapterBank(base, [Encoded(row, supervised) for row in some], token_budget=budget if on_gpu else None)
    for number in range(trials):
        bank.admit(f"trial-{number}", trial_settings(where, number, options))

    def once() -> float:
        began = time.perf_counter()
        made = 0
        while made < trials:
            made += len(bank.step())
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    return once


def of_kind(name: str) -> str:
    """What an operator or kernel is there for."""
    bare = name.lower().removeprefix("aten::")
    for kind, words in KINDS.items():
        if any(bare.strip("_") == word or (len(word) > 4 and word in bare) for word in words):
            return kind
    return "rest"


def main() -> int:
    """Runs the benchmark; 2 if the machine was busy."""
    parser = options_of(__doc__)
    parser.add_argument("--base", choices=[*SHAPES, "smollm2-135m"], default="small")
    parser.add_argument("--trials", default="2,16,32")
    parser.add_argument("--folder", help="where the base is kept for the next benchmark")
    parser.add_argument("--tokens", type=int, default=256, help="of a trial's step")
    parser.add_argument("--budget", type=int, help="most tokens at a time on a GPU; those of all trials by default")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument(
        "--precision", choices=["auto", "bf16"], default="auto", help="of the bank; peers have their own"
    )
    parser.add_argument("--peers", action="store_true", help="measure TRL's trainer on the same rows, too")
    parser.add_argument("--peer-steps", type=int, default=40)
    options = parser.parse_args()
    name = f"bench_bank_{options.base}_{options.tokens}_{options.device}"
    if options.precision != "auto":
        name += f"_{options.precision}"
    return measured(name, lambda: profile_bank(options), allow_busy=options.allow_busy)


if __name__ == "__main__":
    sys.exit(main())
