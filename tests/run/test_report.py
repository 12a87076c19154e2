"""The page at the end of a run: whatever a config holds is text on it."""

import html.parser

from PIL import Image

from jaxdistill.run.page import page
from jaxdistill.run.table import markdown_table

EVIL = "<script>alert('x')</script>\"&"


def test_values_of_configs_are_text(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    rows = [{"name": EVIL, "nfe": 1, EVIL: 0.5}, {"name": "student", "nfe": EVIL}]
    claim = dict(
        metric=EVIL,
        model=EVIL,
        against=EVIL,
        value=EVIL,
        baseline=2.0,
        bound=EVIL,
        better=EVIL,
        holds=True,
    )
    result = dict(
        config={"seed": EVIL, EVIL: EVIL},
        method=EVIL,
        steps=1,
        seconds=2.0,
        models=rows,
        claim=claim,
    )
    text = page(result, {EVIL: Image.new("L", (2, 2))}, tmp_path)
    tags = []
    texts = []
    alts = []

    class Reader(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            alts.extend(value for name, value in attrs if name == "alt")
            assert {name for name, _ in attrs} <= {
                "lang",
                "charset",
                "src",
                "alt",
                "class",
            }

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(text)
    assert "script" not in tags and alts == [EVIL, "losses"]
    whole = "".join(texts)
    assert (
        f"seed {EVIL}" in whole
        and f"Claim: {EVIL} of {EVIL}" in whole
        and "bound" not in whole
    )
    # title, heading, method, seed, claim's six, two cells and a column, caption, config's two
    assert whole.count("<script>") >= 12


def test_cells_of_markdown_are_text():
    table = markdown_table(
        ["name", "a|b"], [["x | y\n| z", "1\r\n2"], [r"c\|d", "2"]]
    )
    assert table.split("\n") == [
        "| name | a\\|b |",
        "| --- | --- |",
        r"| x \| y \| z | 1 2 |",
        r"| c\\\|d | 2 |",
    ]
