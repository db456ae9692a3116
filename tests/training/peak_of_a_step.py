"""Prints predicted and measured bytes of a small Llama's training steps: ``python peak_of_a_step.py METHOD TOKENS``."""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_ft.models.attention import SEGMENTS, use_attention
from raytune_ft.models.chat import Encoded
from raytune_ft.models.collate import pack
from raytune_ft.models.scoring import SummedLoss
from raytune_ft.training.config import FineTuningMethod
from raytune_ft.training.memory import Load, ModelShape, predict_peak


def made(seed_tokens: int, method: str, config: LlamaConfig) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if method == "lora":
        model.requires_grad_(False)
        model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear"))
    use_attention(model, SEGMENTS)
    loss = SummedLoss(model.train())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    rows = [Encoded(list(range(2, 2 + seed_tokens // 4)), [True] * (seed_tokens // 4)) for _ in range(4)]
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        loss(pack(rows)).backward()
        optimizer.step()


def peak_bytes() -> int:
    # Not getrusage: its peak is inherited from the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


if __name__ == "__main__":
    method, tokens = sys.argv[1], int(sys.argv[2])
    sizes = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "vocab_size": 4096}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": False}
    made(16, method, LlamaConfig(**{**sizes, "num_hidden_layers": 1, "hidden_size": 64, "vocab_size": 64}, **heads))
    before = peak_bytes()
    config = LlamaConfig(**sizes, **heads)
    made(tokens, method, config)
    grown = peak_bytes() - before
    parameters = sum(p.numel() for p in LlamaForCausalLM(config).parameters())
    load = Load(
        FineTuningMethod(method),
        tokens,
        bytes_per_value=4,
        zero_stage=0,
        device="cpu",
        lora_target_modules="all-linear",
    )
    print(predict_peak(ModelShape.of(config, parameters), load).total, grown)
