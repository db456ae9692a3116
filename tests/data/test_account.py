from __future__ import annotations

import pytest

from raytune_ft.core.errors import RunError
from raytune_ft.data.account import Account

TRAIN = {"folder": "train", "rows": 3, "formats": {"text": 3}, "tokens": 9, "supervised": 5, "longest": 4, "chat": "f"}
REJECTED = {"folder": "rejected", "rows": 2, "formats": {"text": 2}, "reasons": {"too long": 2}}


def test_an_account_adds_up_files() -> None:
    account = Account.of(8, [TRAIN, TRAIN, REJECTED])
    assert str(account) == "8 rows in + 0 made = 6 out + 2 rejected (2 too long)"
    numbers = account.numbers()
    assert (numbers["rows_train"], numbers["rows_test"], numbers["tokens_train"]) == (6, 0, 18)
    assert (numbers["tokens_longest"], numbers["formats"], numbers["chat_fingerprint"]) == (4, {"text": 8}, "f")


@pytest.mark.parametrize("rows_in", [4, 6])
def test_an_account_that_does_not_balance_fails_the_run(rows_in: int) -> None:
    with pytest.raises(RunError, match="does not balance"):
        Account.of(rows_in, [TRAIN, REJECTED])
