"""Variants of an instruction that keep its meaning: other words, typing mistakes, little words lost (English).

What the answer repeats, numbers, quotations, code and addresses are never touched: the answer must stay right.
"""

from __future__ import annotations

import random
import re

_VERBS_IN_A_LIST = """
add analyze answer arrange brainstorm calculate categorize change choose classify combine compare complete compose
compute construct convert correct count create deduce define describe design determine develop discuss draft edit
estimate evaluate explain extract fill find fix formulate generate give identify implement improve infer list make
name outline paraphrase predict prepare propose provide rank recommend reformulate rephrase replace research return
reverse rewrite select show simplify solve sort split state structure suggest summarize take tell transform translate
turn use verify write
"""
_VERBS = frozenset(_VERBS_IN_A_LIST.split())
_FRAMES = ("Please {}", "I would like you to {}", "Your task: {}")
_REQUESTS = ("Could you {}?", "Can you please {}?", "Would you {}?")
_QUESTION = re.compile(r"(?:what|who|whom|whose|which|when|where|why|how|is|are|do|does|did|can)\b", re.IGNORECASE)
_QUESTION_FRAMES = ("I have a question: {}", "Please answer this: {}", "Tell me: {}")
_SAME = {
    "give": "provide",
    "provide": "give",
    "calculate": "compute",
    "compute": "calculate",
    "generate": "produce",
    "summarize": "give a summary of",
}
_CONTRACTIONS = (
    ("do not", "don't"), ("does not", "doesn't"), ("did not", "didn't"), ("is not", "isn't"), ("are not", "aren't"),
    ("was not", "wasn't"), ("were not", "weren't"), ("cannot", "can't"), ("could not", "couldn't"),
    ("should not", "shouldn't"), ("would not", "wouldn't"), ("have not", "haven't"), ("has not", "hasn't"),
    ("it is", "it's"), ("I am", "I'm"), ("you are", "you're"), ("we are", "we're"), ("they are", "they're"),
    ("I have", "I've"), ("what is", "what's"),
)  # fmt: skip
_LITTLE = frozenset(
    ("a", "an", "the", "please", "just", "really", "very", "quite", "also", "then", "kindly", "actually", "basically")
)
_KEYS = {
    "q": "wa", "w": "qes", "e": "wrd", "r": "etf", "t": "ryg", "y": "tuh", "u": "yij", "i": "uok", "o": "ipl",
    "p": "ol", "a": "qsz", "s": "awdx", "d": "sefc", "f": "drgv", "g": "fthb", "h": "gyjn", "j": "hukm", "k": "jil",
    "l": "ko", "z": "asx", "x": "zsdc", "c": "xdfv", "v": "cfgb", "b": "vghn", "n": "bhjm", "m": "njk",
}  # fmt: skip
_PROTECTED = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|\"[^\"\n]*\"|“[^”\n]*”|\S*(?:://|@|[\d_{}<>=/\\])\S*", re.DOTALL)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_LEAST_LETTERS = 4


def reworded(text: str, rng: random.Random) -> str | None:
    """The text in slightly other words, or None where no rule fits.

    Rules are polite frames, contractions and verbs of the same meaning; `rng` chooses among all that fit.
    """
    found = [*_framed(text), *_other_verb(text), *_contracted(text)]
    return rng.choice(found) if found else None


def _framed(text: str) -> list[str]:
    word = _WORD.match(text)
    if word is None:
        return []
    if word[0].lower() in _VERBS:
        lowered = text[0].lower() + text[1:]
        found = [frame.format(lowered) for frame in _FRAMES]
        if "\n" not in text and re.fullmatch(r"[^.!?:]+\.?", text):
            found += [frame.format(lowered.rstrip(".")) for frame in _REQUESTS]
        return found
    if _QUESTION.match(text) and re.fullmatch(r"[^.!?\n]+\?", text):
        return [frame.format(text[0].lower() + text[1:]) for frame in _QUESTION_FRAMES]
    return []


def _other_verb(text: str) -> list[str]:
    word = _WORD.match(text)
    other = _SAME.get(word[0].lower()) if word else None
    if word is None or other is None:
        return []
    return [(other.capitalize() if text[0].isupper() else other) + text[word.end() :]]


def _contracted(text: str) -> list[str]:
    guarded = [match.span() for match in _PROTECTED.finditer(text)]
    found = []
    for long, short in _CONTRACTIONS:
        for before, after in ((long, short), (short, long)):
            # At the end of a clause there is no contraction: "the man it is." stays.
            hit = re.search(rf"\b{re.escape(before)}\b(?=\s+\w)", text, re.IGNORECASE)
            if hit and not any(low <= hit.start() < high for low, high in guarded):
                kept = after[0].upper() + after[1:] if hit[0][0].isupper() else after
                found.append(text[: hit.start()] + kept + text[hit.end() :])
    return found


def mistyped(text: str, rate: float, answer: str, rng: random.Random) -> str | None:
    """The text with typing mistakes in `rate` of its letters, at least one; None where no word may have one.

    Words of fewer than four letters, names in capitals, and words that `answer` repeats are left alone, as is the
    first letter of each word.
    """
    places = [
        place
        for low, high in _free_words(text, answer)
        if high - low >= _LEAST_LETTERS and text[low + 1 : high].islower()
        for place in range(low + 1, high)
    ]
    if not places:
        return None
    letters = list(text)
    wanted = max(1, round(rate * sum(map(str.isalpha, text))))
    for place in rng.sample(places, min(wanted, len(places))):
        letters[place] = rng.choice((_swapped, _dropped, _neighbour))(letters, place, rng)
    changed = "".join(letters)
    return changed if changed != text else None


def _swapped(letters: list[str], place: int, rng: random.Random) -> str:
    if place + 1 < len(letters) and letters[place + 1].isalpha() and len(letters[place + 1]) == 1:
        following, letters[place + 1] = letters[place + 1], letters[place]
        return following
    return _dropped(letters, place, rng)


def _dropped(letters: list[str], place: int, rng: random.Random) -> str:
    return ""


def _neighbour(letters: list[str], place: int, rng: random.Random) -> str:
    keys = _KEYS.get(letters[place])
    return rng.choice(keys) if keys else ""


def thinned(text: str, rate: float, answer: str, rng: random.Random) -> str | None:
    """The text with little words dropped, or swapped with the next, as many as `rate` of all words and at least one.

    None where there is no such word.
    """
    words = list(_free_words(text, answer))
    little = [place for place, (low, high) in enumerate(words) if text[low:high].lower() in _LITTLE]
    if not little:
        return None
    wanted = max(1, round(rate * len(_WORD.findall(text))))
    for place in sorted(rng.sample(little, min(wanted, len(little))), reverse=True):
        low, high = words[place]
        rest = text[high:]
        following = re.match(r" ([^\W\d_]+)", rest)
        # The word after may have been dropped already, or be one that must stay where it is.
        free = following and any(at == high + 1 for at, _ in words)
        if following and free and rng.random() < 0.5:
            text = f"{text[:low]}{following[1]} {text[low:high]}{rest[following.end() :]}"
        else:
            text = text[:low] + (rest[1:] if rest.startswith(" ") else rest)
    return text if text.strip() else None


def _free_words(text: str, answer: str) -> list[tuple[int, int]]:
    """Where the words are that may change: outside of what is protected, and not repeated by the answer."""
    repeated = {word.lower() for word in _WORD.findall(answer)} - _LITTLE
    guarded = [match.span() for match in _PROTECTED.finditer(text)]
    return [
        match.span()
        for match in _WORD.finditer(text)
        if match[0].lower() not in repeated
        and not any(low < match.end() and match.start() < high for low, high in guarded)
    ]
