import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.net import make_net
from jaxdistill.core.step import bind
from jaxdistill.core.types import Ctx
from jaxdistill.data.ner import Conversations, conversation, encode
from jaxdistill.data.tokenizers import ByteTokenizer
from jaxdistill.methods.language.sft import SFT
from jaxdistill.methods.language.universalner import UniversalNER
from jaxdistill.models.language.lm import LM

NET = make_net(LM(vocab=259, dim=8, mlp=8, heads=2, depth=1, max_length=320))
PARAMS = {"student": NET.init(jax.random.key(0))}


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    path = tmp_path_factory.mktemp("ner") / "a.jsonl"
    path.write_text(
        '{"text": "Ada ran", "entities": [["Ada", "who"]]}\n'
        '{"text": "In Rome", "entities": [["Rome", "where"]]}\n'
    )
    return Conversations(
        path=str(path), heldout=0.0, length=320, batch_size=2
    ).batch(0, slice(None))


@functools.partial(jax.jit, static_argnums=0)
def loss(method, batch):
    return method.loss(
        bind({"student": NET}, PARAMS), Ctx(batch, jax.random.key(0), 0, {})
    )


def test_only_answers_are_learnt(batch):
    logits = jax.nn.log_softmax(
        jax.jit(NET.apply)(
            PARAMS["student"], batch["tokens"], segments=batch["segments"]
        )[:, :-1]
    )
    nll = -np.take_along_axis(np.asarray(logits), batch["tokens"][:, 1:, None], -1)[
        ..., 0
    ]
    out = loss(UniversalNER(), batch)
    on = batch["mask"][:, 1:] > 0
    np.testing.assert_allclose(out.loss, nll[on].sum(), rtol=1e-4)
    assert (
        out.count
        == batch["mask"].sum()
        == 2 * len("[]") + len('["Ada"]') + len('["Rome"]') + 4
    )
    assert out.loss == loss(SFT(), batch).loss


def test_labels_of_questions_do_not_matter(batch):
    """The gradient in the logits is zero wherever the next token is no answer's."""
    grad = jax.grad(
        lambda z: (
            UniversalNER()
            .loss(
                SimpleNamespace(student=lambda t, **_: z),
                Ctx(batch, jax.random.key(0), 0, {}),
            )
            .loss
        )
    )
    moved = np.abs(np.asarray(grad(jnp.zeros((2, 320, 259))))).sum(-1)[:, :-1] > 0
    np.testing.assert_array_equal(moved, batch["mask"][:, 1:] > 0)


def test_answers_stop_at_the_end_sign():
    codec = ByteTokenizer()
    script = [*b'["Ada"]', 258, 65, 66]
    prompt, _ = encode(
        [conversation("Ada ran", {})[0], ("What describes who in the text?", "")],
        codec,
    )

    def net(tokens, *_, method="", mask=None, cache=None):
        if method:  # an empty cache: how many tokens it has written
            return jnp.int32(0)
        return jnp.broadcast_to(
            jax.nn.one_hot(jnp.array(script)[cache], 259), (1, tokens.shape[1], 259)
        ), cache + 1

    written = UniversalNER(answer_length=10).answer(net, prompt, 258)
    assert bytes(written.tolist()) == b'["Ada"]'
