"""Methods that compare tokens say in one line that teacher and student have different vocabularies,
before anything runs; where only the padding of their tables differs, they compare and write the ids
that both have.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.build import Role, experiment
from jaxdistill.core.net import make_net
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx, Refused
from jaxdistill.data.language import Markov
from jaxdistill.evals.text import TextEval
from jaxdistill.methods.architecture.prune_then_distil import PruneThenDistil
from jaxdistill.methods.language.gkd import GKD
from jaxdistill.methods.language.kd import KD
from jaxdistill.methods.language.multi_teacher import EnsembleKD, RoutedKD
from jaxdistill.methods.language.paced import Paced
from jaxdistill.methods.language.recursive_meta import RecursiveMeta
from jaxdistill.methods.language.rlad import RLAD
from jaxdistill.methods.language.sequence_kd import SequenceKD
from jaxdistill.methods.language.tsd_kd import TSDKD
from jaxdistill.models.language.lm import LM
from jaxdistill.objectives.divergence import JensenShannon
from jaxdistill.run import loop

METHODS = {
    "KD": KD(),
    "GKD": GKD(prompt_length=4),
    "TSDKD": TSDKD(prompt_length=4),
    "Paced": Paced(prompt_length=4),
    "PruneThenDistil": PruneThenDistil(),
    "RLAD": RLAD(prompt_length=4),
}


def config(method, **roles):
    sizes = lambda vocab: Role(
        model=LM(vocab=vocab, dim=8, mlp=8, heads=2, depth=1),
        init="fresh",
    )
    return experiment(
        steps=1,
        mesh=MeshShape(fsdp=1),
        data=Markov(vocab=12),
        method=METHODS[method],
        roles={"teacher": Role(init="exact"), "student": sizes(13), **roles},
    )


@pytest.mark.parametrize("method", METHODS)
def test_one_line(method, tmp_path):
    said = "config.roles.teacher: a vocabulary of 12 tokens, the student's has 13; "
    said += f"{method} compares tokens"
    for dry in (True, False):
        with pytest.raises(Refused, match=said) as error:
            loop.run(config(method), tmp_path / "run", dry_run=dry, progress=False)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_runs_inside_are_not_trained_first(tmp_path):
    """A teacher that would have to be trained, with another vocabulary: refused before it is."""
    path = Path(__file__).parents[2] / "run/tiny.py"
    found = importlib.util.spec_from_file_location("tiny", path)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    inner = module.get_config("language")
    roles = dict(
        teacher=Role(init="@first"),
        student=Role(model=LM(vocab=99), init="fresh"),
    )
    made = experiment(
        steps=1,
        mesh=module.spec_mesh(),
        data=inner.data,
        method=METHODS["KD"],
        runs={"first": inner},
        roles=roles,
    )
    with pytest.raises(
        Refused, match="a vocabulary of 16 tokens, the student's has 99"
    ):
        loop.run(made, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


SIZES = dict(dim=8, mlp=8, heads=2, depth=1)


def models(**vocab):
    """Random networks, by role, with tables of these lengths."""
    made = {role: LM(vocab=size, **SIZES) for role, size in vocab.items()}
    nets = {role: make_net(config, config=config) for role, config in made.items()}
    params = {
        role: jax.tree.map(lambda w: 3 * w, net.init(jax.random.key(i)))
        for i, (role, net) in enumerate(nets.items())
    }
    return nets, params


def cut(params, vocab):
    """The weights without the padding of the table and of the head."""
    table = params["embed"]["embedding"][:vocab]
    head = params["unembed"]["kernel"][:, :vocab]
    return {**params, "embed": {"embedding": table}, "unembed": {"kernel": head}}


@pytest.mark.parametrize(
    ("low", "high"), [(12, 16), (151_936, 152_064), (50_257, 50_304)]
)
def test_padding_is_no_other_vocabulary(low, high):
    sizes = lambda size: SimpleNamespace(config=SimpleNamespace(vocab=size))
    for teacher, student in ((low, high), (high, low), (low, low)):
        KD().check({"teacher": sizes(teacher), "student": sizes(student)}, None)


@pytest.mark.parametrize(
    ("low", "high"), [(12, 13), (128_256, 151_936), (8, 16), (259, 300)]
)
def test_another_vocabulary_is_refused(low, high):
    sizes = lambda size: SimpleNamespace(config=SimpleNamespace(vocab=size))
    for teacher, student in ((low, high), (high, low)):
        found = f"a vocabulary of {teacher} tokens, the student's has {student}"
        with pytest.raises(Refused, match=f"config.roles.teacher: {found}; KD "):
            KD().check({"teacher": sizes(teacher), "student": sizes(student)}, None)


@pytest.mark.full
@pytest.mark.parametrize("longer", ["teacher", "student"])
@pytest.mark.parametrize(
    "method",
    [
        KD(),
        KD(divergence=JensenShannon(), top_k=3),
        KD(chunk=5),
        GKD(),
        TSDKD(candidates=3),
        EnsembleKD(),
        RecursiveMeta(),
        RoutedKD(),
    ],
    ids=repr,
)
def test_tables_of_different_lengths_are_cut_to_the_common_ids(method, longer):
    """Loss and gradient are those of the networks without the padding."""
    vocab = {"student": 12, "teacher": 12, "teacher1": 12, longer: 16}
    nets, params = models(**vocab)
    plain = {role: make_net(LM(vocab=12, **SIZES)) for role in nets}
    tokens = jax.random.randint(jax.random.key(9), (3, 6), 0, 12)
    batch = {
        "tokens": tokens,
        "mask": jnp.ones((3, 6)),
        "domain": jnp.arange(3) % 2,
    }

    def value(nets, params):
        ctx = Ctx(batch, jax.random.key(0), jnp.int32(0), {})
        run = lambda p: method.loss(bind(nets, {**params, "student": p}), ctx).loss
        return jax.jit(jax.value_and_grad(run))(params["student"])

    (padded, grads), (wanted, plain_grads) = (
        value(nets, params),
        value(plain, {role: cut(p, 12) for role, p in params.items()}),
    )
    np.testing.assert_allclose(padded, wanted, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        cut(grads, 12),
        plain_grads,
    )


@pytest.mark.parametrize(
    ("writer", "method"),
    [
        ("student", GKD(prompt_length=2)),
        ("teacher", SequenceKD(prompt_length=2, sample_temperature=1.0)),
        ("old", RLAD(prompt_length=2, group=2)),
    ],
)
def test_padding_is_never_written(writer, method):
    """A writer that likes its padding best: what it writes are ids that the others have, too."""
    vocab = {
        "student": 12,
        "teacher": 12,
        **({"old": 12} if writer == "old" else {}),
        writer: 16,
    }
    nets, params = models(**vocab)
    tokens = jax.random.randint(jax.random.key(9), (2, 40), 0, 12)
    batch = {"tokens": tokens, "mask": jnp.ones((2, 40))}

    def call(*args, method="__call__", cache=None, **how):
        out = nets[writer].apply(
            params[writer],
            *args,
            method=method,
            **({} if cache is None else {"cache": cache}),
            **how,
        )
        if method != "__call__" or cache is None:
            return out
        return out[0].at[..., 12:].add(50.0), out[1]

    call.config = nets[writer].config
    bound = SimpleNamespace(**{**vars(bind(nets, params)), writer: call})
    written = jax.jit(
        lambda: method.rollout(
            bound, Ctx(batch, jax.random.key(0), jnp.int32(0), {})
        )
    )()
    assert (written["tokens"] < 12).all() and len(
        set(np.asarray(written["tokens"][:, 2:]).ravel().tolist())
    ) > 3


@pytest.mark.full
def test_a_run_with_padded_tables(tmp_path):
    """Distilled, evaluated and written with: teacher 32 rows, student 24, of 20 tokens."""
    model = lambda vocab: LM(
        vocab=vocab, dim=8, mlp=8, heads=2, depth=1, max_length=12
    )
    made = experiment(
        steps=2,
        tensorboard=False,
        mesh=MeshShape(fsdp=1),
        data=Markov(vocab=20, length=12, batch_size=4, order=1),
        method=GKD(prompt_length=4),
        roles=dict(
            teacher=Role(model=model(32), init="random"),
            student=Role(model=model(24)),
        ),
        evaluation=TextEval(samples=4, batch=4),
    )
    rows = {
        row["name"]: row
        for row in loop.run(made, tmp_path / "run", progress=False)["models"]
    }
    assert np.isfinite(
        [
            rows["student"][name]
            for name in ("perplexity", "kl", "rollout_reverse_kl")
        ]
    ).all()
