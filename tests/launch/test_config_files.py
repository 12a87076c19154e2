"""Config files with mistakes in their own Python: the refusal names file and line, in one line."""

import re

import pytest

from jaxdistill.core.types import Refused
from jaxdistill.data.digits import Digits
from jaxdistill.methods.trajectory.flow_matching import FlowMatching
from launch._command import load_config, override

MISTAKES = {
    "a name": (
        "def get_config():\n    return experment()\n",
        r"c\.py:2: NameError: name 'experment' is not defined",
    ),
    "an import": (
        "import no_such_module\n",
        r"c\.py:1: ModuleNotFoundError: No module named 'no_such_module'",
    ),
    "a bracket": ("def get_config(:\n", r"c\.py:1: "),
    "no function": ("x = 1\n", r"defines no get_config\(\)"),
    "nothing returned": (
        "def get_config():\n    pass\n",
        r"get_config\(\) returns NoneType, expected core\.build\.experiment",
    ),
    "an unknown field": (
        "from jaxdistill.core.build import spec\n"
        "def get_config():\n    return spec('core.optim:Ema', raet=0.9)\n",
        r"c\.py: core\.optim:Ema has no field 'raet'; did you mean 'rate'",
    ),
    "a value": (
        "from jaxdistill.core.build import spec\n"
        "def get_config():\n    return spec('core.optim:Ema', rate='x')\n",
        r"c\.py: rate='x': expected a number",
    ),
    "no argument": (
        "def get_config(x):\n    return 1 / 0\n",
        r"c\.py:1: TypeError: .*missing 1 required positional argument",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_refuses_in_one_line(name, tmp_path):
    text, wanted = MISTAKES[name]
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(Refused) as refusal:
        load_config(str(tmp_path / "c.py"))
    assert re.search(wanted, str(refusal.value)), str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_names_a_near_one_and_walks_no_disk(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"--config=/nope\.py: no such file"):
        load_config("/nope.py")
    with pytest.raises(Refused, match=r"did you mean 'configs/toy/dmd2\.py'"):
        load_config("configs/toy/dmd22.py")


@pytest.mark.parametrize("text", ["-" * 20_000 + "1", "[" * 20_000, "(" * 500])
def test_a_value_that_cannot_be_parsed_is_refused(text):
    from jaxdistill.core.build import experiment

    config = experiment(
        data=Digits(),
        method=FlowMatching(),
        roles={},
    )
    with pytest.raises(Refused) as refusal:
        override(config, "steps", text)
    assert len(str(refusal.value)) < 300
