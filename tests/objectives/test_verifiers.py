import random
from decimal import Decimal
from fractions import Fraction

import pytest

from jaxdistill.objectives.verifiers import exact_text, find, last_number, number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so it is 42.", 42),
        ("#### 1,234", 1234),
        ("none", None),
        ("", None),
        ("5 or 6!", 6),
        # a minus: a sign, an operator, a range
        ("3-5", 5),
        ("3 - 5", 5),
        ("3\u20135", 5),
        ("3 -5", -5),
        ("is -5", -5),
        ("-5", -5),
        ("= -5", -5),
        ("=-5", -5),
        ("(-5)", -5),
        ("(3)-5", 5),
        ("x-5", 5),
        ("2^{3}-5", 5),
        ("50%-5", 5),
        ("3*-5", -5),
        ("minus \u22125.5", Decimal("-5.5")),
        ("is \u20135", -5),
        ("- 5 apples", 5),
        ("2020-01-05", 5),
        # fractions
        ("1/2", Fraction(1, 2)),
        ("is -1/2", Fraction(-1, 2)),
        ("10/4", Decimal("2.5")),
        ("on 12/31/2024", 2024),
        ("on 1/2/3", 3),
        ("1/0", 0),
        ("1/2.5", Decimal("2.5")),
        (r"\boxed{\frac{1}{2}}", Fraction(1, 2)),
        (r"-\dfrac{3}{4}", Fraction(-3, 4)),
        (r"\frac{x}{2}", 2),
        ("12 / 4 = 3", 3),
        # signs of thousands
        ("1,234.50", Decimal("1234.5")),
        ("1,234,567", 1234567),
        ("12,34,567", 1234567),
        ("1\u202f234\u202f567", 1234567),
        ("1_000", 1000),
        ("1'000", 1000),
        ("1,2,3", 3),
        ("1, 234", 234),
        ("1,2345", 2345),
        ("10,", 10),
        ("1,234,", 1234),
        # units
        ("$5", 5),
        ("-$5", -5),
        ("$-5", -5),
        (r"\$1,000.00 a day", 1000),
        ("5\u20ac", 5),
        ("50%", 50),
        ("12.5 %", Decimal("12.5")),
        # decimals and powers
        (".5", Decimal("0.5")),
        ("-.5", Decimal("-0.5")),
        ("wait...5", 5),
        ("version 1.2.3", 3),
        ("1e3", 1000),
        ("1.5E-3", Decimal("0.0015")),
        ("1.5e\u22123", Decimal("0.0015")),
        ("2 x 10^3", 2000),
        ("2\u00d710^{-3}", Decimal("0.002")),
        (r"2 \times 10^3", 2000),
        ("2*10**3", 2000),
        ("1e99999999999999999999999", None),
        ("0.1", Fraction(1, 10)),
        ("1" * 400, int("1" * 400)),
        ("1" * 5000 + "/3", None),
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert number(text) == value
    assert last_number("", text, text) == (value is not None)
    assert number(f"first 7 things, then {text}") == (
        7 if value is None and not any(c.isdigit() for c in text) else value
    )


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("7 then 1,234.50 dollars", "1234.5", 1),
        ("42 is not 43", "42", 0),
        ("minus -3", "-3", 1),
        ("none", "0", 0),
        ("5", "", 0),
        ("", "5", 0),
        ("", "", 0),
        ("5", "none", 0),
        ("3-5", "5", 1),
        ("3-5", "-5", 0),
        ("1/2", "0.5", 1),
        ("1/2", "2", 0),
        ("1/3", "0.3333333333333333", 0),
        ("0.1", "1/10", 1),
        ("1" * 400, "1" * 400, 1),
        ("1" * 400, "1" * 399 + "2", 0),
        ("9" * 10_000, "9" * 10_000 + ".0", 1),
        ("9" * 10_000, "9" * 9_999 + "8", 0),
        ("9007199254740993", "9007199254740992", 0),  # the same in float64
        ("1e999999", "1e999998", 0),  # both infinite in float64
        ("1e999999", "1/2", 0),
    ],
)
def test_last_number(response, answer, right):
    assert last_number("2 + 2", response, answer) == right


@pytest.mark.parametrize(
    "piece",
    [
        "1",
        "1,",
        ",111",
        "1,111",
        "1/",
        "1-",
        "-",
        "$",
        "1e",
        "1 ",
        " ",
        "1.",
        ".",
        "(",
        "1 x 10^",
        "\\frac{1",
        "\\frac{1}{2}",
    ],
)
def test_long_texts_end(piece):
    """100 kB of anything: what is the square of the length takes minutes."""
    text = piece * (100_000 // len(piece))
    assert last_number("", text + " and 5", "5") == 1
    number(text)


PIECES = [
    "1",
    "0",
    "23",
    ",",
    ".",
    "/",
    "-",
    "\u2212",
    "e",
    "x10^",
    "(",
    ")",
    " ",
    "$",
    "%",
    "\\frac{1}{0}",
    "{",
    "}",
    "\u0663",
]


def test_any_text_has_a_number_or_none():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        value = number(text)
        assert value is None or value == value
        assert last_number("", text, text) == (value is not None)
        assert (value is None) <= (
            not any(c.isdigit() for c in text) or "e" in text or "x" in text
        ), text


def test_exact_text():
    assert (
        exact_text("", " a  b\n", "a b") == 1 and exact_text("", "ab", "a b") == 0
    )


@pytest.mark.parametrize(
    "name",
    ["", ":", "a", "a:", ":f", "..a:f", "a b:f", "a:f:g", "a/b.py:f", "a:f()"],
)
def test_names_that_are_none(name):
    with pytest.raises(ValueError, match="no name of a function in a file"):
        find(name)


def test_the_nearest_name_is_said():
    with pytest.raises(
        ValueError, match="has no function 'last_numer'; did you mean 'last_number'"
    ):
        find("objectives.verifiers:last_numer")
    with pytest.raises(ValueError, match=r"no module 'objectives\.no_such_file'"):
        find("objectives.no_such_file:f")
