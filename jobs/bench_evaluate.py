"""Measures perplexity and generation of the same rows by us and by a plain Transformers loop at its best batch size.

python jobs/bench_evaluate.py [--device cpu] [--base smollm2-135m] [--rows 64] [--repeats 3] [--max-new-tokens 128]

The peer takes the rows in their order, pads each batch, and asks the model for logits or for `generate`; it runs once
with each batch size, and the best one runs in turn with ours.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # This checkout, in the place of jobs/, where evaluate.py would stand in for the package of that name.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.bench_machine import measured, options_of
from jobs.bench_sweep import SHAPES, chat_rows, make_base

SIZES = {"perplexity": (1, 2, 4, 8, 16, 32), "generation": (4, 8, 16, 32, 64)}
_ASKED = ("Say this in one sentence: {}", "What is this about? {}", "Answer with one word: is this true? {}")


def scored_rows(loaded: Any, count: int) -> list[Any]:
    """Conversations of natural, varied length with their answers supervised."""
    from raytune_ft.core.records import Message, Record
    from raytune_ft.models.chat import encode_record

    records = [
        Record(messages=tuple(Message(turn["role"], turn["content"]) for turn in row["messages"]))
        for row in chat_rows(count)
    ]
    return [encode_record(loaded.chat, record) for record in records]


def prompts(loaded: Any, count: int) -> list[list[int]]:
    """Shipped questions and passages: short and long prompts that get short and long answers."""
    from raytune_ft.core.records import Message
    from raytune_ft.evaluation.forgetting import general_passages, general_questions

    texts = [question.prompt[0].content for question in general_questions()]
    passages = [passage.text for passage in general_passages(None)]
    asked = [pattern.format(passage) for passage in passages for pattern in _ASKED]
    mixed = [text for pair in zip(texts, asked, strict=False) for text in pair] + texts[len(asked) :]
    return [loaded.chat.prompt_ids([Message("user", text)]) for text in mixed[:count]]


def plain_perplexity(loaded: Any, rows: Sequence[Any], size: int) -> list[float]:
    """Nats of each row by padded batches and whole logits."""
    import torch

    found = []
    with torch.no_grad():
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            longest = max(len(row.input_ids) for row in part)
            pads = [longest - len(row.input_ids) for row in part]
            ids = torch.tensor([[*row.input_ids, *[0] * pad] for row, pad in zip(part, pads, strict=True)])
            mask = torch.tensor([[1] * len(row.input_ids) + [0] * pad for row, pad in zip(part, pads, strict=True)])
            labels = torch.tensor(
                [
                    [token if kept else -100 for token, kept in zip(row.input_ids, row.supervised, strict=True)]
                    + [-100] * pad
                    for row, pad in zip(part, pads, strict=True)
                ]
            )
            ids, mask, labels = (tensor.to(loaded.device) for tensor in (ids, mask, labels))
            logits = loaded.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
            flat = logits.flatten(0, 1)  # seen with the vocabulary in the middle, torch's sums err by 3e-5
            losses = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), reduction="none")
            found += losses.view(len(part), -1).double().sum(1).tolist()
    return found


def plain_generation(loaded: Any, asked: Sequence[list[int]], size: int, max_new_tokens: int) -> list[list[int]]:
    """Answers of each prompt by left-padded batches and transformers' own `generate`."""
    import torch

    stops = list(loaded.chat.stop_ids)
    found = []
    for start in range(0, len(asked), size):
        part = asked[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[stops[0]] * (longest - len(p)) + p for p in part], device=loaded.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part], device=loaded.device)
        with torch.inference_mode():
            out = loaded.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=stops[0],
            )
        for row in out[:, longest:].tolist():
            end = next((place for place, token in enumerate(row) if token in stops), len(row))
            found.append(row[:end])
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what the work gave."""
    import torch

    began = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def duel(name: str, ours: Callable[[], Any], peer: Callable[[int], Any], repeats: int) -> dict[str, Any]:
    """The peer with each batch size once, then its best and ours in turn; medians, and what both gave."""
    search = {size: timed(lambda size=size: peer(size))[0] for size in SIZES[name]}
    best = min(search, key=search.__getitem__)
    mine, theirs = [], []
    found: tuple[Any, Any] = (None, None)
    for turn in range(repeats):
        for side in (0, 1) if turn % 2 else (1, 0):
            seconds, got = timed(ours if side == 0 else lambda: peer(best))
            (mine if side == 0 else theirs).append(seconds)
            found = (got, found[1]) if side == 0 else (found[0], got)
    medians = statistics.median(mine), statistics.median(theirs)
    faster = statistics.median(their / own for own, their in zip(mine, theirs, strict=True))
    print(f"{name:12} ours {medians[0]:8.2f} s   peer (batch {best}) {medians[1]:8.2f} s   {faster:.2f}x", flush=True)
    return {
        "ours_s": mine,
        "peer_s": theirs,
        "peer_batch_sizes_s": search,
        "peer_batch_size": best,
        "ratio": faster,
        "found": found,
    }


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both duels, and whether both sides say the same."""
    from raytune_ft.models.config import DecodingConfig, Precision
    from raytune_ft.models.generation import generate
    from raytune_ft.models.loading import load_model
    from raytune_ft.models.scoring import sequence_scores

    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    precision = Precision.FP32 if options.device == "cpu" else Precision.AUTO
    with tempfile.TemporaryDirectory(prefix="bench-evaluate-") as scratch:
        base = make_base(options.base, Path(scratch) / "base")
        loaded = load_model(base, precision=precision, device=options.device)
    rows, asked = scored_rows(loaded, options.rows), prompts(loaded, options.prompts)
    decoding = DecodingConfig(max_new_tokens=options.max_new_tokens)
    print(f"{options.base}, {options.device}, {precision}: {len(rows)} rows, {len(asked)} prompts")
    scores = duel(
        "perplexity",
        lambda: [score.nll for score in sequence_scores(loaded, rows)],
        lambda size: plain_perplexity(loaded, rows, size),
        options.repeats,
    )
    mine, theirs = scores.pop("found")
    scores["largest_relative_difference"] = max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True))
    print(f"largest relative difference of scores: {scores['largest_relative_difference']:.1e}")
    answers = duel(
        "generation",
        lambda: [completion.token_ids for completion in generate(loaded, asked, decoding)],
        lambda size: plain_generation(loaded, asked, size, options.max_new_tokens),
        options.repeats,
    )
    mine, theirs = answers.pop("found")
    answers["same_answers"] = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(asked)
    answers["answer_tokens"] = sum(map(len, mine))
    print(f"same answers: {answers['same_answers']:.0%} of {len(asked)}, {answers['answer_tokens']} tokens")
    about = {"base": options.base, "device": options.device, "precision": str(precision), "rows": len(rows)}
    return {**about, "prompts": len(asked), "perplexity": scores, "generation": answers}


def main() -> int:
    """Runs the benchmark; 2 if the machine was busy."""
    parser = options_of(__doc__)
    parser.add_argument("--base", choices=[*SHAPES, "smollm2-135m"], default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, help="of torch; by default its own choice")
    options = parser.parse_args()
    return measured(
        f"bench_evaluate_{options.base}_{options.device}", lambda: compare(options), allow_busy=options.allow_busy
    )


if __name__ == "__main__":
    sys.exit(main())
