"""Measures a LoRA grid: peers' trials under Ray Tune, our trainer's, and the packed bank; prints one table.

python jobs/bench_sweep.py --device cpu [--base small] [--steps 60] [--short-steps 15] [--arms peer-one,alone,packed]
                           [--asha] [--batch 2] [--peer-trials 4] [--halves] [--eval-rows 64] [--objective align]

Every trial runs to its last step and is evaluated then, in all arms on the same rows. Two lengths of run (``--steps``
and ``--short-steps``) tell start-up from steady work: what a trial-token costs is the slope between them.

On CUDA the grid has 32 trials, bases are in bf16, and with ``--peer-trials`` the peers run so many of them only: their
makespan is then scaled linearly to the whole grid, and marked so.

With ``--halves`` there is one length of run, with an evaluation in its midst, and steady is the second half.

With ``--objective align`` trials learn from pairs (DPO), on a grid of beta and learning rate; the peer is TRL's
DPOTrainer, which asks the model without its adapter for the reference in every step.

With ``--asha`` it is the time to the best settings instead: trials are evaluated at each quarter of their steps, half
of them go on from the first quarter and half of those from the second, and what each arm found best is named.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.bench_machine import Watch, measured, options_of

RATES = {"cpu": [1e-4, 3e-4, 1e-3, 2e-3], "cuda": [5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 7e-4, 1e-3, 2e-3]}
RANKS = {"cpu": [4, 8, 16, 32], "cuda": [8, 16, 32, 64]}
RANK = 16
"""Where none is searched."""
BETAS = [0.05, 0.1, 0.3, 0.5]
ROWS, WORDS = 1280, 4096
ON_A_GPU = 4
"""Trials of the peer that share a GPU."""
Found = dict[str, tuple[float, float]]
"""Of each trial by `name_of` its settings, see `of_curve`."""
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4},
    "1b": {  # Llama 3.2 1B
        **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    },
    "8b": {  # Llama 3.1 8B
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "vocab_size": 128256},
    },
}


def make_base(name: str, folder: Path) -> str:
    """A model folder: random weights of a shape, with a tokenizer of its own; or the starter, where it is cached."""
    if name == "smollm2-135m":
        from raytune_ft.models.starter import cached

        return str(cached(f"starter:{name}"))
    if (folder / "model.safetensors").exists() or (folder / "model.safetensors.index.json").exists():
        return str(folder)
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    texts = [message["content"] for row in chat_rows(400) for message in row["messages"]]
    bare.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=WORDS, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<|pad|>", eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    small = name == "small"
    device = "cpu" if small or not torch.cuda.is_available() else "cuda"
    dtype = torch.float32 if small else torch.bfloat16
    random_model(name, device, dtype, eos_token_id=tokenizer.eos_token_id).save_pretrained(folder)
    torch.cuda.empty_cache()
    return str(folder)


def random_model(name: str, device: str, dtype: Any, **settings: Any) -> Any:
    """A Llama of a shape with random weights, made on its device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": WORDS, "max_position_embeddings": 2048, "bos_token_id": None, **SHAPES[name]}
    with torch.device(device):
        return LlamaForCausalLM._from_config(LlamaConfig(**shape, **settings), dtype=dtype)


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Questions and answers of natural, varied length: words by Zipf's law, lengths log-normal (median 60 words)."""
    import numpy as np

    rng = np.random.default_rng(0)
    stems = ["ta", "ri", "mo", "ke", "lun", "sol", "ver", "pan", "dis", "gra", "ne", "fol"]
    vocabulary = sorted({a + b + c for a in stems for b in stems for c in ("", "s", "ed", "ing")})
    rows = []
    for _ in range(count):
        asked, said = (int(np.clip(rng.lognormal(np.log(median), 0.6), 4, 300)) for median in (25, 60))
        words = [vocabulary[min(int(n) - 1, len(vocabulary) - 1)] for n in rng.zipf(1.4, asked + said)]
        question, answer = " ".join(words[:asked]), " ".join(words[asked:])
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    return rows


def pair_rows(count: int) -> list[dict[str, Any]]:
    """The same questions; an answer to another one is rejected in favour of their own."""
    rows = [row["messages"] for row in chat_rows(count + 1)]
    return [
        {"prompt": mine[:-1], "chosen": mine[-1:], "rejected": other[-1:]} for mine, other in itertools.pairwise(rows)
    ]


@contextmanager
def scratch_folder(kept: str | None) -> Iterator[Path]:
    """Where bases and rows lie: a folder that is kept for the next benchmark, or one for this run alone."""
    if kept is not None:
        Path(kept).mkdir(parents=True, exist_ok=True)
        yield Path(kept).resolve()
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        yield Path(folder)


def prepare_rows(base: str, folder: Path, eval_rows: int = 64, objective: str = "train") -> Path:
    """The rows as a dataset of ours, made once in a folder; peers read its columns."""
    made = folder / ("dataset" if objective == "train" else "pairs")
    if (made / "manifest.json").exists():
        return made
    from raytune_ft.core.cluster import connect
    from raytune_ft.data.config import DataCollectionConfig
    from raytune_ft.data.run import prepare

    connect()
    source = folder / f"{made.name}.jsonl"
    rows = chat_rows(ROWS) if objective == "train" else pair_rows(ROWS)
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = {"sources": (str(source),), "output_path": str(made), "model_path": base}
    settings["validation_split"] = eval_rows / ROWS
    prepare(DataCollectionConfig(**settings, test_split=0.0, near_duplicates="keep"))
    return made


def splits_of(dataset: str) -> Callable[[str], Any]:
    """Reads a split of a prepared dataset as the peer's datasets."""
    import datasets

    datasets.disable_progress_bars()
    return lambda name: datasets.Dataset.from_parquet(sorted(map(str, Path(dataset, name).glob("*.parquet"))))


def peer_trial(
    space: dict[str, Any], *, base: str, dataset: str, out: str, steps: int, batch: int, threads: int, eval_steps: int
) -> None:
    """A trial of the peer: TRL's trainer on a PEFT model, on rows with the labels that ours have, or on pairs."""
    import datasets
    import torch
    from peft import LoraConfig
    from ray import tune
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    torch.set_num_threads(threads)
    on_gpu = torch.cuda.is_available()
    read = splits_of(dataset)

    class Teller(TrainerCallback):  # type: ignore[misc]  # transformers' classes count as Any
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **rest: Any) -> None:
            tune.report({"eval_loss": metrics["eval_loss"], "global_step": state.global_step})

    def examples(name: str) -> Any:
        rows = read(name)
        labels = [
            [token if kept else -100 for token, kept in zip(row["input_ids"], row["supervised"], strict=True)]
            for row in rows
        ]
        return datasets.Dataset.from_dict({"input_ids": rows["input_ids"], "labels": labels})

    def pairs(name: str) -> Any:
        rows = read(name)
        turns = {"prompt": "messages", "chosen": "chosen", "rejected": "rejected"}
        said = {
            ours: [[{key: turn[key] for key in ("role", "content")} for turn in row[theirs]] for row in rows]
            for ours, theirs in turns.items()
        }
        return datasets.Dataset.from_dict(said)

    where = Path(out) / "-".join(f"{key}{value}" for key, value in space.items())
    common = {
        "output_dir": str(where), "max_steps": steps, "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": 8, "learning_rate": space["learning_rate"], "lr_scheduler_type": "linear",
        "warmup_steps": max(1, steps // 10), "weight_decay": 0.01, "seed": 0, "save_strategy": "no",
        "logging_strategy": "no", "report_to": "none", "disable_tqdm": True, "eval_strategy": "steps",
        "eval_steps": eval_steps, "use_cpu": not on_gpu, "bf16": on_gpu, "gradient_checkpointing": False,
    }  # fmt: skip
    if "beta" in space:
        kind, args, split = DPOTrainer, DPOConfig(**common, beta=space["beta"]), pairs
    else:
        more = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "max_length": None}
        kind, args, split = SFTTrainer, SFTConfig(**common, **more), examples
    rank = space.get("lora_r", RANK)
    trainer = kind(
        model=AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16 if on_gpu else torch.float32, device_map={"": 0} if on_gpu else None
        ),
        processing_class=AutoTokenizer.from_pretrained(base),
        args=args,
        peft_config=LoraConfig(
            r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        train_dataset=split("train"),
        eval_dataset=split("validation"),
        callbacks=[Teller()],
    )
    trainer.train()
    trainer.save_model(str(where))


def evaluated_every(steps: int, options: argparse.Namespace) -> int:
    """Steps between evaluations; the last step is one of them."""
    return steps // (4 if options.asha else 2 if options.halves else 1)


def peers(arm: str) -> Callable[..., Found]:
    """An arm of the peer's trials: as many at a time as `side_by_side` says share the device."""

    def run(base: str, dataset: Path, out: Path, steps: int, options: argparse.Namespace) -> Found:
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

        cpus = os.cpu_count() or 1
        at_once = side_by_side(arm, options)
        threads = cpus // at_once
        resources = {"CPU": threads} if options.device == "cpu" else {"CPU": 1, "GPU": 1 / at_once}
        trial = tune.with_parameters(
            peer_trial, base=base, dataset=str(dataset), out=str(out), steps=steps, batch=options.batch,
            eval_steps=evaluated_every(steps, options), threads=threads,
        )  # fmt: skip
        rungs = {"time_attr": "global_step", "grace_period": steps // 4, "reduction_factor": 2, "max_t": steps}
        grid = grid_of(options)
        others = all_trials(options) // len(grid["learning_rate"])
        grid["learning_rate"] = grid["learning_rate"][: peer_trials(options) // others]
        tuner = tune.Tuner(
            tune.with_resources(trial, resources),
            param_space={key: tune.grid_search(values) for key, values in grid.items()},
            tune_config=tune.TuneConfig(
                metric="eval_loss", mode="min", scheduler=ASHAScheduler(**rungs) if options.asha else FIFOScheduler()
            ),
            run_config=tune.RunConfig(storage_path=str(out), name="ray", verbose=0),
        )
        found = {}
        for result in tuner.fit():
            rows = result.metrics_dataframe[["eval_loss", "time_total_s"]].to_dict("records")
            found[name_of(result.config, options)] = of_curve(rows)
        return found

    return run


def side_by_side(arm: str, options: argparse.Namespace) -> int:
    """Trials that an arm computes at the same time."""
    if arm == "packed":
        return all_trials(options)
    if arm != "peer-shared":
        return 1
    return (os.cpu_count() or 1) if options.device == "cpu" else ON_A_GPU


def of_curve(rows: list[dict[str, float]]) -> tuple[float, float]:
    """A trial's last loss, and the seconds from its last evaluation but one (or its start) to the last."""
    before = rows[-2]["time_total_s"] if len(rows) > 1 else 0.0
    return rows[-1]["eval_loss"], rows[-1]["time_total_s"] - before


def grid_of(options: argparse.Namespace) -> dict[str, list[Any]]:
    """What is searched: rank, or DPO's beta, and learning rate."""
    first = {"beta": BETAS} if options.objective == "align" else {"lora_r": RANKS[options.device]}
    return {**first, "learning_rate": RATES[options.device]}


def name_of(settings: dict[str, Any], options: argparse.Namespace) -> str:
    """A trial's name: its settings of the grid."""
    return "/".join(f"{settings[key]:g}" for key in grid_of(options))


def all_trials(options: argparse.Namespace) -> int:
    """Trials of the grid."""
    return math.prod(map(len, grid_of(options).values()))


def peer_trials(options: argparse.Namespace) -> int:
    """Trials that the peers run: as many of each rank (or beta), since ranks differ in work."""
    others = all_trials(options) // len(RATES[options.device])
    return max(others, (options.peer_trials or all_trials(options)) // others * others)


def ours(packed: str) -> Callable[..., Found]:
    """An arm of ours: the bank, or our trainer one trial after the other."""

    def run(base: str, dataset: Path, out: Path, steps: int, options: argparse.Namespace) -> Found:
        from raytune_ft.tuning.config import SweepConfig
        from raytune_ft.tuning.result import SweepResult
        from raytune_ft.tuning.run import tune

        training = {
            "model_path": base, "dataset_path": str(dataset), "max_steps": steps,
            "per_device_train_batch_size": options.batch, "use_gpu": options.device == "cuda",
            "per_device_eval_batch_size": 8, "eval_strategy": "steps", "lora_dropout": 0.0,
            "eval_steps": evaluated_every(steps, options),
            "lora_target_modules": "all-linear", "warmup_steps": max(1, steps // 10), "lora_r": RANK,
        }  # fmt: skip
        aligns = options.objective == "align"
        found = tune(
            SweepConfig(
                output_dir=str(out), space={**grid_of(options), "lora_alpha": {"times_rank": [2]}},
                objective=options.objective, metric="eval_reward_accuracy" if aligns else "eval_loss",
                scheduler="asha" if options.asha else "none", packed=packed, training=training, cpus_per_trial=2,
                **({"grace_steps": max(1, steps // 4)} if options.asha else {}),
                # All on the base at once, so that steady time is what its end says, not that of trials after others.
                max_concurrent_trials=None if packed == "never" else math.prod(map(len, grid_of(options).values())),
            )
        )  # fmt: skip
        trials = SweepResult.from_json(found.read_json("result.json")).trials
        return {name_of(trial.settings, options): of_curve(trial.curve) for trial in trials}

    return run


ARMS: dict[str, Callable[..., Found]] = {
    "peer-one": peers("peer-one"),
    "peer-shared": peers("peer-shared"),
    "alone": ours("never"),
    "packed": ours("auto"),
}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the arms in turn, short and long, and prints the table."""
    from raytune_ft.core.cluster import connect

    arms = options.arms.split(",")
    one_length = options.asha or options.halves
    lengths = [options.steps] if one_length else [options.short_steps or max(1, options.steps // 4), options.steps]
    watched: dict[str, dict[int, list[Watch]]] = {arm: {steps: [] for steps in lengths} for arm in arms}
    losses: dict[str, dict[str, float]] = {}
    spans: dict[str, list[float]] = {arm: [] for arm in arms}
    with scratch_folder(options.folder) as folder:
        base = make_base(options.base, folder / options.base)
        connect()
        dataset = prepare_rows(base, folder, options.eval_rows, options.objective)
        for turn in range(options.repeats):
            for steps in lengths:
                for arm in arms:
                    out = folder / f"{arm}-{steps}-{turn}"
                    shutil.rmtree(out, ignore_errors=True)
                    with Watch() as watch:
                        found = ARMS[arm](base, dataset, out, steps, options)
                    losses[arm] = {key: loss for key, (loss, _) in found.items()}
                    stretch = evaluated_every(steps, options) * side_by_side(arm, options)
                    mine = [seconds / stretch for _, seconds in found.values()]
                    spans[arm] += mine
                    watched[arm][steps].append(watch)
                    shutil.rmtree(out, ignore_errors=True)
                    each = 1000 * statistics.fmean(mine)
                    print(f"{arm}, {steps} steps: {watch.seconds:.1f} s; at last {each:.2f} ms", flush=True)
                    time.sleep(2)
    if options.asha:
        return best_table(watched, losses, options)
    halves = {arm: statistics.fmean(spans[arm]) for arm in arms} if options.halves else None
    return table(watched, losses, lengths, halves, options)


def best_table(
    watched: dict[str, dict[int, list[Watch]]], losses: dict[str, dict[str, float]], options: argparse.Namespace
) -> dict[str, Any]:
    """Prints and returns what each arm found under ASHA, and how long that took."""
    figures = {}
    print(f"\n{all_trials(options)} trials under ASHA, {options.steps} steps, base {options.base}; medians")
    print(f"{'arm':12}{'makespan s':>12}{'cpu s':>9}{'MB':>9}   best rank/rate, its validation loss")
    for arm, runs in watched.items():
        best = min(losses[arm], key=losses[arm].__getitem__)
        figures[arm] = {
            "makespan_s": statistics.median(w.seconds for w in runs[options.steps]),
            "cpu_seconds": statistics.median(w.cpu_seconds for w in runs[options.steps]),
            "peak_mb": max(w.peak_mb for w in runs[options.steps]),
            "best": best,
            "best_eval_loss": losses[arm][best],
        }
        f = figures[arm]
        spent = f"{f['makespan_s']:12.1f}{f['cpu_seconds']:9.0f}{f['peak_mb']:9.0f}"
        print(f"{arm:12}{spent}   {best}, {losses[arm][best]:.4f}")
    return {"base": options.base, "device": options.device, "steps": options.steps, "arms": figures}


def table(
    watched: dict[str, dict[int, list[Watch]]],
    losses: dict[str, dict[str, float]],
    lengths: list[int],
    halves: dict[str, float] | None,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Prints and returns the figures: medians over the turns; `halves` are seconds of a trial-step, measured so."""
    short, long = lengths[0], lengths[-1]
    trials = all_trials(options)
    figures: dict[str, dict[str, Any]] = {}
    for arm, runs in watched.items():
        scaled = trials / (peer_trials(options) if arm.startswith("peer") else trials)
        seconds = {steps: scaled * statistics.median(w.seconds for w in runs[steps]) for steps in lengths}
        steady = halves[arm] if halves else (seconds[long] - seconds[short]) / ((long - short) * trials)
        figures[arm] = {
            "scaled_by": scaled,
            "makespan_s": seconds,
            "steady_ms_per_trial_step": 1000 * steady,
            "start_up_s": seconds[short] - steady * short * trials,
            "cpu_seconds": statistics.median(w.cpu_seconds for w in runs[long]),
            "peak_mb": max(w.peak_mb for w in runs[long]),
        }
    searched = " x ".join(grid_of(options))
    print(f"\n{trials} trials ({searched}), batch {options.batch}, base {options.base}, {options.device}; medians")
    heads = [*(f"{steps} steps s" for steps in lengths), "ms/trial-step", "start s", "cpu s", "MB"]
    print(f"{'arm':12}" + "".join(f"{head:>14}" for head in heads))
    for arm, f in figures.items():
        spans = list(f["makespan_s"].values())
        values = [*spans, f["steady_ms_per_trial_step"], f["start_up_s"], f["cpu_seconds"], f["peak_mb"]]
        marked = f"  times scaled from {trials / f['scaled_by']:.0f} trials" if f["scaled_by"] > 1 else ""
        print(f"{arm:12}" + "".join(f"{value:14.1f}" for value in values) + marked)
    result: dict[str, Any] = {"base": options.base, "device": options.device, "trials": trials, "arms": figures}
    result |= {"objective": options.objective, "batch": options.batch, "eval_rows": options.eval_rows}
    if "packed" in figures:
        mine = figures["packed"]
        result["ratios"] = {
            arm: {
                "makespan": f["makespan_s"][long] / mine["makespan_s"][long],
                "steady": f["steady_ms_per_trial_step"] / mine["steady_ms_per_trial_step"],
            }
            for arm, f in figures.items()
            if arm != "packed"
        }
        for arm, ratio in result["ratios"].items():
            print(f"packed against {arm}: makespan {ratio['makespan']:.2f}x, steady {ratio['steady']:.2f}x")
    if {"alone", "packed"} <= set(losses):
        apart = max(abs(losses["alone"][key] - losses["packed"][key]) for key in losses["alone"])
        result["largest_difference_of_losses"] = apart
        print(f"largest difference of validation losses, alone against packed: {apart:.2e}")
    return result


def main() -> int:
    """Runs the benchmark; 2 if the machine was busy."""
    parser = options_of(__doc__)
    parser.add_argument("--base", choices=[*SHAPES, "smollm2-135m"], default="small")
    parser.add_argument("--objective", choices=["train", "align"], default="train")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--short-steps", type=int, help="a quarter of --steps by default")
    parser.add_argument("--batch", type=int, default=2, help="rows of a trial's step, of about 120 tokens each")
    parser.add_argument("--eval-rows", type=int, default=64, help="validation rows; fewer for slow machines")
    parser.add_argument("--folder", help="where base and rows are kept for the next benchmark")
    parser.add_argument("--peer-trials", type=int, help="trials that the peers run, scaled to all; all by default")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--halves", action="store_true", help="steady time from the second half of one length of run")
    parser.add_argument("--asha", action="store_true", help="time to the best settings under ASHA")
    options = parser.parse_args()
    batch = f"_batch{options.batch}" if options.batch != 2 else ""
    objective = "" if options.objective == "train" else f"{options.objective}_"
    name = f"bench_sweep_{objective}{options.base}_{options.steps}{batch}{'_asha' * options.asha}_{options.device}"
    return measured(name, lambda: compare(options), allow_busy=options.allow_busy)


if __name__ == "__main__":
    sys.exit(main())
