"""The page of a pipeline: the evaluation's page, with the steps, curves, sizes and the endpoint's answer before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.ledger import assigned
from raytune_ft.core.pages import image
from raytune_ft.evaluation.report import page_template, page_values
from raytune_ft.evaluation.results import EvaluationResult, read_result
from raytune_ft.pipeline import plots
from raytune_ft.training.folder import read_history
from raytune_ft.tuning.plots import survival
from raytune_ft.tuning.result import SweepResult

_MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Step:
    """A line of the table of steps."""

    name: str
    seconds: float
    where: str
    figures: str


@dataclass(frozen=True)
class Story:
    """What the page tells."""

    steps: tuple[Step, ...]
    history: list[dict[str, float]]
    aligned: list[dict[str, float]]
    sweep: SweepResult | None
    evaluation: EvaluationResult | None
    megabytes: dict[str, float]
    exchange: dict[str, Any] | None

    @classmethod
    def of(cls, made: dict[str, Artifact]) -> Story:
        """The story of the artifacts that a pipeline made, by step."""
        steps = [
            Step(name, artifact.seconds, str(artifact.location), _figures(artifact.numbers))
            for name, artifact in made.items()
        ]
        return cls(
            steps=tuple(steps),
            history=read_history(made["train"].location),
            aligned=read_history(made["align"].location) if "align" in made else [],
            sweep=SweepResult.from_json(made["tune"].read_json("result.json")) if "tune" in made else None,
            evaluation=read_result(made["evaluate"]) if "evaluate" in made else None,
            megabytes=weights_sizes(made),
            exchange=made["serve"].read_json("exchange.json") if "serve" in made else None,
        )


def weights_sizes(made: dict[str, Artifact]) -> dict[str, float]:
    """Megabytes of weights on disk: what training added, and the quantized model beside its full-precision source."""
    found = {"trained weights (adapter)": _weights(made["train"]) / _MEGABYTE}
    if "quantize" in made:
        numbers = made["quantize"].numbers
        found["full precision"] = numbers["bytes_before"] / _MEGABYTE
        found["quantized"] = numbers["bytes_after"] / _MEGABYTE
    return found


def render(story: Story) -> str:
    """The self-contained page; whatever models and data say stays text."""
    pictures = [(plots.losses(story.history), "Loss while training the chosen settings.")]
    if story.sweep is not None:
        caption = "The search: a line a trial; a cross where the scheduler stopped it."
        pictures.insert(0, (survival(story.sweep), caption))
    if story.aligned:
        pictures.append((plots.losses(story.aligned), "Loss while training on preferences."))
    pictures.append((plots.sizes(story.megabytes), "Weights on disk."))
    images = [(image(svg), caption) for svg, caption in pictures]
    if story.evaluation is None:
        page = page_template("pipeline/unmeasured.html.j2")
        return str(page.render(title="From records to a model", story=story, images=images))
    values = {**page_values(story.evaluation), "story": story, "images": images, "title": "From records to an endpoint"}
    return str(page_template("pipeline/report.html.j2").render(**values))


def _weights(artifact: Artifact) -> int:
    return sum(entry.size for name, entry in artifact.manifest.files.items() if name.endswith(".safetensors"))


def _figures(numbers: dict[str, Any]) -> str:
    words = []
    for key, value in numbers.items():
        if isinstance(value, float):
            words.append(f"{key} {value:.4g}")
        elif isinstance(value, int | str | bool):
            words.append(f"{key} {value}")
        elif isinstance(value, dict) and value and all(isinstance(item, int | float | str) for item in value.values()):
            words.append(f"{key} {', '.join(assigned(value))}")
    return " · ".join(words)
