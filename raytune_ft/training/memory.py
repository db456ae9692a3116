"""How much memory training takes at its peak, predicted from a model's shape and the settings. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from raytune_ft.models.chunks import CHUNK, frozen_chunk
from raytune_ft.training.config import FineTuningMethod

GIB = 1 << 30
_FULL_BYTES = 4
_TYPICAL = (  # of Llama's family: parameters, layers, hidden, intermediate, key-value share, vocabulary
    (135e6, 30, 576, 1536, 1 / 3, 49_152),
    (1.2e9, 16, 2048, 8192, 1 / 4, 128_256),
    (3.2e9, 28, 3072, 8192, 1 / 3, 128_256),
    (8e9, 32, 4096, 14_336, 1 / 4, 128_256),
    (70e9, 80, 8192, 28_672, 1 / 8, 128_256),
)
_UNTIED_FROM = 8e9


@dataclass(frozen=True)
class ModelShape:
    """What memory depends on: numbers of weights and the widths of a decoder's layers."""

    parameters: float
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    """Width of keys, and of values: key-value heads x head size."""
    vocabulary: int
    tied: bool = False
    """Whether the head's weights are those of the embeddings."""

    @classmethod
    def of(cls, settings: Any, parameters: float) -> Self:
        """The shape that a transformers configuration gives; gated layers as in Llama are assumed.

        Raises:
            AttributeError: if the configuration lacks a width.
        """
        heads = settings.num_attention_heads
        head = getattr(settings, "head_dim", None) or settings.hidden_size // heads
        kv = (getattr(settings, "num_key_value_heads", None) or heads) * head
        inner = getattr(settings, "intermediate_size", None) or 4 * settings.hidden_size
        tied = bool(getattr(settings, "tie_word_embeddings", False))
        return cls(parameters, settings.num_hidden_layers, settings.hidden_size, inner, kv, settings.vocab_size, tied)

    @classmethod
    def typical(cls, parameters: float) -> Self:
        """The shape of a published Llama or SmolLM2 of about this size, for a model of which only the size is known."""
        size, layers, hidden, inner, share, words = min(_TYPICAL, key=lambda known: abs(known[0] / parameters - 1))
        return cls(parameters, layers, hidden, inner, int(hidden * share), words, tied=size < _UNTIED_FROM)

    @property
    def unquantized(self) -> float:
        """Weights that quantization leaves as they are: embeddings, and the head."""
        return min(self.parameters, self.vocabulary * self.hidden * (1.0 if self.tied else 2.0))


@dataclass(frozen=True)
class Load:
    """What a worker computes at once, and how: the settings that its memory depends on."""

    method: FineTuningMethod
    tokens: int
    """Tokens of a micro-batch."""
    bytes_per_value: int = 2
    """Of weights and activations: 2 for bf16 and fp16, 4 for fp32."""
    zero_stage: int = 2
    """0 is plain AdamW without DeepSpeed."""
    world_size: int = 1
    accumulates: bool = False
    """Whether gradients of earlier micro-batches are there during the forward pass."""
    lora_r: int = 8
    lora_target_modules: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "v_proj")
    device: Literal["cpu", "cuda"] = "cuda"
    bits: int = 4
    gradient_checkpointing: bool = False


@dataclass(frozen=True)
class MemoryPeak:
    """Bytes on one worker at the fullest moment of a step, by what they hold."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    loss: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss

    @property
    def gib(self) -> float:
        """GiB in all."""
        return self.total / GIB


def predict_peak(shape: ModelShape, load: Load) -> MemoryPeak:
    """The peak of a training step after the first, when the optimizer's state exists.

    Activations are there in full when the backward pass begins, gradients when it ends; each layer gives up its
    activations as its gradients come, so that the fuller of both moments is the peak. Under ZeRO, fp32 master weights
    and both moments (12 bytes a trained weight) are shared by the workers, in stage 2 gradients, in 3 weights, too.
    """
    trained = trained_weights(shape, load)
    frozen = 0.0 if load.method is FineTuningMethod.FULL else shape.parameters
    share = load.world_size
    width = load.bytes_per_value
    held = frozen * width
    if load.method is FineTuningMethod.QLORA:
        packed = 0.55 if load.bits == 4 else 1.05
        held = (frozen - shape.unquantized) * packed + shape.unquantized * width
    weights = (held + trained * width) / (share if load.zero_stage == 3 else 1)
    gradients = trained * width / (share if load.zero_stage >= 2 else 1)
    optimizer = trained * (12 / share if load.zero_stage >= 1 else 8)
    activations = load.tokens * activation_bytes_per_token(shape, load)
    chunk = CHUNK if load.method is FineTuningMethod.FULL else frozen_chunk(load.device, shape.vocabulary)
    loss = min(load.tokens, chunk) * shape.vocabulary * (2 * _FULL_BYTES + width)
    begins = activations + loss + (gradients if load.accumulates else 0)
    if begins >= gradients:
        earlier = gradients if load.accumulates else 0.0
        return MemoryPeak(weights, earlier, optimizer, activations, loss)
    return MemoryPeak(weights, gradients, optimizer, 0.0, 0.0)


def trained_weights(shape: ModelShape, load: Load) -> float:
    """Weights that have gradients: all, or a LoRA pair of `lora_r` x (inputs + outputs) for each target of a layer."""
    if load.method is FineTuningMethod.FULL:
        return shape.parameters
    return load.lora_r * shape.layers * sum(map(sum, _targets(shape, load)))


def activation_bytes_per_token(shape: ModelShape, load: Load) -> float:
    """Bytes that a token's forward pass keeps for the backward pass (flash attention: no [tokens, tokens] matrix).

    A layer keeps, in values of the model's width h, its inner width i and its key-value width k: the residual before
    each of two norms (2h); queries, keys and values (h + 2k); attention's output as computed and joined over heads
    (2h); of the gated layer the gate, its activation and the other factor (3i). Where all weights are trained, also
    the inputs of linear layers and norm scales (4h + i). With LoRA, each target's own input after dropout, and
    dropout's mask: a byte a value on CUDA, a value on CPUs. In two-byte formats norms keep a four-byte copy (2h).
    """
    h, i, k, width = shape.hidden, shape.intermediate, shape.kv_width, load.bytes_per_value
    layer = float((5 * h + 2 * k + 3 * i) * width + (2 * h * _FULL_BYTES if width < _FULL_BYTES else 0))
    if load.method is FineTuningMethod.FULL:
        layer += (4 * h + i) * width
    else:
        mask = 1 if load.device == "cuda" else width
        layer += sum(inputs for inputs, _ in _targets(shape, load)) * (width + mask)
    if load.gradient_checkpointing:
        return shape.layers * h * width + layer
    return shape.layers * layer


def _targets(shape: ModelShape, load: Load) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's linear layers that get LoRA factors, by Llama's names."""
    h, i, k = shape.hidden, shape.intermediate, shape.kv_width
    known = {"q_proj": (h, h), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (h, h)}
    known |= {"gate_proj": (h, i), "up_proj": (h, i), "down_proj": (i, h)}
    names = known if load.lora_target_modules == "all-linear" else load.lora_target_modules
    return [known[name] for name in names if name in known]
