"""A refusal is one printable line, whatever characters the names in it contain."""

from jaxdistill.core.types import Refused, nearest, one_line


def test_a_refusal_is_one_printable_line():
    text = str(Refused("a\nb\r\nc\x1b[31m\u2028d\x00"))
    assert text == "a b c\ufffd[31m d\ufffd"


def test_what_others_say_is_cut_at_its_first_line():
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError("")) == "ValueError"
    assert one_line("x" * 400) == "x" * 300
    assert one_line("x" * 400, 20) == "x" * 20


def test_the_nearest_name_is_named():
    assert nearest("studnet", ["student", "teacher"]) == "; did you mean 'student'?"
    assert (
        nearest("x", ["student", "teacher"]) == "; expected one of student, teacher"
    )
