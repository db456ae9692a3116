from __future__ import annotations

import sys

import pytest

from raytune_ft.core.errors import ConfigError, MissingDependencyError
from raytune_ft.core.records import Message, Record
from raytune_ft.data import language
from raytune_ft.data.language import check_languages, foreign, language_scores

GERMAN = "Der schnelle braune Fuchs springt über den faulen Hund und läuft davon."
ENGLISH = "The quick brown fox jumps over the lazy dog and runs away from it."


def asked(prompt: str, answer: str) -> Record:
    return Record(messages=(Message("user", prompt), Message("assistant", answer)))


def test_a_text_of_another_language_is_foreign() -> None:
    assert foreign(Record(text=GERMAN), ["en"]) == ("language: de, wanted en", False)
    assert foreign(Record(text=GERMAN), ["en", "de"]) == (None, False)
    assert foreign(Record(text=ENGLISH), ["en"]) == (None, False)


def test_the_answer_decides_and_a_short_one_is_judged_with_its_prompt() -> None:
    assert foreign(asked(ENGLISH, GERMAN), ["en"])[0] == "language: de, wanted en"
    assert foreign(asked(GERMAN, "42"), ["en"])[0] == "language: de, wanted en"
    assert foreign(asked("Say it.", "Ja."), ["en"]) == (None, True)


def test_code_addresses_and_digits_are_no_prose() -> None:
    assert (
        language_scores("```\nfor eintrag in liste: ausgabe(eintrag)\n``` 1234567890 https://example.de/der-hund") == {}
    )


def test_a_sum_with_few_words_is_kept_as_undecided() -> None:
    assert foreign(asked("?", "Tamika drove 8*3=24 miles, Logan drove 6*5=30 miles"), ["en"]) == (None, True)


def test_unknown_codes_are_refused_with_the_known_ones() -> None:
    check_languages(["en", "de"])
    with pytest.raises(ConfigError, match=r"languages: english, xx cannot be told; known are .*\ben\b"):
        check_languages(["xx", "english"])


def test_without_the_library_the_command_that_installs_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    language._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'py3langid>=0\.4'"):
        check_languages(["en"])
    check_languages([])
