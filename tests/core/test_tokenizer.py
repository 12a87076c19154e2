import ast
import json
from pathlib import Path

import numpy as np
import pytest

from jaxdistill.core.tokenizer import stored_tokenizer
from jaxdistill.core.types import Refused
from tests import damage

ROOT = Path(__file__).parents[2]
CODE = """from pathlib import Path
from transformers import PreTrainedTokenizerFast
Path({!r}).write_text("ran")
class Mine(PreTrainedTokenizerFast): pass
class MyConfig: pass
"""


@pytest.fixture
def folder(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(
        models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?")
    )
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="?"
    ).save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def configure(file, **changes):
    file.write_text(
        json.dumps(
            (json.loads(file.read_text()) if file.exists() else {}) | changes
        )
    )


def test_a_sound_folder_loads_with_options(folder):
    with damage.quiet(folder):
        found = stored_tokenizer(folder, padding_side="right")
    assert found("a b")["input_ids"] == [0, 1] and found.padding_side == "right"


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (
            "tokenizer_config.json",
            {
                "auto_map": {"AutoTokenizer": ["mine.Mine", None]},
                "tokenizer_class": "Mine",
            },
        ),
        (
            "tokenizer_config.json",
            {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}},
        ),
        (
            "tokenizer_config.json",
            {
                "auto_map": {
                    "AutoTokenizer": ["other/repository--mine.Mine", None]
                },
                "tokenizer_class": "Mine",
            },
        ),
        (
            "tokenizer_config.json",
            {"auto_map": ["mine.Mine", None], "tokenizer_class": "Mine"},
        ),
        (
            "config.json",
            {
                "auto_map": {"AutoTokenizer": ["mine.Mine", None]},
                "model_type": "mine",
            },
        ),
        (
            "config.json",
            {"auto_map": {"AutoConfig": "mine.MyConfig"}, "model_type": "mine"},
        ),
    ],
)
def test_code_of_a_folder_is_never_run_and_nobody_is_asked(
    folder, monkeypatch, file, changes
):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *_: asked.append(1) or "y")
    (folder / "mine.py").write_text(CODE.format(str(folder / "ran")))
    if (
        file == "config.json"
    ):  # where transformers looks when the tokenizer's own file says no class
        (folder / "tokenizer_config.json").unlink()
    configure(folder / file, **changes)
    with damage.quiet(folder):
        message = damage.outcome(lambda: stored_tokenizer(folder), str(folder))
    assert not asked and not (folder / "ran").exists()
    assert message is not None or "AutoTokenizer" not in changes["auto_map"]


def test_damage_is_one_line(folder):
    """Any damaged file is refused in one line, whatever transformers and its Rust code raise."""
    sound = {file: file.read_bytes() for file in sorted(folder.iterdir())}
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(60):
        for file, data in sound.items():
            file.write_bytes(data)
        file = sorted(sound)[i % len(sound)]
        damage.damage(file, rng)
        with damage.quiet(folder):
            refused += (
                damage.outcome(lambda: stored_tokenizer(folder), str(folder))
                is not None
            )
    assert 20 <= refused < 60


def test_refuses_what_is_no_folder(folder, tmp_path):
    for path in (tmp_path / "none", folder / "tokenizer.json"):
        with pytest.raises(Refused, match="no such folder"):
            stored_tokenizer(path)


def test_every_from_pretrained_stays_local_and_runs_no_code():
    found = 0
    for file in (
        f
        for part in ("jaxdistill", "launch", "tools")
        for f in sorted((ROOT / part).rglob("*.py"))
    ):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
                "from_pretrained",
                "from_config",
                "pipeline",
            ):
                options = {
                    word.arg: getattr(word.value, "value", None)
                    for word in node.keywords
                }
                place = f"{file.relative_to(ROOT)}:{node.lineno}"
                assert (
                    options.get("local_files_only") is True
                    and options.get("trust_remote_code") is False
                ), place
                found += 1
    assert found >= 2
