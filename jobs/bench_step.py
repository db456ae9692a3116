"""Times a LoRA step alone, without Ray, DeepSpeed or an optimizer: forward and backward of one padding-free batch.

python jobs/bench_step.py --device cpu|cuda [--base 1b] [--tokens 16000] [--steps 5] [--without-liger] [--profile]

Weights are random and made on the device; LoRA of rank 16 is on all linear layers; rows have log-normal lengths (median
100 tokens), of which two thirds are supervised. Printed: tokens a second, milliseconds a step, how long the host took
to launch it, the highest memory, and with ``--profile`` where the time went.
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
from jobs.bench_sweep import SHAPES, WORDS, random_model

RANK = 16


def some_rows(tokens: int) -> list[Any]:
    """Rows of so many tokens in all, or a few more."""
    import torch

    from raytune_ft.models.chat import Encoded

    generator = torch.Generator().manual_seed(0)
    found: list[Any] = []
    total = 0
    while total < tokens:
        length = int(torch.empty(1).log_normal_(4.6, 0.5, generator=generator).clamp(8, 600))
        ids = torch.randint(3, WORDS, (length,), generator=generator).tolist()
        found.append(Encoded(ids, [place >= length // 3 for place in range(length)]))
        total += length
    return found


def trainable(options: argparse.Namespace) -> Any:
    """The model of a shape with LoRA layers in its own number format, as DeepSpeed leaves them, and its loss."""
    import torch

    from raytune_ft.models.adapters import add_lora
    from raytune_ft.models.attention import SEGMENTS, use_attention
    from raytune_ft.models.kernels import use_liger
    from raytune_ft.models.scoring import SummedLoss
    from raytune_ft.training.fused_lora import fuse_lora

    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    bare = random_model(options.base, options.device, dtype).requires_grad_(False)
    use_liger(bare, options.device, wanted=False if options.without_liger else None)
    settings = {"rank": RANK, "alpha": 2 * RANK, "dropout": 0.0, "target_modules": "all-linear"}
    model = add_lora(bare, **settings, seed=0, base=options.base)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    fuse_lora(model)
    use_attention(model, SEGMENTS)
    return SummedLoss(model.train())


def time_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Prints and returns the figures."""
    import torch

    from raytune_ft.models.collate import pack

    on_gpu = options.device == "cuda"
    loss = trainable(options)
    batch = pack(some_rows(options.tokens)).to(options.device)

    def step() -> tuple[float, float]:
        began = time.perf_counter()
        loss.zero_grad(set_to_none=True)
        loss(batch).backward()
        launched = time.perf_counter() - began
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, launched

    step(), step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    took, host = (statistics.median(times) for times in zip(*(step() for _ in range(options.steps)), strict=True))
    found = {
        "base": options.base, "device": options.device, "tokens": batch.tokens, "rows": batch.rows,
        "tokens_per_s": batch.tokens / took, "step_ms": 1000 * took, "host_ms": 1000 * host,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }  # fmt: skip
    print(
        f"{options.base}, {batch.tokens} tokens in {batch.rows} rows: {found['tokens_per_s']:.0f} tokens/s, "
        f"{found['step_ms']:.1f} ms a step (host {found['host_ms']:.1f})"
        + (f", {found['peak_gb']:.1f} GB" if on_gpu else "")
    )
    if options.profile:
        found["kernels"] = largest_shares(profiled(step, on_gpu=on_gpu)[1])
    return found


def largest_shares(spent: dict[str, float]) -> dict[str, float]:
    """Shares of one step's time, the largest first; printed, too."""
    total = sum(spent.values()) or 1
    largest = {name[:100]: spent[name] / total for name in sorted(spent, key=lambda name: -spent[name])[:22]}
    for name, share in largest.items():
        print(f"  {share:6.1%}  {name}")
    return largest


def main() -> int:
    """Runs the benchmark; 2 if the machine was busy."""
    parser = options_of(__doc__)
    parser.add_argument("--base", choices=list(SHAPES), default="small")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--without-liger", action="store_true", help="transformers' own kernels")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    name = f"bench_step_{options.base}_{options.device}{'_without_liger' * options.without_liger}"
    return measured(name, lambda: time_steps(options), allow_busy=options.allow_busy)


if __name__ == "__main__":
    sys.exit(main())
