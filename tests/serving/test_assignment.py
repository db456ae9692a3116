"""Who gets which variant: the same for the same subject, everywhere, and in the shares that were asked for."""

from __future__ import annotations

import hashlib
import hmac
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from raytune_ft.core.errors import ConfigError
from raytune_ft.serving.assignment import assign
from raytune_ft.serving.config_ab import ABTestConfig


def made(*, name: str = "t", **settings: object) -> ABTestConfig:
    return ABTestConfig(**{"variants": {"base": 0.5, "new": 0.5}, "log_path": "log", "name": name, **settings})


def counted(test: ABTestConfig, subjects: int = 20_000) -> dict[str, int]:
    found = dict.fromkeys(test.variants, 0)
    for number in range(subjects):
        found[assign(test, f"user-{number}").variant] += 1
    return found


@given(st.text(min_size=1))
def test_a_subject_keeps_its_variant_and_its_name_in_the_log(subject: str):
    first, again = assign(made(), subject), assign(made(), subject)
    assert first == again
    assert first.sticky
    assert len(first.subject) == 16


def test_the_place_of_a_subject_is_the_head_of_its_hmac():
    # By hand, with the standard library: the first 64 bits decide, the next 64 are the subject's name in the log.
    digest = hmac.new(b"t\0pepper", b"ada", hashlib.sha256).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    found = assign(made(salt="pepper"), "ada")
    assert found.variant == ("base" if place < 0.5 else "new")
    assert found.subject == digest[8:16].hex()


@pytest.mark.parametrize(
    "shares", [{"base": 0.5, "new": 0.5}, {"base": 0.9, "new": 0.1}, {"base": 0.5, "new": 0.3, "other": 0.2}]
)
def test_variants_get_their_shares(shares: dict[str, float]):
    found = counted(made(variants=shares))
    expected = [20_000 * share for share in shares.values()]
    assert stats.chisquare([found[name] for name in shares], expected).pvalue > 1e-4


def test_groups_of_two_tests_have_nothing_to_do_with_each_other():
    one, other = made(name="one"), made(name="two")
    both = [[0, 0], [0, 0]]
    for number in range(20_000):
        subject = f"user-{number}"
        both[assign(one, subject).variant == "new"][assign(other, subject).variant == "new"] += 1
    assert stats.chi2_contingency(both).pvalue > 1e-4
    salted = made(name="one", salt="another")
    assert any(assign(one, str(n)).subject != assign(salted, str(n)).subject for n in range(3))


def test_the_order_of_variants_in_the_file_changes_nothing():
    shares = {"base": 0.5, "new": 0.3, "other": 0.2}
    turned = dict(reversed(shares.items()))
    for number in range(500):
        subject = str(number)
        assert assign(made(variants=shares), subject) == assign(made(variants=turned), subject)


def test_another_process_gives_the_same_variants():
    program = (
        "from raytune_ft.serving.assignment import assign\n"
        "from raytune_ft.serving.config_ab import ABTestConfig\n"
        "test = ABTestConfig(name='t', variants={'base': 0.5, 'new': 0.5}, log_path='log')\n"
        "print(*(assign(test, f'user-{n}').variant for n in range(50)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [assign(made(), f"user-{n}").variant for n in range(50)]


@pytest.mark.parametrize("subject", [None, ""])
def test_without_a_subject_each_request_is_its_own(subject: str | None):
    found = [assign(made(), subject) for _ in range(200)]
    assert len({one.subject for one in found}) == 200
    assert {one.variant for one in found} == {"base", "new"}
    assert not any(one.sticky for one in found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variants": {"base": 0.5, "new": 0.4}}, "variants: the shares must sum to 1; these sum to 0.9"),
        ({"variants": {"base": 1.5, "new": -0.5}}, "variants: base: a share must be above 0 and below 1"),
        ({"variants": {"base": 1.0}}, r"variants: must have at least 2 items"),
        ({"variants": {"base": 0.5, "new": float("nan")}}, "variants.new: must be a finite number"),
        ({"control": "old"}, "control: 'old' is none of the variants"),
        ({"log_path": None}, "log_path: must be text"),
        ({"log_path": "s3://bucket/log"}, "object stores cannot append"),
        ({"name": "a test"}, "name: "),
        ({"weights": {}}, "weights: there is no such setting"),
    ],
)
def test_settings_that_make_no_test_are_refused_in_one_line(settings: dict[str, object], said: str):
    with pytest.raises(ConfigError, match=said) as refused:
        made(**settings)
    assert refused.value.exit_code == 2
    assert len(str(refused.value).splitlines()) == 1
