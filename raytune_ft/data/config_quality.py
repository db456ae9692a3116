"""Settings of what is measured about a dataset, and of what is wrong enough to stop the run."""

from __future__ import annotations

from pydantic import Field, model_validator

from raytune_ft.core.config import Config


class QualityConfig(Config):
    """What the quality report measures; each threshold that is set and not met ends the run with exit code 2."""

    report: bool = True
    """Writes ``quality.json`` and ``quality.html`` into the dataset."""
    sample_rows: int = Field(2000, ge=50)
    """Rows, chosen by hash, that relevance, clusters, suspect labels and quirks are measured on."""
    clusters: int = Field(20, ge=2)
    """Clusters of the sample's embeddings that its diversity is told from."""
    irrelevant_below: float = Field(0.1, ge=-1.0, le=1.0)
    """Cosine to the task description below which a row counts as off the task."""
    find_suspects: bool = True
    """Looks for answers that a classifier, trained without them, expects to be others."""
    find_quirks: bool = True
    """Looks for what gives answers away without being understood: length, punctuation, first words, word sequences."""
    suspect_z: float = Field(5.0, gt=0.0)
    """With `suspect_model`: loss per token this many robust standard deviations above the median makes a suspect."""
    suspect_below: float = Field(0.3, gt=0.0, le=0.5)
    """Probability that a classifier gives a label below which, if it expects another, the label is a suspect."""
    most_suspects: int = Field(1000, ge=1)
    """Most rows that are flagged and exported: the worst first."""

    min_rows: int | None = Field(None, ge=1)
    """Least training rows, those that augmentation or weights make apart."""
    min_relevance: float | None = Field(None, ge=-1.0, le=1.0)
    """Least mean cosine of rows to the task description."""
    max_irrelevant_rate: float | None = Field(None, ge=0.0, le=1.0)
    """Most rows off the task, as a share of the sample."""
    max_duplicate_rate: float | None = Field(None, ge=0.0, le=1.0)
    """Most exact and near-duplicates, as a share of the rows read."""
    min_distinct_2: float | None = Field(None, ge=0.0, le=1.0)
    """Least share of different word pairs among all word pairs of the rows."""
    min_cluster_entropy: float | None = Field(None, ge=0.0, le=1.0)
    """Least evenness of the clusters of the sample's embeddings (1: all the same size)."""
    min_balance: float | None = Field(None, ge=0.0, le=1.0)
    """Least evenness of each label (1: all values equally often)."""
    min_consistency: float | None = Field(None, ge=0.0, le=1.0)
    """Least share of the commonest shape of answers."""
    max_suspect_rate: float | None = Field(None, ge=0.0, le=1.0)
    """Most answers that look wrong, as a share of the rows judged."""
    max_quirk: float | None = Field(None, ge=0.0, le=1.0)
    """Most accuracy above chance that the instruction's surface alone may give."""

    @model_validator(mode="after")
    def _thresholds_have_a_report(self) -> QualityConfig:
        limits = [name for name in type(self).model_fields if name.startswith(("min_", "max_"))]
        given = [name for name in limits if getattr(self, name) is not None]
        if given and not self.report:
            raise ValueError(f"{given[0]} needs the report: set report to true, or leave out the threshold")
        if not self.report:
            others = [name for name in type(self).model_fields if name != "report"]
            self.refuse_idle(others, "has no effect without the report; leave it out, or set report to true")
        if not self.find_suspects:
            self.refuse_idle(["suspect_below"], "has no effect where find_suspects is false; leave it out")
        if not self.find_quirks:
            self.refuse_idle(["max_quirk"], "cannot be measured where find_quirks is false; leave it out")
        return self

    @property
    def needs_embeddings(self) -> bool:
        """Whether a threshold is set that only embeddings can meet."""
        return self.min_cluster_entropy is not None
