from __future__ import annotations

import json
from collections import Counter

import pytest

from raytune_ft.data.config import PersonalData
from raytune_ft.data.redaction import passes_iban, passes_luhn, redact, redact_text, redact_value

ALL = tuple(PersonalData)
# Written in parts, so that no scanner takes these made-up keys for real ones.
KEYS = [
    "sk-" + "proj-" + "abcDEF123" * 4,
    "sk-" + "ant-" + "api03-" + "abcDEF123" * 4,
    "hf_" + "aBcDeFgHiJ" * 3 + "abcd",
    "ghp_" + "a1B2" * 9,
    "AKIA" + "IOSFODNN7EXAMPLE",
    "AIza" + "Sy" + "a1B2c3D4e5" * 3 + "xyz",
    "xoxb-" + "123456789012-abcdef",
    "sk_" + "live_" + "a1B2c3D4" * 3,
    "glpat-" + "a1B2c3D4e5" * 2,
]


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("Write to jane.doe+news@mail.example.co.uk.", "Write to [EMAIL]."),
        ("Mail <müller@bücher.de>", "Mail <[EMAIL]>"),
        ("Call (415) 555-2671 or 415.555.2671", "Call [PHONE] or [PHONE]"),
        ("+1 415 555 2671, +49 30 901820, +44 (0)20 7946 0958", "[PHONE], [PHONE], [PHONE]"),
        ("+14155552671", "[PHONE]"),
        ("Visa 4111 1111 1111 1111, Amex 3782-822463-10005.", "Visa [CARD], Amex [CARD]."),
        ("5500005555555559", "[CARD]"),
        ("Jo,4111111111111111,5500005555555559,12/26", "Jo,[CARD],[CARD],12/26"),
        ("Pay DE89 3704 0044 0532 0130 00 AND wait", "Pay [IBAN] AND wait"),
        ("GB82WEST12345698765432.", "[IBAN]."),
        ("NO93 8601 1117 947 GB82 WEST 1234 5698 7654 32", "[IBAN] [IBAN]"),
        (f"key={KEYS[0]}", "key=[API_KEY]"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\n-----END RSA PRIVATE KEY-----", "[API_KEY]"),
    ],
)
def test_personal_data_becomes_its_placeholder(text: str, redacted: str) -> None:
    assert redact(text, ALL)[0] == redacted


@pytest.mark.parametrize("key", KEYS)
def test_keys_of_the_usual_makers_are_known(key: str) -> None:
    assert redact(f"use '{key}'", [PersonalData.API_KEY]) == ("use '[API_KEY]'", Counter(api_key=1))


@pytest.mark.parametrize(
    "text",
    [
        "@app.route decorates, and icon@2x.png is an image",
        "git clone git@github.com:org/name",
        "4111 1111 1111 1112 fails Luhn's check",
        "1646615806005 + 2566267207 = 4212883012996",
        "0000 0000 0000 0000",
        "DE88 3704 0044 0532 0130 00 has wrong check digits",
        "0,4111111111111111 and 0.4111111111111111",
        "1990-2000, 3.14159265358979, 12-31-2024, 192.168.10.254",
        "2 + 3456 7890 = 3 and 1,234,567,890",
        "pages 100-200-3000, ISBN 978-3-16-148410-0",
        "sk-learn-is-a-library-with-a-long-name",
        "In 2023 there were 5551234 people",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert redact(text, ALL) == (text, Counter())


def test_only_the_kinds_that_are_asked_for_are_replaced_and_counted() -> None:
    text = "a@example.com b@example.com (415) 555-2671"
    assert redact(text, [PersonalData.EMAIL]) == ("[EMAIL] [EMAIL] (415) 555-2671", Counter(email=2))


def test_check_digits_worked_by_hand() -> None:
    # 7992739871: doubled from the right 1->2 8->8.. sum 67, so the check digit is 3.
    assert passes_luhn("79927398713")
    assert [digit for digit in range(10) if passes_luhn(f"7992739871{digit}")] == [3]
    assert passes_iban("NO9386011117947")
    assert not passes_iban("NO93860111179471")


def test_values_inside_json_are_replaced_and_the_value_stays_json() -> None:
    found: Counter[str] = Counter()
    value = {"to": ["a@example.com"], "card": 4111111111111111, "n": 12345678901234, "ok": True, "none": None}
    assert redact_value(value, ALL, found) == {**value, "to": ["[EMAIL]"], "card": "[CARD]"}
    assert found == Counter(email=1, card=1)


def test_a_long_text_without_any_is_quick_to_pass() -> None:
    text = "abc-def." * 50_000 + "a" * 100_000 + "1 2 " * 20_000
    assert redact(text, ALL) == (text, Counter())


def test_arguments_that_are_json_text_stay_json_text() -> None:
    found: Counter[str] = Counter()
    calls = '[{"function": {"arguments": "{\\"card\\": 4111111111111111}"}}]'
    assert redact_value(calls, ALL, found) == '[{"function": {"arguments": "{\\"card\\": \\"[CARD]\\"}"}}]'
    assert redact_value("{not json: a@b.org", ALL, found) == "{not json: [EMAIL]"
    assert redact_value('{"a":  1}', ALL, found) == '{"a":  1}'


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ('{"john.doe@example.com": "admin"}', '{"[EMAIL]": "admin"}'),
        ('{"a":"x@y.com","a":"2"}', '{"a":"[EMAIL]","a":"2"}'),
        ('{\n  "mail":"a@b.com",\n  "v":1.50\n}', '{\n  "mail":"[EMAIL]",\n  "v":1.50\n}'),
        ('{"a": "so:\\na@b.com", "b": "\\n+49 30 901820"}', '{"a": "so:\\n[EMAIL]", "b": "\\n[PHONE]"}'),
        (' [4111111111111111,5500005555555559, 1e99]', ' ["[CARD]","[CARD]", 1e99]'),
        ('{"a": "\\ud83d a@b.com", "b": "\\ud83d"}', '{"a": "? [EMAIL]", "b": "\\ud83d"}'),
        ('{"a": "m\\u00fcller@b.com", "b": "caf\\u00e9"}', '{"a": "[EMAIL]", "b": "caf\\u00e9"}'),
    ],
)  # fmt: skip
def test_json_keeps_its_form_and_loses_personal_data_in_keys_and_repeated_ones_too(text: str, redacted: str) -> None:
    found: Counter[str] = Counter()
    assert redact_text(text, ALL, found) == redacted
    assert json.loads(redacted)
    assert found


def test_keys_of_a_value_that_become_the_same_are_all_kept() -> None:
    value = {"a@b.com": 1, "[EMAIL]": 2, "c@d.com": 3}
    assert redact_value(value, ALL, Counter()) == {"[EMAIL]": 1, "[EMAIL] (2)": 2, "[EMAIL] (3)": 3}


@pytest.mark.parametrize(
    "number",
    [
        "+33 1 23 45 67 89",
        "+31 6 12345678",
        "+61 2 9374 4000",
        "+353 1 234 5678",
        "+54 9 11 1234 5678",
        "(415) 555 2671",
    ],
)
def test_numbers_with_a_short_area_code_are_phone_numbers(number: str) -> None:
    assert redact(f"Call {number}.", [PersonalData.PHONE])[0] == "Call [PHONE]."


@pytest.mark.parametrize("text", ["order 33 1 23 45 67 89", "2024-01-05 10:30", "415 555 2671 pieces", "+1 2 3 4 5"])
def test_orders_and_dates_are_no_phone_numbers(text: str) -> None:
    assert redact(text, [PersonalData.PHONE])[0] == text
