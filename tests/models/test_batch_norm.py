"""Batch norm and its running statistics: PyTorch's, and those of the global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdistill.core.net import make_net
from jaxdistill.core.sharding import MeshShape, make_mesh
from jaxdistill.models.layers import BatchNorm, conv, dense

WIDTH = 6
EIGHT = MeshShape(data=8, fsdp=1, tensor=1)


class Residual(nnx.Module):
    """Two convolutions with batch norms around a shortcut."""

    def __init__(self, rngs):
        make = lambda: conv(
            WIDTH, WIDTH, (3, 3), rngs=rngs, bias=False, padding=[(1, 1), (1, 1)]
        )
        self.conv1 = make()
        self.norm1 = BatchNorm(WIDTH, rngs=rngs)
        self.conv2 = make()
        self.norm2 = BatchNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(x + self.norm2(self.conv2(h)))


class ResNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = conv(
            3, WIDTH, (3, 3), rngs=rngs, bias=False, padding=[(1, 1), (1, 1)]
        )
        self.norm = BatchNorm(WIDTH, rngs=rngs)
        self.block = Residual(rngs)
        self.head = dense(WIDTH, 5, ("embed", None), rngs=rngs)

    def __call__(self, x):
        h = self.block(nnx.relu(self.norm(self.conv(x))))
        return self.head(h.mean((1, 2)))


class TorchResidual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        make = lambda: torch.nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.conv1 = make()
        self.norm1 = torch.nn.BatchNorm2d(WIDTH)
        self.conv2 = make()
        self.norm2 = torch.nn.BatchNorm2d(WIDTH)

    def forward(self, x):
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(h)))


class TorchResNet(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, WIDTH, 3, padding=1, bias=False)
        self.norm = torch.nn.BatchNorm2d(WIDTH)
        self.block = TorchResidual()
        self.head = torch.nn.Linear(WIDTH, 5)

    def forward(self, x):
        h = self.block(torch.relu(self.norm(self.conv(x))))
        return self.head(h.mean((2, 3)))


def as_ours(module) -> dict:
    """The weights of a PyTorch module as ours: numpy arrays in a nested dict."""
    if isinstance(module, torch.nn.BatchNorm2d):
        named = dict(scale=module.weight, bias=module.bias)
        named |= dict(mean=module.running_mean, var=module.running_var)
        return {name: w.detach().numpy().copy() for name, w in named.items()}
    if isinstance(module, torch.nn.Conv2d):
        return {
            "kernel": module.weight.detach().numpy().transpose(2, 3, 1, 0).copy()
        }
    if isinstance(module, torch.nn.Linear):
        kernel = module.weight.detach().numpy().T.copy()
        return {"kernel": kernel, "bias": module.bias.detach().numpy().copy()}
    return {name: as_ours(child) for name, child in module.named_children()}


def gradients(module) -> dict:
    """The same tree of the gradients."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(weight.grad)
    return as_ours(module)


def close(a, b):
    return np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_one_step_of_a_small_resnet_is_pytorchs():
    torch.manual_seed(0)
    theirs = TorchResNet()
    for norm in (theirs.norm, theirs.block.norm1, theirs.block.norm2):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3)
    params = as_ours(theirs)
    net = make_net(ResNet)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda s: s.shape, net.shapes
    )
    x = np.random.default_rng(1).standard_normal((4, 8, 8, 3)).astype(np.float32)

    def loss(params):
        out, statistics = net.apply_training(params, x)
        return jnp.sum(jnp.sin(out)), (out, statistics)

    grads, (out, statistics) = jax.jit(jax.grad(loss, has_aux=True))(params)
    expected = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    torch.sin(expected).sum().backward()
    close(out, expected.detach())
    moved = as_ours(theirs)
    for norms in (statistics, statistics["block"]):
        there = moved if norms is statistics else moved["block"]
        for name in norms.keys() - {"block"}:
            close(norms[name]["mean"], there[name]["mean"])
            close(norms[name]["var"], there[name]["var"])
    wanted = gradients(theirs)
    for name in ("conv", "head"):
        jax.tree.map(close, grads[name], wanted[name])
    for ours, other in ((grads, wanted), (grads["block"], wanted["block"])):
        for name in ours.keys() - {"block", "conv", "head"}:
            for part in ours[name].keys() - {"mean", "var"}:
                close(ours[name][part], other[name][part])
    # what evaluation, export and frozen roles compute
    later = as_ours(theirs.eval())
    with torch.no_grad():
        calm = theirs(torch.tensor(x.transpose(0, 3, 1, 2)))
    close(jax.jit(net.apply)(later, x), calm)


def test_statistics_are_those_of_the_global_batch():
    net = make_net(ResNet)
    params = jax.jit(net.init)(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (8, 4, 4, 3))
    expected = jax.jit(net.apply_training)(params, x)
    mesh = make_mesh(EIGHT)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    found = jax.jit(net.apply_training)(params, sharded)
    jax.tree.map(close, found, expected)
