"""The report of slow files: growth is seen whatever the machine, budgets are named."""

from tests import times

KNOWN = {f"tests/test_{i}.py": 10.0 for i in range(times.ENOUGH)}


def test_a_file_that_grew_stands_out_on_a_slower_machine():
    used = dict.fromkeys(KNOWN, 20.0) | {"tests/test_0.py": 60.0}
    first, second, *_, last = times.lines(used, KNOWN)
    assert "tests/test_0.py  3.00 x the table's 10" in first
    assert "1.00 x the table's 10" in second
    assert "all 10 files, speed 2.00" in last


def test_with_few_files_the_speed_of_the_machine_is_not_known():
    (line, _) = times.lines({"tests/test_0.py": 20.0}, KNOWN)
    assert "2.00 x the table's 10" in line


def test_budgets_are_named():
    family = "tests/interop/families/test_x.py"
    method = "tests/methods/language/test_x.py"
    found = times.lines({family: 16.0, method: 39.0}, {})
    assert any(line.endswith(f"{family}; its budget is 15") for line in found)
    assert any(line.endswith(method) for line in found)
