"""Real data through the real loaders into training: what is learned from each is more than how
often its tokens occur.
"""

import json

import numpy as np
import pytest

from jaxdistill.core.build import Role, experiment, spec
from jaxdistill.core.optim import Optimizer
from jaxdistill.core.sharding import MeshShape
from jaxdistill.data import ner
from jaxdistill.data.ner import Conversations
from jaxdistill.data.rationales import SVAMP
from jaxdistill.data.text import PackedJson, Text
from jaxdistill.data.tokenizers import ByteTokenizer
from jaxdistill.evals.text import TextEval
from jaxdistill.models.language.lm import LM
from jaxdistill.run import loop

pytestmark = pytest.mark.shared_data


def lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def shakespeare(shared, folder):
    return Text(
        path=str(shared / "tinyshakespeare" / "input.txt"),
        length=128,
        batch_size=16,
    ), "sft:SFT"


def gsm8k(shared, folder):
    data = dict(
        path=str(shared / "gsm8k"),
        prompt_key="question",
        response_key="answer",
        length=512,
        batch_size=4,
    )
    return PackedJson(**data), "sft:SFT"


def svamp(shared, folder):
    sizes = dict(prompt_length=344, label_length=32, rationale_length=136)
    return SVAMP(
        path=str(shared / "svamp"), batch_size=4, **sizes
    ), "step_by_step:StepByStep"


def wnut17(shared, folder):
    for split, name in (
        ("train", "emerging.dev.conll"),
        ("test", "emerging.test.annotated"),
    ):
        rows = [
            {"text": text, "entities": pairs}
            for text, pairs in ner.conll(shared / "wnut17" / name)
            if pairs
        ]
        lines(folder / f"{split}.jsonl", rows)
    return Conversations(
        path=str(folder), length=512, batch_size=4
    ), "universalner:UniversalNER"


@pytest.mark.full
@pytest.mark.parametrize("source", [shakespeare, gsm8k, svamp, wnut17])
def test_held_out_perplexity_falls_below_that_of_the_frequencies(
    source, shared_data, tmp_path
):
    """Against the frequencies of the training targets, one added to each so that none is zero."""
    data, method = source(shared_data, tmp_path)
    network = LM(
        vocab=ByteTokenizer.vocab,
        dim=64,
        mlp=128,
        heads=4,
        depth=2,
        max_length=512,
    )
    config = experiment(
        steps=20,
        mesh=MeshShape(fsdp=1),
        data=data,
        method=spec(f"methods.language.{method}"),
        roles=dict(
            student=Role(model=network, optimizer=Optimizer(lr=3e-3, warmup=5))
        ),
        evaluation=TextEval(samples=32, batch=32),
    )
    (row,) = loop.run(config, tmp_path / "run")["models"]
    targets = lambda rows: rows["tokens"][rows["mask"] > 0]
    counts = 1 + np.bincount(
        targets(data.arrays("train")), minlength=ByteTokenizer.vocab
    )
    nll = -np.log(counts / counts.sum())[targets(data.evaluation(32))]
    assert row["perplexity"] < np.exp(nll.mean())
    print(
        f"{source.__name__}: {row['perplexity']:.2f} against {np.exp(nll.mean()):.2f}"
    )
