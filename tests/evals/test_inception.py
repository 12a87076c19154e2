"""Inception features against the same network built from torch layers, on random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxdistill.core.types import Refused
from jaxdistill.evals import inception


@pytest.fixture(scope="module")
def weights():
    """Random kernels that keep the signal's size; batch norms with all four statistics in use."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in inception.shapes().items():
        tensors[f"{name}.conv.weight"] = rng.standard_normal(
            shape, np.float32
        ) * np.float32(np.sqrt(2 / np.prod(shape[1:])))
        for key in ("weight", "running_var"):
            tensors[f"{name}.bn.{key}"] = rng.uniform(0.8, 1.2, shape[0]).astype(
                np.float32
            )
        for key in ("bias", "running_mean"):
            tensors[f"{name}.bn.{key}"] = 0.1 * rng.standard_normal(
                shape[0], np.float32
            )
    return tensors


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "fid.safetensors"
    save_file(weights, file)
    return file


def torch_features(weights, x):
    """pytorch-fid's blocks, branch by branch; `x` [n 3 h w] in [-1, 1]."""
    torch = pytest.importorskip(
        "torch", reason="the reference is built from torch layers"
    )
    F = torch.nn.functional
    w = {k: torch.from_numpy(v) for k, v in weights.items()}

    def conv(name, x, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        stats = (
            w[f"{name}.bn.{k}"]
            for k in ("running_mean", "running_var", "weight", "bias")
        )
        return F.relu(F.batch_norm(x, *stats, eps=0.001))

    def mixed(name, *branches):
        return torch.cat(
            [
                branch(lambda key, *a: conv(f"{name}.{key}", *a))
                for branch in branches
            ],
            1,
        )

    average = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    biggest = lambda x: F.max_pool2d(x, 3, 2)

    def a(name, x):
        return mixed(
            name,
            lambda c: c("branch1x1", x),
            lambda c: c("branch5x5_2", c("branch5x5_1", x), 1, 2),
            lambda c: c(
                "branch3x3dbl_3",
                c("branch3x3dbl_2", c("branch3x3dbl_1", x), 1, 1),
                1,
                1,
            ),
            lambda c: c("branch_pool", average(x)),
        )

    def b(name, x):
        return mixed(
            name,
            lambda c: c("branch3x3", x, 2),
            lambda c: c(
                "branch3x3dbl_3",
                c("branch3x3dbl_2", c("branch3x3dbl_1", x), 1, 1),
                2,
            ),
            lambda c: biggest(x),
        )

    def seven(c, stem, x, *paddings):
        for i, padding in enumerate(paddings, 1):
            x = c(f"{stem}_{i}", x, 1, padding)
        return x

    def c7(name, x):
        return mixed(
            name,
            lambda c: c("branch1x1", x),
            lambda c: seven(c, "branch7x7", x, 0, (0, 3), (3, 0)),
            lambda c: seven(
                c, "branch7x7dbl", x, 0, (3, 0), (0, 3), (3, 0), (0, 3)
            ),
            lambda c: c("branch_pool", average(x)),
        )

    def d(name, x):
        return mixed(
            name,
            lambda c: c("branch3x3_2", c("branch3x3_1", x), 2),
            lambda c: c(
                "branch7x7x3_4", seven(c, "branch7x7x3", x, 0, (0, 3), (3, 0)), 2
            ),
            lambda c: biggest(x),
        )

    def e(name, x, pool):
        def fork(c, stem, x):
            return torch.cat(
                [c(f"{stem}a", x, 1, (0, 1)), c(f"{stem}b", x, 1, (1, 0))], 1
            )

        return mixed(
            name,
            lambda c: c("branch1x1", x),
            lambda c: fork(c, "branch3x3_2", c("branch3x3_1", x)),
            lambda c: fork(
                c,
                "branch3x3dbl_3",
                c("branch3x3dbl_2", c("branch3x3dbl_1", x), 1, 1),
            ),
            lambda c: c("branch_pool", pool(x)),
        )

    with torch.no_grad():
        x = F.interpolate(
            torch.from_numpy(x), (299, 299), mode="bilinear", align_corners=False
        )
        x = conv("Conv2d_2a_3x3", conv("Conv2d_1a_3x3", x, 2))
        x = biggest(conv("Conv2d_2b_3x3", x, 1, 1))
        x = biggest(conv("Conv2d_4a_3x3", conv("Conv2d_3b_1x1", x)))
        for name in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
            x = a(name, x)
        x = b("Mixed_6a", x)
        for name in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
            x = c7(name, x)
        x = d("Mixed_7a", x)
        x = e("Mixed_7b", x, average)
        x = e("Mixed_7c", x, lambda x: F.max_pool2d(x, 3, 1, 1))
        return F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0].numpy()


def test_agrees_with_torch(weights, path, monkeypatch):
    """Colour images smaller than 299 pixels, in batches of 2 of which the last is not full."""
    monkeypatch.setattr(inception, "BATCH", 2)
    x = np.random.default_rng(1).uniform(-1, 1, (3, 40, 32, 3)).astype(np.float32)
    want = torch_features(weights, x.transpose(0, 3, 1, 2).copy())
    got = inception.load(path)(x)
    assert got.shape == (3, 2048) and got.dtype == np.float32
    # 94 layers of float32, sums of up to 4,032 terms in another order: relative 94 * eps *
    # sqrt(4032) = 7e-4 of the scale
    np.testing.assert_allclose(got, want, rtol=0, atol=7e-4 * np.abs(want).max())
    assert np.std(want, 0).max() > 10 * 7e-4 * np.abs(want).max()


def test_has_the_94_convolutions_of_pytorch_fid():
    shapes = inception.shapes()
    assert len(shapes) == 94
    assert shapes["Conv2d_1a_3x3"] == (32, 3, 3, 3)
    assert shapes["Mixed_5b.branch_pool"] == (32, 192, 1, 1)
    assert shapes["Mixed_6e.branch7x7dbl_5"] == (192, 192, 1, 7)
    assert shapes["Mixed_7c.branch3x3dbl_3b"] == (384, 384, 3, 1)


def test_resizing_is_torchs_in_both_directions():
    torch = pytest.importorskip(
        "torch", reason="the reference is torch.nn.functional.interpolate"
    )
    x = np.random.default_rng(2).uniform(-1, 1, (1, 350, 20, 3)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
        (299, 299),
        mode="bilinear",
    )
    got = jax.image.resize(x, (1, 299, 299, 3), "linear", antialias=False)
    np.testing.assert_allclose(got, want.numpy().transpose(0, 2, 3, 1), atol=1e-4)


def test_average_pool_leaves_the_padding_out():
    np.testing.assert_allclose(
        inception._average(jnp.ones((1, 4, 4, 2))), 1.0, rtol=1e-6
    )


def test_refusals(weights, tmp_path):
    with pytest.raises(Refused, match=r"none\.safetensors: no such file"):
        inception.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(Refused, match="not a whole safetensors file"):
        inception.load(tmp_path / "cut.safetensors")
    first = {k: v for k, v in weights.items() if k.startswith("Conv2d_1a")}
    save_file(first, tmp_path / "part.safetensors")
    with pytest.raises(Refused, match=r"no key 'Conv2d_2a_3x3\.bn\.weight'"):
        inception.load(tmp_path / "part.safetensors")
    first["Conv2d_1a_3x3.conv.weight"] = first["Conv2d_1a_3x3.conv.weight"][
        :, :1
    ].copy()
    save_file(first, tmp_path / "shape.safetensors")
    with pytest.raises(
        Refused,
        match=r"conv\.weight has shape \(32, 1, 3, 3\), expected \(32, 3, 3, 3\)",
    ):
        inception.load(tmp_path / "shape.safetensors")
