"""Which base model belongs beside a tuned one, so that a table shows what tuning changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from raytune_ft.core.artifacts import Artifact
from raytune_ft.core.storage import Location
from raytune_ft.models.fetching import SCHEME
from raytune_ft.models.references import resolve_model

logger = logging.getLogger("raytune_ft")


def with_base(models: Mapping[str, str]) -> dict[str, str]:
    """The models (label to path) with the base of the first tuned one before them, unless it is among them already.

    Raises:
        ModelError: if a path leads to no model.
    """
    present = {key for path in models.values() for key in (_place(path), resolve_model(path).digest)}
    for path in models.values():
        base = base_of(path)
        if base is None:
            continue
        if "base" in models or _place(base) in present:
            break
        if not _is_there(base):
            logger.warning("%s: its base %s is not there any more, so the table goes without it", path, base)
            break
        if resolve_model(base).digest in present:
            break
        logger.info("Evaluation: %s, the base of %s, is measured beside it", base, path)
        alone = len(models) == 1
        return {"base": base, **({"tuned": path} if alone else {name: models[name] for name in models})}
    return dict(models)


def base_of(path: str) -> str | None:
    """The model that an adapter stands on, or that an artifact of ours was made from; None where neither is known."""
    found = resolve_model(path)
    if found.adapter is not None:
        return found.base
    return _made_from(found.artifact) if found.artifact is not None else None


def _made_from(artifact: Artifact) -> str | None:
    return next((parent.where for parent in artifact.manifest.parents if parent.role == "model"), None)


def _is_there(path: str) -> bool:
    return path.startswith(SCHEME) or "://" in path or Location.at(path).exists() or path.count("/") == 1


def _place(path: str) -> str:
    return path if path.startswith(SCHEME) else str(Location.at(path))
