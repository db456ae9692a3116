"""In which language a record is written, told by py3langid's naive Bayes model; too short a text is undecided."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection
from typing import Any

from raytune_ft.core.errors import ConfigError, MissingDependencyError
from raytune_ft.core.records import Record

_LEAST_LETTERS = 20
_MOST_CHARACTERS = 2000
_CERTAIN = 0.5
_UNLIKELY = 0.1
_NO_PROSE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|https?://\S+|[\d_]+", re.DOTALL)


def language_scores(text: str) -> dict[str, float]:
    """Share of belief in each language by ISO 639 code, the most likely first; empty under 20 letters.

    Code in backticks, addresses and digits do not count, nor what stands behind the first 2,000 characters.
    """
    prose = _NO_PROSE.sub(" ", text[: 2 * _MOST_CHARACTERS])[:_MOST_CHARACTERS]
    if sum(map(str.isalpha, prose)) < _LEAST_LETTERS:
        return {}
    return {language: float(share) for language, share in _identifier().rank(prose)}


def foreign(record: Record, languages: Collection[str]) -> tuple[str | None, bool]:
    """Why a record is in none of `languages` (None: it is in one), and whether that could not be told.

    Judged is what is trained on: the raw text, else the answers, and the whole conversation where those are too short.
    A record is foreign if one other language has most of the belief, and the wanted ones together next to none.
    """
    turns = record.messages + record.chosen
    scores = language_scores(record.text or "\n".join(m.content for m in turns if m.role == "assistant"))
    if not scores:
        scores = language_scores("\n".join(m.content for m in turns if m.role in {"user", "assistant"}))
    best = next(iter(scores), None)
    if best is None or scores[best] < _CERTAIN:
        return None, True
    if best in languages:
        return None, False
    if sum(scores[language] for language in languages) > _UNLIKELY:
        return None, True
    return f"language: {best}, wanted {', '.join(languages)}", False


def check_languages(languages: Collection[str]) -> None:
    """Refuses codes that the model does not know, before any row is read.

    Raises:
        ConfigError: if there is one.
        MissingDependencyError: if py3langid is not installed.
    """
    if languages:
        unknown = sorted(set(languages) - set(_identifier().labels))
        if unknown:
            known = ", ".join(sorted(_identifier().labels))
            raise ConfigError(f"languages: {', '.join(unknown)} cannot be told; known are {known}")


@functools.cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise MissingDependencyError(
            "languages: telling languages needs py3langid, which is not installed; pip install 'py3langid>=0.4'"
        ) from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
