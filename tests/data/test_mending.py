from __future__ import annotations

from raytune_ft.data.mending import (
    fix_encoding,
    normalize_capitalization,
    normalize_whitespace,
    remove_control_characters,
)


def test_mojibake_is_repaired_and_wording_stays() -> None:
    assert fix_encoding("cafÃ©") == "café"
    assert fix_encoding("“quoted” &amp; ﬁne Ａ") == "“quoted” &amp; ﬁne Ａ"
    assert fix_encoding("e\u0301") == "é"


def test_control_characters_go_and_line_ends_become_newlines() -> None:
    assert remove_control_characters("a\x00b\r\nc\rd\te\x1b[31mf\ufeff") == "ab\nc\nd\tef"
    assert remove_control_characters("a\x0cb\x0bc\x85d\u2028e\x1ef") == "a\nb\nc\nd\ne\nf"


def test_blanks_inside_become_one_and_indentation_and_code_stay() -> None:
    text = "a  b\tc \n    indented  here\n\n\n\nend\n```\nx  =  1\n\n\n\ny\n```\nlast\u00a0word"
    assert normalize_whitespace(text) == ("a b c\n    indented here\n\nend\n```\nx  =  1\n\n\n\ny\n```\nlast word")


def test_lines_in_capitals_become_sentences_and_the_rest_stays() -> None:
    assert normalize_capitalization("WHY DO I SEE THIS? IT IS BROKEN!") == "Why do I see this? It is broken!"
    for text in ("NASA and the USA", "THE END", "SELECT NAME FROM USERS WHERE ID = 3;", "Why do I SEE THIS?", "1 2 3"):
        assert normalize_capitalization(text) == text
    assert normalize_capitalization("Fine.\nTHIS LINE IS LOUD\n```\nTHIS IS CODE OR SO\n```") == (
        "Fine.\nThis line is loud\n```\nTHIS IS CODE OR SO\n```"
    )
