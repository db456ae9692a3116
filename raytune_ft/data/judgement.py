"""The judgement of a bounded sample in one task: relevance, clusters, suspect labels and quirks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from raytune_ft.core.records import RECORD_SCHEMA, Record, table_to_records
from raytune_ft.data.config_quality import QualityConfig
from raytune_ft.data.labels import label_values
from raytune_ft.data.quality import answer_of, prompt_of
from raytune_ft.data.quirks import surface_quirks
from raytune_ft.data.sketches import evenness
from raytune_ft.data.suspects import unlikely_labels, without_confirmed
from raytune_ft.models.embedding import load_embedder
from raytune_ft.models.size import parameter_count

_MOST_CHARACTERS = 20_000
_EXAMPLES = 5
_SHOWN_CHARACTERS = 300


def judge_sample(
    rows: pa.Table, config: QualityConfig, seed: int, *, task: str | None, embedder: str | None, model: str | None
) -> pa.Table:
    """One row with all that was found in a sample, as JSON in column ``judgement``.

    Args:
        rows: of `quality.sample`, all in one table.
        config: what to look for.
        seed: of `prepare`.
        task: description of the task, where there is one.
        embedder: reference of the model that tells meanings, where they are needed.
        model: reference of the model whose size counts, where there is one.
    """
    rows = rows.select(RECORD_SCHEMA.names).sort_by(
        [("id", "ascending"), ("source", "ascending"), ("position", "ascending")]
    )
    records = table_to_records(rows)
    found: dict[str, Any] = {"rows": len(records)}
    if embedder is not None and records:
        found |= _meaning(records, config, seed, task, embedder)
    judged = without_confirmed(records)
    labels = [label_values(record) for record in judged]
    texts = [prompt_of(record)[:_MOST_CHARACTERS] for record in judged]
    if config.find_suspects:
        ids = [record.id for record in judged]
        suspects, count = unlikely_labels(texts, labels, ids, below=config.suspect_below, seed=seed)
        found["suspects"], found["judged"] = [asdict(suspect) for suspect in suspects], count
    if config.find_quirks:
        quirks, telling = surface_quirks(texts, labels, seed)
        found["quirks"] = [{**asdict(quirk), "gain": quirk.gain, "is_quirk": quirk.is_quirk} for quirk in quirks]
        found["telling_words"] = [asdict(words) for words in telling]
    if model is not None:
        found["parameters"] = parameter_count(model)
    return pa.table({"judgement": [json.dumps(found)]})


def _meaning(
    records: Sequence[Record], config: QualityConfig, seed: int, task: str | None, embedder: str
) -> dict[str, Any]:
    texts = [f"{prompt_of(record)}\n{answer_of(record) or ''}"[:_MOST_CHARACTERS].strip() for record in records]
    loaded = load_embedder(embedder)
    embedded = loaded.embed(texts)
    found: dict[str, Any] = {
        "cut_by_embedder": embedded.cut,
        "clusters": clusters(embedded.vectors, texts, config, seed),
    }
    if task is not None:
        cosines = embedded.vectors @ loaded.embed([task]).vectors[0]
        found["relevance"] = relevance(cosines, records, config.irrelevant_below)
    return found


def relevance(cosines: NDArray[np.float32], records: Sequence[Record], below: float) -> dict[str, Any]:
    """Mean, share below the threshold, deciles, a histogram and the least relevant rows."""
    order = np.argsort(cosines, kind="stable")
    counts, _ = np.histogram(cosines, bins=40, range=(-1, 1))
    return {
        "mean": float(cosines.mean()),
        "below": below,
        "irrelevant_rate": float((cosines < below).mean()),
        "deciles": [float(value) for value in np.quantile(cosines, np.linspace(0, 1, 11))],
        "histogram": counts.tolist(),
        "least": [
            {"id": records[at].id, "cosine": float(cosines[at]), "text": prompt_of(records[at])[:_SHOWN_CHARACTERS]}
            for at in order[:_EXAMPLES].tolist()
        ],
    }


def clusters(
    vectors: NDArray[np.float32], texts: Sequence[str], config: QualityConfig, seed: int
) -> dict[str, Any] | None:
    """Sizes and evenness (entropy over the highest) of k-means clusters, with the text nearest to each centre.

    None for fewer rows than clusters.
    """
    from sklearn.cluster import KMeans

    different = len(np.unique(vectors, axis=0))
    number = min(config.clusters, different)
    if number < 2:
        return None
    fitted = KMeans(number, n_init=2, random_state=seed).fit(vectors)
    sizes = np.bincount(fitted.labels_, minlength=number)
    nearest = [int(np.argmax(vectors @ centre)) for centre in fitted.cluster_centers_]
    order = np.argsort(-sizes, kind="stable")
    return {
        "evenness": evenness(sizes.tolist()),
        "sizes": sizes[order].tolist(),
        "examples": [texts[nearest[place]][:_SHOWN_CHARACTERS] for place in order.tolist()],
    }
