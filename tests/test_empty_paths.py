"""Settings that name a file, a folder or a model refuse an empty text, which as a path is the current folder."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

import raytune_ft
from raytune_ft.core.config import Config, explain
from raytune_ft.core.errors import ArtifactError
from raytune_ft.core.storage import Location

PLACES = re.compile(
    r"_(?:path|dir)s?$|^(?:sources|test_sources|benchmarks|corrections|tokenizer|endpoint_tokenizer)$|_(?:model|embedder)$"
)
"""Names of settings that lead somewhere."""
NO_PLACES = {"metric_for_best_model", "stratify_by"}


def kinds(base: type[Config]) -> Iterator[type[Config]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


def places() -> list[tuple[type[Config], str]]:
    for module in pkgutil.walk_packages(raytune_ft.__path__, "raytune_ft."):
        if ".config" in module.name:
            importlib.import_module(module.name)
    found = {(kind, name) for kind in kinds(Config) for name in kind.model_fields if PLACES.search(name)}
    found = {(kind, name) for kind, name in found if name not in NO_PLACES and kind.__module__.startswith("raytune_ft")}
    return sorted(found, key=lambda item: (item[0].__qualname__, item[1]))


@pytest.mark.parametrize(("kind", "name"), places())
def test_an_empty_place_is_refused(kind: type[Config], name: str) -> None:
    if (kind.__name__, name) == ("DistillationConfig", "model_path"):
        pytest.skip("none means a student that is made of the teacher")
    given: Any = [""] if "tuple" in str(kind.model_fields[name].annotation) else ""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({name: given})
    lines = explain(caught.value, kind).splitlines()
    assert any(re.search(rf": {name}(?:\.0)?: must not be empty", line) for line in lines), lines


def test_an_empty_path_is_no_location() -> None:
    with pytest.raises(ArtifactError, match=r"a path is empty; .*the current folder is \."):
        Location.at("")
