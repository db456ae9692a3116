"""Metrics of an answer's surface: chrF, length, repetition, and what a schema or a function of the user's own says."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from importlib import import_module
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray

from raytune_ft.core.errors import ArtifactError, ConfigError, DataError, first_line
from raytune_ft.core.storage import Location
from raytune_ft.evaluation.answers import parse_json, repeated_share
from raytune_ft.evaluation.metric_names import EvaluationMetric
from raytune_ft.evaluation.row_metric import Columns, MeanMetric, RowMetric, Values, counted, ratio


class Chrf(RowMetric):
    """Corpus chrF from 0 to 100, as sacrebleu gives it with its defaults (chrF2, characters up to 6)."""

    name_in_settings = EvaluationMetric.CHRF
    citation = "Popović 2015, chrF: character n-gram F-score for automatic MT evaluation"

    @cached_property
    def _scorer(self) -> Any:
        from sacrebleu.metrics import CHRF

        return CHRF()

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Character n-grams given, wanted and shared, of each order."""
        # sacrebleu adds these up itself, and offers the sums' score only for whole corpora.
        extract = self._scorer._extract_corpus_statistics
        both = zip(rows["predictions"], rows["references"], strict=True)
        counts = (extract([answer], [[reference]])[0] for answer, reference in both)
        first = next(counts)
        return counted([f"count.{place}" for place in range(len(first))], itertools.chain([first], counts))

    def values(self, sums: Columns) -> Values:
        """`chrf`."""

        def chrf(*counts: float) -> float:
            return float(self._scorer._compute_f_score([int(count) for count in counts]))

        counted = [sums[f"count.{place}"] for place in range(len(sums))]
        return {"chrf": np.asarray(np.vectorize(chrf, otypes=[float])(*counted))}


class Length(RowMetric):
    """How far the number of words of answer and reference are apart, as a share of the reference's."""

    name_in_settings = EvaluationMetric.LENGTH

    def misfit(self, reference: str) -> str | None:
        """A reference needs words."""
        return None if reference.split() else "it compares numbers of words"

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """Words of answer and reference, and their relative difference."""
        given = np.array([len(text.split()) for text in rows["predictions"]], float)
        wanted = np.array([len(text.split()) for text in rows["references"]], float)
        error = ratio(abs(given - wanted), wanted)
        return {"error": error, "given": given, "wanted": wanted, "rows": np.ones(len(given))}

    def values(self, sums: Columns) -> Values:
        """`length_error`, mean words of answers and references, and their ratio."""
        return {
            "length_error": ratio(sums["error"], sums["rows"]),
            "length_words": ratio(sums["given"], sums["rows"]),
            "length_reference_words": ratio(sums["wanted"], sums["rows"]),
            "length_ratio": ratio(sums["given"], sums["wanted"]),
        }


class AnswerMetric(RowMetric):
    """Base of metrics that look at answers alone: the mean of a number a row."""

    def _info(self) -> Any:
        return self._described({"predictions": datasets.Value("string")})

    def columns(self, **rows: Sequence[Any]) -> Columns:
        """The score of each row, and `rows` (1 each)."""
        scores: NDArray[np.float64] = np.array([self.score(text) for text in rows["predictions"]], float)
        return {"score": scores, "rows": np.ones(len(scores))}

    def values(self, sums: Columns) -> Values:
        """The mean, under the metric's name."""
        return {str(self.name_in_settings): ratio(sums["score"], sums["rows"])}

    def score(self, prediction: str) -> float:
        """The score of one answer."""
        raise NotImplementedError


class Repetition(AnswerMetric):
    """Share of an answer's four-word sequences that stood in it before, mean of rows."""

    name_in_settings = EvaluationMetric.REPETITION
    citation = "Welleck et al. 2020, Neural Text Generation with Unlikelihood Training"

    def score(self, prediction: str) -> float:
        """0 for an answer that says nothing twice."""
        return repeated_share(prediction)


class JsonSchema(AnswerMetric):
    """Share of answers that are JSON, whole and strict, and that the schema accepts."""

    name_in_settings = EvaluationMetric.JSON_SCHEMA

    def __init__(self, schema: str | Mapping[str, Any]) -> None:
        super().__init__()
        self._validator = _validator(schema)

    def misfit(self, reference: str) -> str | None:
        """Where the schema refuses a reference, it is not the one that is meant."""
        return None if not reference or self.score(reference) else "its schema accepts no such reference"

    def score(self, prediction: str) -> float:
        """1 where the schema accepts the answer."""
        parsed = parse_json(prediction)
        return float(parsed is not None and _accepts(self._validator, parsed))


def _validator(schema: str | Mapping[str, Any]) -> Any:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    if isinstance(schema, str):
        try:
            schema = json.loads(Location.at(schema).read())
        except (ArtifactError, ValueError) as error:
            raise ConfigError(f"json_schema: no schema can be read there: {error}") from None
    kind = validator_for(schema)
    try:
        kind.check_schema(schema)
    except SchemaError as error:
        raise ConfigError(f"json_schema: is not a JSON schema: {error.message}") from None
    validator = kind(schema)
    for reference in _local_references(schema):
        _accepts(validator.evolve(schema={"$ref": reference}), None)
    return validator


def _accepts(validator: Any, value: Any) -> bool:
    """Whether a schema accepts a value.

    Raises:
        ConfigError: if it refers to what is not there, or to itself without an end.
    """
    from referencing.exceptions import Unresolvable

    try:
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise ConfigError(f"json_schema: a $ref leads nowhere: {first_line(error)[:200]}") from None
    except RecursionError:
        raise ConfigError("json_schema: refers to itself without an end") from None


def _local_references(schema: Any) -> Iterator[str]:
    """The ``$ref``s of a schema into itself; within a part that has an ``$id`` of its own, they mean that part."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            reference = part.get("$ref")
            if isinstance(reference, str) and reference.startswith("#"):
                yield reference
            waiting += [item for key, item in part.items() if key not in {"const", "enum", "default", "examples"}]
        elif isinstance(part, list):
            waiting += part
        waiting = [item for item in waiting if not (isinstance(item, Mapping) and "$id" in item)]


class Custom(MeanMetric):
    """Mean scores of the user's own functions of answer and reference."""

    name_in_settings = EvaluationMetric.CUSTOM

    def __init__(self, functions: Mapping[str, str]) -> None:
        super().__init__()
        self._functions = {name: _function(name, where) for name, where in functions.items()}

    def score(self, prediction: str, reference: str) -> dict[str, float]:
        """The number of each function as ``custom.<name>``, and of the first as ``custom``.

        Raises:
            DataError: if a function raises, or gives no finite number.
        """
        scores: dict[str, float] = {}
        for name, function in self._functions.items():
            try:
                found = float(function(prediction, reference))
            except Exception as error:
                raise DataError(
                    f"custom: {name} raised {type(error).__name__} ({error}) for the answer {prediction!r:.60}"
                ) from error
            if not math.isfinite(found):
                raise DataError(f"custom: {name} must give a finite number, gave {found} for {prediction!r:.60}")
            scores.setdefault("custom", found)
            scores[f"custom.{name}"] = found
        return scores


def _function(name: str, where: str) -> Callable[[str, str], float]:
    module, _, attribute = where.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # whatever a module of the user's own raises when it is imported
        reason = str(error) if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"custom_functions.{name}: {where!r} cannot be imported ({reason}); expected package.module:function, with "
            "the package on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"custom_functions.{name}: {where!r} is not a function")
    return found  # type: ignore[no-any-return]
