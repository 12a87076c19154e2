"""EDM's U-Nets against a reference written from the architectures' definition: the same outputs,
the same weights, both ways.
"""

import dataclasses
import json
import math
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdistill import interop
from jaxdistill.core.net import make_net, paths
from jaxdistill.core.types import Refused
from jaxdistill.diffusion.denoiser import Denoiser, EDMPrecond
from jaxdistill.diffusion.process import EDM
from jaxdistill.models.denoisers.edm import DhariwalUNet, SongUNet, resample

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
F = torch.nn.functional

SONG = dict(
    _class_name="SongUNet",
    img_resolution=16,
    in_channels=3,
    out_channels=3,
    model_channels=8,
    channel_mult=[1, 2, 2],
    num_blocks=2,
    attn_resolutions=[8],
)
ADM = dict(
    SONG,
    _class_name="DhariwalUNet",
    model_channels=16,
    num_blocks=1,
    channels_per_head=8,
)
VARIANTS = {
    "ddpmpp": dict(SONG, label_dim=3, augment_dim=4, dropout=0.13),
    "ncsnpp": dict(
        SONG,
        num_blocks=1,
        embedding_type="fourier",
        channel_mult_noise=2,
        encoder_type="residual",
        resample_filter=[1, 3, 3, 1],
    ),
    "adm": dict(ADM, label_dim=3, augment_dim=4),
}
RELEASED = {  # arXiv:2206.00364, table 7; the same counts from the repository's own classes
    "cifar10": (
        SongUNet(
            size=32,
            width=128,
            multiples=(2, 2, 2),
            blocks=4,
            attention=(16,),
            augment_dim=9,
            classes=10,
        ),
        55_735_299,
    ),
    "ffhq64": (
        SongUNet(
            size=64,
            width=128,
            multiples=(1, 2, 2, 2),
            blocks=4,
            attention=(16,),
            augment_dim=9,
        ),
        61_805_571,
    ),
    "ffhq64_ncsnpp": (
        SongUNet(
            size=64,
            width=128,
            multiples=(1, 2, 2, 2),
            blocks=4,
            attention=(16,),
            augment_dim=9,
            time_embedding="fourier",
            noise_multiple=2,
            residual=True,
            filter=(1, 3, 3, 1),
        ),
        62_761_219,
    ),
    "imagenet64": (
        DhariwalUNet(
            size=64,
            width=192,
            multiples=(1, 2, 3, 4),
            blocks=3,
            attention=(32, 16, 8),
            head_dim=64,
            classes=1000,
        ),
        295_899_267,
    ),
}


class Reference:
    """The networks in PyTorch as functions of named weights; one that is met for the first time is
    drawn on `device`.
    """

    def __init__(self, config, device="cpu"):
        self.c = config
        self.device = device
        self.weights = {}
        self.song = config["_class_name"] == "SongUNet"
        self.draw = torch.Generator().manual_seed(0)
        self.filter = config.get("resample_filter", [1, 1])

    def get(self, name, *shape, mean=0.0, std=None):
        name = f"model.{name}"
        if name not in self.weights:
            std = math.prod(shape[1:]) ** -0.5 if std is None else std
            self.weights[name] = (
                torch.empty(shape, device="meta")
                if self.device == "meta"
                else mean + std * torch.randn(shape, generator=self.draw)
            )
        return self.weights[name]

    def linear(self, x, name, o, bias=True):
        return F.linear(
            x,
            self.get(f"{name}.weight", o, x.shape[1]),
            self.get(f"{name}.bias", o, std=0.1) if bias else None,
        )

    def conv(self, x, name, o, k=3, pad=None):
        weight = self.get(f"{name}.weight", o, x.shape[1], k, k)
        bias = self.get(f"{name}.bias", o, std=0.1)
        return F.conv2d(x, weight, bias, padding=k // 2 if pad is None else pad)

    def norm(self, x, name):
        n = x.shape[1]
        return F.group_norm(
            x,
            min(32, n // 4),
            self.get(f"{name}.weight", n, mean=1.0, std=0.1),
            self.get(f"{name}.bias", n, std=0.1),
            1e-6 if self.song else 1e-5,
        )

    def move(self, x, name, way, pad=None):
        """Resampled by a filter that the class stores under `name`."""
        f = (
            torch.outer(*[torch.tensor(self.filter, dtype=torch.float32)] * 2)
            / sum(self.filter) ** 2
        )
        self.weights.setdefault(
            f"model.{name}.resample_filter", f[None, None].to(self.device)
        )
        n = x.shape[1]
        f = f.to(self.device).expand(x.shape[1], 1, -1, -1)
        pad = (len(self.filter) - 1) // 2 if pad is None else pad
        return (
            F.conv_transpose2d(x, 4 * f, stride=2, padding=pad, groups=n)
            if way == "up"
            else F.conv2d(x, f, stride=2, padding=pad, groups=n)
        )

    def block(self, x, name, o, emb, way="", attend=False):
        i = x.shape[1]
        damp = math.sqrt(0.5) if self.song else 1.0
        h = F.silu(self.norm(x, f"{name}.norm0"))
        h = self.conv(
            self.move(h, f"{name}.conv0", way) if way else h, f"{name}.conv0", o
        )
        a = self.linear(emb, f"{name}.affine", o if self.song else 2 * o)[
            :, :, None, None
        ]
        if self.song:
            h = F.silu(self.norm(h + a, f"{name}.norm1"))
        else:
            h = F.silu(self.norm(h, f"{name}.norm1") * (1 + a[:, :o]) + a[:, o:])
        h = self.conv(h, f"{name}.conv1", o)
        x = self.move(x, f"{name}.skip", way) if way else x
        x = (
            self.conv(x, f"{name}.skip", o, 1)
            if i != o or (way and self.song)
            else x
        )
        x = (x + h) * damp
        if attend:
            heads = 1 if self.song else o // self.c.get("channels_per_head", 64)
            h = self.conv(self.norm(x, f"{name}.norm2"), f"{name}.qkv", 3 * o, 1)
            q, k, v = h.reshape(len(x), heads, o // heads, 3, -1).unbind(3)
            w = torch.softmax(
                torch.einsum("bhcq,bhck->bhqk", q, k) / math.sqrt(o // heads), -1
            )
            x = (
                x
                + self.conv(
                    torch.einsum("bhqk,bhck->bhcq", w, v).reshape(x.shape),
                    f"{name}.proj",
                    o,
                    1,
                )
            ) * damp
        return x

    def embed(self, t, label, augment):
        c = self.c
        width = self.c["model_channels"]
        noise = width * c.get("channel_mult_noise", 1)
        emb = 4 * width
        half = noise // 2
        if c.get("embedding_type") == "fourier":
            args = (
                2
                * math.pi
                * t[:, None]
                * self.get("map_noise.freqs", half, std=16.0)
            )
        else:
            args = t[:, None] * 10000.0 ** (
                -torch.arange(half, device=self.device) / (half - self.song)
            )
        h = torch.cat(
            [args.sin(), args.cos()] if self.song else [args.cos(), args.sin()], 1
        )
        if label is not None and self.song:
            h = h + self.linear(
                label * math.sqrt(label.shape[1]), "map_label", noise
            )
        if augment is not None:
            h = h + self.linear(augment, "map_augment", noise, bias=False)
        h = self.linear(
            F.silu(self.linear(h, "map_layer0", emb)), "map_layer1", emb
        )
        return F.silu(
            h
            if label is None or self.song
            else h + self.linear(label, "map_label", emb, bias=False)
        )

    def __call__(self, x, t, label=None, augment=None):
        """(F, states after the levels of the way down, the middle and the levels of the way up)."""
        c = self.c
        width = self.c["model_channels"]
        mults = self.c["channel_mult"]
        blocks = self.c["num_blocks"]
        emb = self.embed(t, label, augment)
        states = []
        image = x
        at = lambda half, level: (
            f"{half}.{c['img_resolution'] >> level}x{c['img_resolution'] >> level}_"
        )
        attends = lambda level: (
            c["img_resolution"] >> level in c["attn_resolutions"]
        )
        x = self.conv(
            x, at("enc", 0) + "conv", width if self.song else width * mults[0]
        )
        held = [x]
        for i, m in enumerate(mults):
            if i:
                x = self.block(x, at("enc", i) + "down", x.shape[1], emb, "down")
                if c.get("encoder_type") == "residual":
                    name = at("enc", i) + "aux_residual"
                    pad = 1 + (len(self.filter) - 1) // 2
                    image = self.move(
                        self.conv(image, name, x.shape[1], pad=pad),
                        name,
                        "down",
                        pad=0,
                    )
                    x = image = (x + image) / math.sqrt(2)
                held.append(x)
            for j in range(blocks):
                x = self.block(
                    x, at("enc", i) + f"block{j}", m * width, emb, attend=attends(i)
                )
                held.append(x)
            states.append(x)
        last = len(mults) - 1
        x = self.block(x, at("dec", last) + "in0", x.shape[1], emb, attend=True)
        x = self.block(x, at("dec", last) + "in1", x.shape[1], emb)
        states.append(x)
        for i in range(last, -1, -1):
            x = (
                self.block(x, at("dec", i) + "up", x.shape[1], emb, "up")
                if i < last
                else x
            )
            for j in range(blocks + 1):
                attend = attends(i) and (not self.song or j == blocks)
                x = self.block(
                    torch.cat([x, held.pop()], 1),
                    at("dec", i) + f"block{j}",
                    mults[i] * width,
                    emb,
                    attend=attend,
                )
            states.append(x)
        out = at("dec", 0) + "aux_" if self.song else "out_"
        return self.conv(
            F.silu(self.norm(x, out + "norm")), out + "conv", c["out_channels"]
        ), states


def inputs(config, rows=16, cols=16):
    """x, t = ln(sigma) / 4, labels (of each class and none) and the augmentation."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4, rows, cols, 3)).astype("f4")
    t = np.log([0.002, 0.5, 3.0, 80.0]).astype("f4") / 4
    cond = {"label": np.arange(4)} if config.get("label_dim") else {}
    return (
        x,
        t,
        cond
        | (
            {
                "augment": rng.standard_normal((4, config["augment_dim"])).astype(
                    "f4"
                )
            }
            if config.get("augment_dim")
            else {}
        ),
    )


def theirs(model, x, t, cond):
    # label 3 is the null one
    one_hot = torch.cat([torch.eye(3), torch.zeros(1, 3)])
    with torch.no_grad():
        out, states = model(
            torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
            torch.from_numpy(t),
            one_hot[cond["label"]]
            if "label" in cond
            else torch.zeros(len(x), 3)
            if model.c.get("label_dim")
            else None,
            torch.from_numpy(cond["augment"]) if "augment" in cond else None,
        )
    return out.permute(0, 2, 3, 1), [s.flatten(2).transpose(1, 2) for s in states]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, tmp_path_factory):
    """(name, reference, folder, net, params, jitted call with all features)."""
    config = VARIANTS[request.param]
    model = Reference(config)
    theirs(model, *inputs(config))
    folder = tmp_path_factory.mktemp(request.param)
    save_file(
        {name: w.numpy() for name, w in model.weights.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps(config))
    net, params = interop.load(folder)
    return (
        request.param,
        model,
        folder,
        net,
        params,
        jax.jit(lambda *a: net.apply(params, *a, taps=tuple(range(7)))),
    )


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_outputs_and_features_agree(pair, agree, size):
    name, model, _, _, _, call = pair
    x, t, cond = inputs(model.c, *size)
    ours, features = call(x, t, cond)
    expected, states = theirs(model, x, t, cond)
    agree(f"{name} {size}", ours, expected)
    for i, (found, state) in enumerate(zip(features, states, strict=True)):
        agree(f"{name} {size} level {i}", found, state)


@pytest.mark.full
def test_null_label_and_forms_of_the_condition(pair, agree):
    name, model, _, _, _, call = pair
    x, t, cond = inputs(model.c)
    expected, _ = theirs(model, x, t, {})
    agree(f"{name} no condition", call(x, t, None)[0], expected)
    if "label" in cond:
        label = cond["label"]
        # two programs: float32 sums
        same = lambda a, b: np.testing.assert_allclose(
            call(x, t, a)[0], call(x, t, b)[0], atol=1e-5
        )
        same(np.full(4, 3), None)
        same(label, {"label": label})
        same(jax.nn.one_hot(label, 3), label)
        # the augmentation
        assert np.abs(call(x, t, label)[0] - call(x, t, cond)[0]).max() > 1e-3
        assert (
            np.abs(call(x, t, label)[0][:3] - call(x, t, None)[0][:3]).max() > 1e-3
        )


@pytest.mark.full
def test_as_a_denoiser(pair, agree):
    """D = c_skip x + c_out F(c_in x, ln(sigma) / 4), table 1 of the paper."""
    name, model, _, net, params, _ = pair
    x, t, cond = inputs(model.c)
    sigma = np.exp(4 * t)
    denoise = Denoiser(param=EDMPrecond(), native=EDM()).wrap(
        lambda *a, **kw: net.apply(params, *a, **kw), EDM()
    )
    pred = jax.jit(lambda *a: denoise(*a, taps=(2,)))(x, sigma, cond)
    s = sigma[:, None, None, None]
    raw, states = theirs(model, (x / np.sqrt(s**2 + 0.25)).astype("f4"), t, cond)
    agree(
        f"{name} D",
        pred.x0,
        0.25 / (s**2 + 0.25) * x + s * 0.5 / np.sqrt(s**2 + 0.25) * raw.numpy(),
    )
    agree(f"{name} bottleneck", pred.features[0], states[2])


def test_round_trip_is_exact(pair, tmp_path):
    _, model, _, net, params, _ = pair
    interop.save(tmp_path / "out", net, params)
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == model.weights.keys()
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(again[name], weight.numpy(), err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {
        key: value for key, value in model.c.items() if config.get(key) != value
    }.keys() <= {"dropout"}
    assert interop.describe(tmp_path / "out") == net.config


@pytest.mark.full
def test_bfloat16(pair, halves):
    _, model, folder, net, params, call = pair
    halves(folder)
    small = make_net(
        cfg := dataclasses.replace(net.config, dtype="bfloat16"), config=cfg
    )
    x, t, cond = inputs(model.c)
    found = jax.jit(small.apply)(params, x, t, cond)
    expected = call(x, t, cond)[0]
    # 2^-8 a rounding, some tens of them
    assert (
        found.dtype == jnp.float32
        and np.abs(found - expected).mean() <= 0.05 * expected.std()
    )


@pytest.mark.full
def test_rematerialised_gradients_are_the_same(rematerialised):
    x, t, _ = inputs({}, 4, 4)
    grads = rematerialised(SongUNet(size=4, width=8, attention=()), x, t)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_random_frequencies_are_never_trained(weights):
    net = make_net(
        SongUNet(
            size=4, width=8, multiples=(1,), attention=(), time_embedding="fourier"
        )
    )
    x, t, _ = inputs({}, 4, 4)
    loss = lambda p: jnp.mean(net.apply(p, x, t) ** 2)
    grads = paths(jax.device_get(jax.jit(jax.grad(loss))(weights(net))))
    assert [path for path, g in grads.items() if not np.abs(g).max() > 0] == [
        "frequencies"
    ]


@pytest.mark.full
@pytest.mark.parametrize(
    "cfg",
    [SongUNet(classes=2, augment_dim=2), DhariwalUNet(classes=2, augment_dim=2)],
    ids=lambda cfg: type(cfg).__name__,
)
def test_fresh_weights(cfg):
    """The paper's: branches and the output begin at zero or near it."""
    net = make_net(cfg)
    params = net.init(jax.random.key(0))
    x, t, _ = inputs({}, 8, 8)
    assert np.abs(jax.jit(net.apply)(params, x, t, np.zeros(4, int))).max() <= 1e-3
    weights = paths(params)
    assert np.abs(weights["down/0/blocks/0/conv1/kernel"]).max() <= 1e-5 * (
        isinstance(cfg, SongUNet)
    )
    assert np.abs(weights["down/0/blocks/0/conv0/kernel"]).std() > 0.01


@pytest.mark.parametrize("filter", [(1, 1), (1, 3, 3, 1), (1, 2, 2, 1)])
def test_resampling(filter):
    x = np.random.default_rng(0).standard_normal((2, 6, 4, 5)).astype("f4")
    down = resample(x, "down", filter)
    up = resample(x, "up", filter)
    assert down.shape == (2, 3, 2, 5) and up.shape == (2, 12, 8, 5)
    dot = lambda a, b: float(np.sum(np.asarray(a, "f8") * np.asarray(b, "f8")))
    y = np.random.default_rng(1).standard_normal(up.shape).astype("f4")
    # adjoint, up to the gain of 4
    np.testing.assert_allclose(
        dot(up, y), 4 * dot(x, resample(y, "down", filter)), rtol=1e-4
    )
    np.testing.assert_allclose(
        resample(np.ones_like(x), "up", filter)[:, 2:-2, 2:-2], 1, rtol=1e-6
    )


@pytest.mark.full
@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name):
    cfg, count = RELEASED[name]
    family = interop.family_of(make_net(cfg, config=cfg))
    model = Reference(family.write(cfg)["config.json"], "meta")
    empty = lambda *shape: torch.empty(shape, device="meta")
    model(
        empty(1, 3, cfg.size, cfg.size),
        empty(1),
        empty(1, cfg.classes) if cfg.classes else None,
        empty(1, 9) if cfg.augment_dim else None,
    )
    net = make_net(cfg, config=cfg)
    leaves = paths(net.shapes)
    family = interop.family_of(net)
    ours = {
        name: row.torch_shape(leaves[row.path].shape)
        for row in family.table(cfg)
        for name in row.names(leaves[row.path].shape)
    }
    ours |= {
        name: array.shape
        for name, array in interop.families.edm.constants(cfg).items()
    }
    assert ours == {name: tuple(w.shape) for name, w in model.weights.items()}
    assert {row.path for row in family.table(cfg)} == leaves.keys()
    assert net.size == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"encoder_type": "skip"},
            "encoder_type='skip' is not supported, expected 'standard' or 'residual'",
        ),
        (
            {"decoder_type": "skip"},
            "decoder_type='skip' is not supported, expected 'standard'",
        ),
        ({"out_channels": 6}, "out_channels=6 is not supported, expected 3"),
        ({"resample_filter": [1, 2]}, "resample_filter=.* is not supported"),
        ({"embedding_type": "zero"}, "embedding_type='zero' is not supported"),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    (tmp_path / "config.json").write_text(json.dumps(SONG | change))
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


def test_missing_arguments_have_the_defaults_of_the_class(tmp_path):
    """ADM of ImageNet-64 names two arguments besides the sizes of the data."""
    given = {
        "_class_name": "DhariwalUNet",
        "img_resolution": 64,
        "in_channels": 3,
        "out_channels": 3,
        "label_dim": 1000,
    }
    (tmp_path / "config.json").write_text(
        json.dumps(given | {"model_channels": 192, "channel_mult": [1, 2, 3, 4]})
    )
    assert interop.describe(tmp_path) == RELEASED["imagenet64"][0]


def test_pickles_are_refused_with_the_command_that_converts_them(tmp_path):
    file = tmp_path / "edm-cifar10-32x32-cond-vp.pkl"
    file.write_bytes(b"\x80\x05never opened")
    for place in (tmp_path, file):
        with pytest.raises(
            Refused,
            match=r"cond-vp.pkl is pickled and is not opened; "
            r"convert it with: python -c .*\[\"ema\"\]",
        ) as error:
            interop.load(place)
    command = shlex.split(str(error.value).split("convert it with: ")[1])[2]
    compile(command, "command", "exec")
    assert (
        str(tmp_path / "edm-cifar10-32x32-cond-vp" / "model.safetensors") in command
    )
    (tmp_path / "config.json").write_text(json.dumps(SONG))
    with pytest.raises(Refused, match=r"cond-vp.pkl is pickled .* python -c "):
        interop.load(tmp_path)


def test_refuses_inputs_that_do_not_fit():
    net = make_net(SongUNet(classes=2))
    call = lambda size, cond, taps=(): jax.eval_shape(
        lambda: net.apply(
            net.shapes, jnp.ones((1, size, size, 3)), jnp.ones(1), cond, taps=taps
        )
    )
    with pytest.raises(Refused, match="x: 5 by 5 pixels, expected multiples of 2"):
        call(5, None)
    with pytest.raises(
        Refused, match=r"taps=\(5,\): levels are numbered 0 to 4, 2 is the middle"
    ):
        call(4, None, (5,))
    with pytest.raises(
        Refused, match="cond: 'augment' is not read by this network, expected label"
    ):
        call(4, {"augment": jnp.ones((1, 9))})
    with pytest.raises(Refused, match="expected 'positional' or 'fourier'"):
        make_net(SongUNet(time_embedding="square"))
    with pytest.raises(Refused, match="expected multiples of head_dim=5"):
        make_net(DhariwalUNet(head_dim=5))
