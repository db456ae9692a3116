import pytest

from raytune_ft.core.grammar import agreeing, number_of


@pytest.mark.parametrize(("number", "said"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows")])
def test_one_of_a_kind_is_singular(number: int, said: str) -> None:
    assert number_of(number, "row") == said


def test_words_agree_with_the_number() -> None:
    assert [number_of(number, "row is", "rows are") for number in (1, 3)] == ["1 row is", "3 rows are"]
    assert [agreeing(number, "has", "have") for number in (0, 1)] == ["have", "has"]
