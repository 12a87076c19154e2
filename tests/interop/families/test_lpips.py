"""LPIPS against its formula on torch's layers under the package's names; a distance; the same
weights both ways.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.interop.families import lpips
from jaxdistill.models.vision.lpips import LPIPS

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)

CFG = LPIPS(widths=(8, 12, 16), layers=(2, 1, 2))
NAMES = [
    "net.slice1.0",
    "net.slice1.2",
    "net.slice2.5",
    "net.slice3.8",
    "net.slice3.10",
]
A, B = np.random.default_rng(0).uniform(-1, 1, (2, 3, 24, 20, 3)).astype("f4")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(our net and params, torch's weights by name): a folder as the command writes it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {
        "scaling_layer.shift": torch.zeros(1, 3, 1, 1),
        "scaling_layer.scale": torch.ones(1, 3, 1, 1),
    }
    i = 3
    for name, width in zip(NAMES, (8, 8, 12, 16, 16), strict=True):
        weights |= {
            f"{name}.weight": torch.randn(width, i, 3, 3) / i**0.5 / 3,
            f"{name}.bias": 0.3 * torch.randn(width),
        }
        i = width
    weights |= {
        f"lin{n}.model.1.weight": torch.rand(1, width, 1, 1)
        for n, width in enumerate(CFG.widths)
    }
    folder = tmp_path_factory.mktemp("lpips")
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(lpips.FAMILY.write(CFG)["config.json"])
    )
    return *interop.load(folder), weights


def theirs(weights, a, b):
    """Section 3 of the paper: unit features in the channels, squared differences times the heads,
    means over pixels, the sum.
    """
    F = torch.nn.functional
    total = 0.0
    features = [
        (
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
            - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
        )
        / torch.tensor([0.458, 0.448, 0.450])[:, None, None]
        for x in (a, b)
    ]
    for n, names in enumerate((NAMES[:2], NAMES[2:3], NAMES[3:])):
        features = [F.max_pool2d(f, 2) if n else f for f in features]
        for name in names:
            features = [
                F.relu(
                    F.conv2d(
                        f,
                        weights[f"{name}.weight"],
                        weights[f"{name}.bias"],
                        padding=1,
                    )
                )
                for f in features
            ]
        units = [f / (f.norm(dim=1, keepdim=True) + 1e-10) for f in features]
        total = total + F.conv2d(
            (units[0] - units[1]) ** 2, weights[f"lin{n}.model.1.weight"]
        ).mean((1, 2, 3))
    return total


def test_distances_agree(stored, agree):
    net, params, weights = stored
    assert net.config == CFG
    agree("distance", jax.jit(net.apply)(params, A, B), theirs(weights, A, B))


def test_it_is_a_distance(stored):
    net, params, _ = stored
    d = jax.jit(lambda a, b: net.apply(params, a, b))
    np.testing.assert_array_equal(d(A, A), np.zeros(3))
    np.testing.assert_allclose(d(A, B), d(B, A), rtol=1e-6)
    near = d(A, A + 0.01 * B)
    far = d(A, A + 0.1 * B)
    assert np.all(near > 0) and np.all(near < far)


def test_gradients_are_finite_where_features_vanish(stored):
    """All features of a level are 0 under strongly negative biases."""
    net, params, _ = stored
    dead = jax.tree.map_with_path(
        lambda path, w: w - 100.0 if "bias" in str(path) else w, params
    )
    for p in (params, dead):
        grad = jax.jit(jax.grad(lambda a: net.apply(p, a, jnp.asarray(B)).sum()))(
            jnp.asarray(A)
        )
        assert np.isfinite(grad).all() and np.any(grad) == (p is params)


def test_round_trip(stored, tmp_path):
    net, params, weights = stored
    interop.save(tmp_path / "out", net, params)
    from safetensors.torch import load_file

    again = load_file(tmp_path / "out/model.safetensors")
    assert again.keys() == {name for name in weights if "scaling" not in name}
    assert all((again[name] == weights[name]).all() for name in again)
    assert interop.load(tmp_path / "out")[0].config == CFG


def test_vgg_16s_sizes_and_names():
    net = make_net(LPIPS())
    # torchvision's vgg16().features, and the heads
    assert net.size == 14_714_688 + 64 + 128 + 256 + 512 + 512
    names = [
        row.name
        for row in lpips.table(LPIPS())
        if row.name.endswith("weight") and row.name.startswith("net")
    ]
    slices = {
        1: (0, 2),
        2: (5, 7),
        3: (10, 12, 14),
        4: (17, 19, 21),
        5: (24, 26, 28),
    }
    assert names == [
        f"net.slice{i}.{n}.weight" for i, numbers in slices.items() for n in numbers
    ]
    assert (
        lpips.FAMILY.read({"_class_name": "LPIPS", "pnet_type": "vgg"}, Path("x"))
        == LPIPS()
    )


def test_refusals(tmp_path):
    with pytest.raises(Refused, match="2 widths and 1 layers"):
        make_net(LPIPS(widths=(8, 8), layers=(1,)))
    with pytest.raises(
        Refused, match="pnet_type='alex' is not supported, expected 'vgg'"
    ):
        lpips.FAMILY.read({"pnet_type": "alex"}, tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "LPIPS", "pnet_type": "vgg"})
    )
    (tmp_path / "vgg.pth").write_bytes(b"")
    with pytest.raises(
        Refused,
        match=r"vgg.pth is pickled and is not opened; convert it with: python -c .*lpips.LPIPS",
    ):
        interop.load(tmp_path)
