"""Fixtures of the tests that compare model families with PyTorch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net, paths


@pytest.fixture
def agree(record_property):
    """agree(name, ours, theirs, where=...): max|difference| <= 1e-4 standard deviations of theirs;
    the figure is recorded.

    Both sides are float32 and sum in another order: 1e-7 a term, grown by the depth of the network.
    """

    def check(name, ours, theirs, where=True):
        ours = np.asarray(ours)
        theirs = (
            theirs.detach().numpy()
            if hasattr(theirs, "detach")
            else np.asarray(theirs)
        )
        assert (
            ours.shape == theirs.shape
            and np.isfinite(ours).all()
            and theirs.std() > 0
        )
        figure = float(
            np.abs(np.where(where, ours - theirs, 0)).max() / theirs.std()
        )
        record_property(f"max|diff|/std {name}", f"{figure:.1e}")
        print(f"max|diff|/std {name}: {figure:.1e}")
        assert figure <= 1e-4, name

    return check


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """imported(model, std=0.1) -> (PyTorch's model, its folder, our net, params): every weight is
    moved away from 0 and 1, then the model is saved and loaded here.
    """

    def take(model, std=0.1):
        import torch

        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(std * torch.randn_like(weight))
        folder = tmp_path_factory.mktemp(type(model).__name__)
        model.eval().save_pretrained(folder)
        return model, folder, *interop.load(folder)

    return take


@pytest.fixture
def returns(tmp_path):
    """returns(cls, model, net, params): our export loads as a `cls` of PyTorch with every key used
    and every bit as in `model`.
    """

    def check(cls, model, net, params):
        interop.save(tmp_path / "out", net, params)
        again, info = cls.from_pretrained(
            tmp_path / "out", output_loading_info=True
        )
        assert not any(info.values()), info
        ours = again.state_dict()
        theirs = model.state_dict()
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert (ours[name] == weight).all(), name
        return again

    return check


def drawn(net, std=0.3):
    """Weights of a net, drawn in numpy: an initialiser of JAX compiles a program for each shape."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: std * rng.standard_normal(s.shape).astype(s.dtype), net.shapes
    )


@pytest.fixture
def weights():
    """weights(net, std=0.3) -> weights drawn in numpy."""
    return drawn


@pytest.fixture
def rematerialised():
    """rematerialised(config, *inputs): with and without rematerialisation, the mean square of the
    output has the same gradients of all weights; returns them.
    """

    def check(cfg, *inputs):
        params = drawn(make_net(cfg))

        def gradients(remat):
            net = make_net(dataclasses.replace(cfg, remat=remat))
            loss = lambda p: jnp.mean(net.apply(p, *inputs) ** 2)
            return jax.device_get(jax.jit(jax.grad(loss))(params))

        first = gradients("none")
        second = gradients("full")
        scale = max(np.abs(g).max() for g in jax.tree.leaves(first))
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * scale)
        jax.tree.map(close, first, second)
        return first

    return check


@pytest.fixture
def covers():
    """covers(config, model, count): at its true size the net has `count` weights, with the names
    and shapes of `model` (on torch's meta device).
    """

    def check(cfg, model, count, family):
        net = make_net(cfg, config=cfg)
        assert net.size == count
        leaves = paths(net.shapes)
        ours = {
            name: row.torch_shape(leaves[row.path].shape)
            for row in family.table(cfg)
            for name in row.names(leaves[row.path].shape)
        }
        assert ours == {
            name: tuple(weight.shape) for name, weight in model.state_dict().items()
        }
        assert {row.path for row in family.table(cfg)} == leaves.keys()

    return check


@pytest.fixture
def halves():
    """halves(folder): the weights load in bfloat16, each the rounding of its float32 value."""

    def check(folder):
        _, params = interop.load(folder)
        _, half = interop.load(folder, "bfloat16")
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(
                np.asarray(a).astype(b.dtype), b
            ),
            params,
            half,
        )

    return check
