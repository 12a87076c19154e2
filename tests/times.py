"""A pytest plugin: prints which test files take the time, compared with tests/times.json.

The figures are processor seconds: those of all threads, and of the processes that a test starts.
The table holds figures for both tiers of tools/test.sh. The median of the ratios to the table is
the speed of the machine, and is divided out. Nothing fails here. `bash tools/test.sh [--all]
--write_times` writes the run's figures into the table.
"""

import collections
import json
import os
import statistics
from pathlib import Path

import pytest

TABLE = Path(__file__).with_name("times.json")
SHOWN = 15  # files
ENOUGH = 10  # files of the table that a run must have for its median to be the machine's speed
BUDGETS = {  # folder -> processor seconds that a file of it may take
    "tests/methods/": 40,
    "tests/interop/families/": 15,
}

seconds = collections.Counter()  # of this run: file -> processor seconds
LAST = pytest.StashKey[float]()


def pytest_addoption(parser):
    parser.addoption(
        "--write_times",
        action="store_true",
        help="take this run's figures into tests/times.json",
    )


def processor() -> float:
    """Processor seconds of this process and its finished children so far."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def pytest_collection_finish(session):
    session.config.stash[LAST] = processor()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Attributes to this report the time since the previous one."""
    report = yield
    now = processor()
    report.processor_seconds = now - item.config.stash[LAST]
    item.config.stash[LAST] = now
    return report


def pytest_runtest_logreport(report):
    seconds[report.nodeid.partition("::")[0]] += getattr(
        report, "processor_seconds", 0.0
    )


def tier(config) -> str:
    return "quick" if "not full" in config.getoption("markexpr", "") else "all"


def pytest_terminal_summary(terminalreporter, config):
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    known = tables.get(tier(config), {})
    terminalreporter.section(f"slowest files, processor seconds ({tier(config)})")
    for line in lines(dict(seconds), known):
        terminalreporter.write_line(line)
    if config.getoption("--write_times"):
        measured = {file: round(used, 1) for file, used in seconds.items()}
        tables[tier(config)] = dict(sorted({**known, **measured}.items()))
        TABLE.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def lines(used: dict[str, float], known: dict[str, float]) -> list[str]:
    """The lines of the report: the slowest files of `used`, compared with the table's."""
    ratios = [used[file] / known[file] for file in used if known.get(file, 0) >= 1]
    speed = statistics.median(ratios) if len(ratios) >= ENOUGH else 1.0
    shown = []
    for file, value in sorted(used.items(), key=lambda pair: -pair[1])[:SHOWN]:
        line = f"{value:7.1f}  {file}"
        if file in known:
            line += f"  {value / speed / max(known[file], 0.1):.2f} x the table's {known[file]:g}"
        for folder, budget in BUDGETS.items():
            if file.startswith(folder) and value / speed > budget:
                line += f"; its budget is {budget}"
        shown.append(line)
    total = f"{sum(used.values()):7.1f}  all {len(used)} files"
    return (
        [*shown, total]
        if len(ratios) < ENOUGH
        else [*shown, f"{total}, speed {speed:.2f}"]
    )
