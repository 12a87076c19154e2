"""Config files with mistakes of their own: file and line are named, nothing else comes out."""

import re

import pytest

from jaxdistill.core.types import Refused
from launch._command import load_config

MISTAKES = {
    "a name": ("def get_config():\n    return experment()\n", r"c\.py:2: NameError: name 'experment' is not defined"),
    "an import": ("import no_such_module\n", r"c\.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
    "a bracket": ("def get_config(:\n", r"c\.py:1: "),
    "no function": ("x = 1\n", r"defines no get_config\(\)"),
    "nothing returned": ("def get_config():\n    pass\n", r"get_config\(\) returns NoneType, expected core\.build\.experiment"),
    "an unknown field": (
        "from jaxdistill.core.build import spec\ndef get_config():\n    return spec('core.optim:Ema', raet=0.9)\n",
        r"c\.py: core\.optim:Ema has no field 'raet'; did you mean 'rate'",
    ),
    "a value": (
        "from jaxdistill.core.build import spec\ndef get_config():\n    return spec('core.optim:Ema', rate='x')\n",
        r"c\.py: rate='x': expected a number",
    ),
    "no argument": ("def get_config(x):\n    return 1 / 0\n", r"c\.py:1: TypeError: .*missing 1 required positional argument"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_refuses_in_one_line(name, tmp_path):
    text, wanted = MISTAKES[name]
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(Refused) as refusal:
        load_config(str(tmp_path / "c.py"))
    assert re.search(wanted, str(refusal.value)), str(refusal.value)
    assert "\n" not in str(refusal.value)
