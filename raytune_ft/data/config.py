"""Settings of `prepare`: where the records come from, how they are cleaned and split, what they are prepared for."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from raytune_ft.core.config import Config

SPLITS = ("train", "validation", "test")


class DatasetFormat(StrEnum):
    """How `DataCollector.export` writes a dataset."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    HUGGINGFACE = "huggingface"


class RecordFormat(StrEnum):
    """How the rows of a source say what was asked and answered."""

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    QUESTION_ANSWER = "question_answer"
    TEXT = "text"
    PREFERENCE = "preference"
    KTO = "kto"
    RECORD = "record"


class DataCollectionConfig(Config):
    """From source files to a dataset that is ready for training."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"output_path", "output_format"})

    sources: tuple[str, ...] = Field(min_length=1)
    """Files, folders and globs of JSONL, JSON lists, CSV, Parquet and plain text (a record a line); paths or URIs."""
    output_path: str = Field(min_length=1)
    """Folder of the dataset artifact; a local path or a URI."""
    output_format: DatasetFormat = DatasetFormat.JSONL
    """What `export` writes; the artifact itself is Parquet."""

    input_format: RecordFormat | None = None
    """Format of the rows; by default each row's is told from its columns, and refused where two fit."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns before the format is told: standard name -> name in the source (``{prompt: ask}``)."""
    on_bad_row: Literal["raise", "reject"] = "raise"
    """A row that is no record (malformed JSON, unknown columns) stops the run, or goes to ``rejected/``."""

    fix_encoding: bool = True
    """Repairs text that was decoded wrongly (mojibake) and brings Unicode to NFC; wording and quotes stay."""
    strip_whitespace: bool = True
    """Removes whitespace around every text; what is inside stays."""
    remove_control_characters: bool = True
    """Removes control characters and terminal escapes, and turns all line ends to a newline."""
    drop_empty: bool = True
    """Rejects rows without a prompt, an answer or a text."""
    drop_duplicates: bool = True
    """Rejects rows whose content occurred before; the first by source and position stays."""

    shuffle: bool = True
    """Orders each split by a hash of seed and record; otherwise by source and position."""
    seed: int = 0
    """Decides the order and which rows fall into which split."""
    validation_split: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows for validation (the guide: 0.10 to 0.15)."""
    test_split: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows for the test (the guide: 0.05 to 0.10); 0 when `test_sources` are given."""
    test_sources: tuple[str, ...] = ()
    """Sources that make the test split as they are; rows of `sources` with a prompt from these are rejected."""

    model_path: str | None = None
    """Tokenizes for this model (folder, artifact, hub id or ``starter:...``); none leaves records only."""
    max_length: int = Field(1024, ge=1)
    """Most tokens of a row; longer ones are rejected."""

    @model_validator(mode="before")
    @classmethod
    def _test_is_given(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("test_sources"):
            return {"test_split": 0.0, **settings}
        return settings

    @model_validator(mode="after")
    def _splits_leave_training_rows(self) -> DataCollectionConfig:
        if self.test_sources and self.test_split:
            raise ValueError("test_split must be 0 where test_sources are given: those files are the test split")
        if self.validation_split + self.test_split >= 1:
            total = self.validation_split + self.test_split
            raise ValueError(f"validation_split + test_split must be less than 1 (got {total:g}): nothing to train on")
        return self
