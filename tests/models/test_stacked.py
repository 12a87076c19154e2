"""The protocol of stacked blocks: parts of a network, layers by themselves, unlike blocks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdistill.core.net import make_net, paths
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.denoisers.qwen_image import QwenImage
from jaxdistill.models.denoisers.sana import Sana
from jaxdistill.models.denoisers.wan import Wan
from jaxdistill.models.language.bert import Bert
from jaxdistill.models.language.gemma import Gemma2
from jaxdistill.models.language.lm import LM, Block, LMModule
from jaxdistill.models.language.neox import NeoX
from jaxdistill.models.language.t5 import T5, T5Encoder
from jaxdistill.models.layers import Residual, Runs, scan_layers
from jaxdistill.models.vision.clip import ClipText, ClipVision
from jaxdistill.models.vision.vit import ViT

DEPTH = 3
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 60, (2, 6))
TIMES = np.float32([0.3, 0.8])


# The first tier runs these families; the second runs all.
QUICK = ("lm", "dit", "qwen_image")


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


TEXT = {"text": normal(2, 5, 32)}
CASES = {
    "lm": (LM(depth=DEPTH, kv_heads=2), (TOKENS,)),
    "neox": (NeoX(depth=DEPTH), (TOKENS,)),
    "gemma": (Gemma2(depth=DEPTH), (TOKENS,)),
    "bert": (Bert(depth=DEPTH), (TOKENS,)),
    "t5": (T5(depth=DEPTH), (TOKENS, TOKENS[:, :4])),
    "t5_encoder": (T5Encoder(depth=DEPTH), (TOKENS,)),
    "vit": (ViT(depth=DEPTH), (normal(2, 8, 8, 1),)),
    "clip_text": (ClipText(depth=DEPTH), (TOKENS,)),
    "clip_vision": (ClipVision(depth=DEPTH), (normal(2, 8, 8, 3),)),
    "dit": (DiT(depth=DEPTH), (normal(2, 8, 8, 1), TIMES, np.arange(2))),
    "qwen_image": (QwenImage(depth=DEPTH), (normal(2, 8, 8, 4), TIMES, TEXT)),
    "sana": (Sana(depth=DEPTH, text_dim=32), (normal(2, 8, 8, 4), TIMES, TEXT)),
    "wan": (Wan(depth=DEPTH), (normal(2, 2, 4, 4, 4), TIMES, TEXT)),
}


FAMILIES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.full)
    for name in CASES
]


def weights(net):
    """Random weights, none of them zero."""

    def draw(key):
        leaves, tree = jax.tree.flatten(net.init(key))
        keys = jax.random.split(key, len(leaves))
        moved = [
            w + 0.1 * jax.random.normal(k, w.shape) for k, w in zip(keys, leaves)
        ]
        return jax.tree.unflatten(tree, moved)

    return jax.jit(draw)(jax.random.key(1))


def probe(cfg, inputs, check):
    """check(module, inputs) of random weights, as one program; its results as numpy."""
    net = make_net(cfg, config=cfg)

    @jax.jit
    def program(params):
        return check(nnx.merge(net.graphdef, params), *inputs)

    return jax.tree.map(np.asarray, program(weights(net)))


def close(a, b):
    """To rounding: the same sums in another order, of activations of size 1 to 10."""
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=2e-4), a, b
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers(name):
    """The composition, the first layers alone, a layer left out or replaced, all layers at once."""

    def check(module, *inputs):
        state, context = module.embed_inputs(*inputs)
        states = [state]
        for layer in range(DEPTH):
            states.append(module.apply_blocks(states[-1], context, [layer]).state)
        read = lambda before, inside, after: (before, inside, after)
        applied = module.apply_blocks(state, context, read=read, taps=(0,))
        before, inside, after = applied.reads
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *states[:-1])
        skipped = module.apply_blocks(state, context, [0, 2]).state
        return {
            "output": (module(*inputs), module.head(states[-1], context)),
            "last": (applied.state, states[-1]),
            "tap": (applied.features[0], module.feature(states[1], context)),
            "before": (before, stacked),
            "each": (module.apply_each(before, context), after),
            "first": (
                module.apply_blocks(state, context, range(2)).state,
                states[2],
            ),
            "skipped": (
                skipped,
                module.apply_blocks(states[1], context, [2]).state,
            ),
            "instead": (
                module.apply_blocks(state, context, instead={1: lambda s: s}).state,
                skipped,
            ),
            "inside": jax.tree.map(jnp.shape, inside),
        }

    cfg, inputs = CASES[name]
    found = probe(cfg, inputs, check)
    assert all(
        shape[0] == DEPTH
        for shape in (found["inside"].attended, found["inside"].neurons)
    )
    del found["inside"]
    for what, (ours, expected) in found.items():
        try:
            close(ours, expected)
        except AssertionError as error:
            raise AssertionError(what) from error


@pytest.mark.parametrize("name", FAMILIES)
def test_a_residual_is_added_to_the_output_of_attention(name):
    """A zero residual changes nothing; that of one layer changes what comes after that layer."""

    def check(module, *inputs):
        state, context = module.embed_inputs(*inputs)
        width = jax.tree.leaves(state)[0].shape[-1]

        def run(scales):
            shift = jnp.float32(scales)[:, None] * jnp.linspace(-1, 1, width)
            residual = Residual(shift, lambda shift, h: shift)
            return module.apply_blocks(state, context, taps=(0,), residual=residual)

        plain = module.apply_blocks(state, context, taps=(0,))
        return plain, run([0.0] * DEPTH), run([0.0, 0.0, 1.0])

    cfg, inputs = CASES[name]
    plain, zero, last = probe(cfg, inputs, check)
    close(plain.state, zero.state)
    close(plain.features, last.features)
    difference = jax.tree.leaves(plain.state)[0] - jax.tree.leaves(last.state)[0]
    assert np.abs(difference).max() > 1e-2


def test_no_residual_is_the_same_program():
    cfg, inputs = CASES["dit"]
    net = make_net(cfg, config=cfg)

    def through(params, **options):
        return nnx.merge(net.graphdef, params)(*inputs, **options)

    with_none = jax.make_jaxpr(lambda p: through(p, residual=None))(net.shapes)
    assert str(with_none) == str(jax.make_jaxpr(through)(net.shapes))


@pytest.mark.parametrize(
    "options",
    [
        dict(layers=[3]),
        dict(taps=(1,), layers=[0]),
        dict(instead={5: lambda state: state}),
    ],
)
def test_layers_that_are_not_there_are_refused(options):
    cfg, inputs = CASES["vit"]
    with pytest.raises(Refused, match=r"layers|taps|instead"):
        probe(cfg, inputs, lambda module, x: module(x, **options))


def test_a_language_model_reads_embeddings():
    def check(module, tokens):
        embedded = jnp.take(module.embed.embedding[...], tokens, axis=0)
        return module(embedded), module(tokens)

    for name in ("lm", "gemma"):
        close(*probe(*CASES[name], check))


@pytest.mark.parametrize("name", ["lm", "neox", "gemma", "bert"])
def test_scores_of_a_layer_make_its_attention(name):
    """Softmax of the scores under the mask, times the values, is what the block attended to."""

    def check(module, tokens):
        state, context = module.embed_inputs(tokens)
        read = lambda before, inside, after: (before, inside.attended)
        before, attended = module.apply_blocks(state, context, read=read).reads
        scores = module.scores(1, before[1], context)
        block = jax.tree.map(lambda w: w[1], module.blocks)
        if name == "bert":
            h = before[1]
            v = block.to_v(h).reshape(*h.shape[:2], block.heads, -1)
        else:
            v = block.project(block.norm_attention(before[1]))[2]
            causal = jnp.tri(tokens.shape[1], dtype=bool)
            scores = jnp.where(causal, scores, -jnp.inf)
        v = jnp.repeat(v, scores.shape[1] // v.shape[2], 2)
        made = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v)
        return made.reshape(attended[1].shape), attended[1]

    close(*probe(*CASES[name], check))


def test_another_attention():
    """Attention of every block to itself alone gives each token its own values."""

    def check(module, tokens):
        alone = lambda q, k, v: (jnp.repeat(v, 2, 2), None)
        whole = module(tokens, attend=alone)
        parts = [
            module(tokens[:, i : i + 1], attend=alone)
            for i in range(tokens.shape[1])
        ]
        return whole, jnp.concatenate(parts, 1)

    close(*probe(*CASES["lm"], check))


class Doubled(Block):
    """A block of another kind: its MLP is applied twice."""

    def mlp_branch(self, x, out):
        x = super().mlp_branch(x, out)
        return super().mlp_branch(x, self.down(self.neurons(x)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hybrid(LM):
    """A language model whose layers 1 and 2 of 4 are of the other kind."""

    depth: int = 4

    def __call__(self, rngs):
        return HybridModule(self, rngs)


class HybridModule(LMModule):
    def __init__(self, cfg, rngs):
        super().__init__(cfg, rngs)
        plain = lambda rngs: Block(cfg, rngs)
        other = lambda rngs: Doubled(cfg, rngs)
        self.blocks = Runs([plain, other, other, plain], rngs)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_unlike_blocks_are_runs_with_one_numbering(remat):
    def check(module, tokens):
        state, context = module.embed_inputs(tokens)
        read = lambda before, inside, after: after
        applied = module.apply_blocks(state, context, read=read, taps=(0, 2, 3))
        one = state
        for run, index in (("run0", 0), ("run1", 0), ("run1", 1), ("run2", 0)):
            block = jax.tree.map(lambda w: w[index], getattr(module.blocks, run))
            one, _ = module.apply_block(block, one, context)
        before = jnp.concatenate([state[None], applied.reads[:-1]])
        return {
            "last": (applied.state, one),
            "taps": (
                jnp.stack(applied.features),
                applied.reads[jnp.array([0, 2, 3])],
            ),
            "each": (module.apply_each(before, context), applied.reads),
            "chosen": (
                module.apply_blocks(state, context, [0, 3]).state,
                module.apply_blocks(applied.features[0], context, [3]).state,
            ),
        }

    cfg = Hybrid(remat=remat)
    for ours, expected in probe(cfg, (TOKENS,), check).values():
        close(ours, expected)
    names = paths(
        make_net(cfg, config=cfg).axes, is_leaf=lambda x: not isinstance(x, dict)
    )
    assert names["blocks/run1/to_q/kernel"][0] == "layers"
    shapes = paths(make_net(cfg, config=cfg).shapes)
    assert shapes["blocks/run1/to_q/kernel"].shape[0] == 2


def test_qwen_image_of_true_size_has_two_streams():
    """Shapes alone: 20 billion weights, patches and text through the last two of 60 blocks."""
    cfg = QwenImage(
        channels=16,
        heads=24,
        axes=(16, 56, 56),
        depth=60,
        text_dim=3584,
        dtype="bfloat16",
    )
    net = make_net(cfg, config=cfg)
    assert 20e9 < net.size < 21e9
    shape = jax.ShapeDtypeStruct
    x = shape((1, 128, 128, 16), jnp.float32)
    text = shape((1, 512, 3584), jnp.bfloat16)
    image = shape((1, 128, 128, 16), jnp.float32)
    mask = shape((1, 512), bool)

    def check(params, x, t, text, mask, image):
        module = nnx.merge(net.graphdef, params)
        cond = {"text": text, "mask": mask, "image": image}
        state, context = module.embed_inputs(x, t, cond)
        read = lambda before, inside, after: inside.neurons.mean((0, 1))
        applied = module.apply_blocks(state, context, [58, 59], read, taps=(58,))
        return applied, module.head(applied.state, context)

    times = shape((1,), jnp.float32)
    applied, out = jax.eval_shape(check, net.shapes, x, times, text, mask, image)
    patches, tokens = applied.state
    assert (patches.shape, tokens.shape) == ((1, 8192, 3072), (1, 512, 3072))
    assert applied.features[0].shape == (1, 4096, 3072)
    assert applied.reads.shape == (2, 4 * 3072)
    assert out.shape == x.shape


def test_a_scan_of_chosen_layers_runs_them_in_their_order():
    body = lambda x, w: (2 * x + w, x)
    layers = jnp.arange(4.0)
    x, ys, taps = scan_layers(
        body, jnp.zeros(1), layers, 4, chosen=[2, 3, 0], taps=(3,)
    )
    assert float(x[0]) == 2 * (2 * (2.0) + 3.0) + 0.0
    np.testing.assert_array_equal(ys[:, 0], [0.0, 2.0, 7.0])
    assert float(taps[0][0]) == 7.0
