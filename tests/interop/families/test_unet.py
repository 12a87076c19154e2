"""The U-Net against diffusers' `UNet2DConditionModel`: the same outputs, the same weights, both
ways.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.models.denoisers.unet import UNet

torch = pytest.importorskip(
    "torch", reason="parity with PyTorch needs torch (extra [torch])"
)
diffusers = pytest.importorskip(
    "diffusers", reason="parity with PyTorch needs diffusers"
)

CROSS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN = ("DownBlock2D", "UpBlock2D")


def levels(*kinds):
    return {
        "down_block_types": tuple(down for down, _ in kinds),
        "up_block_types": tuple(up for _, up in reversed(kinds)),
    }


COMMON = dict(
    sample_size=8, norm_num_groups=4, cross_attention_dim=12, layers_per_block=1
)
VARIANTS = {  # the released models' structures, small
    "sd1": dict(
        **levels(CROSS, PLAIN),
        block_out_channels=(8, 16),
        attention_head_dim=2,
        layers_per_block=2,
    ),
    "sd2": dict(
        **levels(CROSS, PLAIN),
        block_out_channels=(8, 16),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        upcast_attention=True,
        time_cond_proj_dim=6,
    ),
    "sdxl": dict(
        **levels(PLAIN, CROSS, CROSS),
        block_out_channels=(8, 8, 16),
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        transformer_layers_per_block=[1, 2, 3],
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=34,
    ),
    "inpaint_small": dict(
        **levels(CROSS, CROSS),
        block_out_channels=(8, 16),
        attention_head_dim=2,
        in_channels=9,
        mid_block_type=None,
    ),
}


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request, imported):
    """(name, torch model, its folder, our net and params, our jitted call with the last block on
    the way down and the middle).
    """
    torch.manual_seed(0)
    model, folder, net, params = imported(
        diffusers.UNet2DConditionModel(**COMMON | VARIANTS[request.param])
    )
    count = len(net.config.widths)
    return (
        request.param,
        model,
        folder,
        net,
        params,
        jax.jit(lambda *a: net.apply(params, *a, taps=(0, count))),
    )


def inputs(cfg, rows, cols):
    """x, t and cond with texts of 7, 3 and 1 tokens."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype("f4")
    cond = {
        "text": draw(3, 7, cfg.text_dim),
        "mask": np.arange(7) < np.array([7, 3, 1])[:, None],
    }
    if cfg.pooled_dim:
        cond |= {
            "pooled": draw(3, cfg.pooled_dim),
            "size": np.array(
                [
                    [1024, 1024, 0, 0, 1024, 1024],
                    [512, 700, 3, 9, 768, 1344],
                    [8] * 6,
                ],
                "f4",
            ),
        }
    if cfg.guidance_dim:
        cond["guidance"] = np.array([0.0, 2.0, 7.5], "f4")
    if cfg.image_channels:
        cond["image"] = draw(3, rows, cols, cfg.image_channels)
    return (
        draw(3, rows, cols, cfg.channels),
        np.array([0.0, 3.5, 999.0], "f4"),
        cond,
    )


def reference(model, cfg, x, t, cond):
    to = lambda a: torch.from_numpy(np.ascontiguousarray(a))
    x = np.concatenate([x, cond["image"]], -1) if "image" in cond else x
    kw = {"encoder_attention_mask": to(cond["mask"])} if "mask" in cond else {}
    if cfg.pooled_dim:
        kw["added_cond_kwargs"] = {
            "text_embeds": to(cond["pooled"]),
            "time_ids": to(cond["size"]),
        }
    if cfg.guidance_dim:
        embed = (
            diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        )
        kw["timestep_cond"] = embed(None, to(cond["guidance"]), cfg.guidance_dim)
    states = []
    hooks = [
        model.down_blocks[0].register_forward_hook(
            lambda *a: states.append(a[2][0])
        )
    ]
    if model.mid_block is not None:
        hooks.append(
            model.mid_block.register_forward_hook(lambda *a: states.append(a[2]))
        )
    with torch.no_grad():
        out = model(
            to(x.transpose(0, 3, 1, 2)), to(t), to(cond["text"]), **kw
        ).sample
    for hook in hooks:
        hook.remove()
    return out.permute(0, 2, 3, 1), [s.flatten(2).transpose(1, 2) for s in states]


@pytest.mark.parametrize(("size", "masked"), [((8, 8), False), ((4, 12), True)])
def test_outputs_and_features_agree(pair, agree, size, masked):
    name, model, _, net, _, call = pair
    x, t, cond = inputs(net.config, *size)
    cond = cond if masked else {k: v for k, v in cond.items() if k != "mask"}
    ours, features = call(x, t, cond)
    theirs, states = reference(model, net.config, x, t, cond)
    agree(f"{name} {size} mask={masked}", ours, theirs)
    for found, state in zip(features, states):
        agree(f"{name} {size} features", found, state)
    assert name == "inpaint_small" or len(states) == 2


def test_round_trip_is_exact(pair, returns):
    _, model, _, net, params, _ = pair
    again = returns(diffusers.UNet2DConditionModel, model, net, params)
    x, t, cond = inputs(net.config, 8, 8)
    first, second = (
        reference(m, net.config, x, t, cond)[0] for m in (model, again)
    )
    assert torch.equal(first, second)  # every setting that matters came back too


def test_loads_in_bfloat16(pair, halves):
    halves(pair[2])


@pytest.mark.full
def test_rematerialised_gradients_are_the_same(rematerialised):
    cfg = UNet(
        widths=(8,),
        heads=(2,),
        groups=4,
        text_dim=8,
        depths=(0,),
        mid_depth=2,
        layers=1,
    )
    grads = rematerialised(cfg, *inputs(cfg, 4, 4))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


# sizes and their numbers of weights: arXiv:2112.10752's repository and arXiv:2307.01952, table 1,
# say 860M, 865M and 2.6B
RELEASED = {
    "sd15": (
        dict(
            size=64,
            widths=(320, 640, 1280, 1280),
            depths=(1, 1, 1, 0),
            heads=(8,) * 4,
            text_dim=768,
            matrices=False,
        ),
        859_520_964,
    ),
    "sd21": (
        dict(
            size=96,
            widths=(320, 640, 1280, 1280),
            depths=(1, 1, 1, 0),
            heads=(5, 10, 20, 20),
            text_dim=1024,
        ),
        865_910_724,
    ),
    "sdxl": (
        dict(
            size=128,
            widths=(320, 640, 1280),
            depths=(0, 2, 10),
            mid_depth=10,
            heads=(5, 10, 20),
            text_dim=2048,
            pooled_dim=1280,
            size_dim=256,
        ),
        2_567_463_684,
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes(name, covers):
    sizes, count = RELEASED[name]
    cfg = UNet(**sizes, groups=32)
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel.from_config(
            interop.families.unet.FAMILY.write(cfg)["config.json"]
        )
    covers(cfg, model, count, interop.families.unet.FAMILY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"class_embed_type": "timestep"},
            "class_embed_type='timestep' is not supported, expected None",
        ),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            "resnet_time_scale_shift='scale_shift' is not supported, expected 'default'",
        ),
        (
            {"up_block_types": ["UpBlock2D", "UpBlock2D"]},
            "up_block_types=.* is not supported",
        ),
        (
            {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]},
            "down_block_types=.* is not supported",
        ),
        (
            {"mid_block_type": "UNetMidBlock2D"},
            "mid_block_type='UNetMidBlock2D' is not supported",
        ),
        (
            {"addition_embed_type": "image"},
            "addition_embed_type='image' is not supported, expected 'text_time' or null",
        ),
        (
            {"transformer_layers_per_block": [[1, 2], 1]},
            "transformer_layers_per_block=.* is not supported",
        ),
        (
            {"layers_per_block": [1, 2]},
            "layers_per_block=.* is not supported, expected the same at every level",
        ),
        ({"in_channels": 3}, "out_channels=4 is more than in_channels=3"),
    ],
)
def test_refuses_settings_our_model_lacks(tmp_path, change, message):
    config = interop.families.unet.FAMILY.write(UNet())["config.json"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert interop.describe(tmp_path) == UNet()
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Refused, match=message):
        interop.describe(tmp_path)


def test_refuses_inputs_that_do_not_fit():
    net = make_net(UNet(pooled_dim=4, size_dim=4))
    call = lambda size, cond, taps=(): jax.eval_shape(
        lambda: net.apply(
            net.shapes, jnp.ones((1, size, size, 4)), jnp.ones(1), cond, taps=taps
        )
    )
    text = {"text": jnp.ones((1, 2, 32)), "pooled": jnp.ones((1, 4))}
    with pytest.raises(Refused, match=r"cond: UNet needs 'size' number \[B 6\]"):
        call(4, text)
    with pytest.raises(Refused, match="x: 5 by 5 latents, expected multiples of 2"):
        call(5, text | {"size": jnp.ones((1, 6))})
    with pytest.raises(
        Refused, match=r"taps=\(5,\): blocks are numbered 0 to 4, 2 is the middle"
    ):
        call(4, text | {"size": jnp.ones((1, 6))}, (5,))
    with pytest.raises(Refused, match="different numbers of levels"):
        make_net(UNet(heads=(1,)))
