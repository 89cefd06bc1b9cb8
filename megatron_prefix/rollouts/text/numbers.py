r"""The number that a text ends in, where it is plainly one.

Read are whole numbers, decimals with or without thousands commas, powers of ten and fractions, also
as LaTeX writes them. Whatever else LaTeX can say (roots, intervals, symbols) is no number here.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

# A sign that follows a digit, a letter or a bracket is a minus or a dash between two things, unless
# it stands at a number and away from what is before it.
_SIGN = r"(?:(?<![\w.)\]])(?<![\w.)\]] )[-+] ?|(?<=\s)[-+](?=[\d.$]))?"
_DIGITS = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_OVER = rf"(?<![/\d.,]){_DECIMAL} ?/ ?{_DECIMAL}(?![\d.]*\d| ?/)"
_NUMBER = re.compile(rf"(?P<sign>{_SIGN})\$?(?:(?P<whole>\d+) +)?(?P<value>{_OVER}|{_DECIMAL})")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_MARK = "####"
_NO_NUMBER = re.compile(r"[\\^_{}()\[\]*/<>|!]")
_LONGEST = 400
"""Digits; an exponent beyond it would take the memory of the machine."""
_WORDS = r"\\(?:text|textbf|mathrm|mathbf|textrm|mbox)"

# What LaTeX and typesetting write in place of plain signs, in the order in which it is replaced.
_PLAIN = [
    (re.compile(r"[\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d]"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[!,;: ]|~|[\u00a0\u2009\u202f]"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:left|right|displaystyle)\b|\\[()\[\]]"), ""),
    (re.compile(r"\^(?:\\circ|\{\\circ\})|\u00b0"), ""),
    # A unit: words, perhaps to a power.
    (re.compile(rf"{_WORDS}\s*\{{[^{{}}\d]*\}}(?:\^(?:\d|\{{-?\d+\}}))?"), " "),
    (re.compile(rf"{_WORDS}\s*\{{([^{{}}]*)\}}"), r" \1 "),
    (re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2 "),
    (re.compile(r"\\[dtc]?frac\s*(\d)\s*(\d)"), r" \1/\2 "),
    (re.compile(r"(\d) ?(?:\\times|\\cdot|\u00d7) ?10\^(?:\{(-?\d+)\}|(-?\d))"), r"\1e\2\3"),
    (re.compile(r"(?<![\w.,^/}])10\^(?:\{(-?\d+)\}|(-?\d))"), r"1e\1\2"),
]


def find_number(text: str) -> Fraction | None:
    r"""The number that a text ends in; None where it ends in none.

    It is what the last `####` or `\boxed{}` gives, whichever comes last, else the last number.
    """
    boxed, mark = _last_boxed(text), text.rfind(_MARK)
    if boxed is not None and boxed[0] > mark:
        return plain_number(boxed[1])
    if mark >= 0:
        return _after_mark(text[mark + len(_MARK) :])
    return _last_number(_plain(text))


def plain_number(text: str) -> Fraction | None:
    """The number of a text that holds one number and no other mathematics."""
    text = _plain(text.strip().strip("$")).rpartition("=")[2].strip(" .:$%")
    found = list(_NUMBER.finditer(text))
    if len(found) != 1 or _NO_NUMBER.search(text[: found[0].start()] + text[found[0].end() :]):
        return None
    return _value(found[0])


def number_of_answer(answer: object) -> Fraction | None:
    """The number that an answer is; None where it is not plainly one."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float, str)):
        return None
    if not isinstance(answer, str):
        answer = str(answer)  # the shortest decimal that is this float
    if _MARK in answer or _last_boxed(answer) is not None:
        return find_number(answer)
    return plain_number(answer)


def _after_mark(text: str) -> Fraction | None:
    """What follows `####`: the number that its line begins with or comes to; behind a heading of
    words, the last number."""
    line = _plain(text.strip().partition("\n")[0]).strip("* $")
    first = _NUMBER.match(line)
    if first is None:
        return _last_number(_plain(text))
    if "=" in line:
        return _last_number(line.rpartition("=")[2])
    return None if re.match(r"[\\^*]", line[first.end() :]) else _value(first)


def _last_number(text: str) -> Fraction | None:
    found = [*_NUMBER.finditer(text)]
    return _value(found[-1]) if found else None


def _last_boxed(text: str) -> tuple[int, str] | None:
    r"""Where the last `\boxed{}` stands and what is in it; its braces may hold others."""
    found = [*_BOXED.finditer(text)]
    if not found:
        return None
    depth, start = 1, found[-1].end()
    for end in range(start, len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return found[-1].start(), text[start:end]
    return None


def _plain(text: str) -> str:
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    parts = [Decimal(part.replace(",", "")) for part in match["value"].split("/")]
    if any(abs(part.adjusted()) > _LONGEST for part in parts) or not all(parts[1:]):
        return None
    value = Fraction(parts[0])
    if len(parts) == 2:
        value = (int(match["whole"]) if match["whole"] else 0) + value / Fraction(parts[1])
    elif match["whole"]:  # two numbers beside each other, of which the second one counts
        return value
    return -value if match["sign"].startswith("-") else value
