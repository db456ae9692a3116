"""Settings of augmentation: which variants of training rows are made, how many, and how far they may go."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from raytune_ft.core.config import Config, Place


class Augmentation(StrEnum):
    """How a variant of an instruction is made: in other words, with typing mistakes, with words lost, by a model."""

    WORDING = "wording"
    CHARACTERS = "characters"
    WORDS = "words"
    PARAPHRASE = "paraphrase"


_OF_KINDS = {
    Augmentation.CHARACTERS: ("character_rate",),
    Augmentation.WORDS: ("word_rate",),
    Augmentation.PARAPHRASE: ("max_new_tokens", "min_similarity", "max_overlap"),
}
"""Settings that only variants of some kind look at."""


class AugmentationConfig(Config):
    """Variants of training rows: the last instruction is varied, the answer stays. Off while `ratio` is 0."""

    ratio: float = Field(0.0, ge=0.0, le=10.0)
    """Most rows made for each training row; 0.5 makes one variant of every second row, chosen by hash."""
    kinds: tuple[Augmentation, ...] = Field((Augmentation.WORDING, Augmentation.CHARACTERS), min_length=1)
    """What variants are made of; each variant is of one kind, chosen by hash."""
    character_rate: float = Field(0.02, gt=0.0, le=0.5)
    """Share of the letters with a typing mistake (two swapped, one dropped, a neighbouring key)."""
    word_rate: float = Field(0.1, gt=0.0, le=0.5)
    """Share of the words dropped or swapped with the next; only words that carry little meaning are touched."""
    paraphrase_model: Place | None = None
    """Model that writes paraphrases (folder, artifact, hub id or ``starter:...``)."""
    max_new_tokens: int = Field(128, ge=1)
    """Most tokens of a paraphrase."""
    min_similarity: float = Field(0.8, ge=-1.0, le=1.0)
    """Least cosine of the meanings (embeddings) of a paraphrase and its original."""
    max_overlap: float = Field(0.7, ge=0.0, le=1.0)
    """Most words that a paraphrase may share with its original (Jaccard similarity of their sets of words)."""

    @model_validator(mode="after")
    def _paraphrases_have_a_model(self) -> AugmentationConfig:
        if len(set(self.kinds)) != len(self.kinds):
            raise ValueError(f"kinds: each at most once (got {', '.join(self.kinds)})")
        if (Augmentation.PARAPHRASE in self.kinds) != (self.paraphrase_model is not None):
            raise ValueError("paraphrase_model and the kind paraphrase go together: set both or neither")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> AugmentationConfig:
        if not self.ratio:
            others = [name for name in type(self).model_fields if name != "ratio"]
            self.refuse_idle(others, "no variants are made (ratio is 0); set that, or leave it out")
        for kind, names in _OF_KINDS.items():
            if kind not in self.kinds:
                self.refuse_idle(names, f"belongs to the kind {kind} (kinds: {', '.join(self.kinds)}); leave it out")
        return self
