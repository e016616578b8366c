"""The answer in what a model wrote: a number, one of some choices, or yes and no.

An answer that is marked (``#### 18``, ``\\boxed{18}``, ``The answer is 18.``) counts before one that is only there.
What is named to be rejected ("A is wrong. So it is D") is no answer. Where nothing can be taken for one the result is
None, which is wrong to every question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

_NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-−]?)\$?(?P<inner>[-−]?)(?P<digits>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?"
    r"(?:\s?/\s?(?P<denominator>\d+)(?!\d*[./]\d))?"
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_HASHES = re.compile(r"####\s*([^\n]*)")
_STATED = re.compile(r"\banswer\b(?:[^.\n:=]{0,40}?\b(?:is|are|was|be)\b\s*:?|[^.\n:=]{0,40}[:=])\s*", re.IGNORECASE)
_ANY = r"(?:\(?\b[A-J]\b\)?|[-−]?\$?\d[\d,.]*\d\b|[-−]?\$?\d\b|\b(?:yes|no|true|false)\b)"
_REJECTED = re.compile(
    rf"\b(?:not|neither|nor|never|rather than|instead of|excludes?|eliminates?|rules? out)\s+(?:the\s+answer\s+)?"
    rf"(?:(?:option|choice)\s+)?{_ANY}"
    rf"|(?:\b(?:option|choice)\s+)?{_ANY}[).,:]?\s+(?:is|was|are|would be|must be|seems|looks)\s+"
    r"(?:(?:also|clearly|obviously|therefore|thus|definitely|probably|simply|just)\s+)?"
    r"(?:not\b(?!\s+only)|wrong|incorrect|false|impossible|out|ruled out|eliminated|excluded)\b[^.;,\n]*"
    rf"|(?:\b(?:option|choice)\s+)?{_ANY}[).,:]?\s+(?:isn't|wasn't|can't|cannot|doesn't|does not|won't)\b[^.;,\n]*",
    re.IGNORECASE,
)
_YES_NO = re.compile(r"\b(yes|no|true|false)\b", re.IGNORECASE)


def extract_number(text: str) -> Fraction | None:
    """The number that a chain of thought arrives at: after ``####``, boxed, stated as the answer, or else the last one.

    >>> extract_number("16 - 3 - 4 = 9 eggs, 9 * $2 = $18. The answer is $18.00.")
    Fraction(18, 1)
    >>> extract_number("I cannot say.") is None
    True
    """
    text = _without_rejected(_plain(text))
    if (marked := _HASHES.search(text)) and (found := next(_numbers(marked[1]), None)) is not None:
        return found  # what follows the mark is no longer about this question
    for part in _marked(text):
        if found := list(_numbers(part.rpartition("=")[2])) or list(_numbers(part)):
            return found[0]
    return next(iter(list(_numbers(text))[::-1]), None)


def extract_yes_no(text: str) -> bool | None:
    """Yes or no: boxed, stated as the answer, or else the first or the last word. True and false count as well.

    >>> extract_yes_no("Yes, it does."), extract_yes_no("It is hard to know.")
    (True, None)
    """
    text = _without_rejected(_plain(text))
    for part in _marked(text):
        if found := _YES_NO.search(part):
            return _is_yes(found)
    first, last = re.match(rf"\W*{_YES_NO.pattern}", text, re.IGNORECASE), list(_YES_NO.finditer(text))[-1:]
    if first:
        return _is_yes(first)
    return _is_yes(last[0]) if last and not re.search(r"\w", text[last[0].end() :]) else None


def extract_choice(text: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice: boxed, stated as the answer (also by its text), or else a letter that begins or ends.

    Args:
        text: what the model wrote.
        choices: the texts of choices A, B, C, ...

    >>> extract_choice("The answer is (B).", ["red", "green"]), extract_choice("green", ["red", "green"])
    ('B', 'B')
    """
    text, letters = _without_rejected(_plain(text)), "".join(chr(ord("A") + i) for i in range(len(choices)))
    one = f"[{letters}]"
    either = f"[{letters}{letters.lower()}]"
    at_start = (
        rf"\W*?(?:(?:option|choice)\s+)?(?:\(({either})\)|({one})(?=[).:,;]|\s*$|\s*\n|\s+(?:because|since|is)\b))"
    )
    for part in _marked(text):
        found = re.match(at_start, part) or re.search(rf"\(({either})\)|\b(?:[Oo]ption|[Cc]hoice)\s+({one})\b", part)
        if found or re.fullmatch(rf"\W*({either})\W*", part):
            return (found[1] or found[2] if found else re.sub(r"\W", "", part)).upper()
        if named := _named(part, choices, letters):
            return named
    found = (
        re.match(at_start, text, re.IGNORECASE if re.fullmatch(r"\W*\w\W*", text) else 0)
        or re.search(rf"(?:\(({either})\)|\b({one}))\W*$", text)
        or re.search(rf"\b(?:[Oo]ption|[Cc]hoice)\s+(?:\(({either})\)|({one})\b)", text)
    )
    return (found[1] or found[2]).upper() if found else _named(text, choices, letters, whole=True)


def _plain(text: str) -> str:
    """Without what only sets type: Markdown emphasis, LaTeX dollars and text, fractions in LaTeX."""
    text = re.sub(r"\*\*|__|`", "", text)
    text = re.sub(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r"\1", text)
    return text.replace("{,}", ",").replace(r"\$", "$").replace(r"\%", "%").strip()


def _without_rejected(text: str) -> str:
    """Without answers that are named to be rejected: "A is wrong", "not 5 but 7"."""
    return _REJECTED.sub(" ", text).strip()


def _marked(text: str) -> Iterator[str]:
    """What is boxed or stated as the answer, the last first: who changes their mind means the later one."""
    yield from (found[1] for found in list(_BOXED.finditer(text))[::-1])
    for found in list(_STATED.finditer(text))[::-1]:
        yield re.split(r"\.\s|\n", text[found.end() :], maxsplit=1)[0].strip()


def _numbers(text: str) -> Iterator[Fraction]:
    for found in _NUMBER.finditer(text):
        digits, decimals, denominator = found["digits"], found["decimals"], found["denominator"]
        if (digits is None and decimals is None) or (denominator is not None and int(denominator) == 0):
            continue
        value = Fraction((digits or "0").replace(",", "") + (decimals or "")) / int(denominator or 1)
        yield -value if found["sign"] or found["inner"] else value


def _is_yes(found: re.Match[str]) -> bool:
    return found[1].lower() in ("yes", "true")


def _named(text: str, choices: Sequence[str], letters: str, whole: bool = False) -> str | None:
    """The letter of the only choice that ``text`` contains, or is."""

    def bare(part: str) -> str:
        return part.strip().strip(".").casefold()

    found = [
        (letter, bare(choice))
        for letter, choice in zip(letters, choices, strict=True)
        if bare(choice) == bare(text)
        or (not whole and re.search(rf"(?<!\w){re.escape(bare(choice))}(?!\w)", bare(text)))
    ]
    longest = [pair for pair in found if not any(pair[1] in other and pair[1] != other for _, other in found)]
    return longest[0][0] if len(longest) == 1 else None
