"""Conditions are held against what a network reads, before it runs and where it is called."""

import jax
import jax.numpy as jnp
import pytest

from jaxdistill.core.needs import Condition, Spec, check_condition, condition_of
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.denoisers.edm import SongUNet
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.denoisers.qwen_image import QwenImage
from jaxdistill.models.denoisers.sana import Sana
from jaxdistill.models.denoisers.unet import UNet
from jaxdistill.models.denoisers.wan import Wan
from jaxdistill.models.heads import Discriminator
from jaxdistill.models.language.lm import LM


def floats(*shape):
    return Spec(shape, jnp.float32)


LABELS = Spec((4,), jnp.int32)
TEXT = floats(4, 7, 32)

FITS = {
    "labels": (DiT(), LABELS),
    "no labels": (DiT(), None),
    "numbers of classes": (SongUNet(classes=3), floats(4, 3)),
    "a dict of labels": (SongUNet(classes=3, augment_dim=2), {"label": LABELS}),
    "points": (MLP(classes=2), LABELS),
    "discriminator": (Discriminator(classes=2), None),
    "nothing is read": (MLP(), {"anything": LABELS}),
    "text": (UNet(), {"text": TEXT, "mask": Spec((4, 7), jnp.bool_)}),
    "text and pictures": (
        QwenImage(),
        {"text": TEXT, "image": (floats(4, 8, 8, 4),) * 2},
    ),
    "a negative prompt": (
        Wan(),
        {"text": TEXT, "negative": floats(4, 5, 32), "nasa": floats(4)},
    ),
    "guidance": (
        Sana(guidance=True),
        {"text": floats(4, 7, 16), "guidance": floats(4)},
    ),
}

REFUSED = {
    "labels are integers": (
        DiT(),
        floats(4),
        r"cond is float32 \[4\], X needs int \[B\]",
    ),
    "one array": (UNet(), LABELS, r"cond is one array, X needs \(text\)"),
    "none": (Wan(), None, r"cond: there is none, X needs \(text\)"),
    "width": (
        UNet(text_dim=24),
        {"text": TEXT},
        r"'text' is float32 \[4, 7, 32\], X needs float ",
    ),
    "batch": (
        UNet(),
        {"text": TEXT, "mask": Spec((3, 7), jnp.bool_)},
        r"'mask' is bool \[3, 7\], X needs array \[B L\]",
    ),
    "one of several pictures": (
        QwenImage(),
        {"text": TEXT, "image": (floats(4, 8, 8, 4), floats(4, 8, 8, 3))},
        r"'image' is float32 \[4, 8, 8, 3\], X needs float \[B _ _ 4\]",
    ),
    "missing": (
        Sana(),
        {"texts": TEXT},
        r"X needs 'text' float \[B L 16\] .*; did you mean 'texts'",
    ),
    "unread": (
        Sana(),
        {"text": TEXT, "guidance": floats(4)},
        "'guidance' is not read by X",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_what_a_network_reads_passes(case):
    config, given = FITS[case]
    check_condition(given, condition_of(config), "X")


@pytest.mark.parametrize("case", REFUSED)
def test_other_conditions_are_refused(case):
    config, given, message = REFUSED[case]
    with pytest.raises(Refused, match=message):
        check_condition(given, condition_of(config), "X")


def test_a_language_model_has_none():
    assert condition_of(LM()) is None


def test_the_network_refuses_what_its_schema_refuses():
    net = make_net(UNet(text_dim=24))
    x = floats(4, 8, 8, 4)
    with pytest.raises(
        Refused, match=r"cond: 'text' is float32 \[4, 7, 32\], UNet needs"
    ):
        jax.eval_shape(net.apply, net.shapes, x, floats(4), {"text": TEXT})


def test_numbers_and_arrays_count_by_their_shape():
    condition = Condition(needs={"scale": Wan().condition.optional["nasa"]})
    for scale in (3.0, jnp.float32(3.0), jnp.ones(4)):
        check_condition({"scale": scale}, condition, "X")
