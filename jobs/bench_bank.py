"""Profiles the adapter bank alone, without Ray: where a trial-step's time goes, and what grows with the trials.

python jobs/bench_bank.py --device cpu|cuda [--base small] [--trials 2,16,32] [--tokens 256] [--steps 10] [--allow-busy]

Trials differ in rank and rate and have rows of ``--tokens`` tokens in all. Printed for each number of trials:
milliseconds a trial-step, tokens a second, the share of the device's peak in matrix products that the usual count of
operations comes to, and calls a step: kernels launched on CUDA, operators called on a CPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.bench_machine import measured, options_of, profiled
from jobs.bench_sweep import RANKS, RATES, SHAPES, make_base, scratch_folder

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "grouped_mm", "gemm", "cutlass", "cublas"),
    "attention": ("scaled_dot_product", "attention", "flash", "varlen"),
    "loss": ("softmax", "nll_loss", "cross_entropy"),
    "optimizer": ("adamw", "adam", "norm_"),
}


def profile_bank(options: argparse.Namespace) -> dict[str, Any]:
    """Times and profiles each number of trials; prints a table and the operators of the largest."""
    import torch

    from raytune_ft.training.bank.base import load_frozen_base
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
            tokens = options.tokens
            operations = work.of(tokens, tokens // 2)
            figures["of_peak"] = operations / (figures["ms_per_trial_step"] / 1000) / peak.flops
            print(
                f"{trials:8}{figures['ms_per_trial_step']:16.2f}{1000 * tokens / figures['ms_per_trial_step']:12.0f}"
                f"{figures['of_peak']:9.1%}{figures['calls_per_step']:12}"
            )
    largest = found[max(found, key=int)]
    print(
        "\nTime of the largest by kind: " + ", ".join(f"{kind} {share:.0%}" for kind, share in largest["kinds"].items())
    )
    for name, share in largest["operators"].items():
        print(f"  {share:6.1%}  {name}")
    return {"base": options.base, "device": options.device, "tokens": options.tokens, "trials": found}


def trial_settings(base: str, number: int, options: argparse.Namespace) -> Any:
    """A LoRA trial on all linear layers; rank and rate go round."""
    from raytune_ft.training.config import FineTuningConfig

    ranks, rates = RANKS[options.device], RATES[options.device]
    rank = ranks[number % len(ranks)]
    return FineTuningConfig(
        model_path=base, dataset_path="none", output_dir="none", max_steps=100_000, per_device_train_batch_size=2,
        eval_strategy="no", save_strategy="no", lora_dropout=0.0, lora_target_modules="all-linear", lora_r=rank,
        lora_alpha=2 * rank, learning_rate=rates[number // len(ranks) % len(rates)], seed=number,
        use_gpu=options.device == "cuda",
    )  # fmt: skip


def figures_of(base: Any, where: str, trials: int, options: argparse.Namespace) -> dict[str, Any]:
    """Median time of a step of all trials, and one step under torch's profiler."""
    import torch

    from raytune_ft.models.chat import Encoded
    from raytune_ft.training.bank.bank import AdapterBank

    on_gpu = options.device == "cuda"
    generator = torch.Generator().manual_seed(0)
    length = options.tokens // 2
    some = torch.randint(3, base.model.config.vocab_size, (64, length), generator=generator).tolist()
    rows = [Encoded(row, [False] * (length // 2) + [True] * (length - length // 2)) for row in some]
    bank = AdapterBank(base, rows, token_budget=trials * options.tokens if on_gpu else None)
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

    once(), once()
    seconds = statistics.median(once() for _ in range(options.steps))
    events, spent = profiled(once, on_gpu=on_gpu)
    for name in bank.names():
        bank.evict(name)
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
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    name = f"bench_bank_{options.base}_{options.tokens}_{options.device}"
    return measured(name, lambda: profile_bank(options), allow_busy=options.allow_busy)


if __name__ == "__main__":
    sys.exit(main())
