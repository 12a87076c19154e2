"""Distillation across tokenizers (arXiv:2503.20083) on a synthetic language with an exact teacher that reads two symbols at a time.

    python -m launch.train --config=configs/toy/cross_tokenizer_kd.py --workdir=runs/toy_cross_tokenizer_kd

2 CPU cores, about a minute. The teacher's tokens are pairs of the student's, 576 of them. The claim: after the same steps on
the same text, a student that sees how probable the teacher finds each pair has a lower held-out perplexity than one that
sees the tokens alone (`baseline`). `--config.method.temperature=1` compares the probabilities themselves,
`--config.method.name=methods.language.cross_tokenizer_kd:SpanULD --config.method.temperature=1` sorted ones.
"""

from configs.toy.kd import STUDENT
from jaxdistill.core.build import Role, experiment, spec

DATA = dict(vocab=24, length=48, batch_size=32)


def train(method, runs=None, claim=None, **roles):
    return experiment(
        steps=400,
        runs=runs or {},
        data=spec("data.two_tokenizers:Blocks", **DATA),
        method=method,
        roles=dict(student=STUDENT, **roles),
        evaluation=spec("evals.text:TextEval"),
        claim=claim,
    )


def get_config():
    return train(
        spec("methods.language.cross_tokenizer_kd:CrossTokenizerKD"),
        dict(baseline=train(spec("methods.language.sft:SFT"))),
        dict(metric="perplexity", model="student", baseline="baseline", better="lower", ratio=0.98),
        teacher=Role(init="exact"),
    )
