"""Settings of `prepare`: where the records come from, how they are cleaned and split, what they are prepared for."""

from __future__ import annotations

import difflib
from enum import StrEnum
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from raytune_ft.core.config import Config, Place, masked
from raytune_ft.core.digest import short_hash
from raytune_ft.data.config_augmentation import AugmentationConfig
from raytune_ft.data.config_quality import QualityConfig
from raytune_ft.models.config import TrainOn

SPLITS = ("train", "validation", "test")
COLUMNS = (
    "messages", "conversations", "instruction", "input", "output", "history", "prompt", "completion", "question",
    "answer", "text", "system", "tools", "reference", "label", "chosen", "rejected", "response", "rating", "correction",
    "preferred", "choices", "reasoning", "reasoning_content", "rationale", "thinking", "metadata", "supervised_spans",
)  # fmt: skip
"""Columns that have a meaning of their own."""
STRATA = ("length", "source", "length_and_source")
"""What rows can be stratified by beside a metadata field."""
_TEXTS = ("system_prompt", "template", "task_description", "reasoning_format")
"""Settings whose every character counts, also where it stands in a URL that is shown without its secrets."""


class DatasetFormat(StrEnum):
    """How `DataCollector.export` writes a dataset."""

    JSONL = "jsonl"
    CSV = "csv"
    PARQUET = "parquet"
    HUGGINGFACE = "huggingface"


class RecordFormat(StrEnum):
    """How the rows of a source say what was asked and answered.

    `QUESTION_ANSWER` reads a last line ``#### 42`` of the answer (as GSM8K has it) as the reference, too;
    `PROMPT_REFERENCE` (with what would be right) and `PROMPT` are prompts without an answer, for learning from rewards;
    `FEEDBACK` is what serving writes.
    """

    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"
    PROMPT_COMPLETION = "prompt_completion"
    QUESTION_ANSWER = "question_answer"
    TEXT = "text"
    PROMPT_REFERENCE = "prompt_reference"
    PROMPT = "prompt"
    PREFERENCE = "preference"
    KTO = "kto"
    FEEDBACK = "feedback"
    RECORD = "record"


class PersonalData(StrEnum):
    """What redaction finds and replaces by a placeholder such as ``[EMAIL]``."""

    EMAIL = "email"
    PHONE = "phone"
    CARD = "card"
    IBAN = "iban"
    API_KEY = "api_key"


class Measure(StrEnum):
    """What a length bound counts: of all turns together (or the raw text), of the prompt, or of the answer."""

    CHARACTERS = "characters"
    WORDS = "words"
    PROMPT_CHARACTERS = "prompt_characters"
    PROMPT_WORDS = "prompt_words"
    ANSWER_CHARACTERS = "answer_characters"
    ANSWER_WORDS = "answer_words"


class NearDuplicates(StrEnum):
    """What becomes of rows that say nearly the same: all but the first go, all stay in one split, or none is sought."""

    DROP = "drop"
    GROUP = "group"
    KEEP = "keep"


class Reasoning(StrEnum):
    """What becomes of reasoning that a row brings: left as it is, or written before the answer and trained or not."""

    NONE = "none"
    TRAIN = "train"
    MASK = "mask"


class OverLength(StrEnum):
    """What becomes of a row with more than `max_length` tokens.

    `SPLIT` cuts a conversation between exchanges (the system turn goes with each piece) and a raw text between tokens.
    """

    DROP = "drop"
    TRUNCATE_LEFT = "truncate_left"
    TRUNCATE_RIGHT = "truncate_right"
    SPLIT = "split"
    RAISE = "raise"


class DataCollectionConfig(Config):
    """From source files to a dataset that is ready for training."""

    not_identity: ClassVar[frozenset[str]] = frozenset({"output_path", "output_format"})

    sources: tuple[Place, ...] = Field(min_length=1)
    """Files, folders and globs of JSONL, JSON lists, CSV, Parquet, Arrow and plain text (a record a line), compressed
    too; paths or URIs (``s3://``, ``gs://``, ``https://``); ``hf:org/name[:config][@split]``; folders that
    `save_to_disk` wrote."""
    source_weights: dict[str, float] = Field(default_factory=dict)
    """How often the training split has the rows of a source (as named in `sources`, or a file or glob of files): 0.5
    leaves out half of them, chosen by hash; 2.5 has each two or three times. Files without a weight count once."""
    output_path: str = Field(min_length=1)
    """Folder of the dataset artifact; a local path or a URI."""
    output_format: DatasetFormat = DatasetFormat.JSONL
    """What `export` writes; the artifact itself is Parquet."""

    input_format: RecordFormat | None = None
    """Format of the rows; by default each row's is told from its columns, and refused where two fit."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns before the format is told: standard name -> name in the source (``{prompt: ask}``); a name that
    no format uses is one of the metadata."""
    on_bad_row: Literal["raise", "reject"] = "raise"
    """A row that is no record (malformed JSON, unknown columns) stops the run, or goes to ``rejected/``."""
    unanswered: Literal["reject", "keep"] = "reject"
    """Rows that end with what is asked (a prompt, with or without a reference): there is no answer to learn, so they
    are rejected (with a reference, they may be in `test_sources`); or kept for `reinforce`, which answers them itself.
    No other training takes a dataset with such rows."""

    fix_encoding: bool = True
    """Repairs text that was decoded wrongly (mojibake) and brings Unicode to NFC; wording and quotes stay."""
    strip_whitespace: bool = True
    """Removes whitespace around every text; what is inside stays."""
    remove_control_characters: bool = True
    """Removes control characters and terminal escapes, and turns all line ends to a newline."""
    normalize_whitespace: bool = False
    """Makes one blank of several inside a line and one empty line of several; indentation and fenced code stay."""
    normalize_capitalization: bool = False
    """Writes lines that are all in capitals (four words or more) in sentence case; names in them lose theirs."""
    redact: tuple[PersonalData, ...] = ()
    """Personal data to replace by placeholders (``[email, phone, card, iban, api_key]``), in metadata and rejected
    rows, too."""
    drop_empty: bool = True
    """Rejects rows without a prompt, an answer or a text."""
    drop_unbalanced_tool_calls: bool = True
    """Rejects rows with a call without result, a result without call, malformed arguments, or a call of a tool that
    `tools` does not list."""
    drop_refusals: bool = False
    """Rejects rows whose answer refuses or is a model's boilerplate about itself (English)."""
    length_bounds: dict[Measure, tuple[int | None, int | None]] = Field(default_factory=dict)
    """Least and most of a measure, both inclusive, null for none: ``{answer_words: [1, 500]}``. Others are rejected."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the languages to keep (``[en, de]``); texts too short to tell are kept, and counted."""
    drop_duplicates: bool = True
    """Rejects rows whose content occurred before; the first by source and position stays, and so do all rows of
    `test_sources`."""
    near_duplicates: NearDuplicates = NearDuplicates.DROP
    """Rows nearly like another: ``drop`` rejects all but the first by source and position, ``group`` keeps them in one
    split, ``keep`` does not look for them. With `test_sources`, those nearly like a test row are rejected by both."""
    near_duplicate_threshold: float = Field(0.7, gt=0.0, le=1.0)
    """Jaccard similarity of two rows' sets of word 5-grams (all turns but the system's) from which they are nearly
    alike."""
    conflicting_answers: Literal["keep", "drop"] = "keep"
    """Rows that answer one prompt differently are kept and counted in a warning, or all rejected; preferences and rows
    with a label are not meant."""

    shuffle: bool = True
    """Orders each split by a hash of seed and record; otherwise by source and position."""
    seed: int = 0
    """Decides the order and which rows fall into which split."""
    validation_split: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows for validation (the guide: 0.10 to 0.15)."""
    test_split: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of the rows for the test (the guide: 0.05 to 0.10); 0 when `test_sources` are given."""
    test_sources: tuple[Place, ...] = ()
    """Sources whose usable rows are the test split, duplicates too; rows of `sources` with a prompt or a first question
    from these are rejected."""
    stratify_by: str | None = "length_and_source"
    """What every split gets its share of: ``length``, ``source``, ``length_and_source``, or a metadata field (a column
    that the format does not use, or a field of a column ``metadata``) of few values; null for none."""
    group_by: str | None = "conversation_id"
    """Metadata field (as in `stratify_by`) whose rows must stay in one split; rows without it are not grouped by it;
    null for none. Another field than the default must be in some row. Rows with one first question stay together anyway
    (case, width and blanks aside), but for an opening of over 100 prompts, or of over half of all, which are counted as
    remarks."""
    benchmarks: tuple[Place, ...] = ()
    """Files (as `sources`) of benchmarks that no row may share 13 words in a row with; texts of fewer are not found."""
    on_leak: Literal["raise", "reject"] = "raise"
    """A row that shares 13 words with a benchmark stops the run, or goes to ``rejected/``."""

    augmentation: AugmentationConfig = AugmentationConfig()
    """Variants of training rows, tagged and bounded; off by default."""
    quality: QualityConfig = QualityConfig()
    """The quality report, and thresholds that end the run with exit code 2."""
    task_description: str | None = Field(None, min_length=1)
    """What the data is to teach, in a sentence or two; relevance of the rows to it is measured."""
    embedding_model: Place = "starter:all-minilm-l6-v2"
    """Model that tells closeness in meaning, for `task_description` and paraphrases (folder, URI or hub id)."""
    suspect_model: Place | None = None
    """Model whose loss tells answers that look wrong (folder, artifact, hub id or ``starter:...``)."""
    corrections: Place | None = None
    """A ``suspects.jsonl`` of an earlier run with ``corrected`` filled in: these answers replace the rows' own."""

    model_path: Place | None = None
    """Tokenizes for this model (folder, artifact, hub id or ``starter:...``); none leaves records only."""
    max_length: int = Field(1024, ge=1)
    """Most tokens of a row; what becomes of longer ones says `over_length`."""
    over_length: OverLength = OverLength.DROP
    """Rows over `max_length`: rejected (``drop``), cut, split into several rows, or the end of the run (``raise``)."""
    train_on: TrainOn = TrainOn.ALL_ASSISTANT_TURNS
    """Turns that count for the loss. Templates that rewrite earlier turns have a right mask for the last one only."""
    special_tokens_in_text: Literal["reject", "keep"] = "reject"
    """Turns that spell out one of the tokenizer's special tokens (``<|im_end|>``), which would be read as the token:
    rejected, or kept as they are."""
    template: str = "model"
    """Chat template: the ``model``'s own, ``instruction`` (``<instruction>/<response>`` tags), a Jinja file, or Jinja
    text. It is kept beside the dataset and the trained model, so that serving uses the same."""
    system_prompt: str | None = Field(None, min_length=1)
    """System turn for conversations without one; a row's own stays."""
    reasoning: Reasoning = Reasoning.NONE
    """Writes answers as reasoning and answer (`reasoning_format`), with the reasoning trained or masked. It is taken
    from the answer (``<think>`` tags, or before a last line ``#### answer``) or from a column ``reasoning``,
    ``reasoning_content``, ``rationale`` or ``thinking``."""
    reasoning_format: str = "<think>\n{reasoning}\n</think>\n\n{answer}"
    """How reasoning and answer are written in the assistant's turn."""
    on_reasoning_fault: Literal["keep", "reject"] = "keep"
    """Rows without reasoning, or whose reasoning ends in another answer: kept as they are and counted, or rejected."""

    def identity(self) -> dict[str, Any]:
        """The resolved settings that decide what the run makes; of texts that are shown masked, a hash as well."""
        texts = {name: text for name in _TEXTS if masked(text := getattr(self, name)) != text}
        hashes = {f"{name} (sha256)": short_hash(text) for name, text in texts.items()}
        return super().identity() | hashes

    @model_validator(mode="before")
    @classmethod
    def _test_is_given(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("test_sources"):
            return {"test_split": 0.0, **settings}
        return settings

    @model_validator(mode="after")
    def _columns_are_known(self) -> DataCollectionConfig:
        known = [*COLUMNS, *(field for field in (self.group_by, self.stratify_by) if field and field not in STRATA)]
        for name, source in self.columns.items():
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if name not in known and near:  # else it is the name of a field of the metadata
                raise ValueError(f"columns.{name}: is no standard name; did you mean {near[0]}?")
            if list(self.columns.values()).count(source) > 1:
                raise ValueError(f"columns.{name}: {source!r} is given twice; a column has one standard name")
        return self

    @model_validator(mode="after")
    def _cleaning_can_be_met(self) -> DataCollectionConfig:
        for source, weight in self.source_weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"source_weights.{source}: must be 0 or more (got {weight:g})")
        for measure, (least, most) in self.length_bounds.items():
            if least is not None and most is not None and least > most:
                raise ValueError(f"length_bounds.{measure}: the least ({least}) is more than the most ({most})")
        return self

    @model_validator(mode="after")
    def _reasoning_is_before_the_answer(self) -> DataCollectionConfig:
        before, answer, after = self.reasoning_format.partition("{answer}")
        if not answer or "{reasoning}" not in before or "{answer}" in after:
            raise ValueError(
                "reasoning_format must have {reasoning} and, after it, {answer} once "
                f"(got {self.reasoning_format!r})"
            )
        return self

    @model_validator(mode="after")
    def _suspects_have_a_report(self) -> DataCollectionConfig:
        for name in ("suspect_model", "task_description"):
            if getattr(self, name) is not None and not self.quality.report:
                raise ValueError(f"{name} needs the report: set quality.report to true")
        return self

    @model_validator(mode="after")
    def _says_nothing_in_vain(self) -> DataCollectionConfig:
        if self.near_duplicates is NearDuplicates.KEEP:
            self.refuse_idle(["near_duplicate_threshold"], "near_duplicates: keep looks for none; leave it out")
        if not self.benchmarks:
            self.refuse_idle(["on_leak"], "there are no benchmarks to share words with; name some, or leave it out")
        if not self.validation_split and not self.test_split and self.stratify_by is not None:
            self.refuse_idle(["stratify_by"], "no rows are split off (validation_split, test_split); leave it out")
        if self.model_path is None:
            why = "no row is tokenized here; set model_path, or the max_length of the training"
            self.refuse_idle(["max_length"], why)
        if self.reasoning is Reasoning.NONE:
            why = "no reasoning is written (reasoning: none); set that, or leave it out"
            self.refuse_idle(["reasoning_format", "on_reasoning_fault"], why)
        self._refuse_idle_models()
        return self

    def _refuse_idle_models(self) -> None:
        """What tells how models judge rows, where none does."""
        for name, judged in (("task_description", "irrelevant_below"), ("suspect_model", "suspect_z")):
            if getattr(self, name) is None:
                self.quality.refuse_idle([judged], f"has no effect without {name}; leave it out", under="quality.")
        if self.suspect_model is None and not self.quality.find_suspects:
            why = "cannot be measured without quality.find_suspects or suspect_model; set one of them, or leave it out"
            self.quality.refuse_idle(["max_suspect_rate"], why, under="quality.")
        if self.task_description is None:
            why = "cannot be measured without task_description; describe the task, or leave it out"
            self.quality.refuse_idle(["min_relevance", "max_irrelevant_rate"], why, under="quality.")
        embeds = self.task_description is not None or self.quality.needs_embeddings
        if not embeds:
            why = "has no effect without task_description or quality.min_cluster_entropy; leave it out"
            self.quality.refuse_idle(["clusters"], why, under="quality.")
        if not embeds and self.augmentation.paraphrase_model is None:
            why = "no meanings are told (task_description, quality.min_cluster_entropy, paraphrases); leave it out"
            self.refuse_idle(["embedding_model"], why)
        if not self.quality.find_suspects and self.suspect_model is None:
            why = "has no effect without quality.find_suspects or suspect_model; leave it out"
            self.quality.refuse_idle(["most_suspects"], why, under="quality.")

    @model_validator(mode="after")
    def _splits_leave_training_rows(self) -> DataCollectionConfig:
        if self.test_sources and self.test_split:
            raise ValueError("test_split must be 0 where test_sources are given: those files are the test split")
        if self.validation_split + self.test_split >= 1:
            total = self.validation_split + self.test_split
            raise ValueError(f"validation_split + test_split must be less than 1 (got {total:g}): nothing to train on")
        return self
