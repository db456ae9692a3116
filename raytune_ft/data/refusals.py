"""Answers that refuse, or that are a model's boilerplate about itself: English patterns, bound to whole words.

A refusal counts where the answer begins with it (after a greeting word or an apology), and only if what cannot be
done is what assistants are asked for: "I'm sorry, but I can't come to your party" is a letter, not a refusal.
"""

from __future__ import annotations

import re

from raytune_ft.core.records import Message, Record

_HEAD = 400
"""Characters of an answer in which a refusal must begin; further on it may be a quotation or a story."""

_CANNOT = (
    r"(?:can(?:no|')?t|can not|could(?:n't| not)|won't|will not|am(?: not|n't) able to|'m not able to|am unable to"
    r"|'m unable to|do(?:n't| not) (?:feel comfortable|have the ability to)|'m not comfortable)"
)
_ASKED_FOR = (
    r"(?:help(?:ing)?(?: you)?(?: with| to| out|[.,!]|\Z)|assist(?:ing|ance)?\b|fulfil+(?:ing)?\b|comply(?:ing)?\b"
    r"|complet(?:e|ing) (?:this|that|your|the) (?:request|task)|provid(?:e|ing)\b|generat(?:e|ing)\b"
    r"|creat(?:e|ing) (?:content|that|this|such)|writ(?:e|ing) (?:that|this|such|content)|engag(?:e|ing) in\b"
    r"|answer(?:ing)? (?:that|this|your|the|such)\b|respond(?:ing)? to (?:that|this|your|such)\b"
    r"|discuss(?:ing)? (?:that|this|such)\b|do (?:that|this)\b|support (?:that|this|such)\b|participate in\b"
    r"|shar(?:e|ing) (?:that|this|such)\b|giv(?:e|ing) (?:you )?(?:advice|instructions)\b)"
)
_SORRY = (
    r"(?:(?:oh|no|hi|hello|thanks?|well|unfortunately|sorry|(?:i'm|i am|we're) (?:\w+ )?sorry|(?:i|my) apolog\w+)\b"
    r"[,.!:;–—-]*\s*(?:but |that |however,? |for (?:the|any) (?:confusion|inconvenience)[,.]? ?(?:but )?)?){0,3}"
)
_A_MODEL = (
    r"an? (?:AI|artificial intelligence|large language|language)(?: language)?(?: (?:model|assistant|chatbot|system))"
)
_MADE = r"(?:developed|trained|created|made) by \w+"
_REFUSAL = re.compile(
    rf"\A\W*{_SORRY}(?:as an? [\w ]{{2,40}}, )?i(?: {_CANNOT}|{_CANNOT})"
    rf"(?: (?:really|directly|currently|legally|ethically))?(?: to)? {_ASKED_FOR}",
    re.IGNORECASE,
)
_SELF = re.compile(
    rf"\b(?:as (?:{_A_MODEL}|an AI)(?: {_MADE})?, i\b|i(?:'m| am)(?: just| only| merely)? {_A_MODEL}\b"
    r"|my (?:knowledge cut-?off|training data (?:only )?(?:goes|extends|ends|was|is|includes))\b"
    r"|(?:as of|since|until) my (?:last|latest|knowledge|training) (?:knowledge )?(?:update|cut-?off)\b"
    rf"|i(?:'m| am) an? (?:AI|assistant|model) {_MADE}\b)",
    re.IGNORECASE,
)
_ABOUT_SELF = re.compile(
    r"\b(?:are you|who (?:are|made|created|trained|built|developed) you|your (?:name|creator|maker|training|knowledge)"
    r"|what are you|AI|artificial intelligence|language models?|chatbots?|role-?play|pretend)\b",
    re.IGNORECASE,
)


def refusal(answer: str) -> str | None:
    """The words with which an answer refuses; None if it does not."""
    match = _REFUSAL.search(answer[:_HEAD].replace("’", "'"))
    return match[0].strip() if match else None


def boilerplate(answer: str, asked: str) -> str | None:
    """What an answer says of itself as a model, although `asked` is not about that; None if nothing."""
    match = _SELF.search(answer[:_HEAD].replace("’", "'"))
    return match[0] if match and not _ABOUT_SELF.search(asked) else None


def refuses(record: Record) -> str | None:
    """Why the last answer of a record (of a preference: the chosen one) is rejected; None if it is not."""
    answer = _answer(record.chosen or record.messages)
    if answer is None:
        return None
    found = refusal(answer)
    if found:
        return f"refusal: {found}"
    asked = next((m.content for m in reversed(record.prompt) if m.role == "user"), "")
    found = boilerplate(answer, asked)
    return f"boilerplate: {found}" if found else None


def _answer(turns: tuple[Message, ...]) -> str | None:
    return turns[-1].content if turns and turns[-1].role == "assistant" else None
