"""An exported adapter on its base in PyTorch is the adapted network here."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxdistill import interop
from jaxdistill.core.lora import adapt, merge
from jaxdistill.core.net import make_net
from jaxdistill.core.types import Refused
from jaxdistill.interop.adapter import check_adapter, save_adapter
from jaxdistill.interop.folder import MARKER
from jaxdistill.models.denoisers.unet import UNet

torch = pytest.importorskip(
    "torch", reason="PyTorch's side needs torch (extra [torch])"
)
diffusers = pytest.importorskip(
    "diffusers", reason="PyTorch's side needs diffusers"
)
transformers = pytest.importorskip(
    "transformers", reason="PyTorch's side needs transformers"
)
peft = pytest.importorskip(
    "peft", reason="PyTorch's side needs peft (extra [torch])"
)

LM = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
)
UNET = dict(
    sample_size=8,
    norm_num_groups=4,
    cross_attention_dim=12,
    layers_per_block=1,
    block_out_channels=(8, 16),
    attention_head_dim=2,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
OUR_UNET = dict(
    size=8,
    channels=1,
    widths=(8, 8),
    layers=1,
    depths=(1, 0),
    mid_depth=1,
    heads=(2, 2),
    text_dim=6,
    groups=4,
)
WAN = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=14,
    in_channels=4,
    out_channels=4,
    text_dim=10,
    freq_dim=32,
    ffn_dim=40,
    num_layers=3,
)
ROWS = jax.random.split(jax.random.key(7), 200)


def made(model, folder, targets, rank=3, alpha=6.0):
    """(our base, its weights, adapter, its random weights) of a PyTorch model that is saved in
    `folder`.
    """
    model.save_pretrained(folder)
    base, weights = interop.load(folder)
    adapter = adapt(base, base="teacher", rank=rank, alpha=alpha, targets=targets)
    shapes, tree = jax.tree.flatten(adapter.shapes)
    random = [0.3 * jax.random.normal(key, s.shape) for key, s in zip(ROWS, shapes)]
    return base, weights, adapter, jax.tree.unflatten(tree, random)


def differs(ours, plain):
    # the adapter matters
    assert (
        np.abs(np.asarray(ours) - np.asarray(plain)).max()
        > 0.05 * np.asarray(plain).std()
    )


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks for an attribute of old
@pytest.mark.parametrize("family", ["Qwen2", "GPTNeoX"])
def test_peft_loads_it(family, tmp_path, agree):
    torch.manual_seed(0)
    sizes = (
        LM
        if family == "Qwen2"
        else {k: v for k, v in LM.items() if k != "num_key_value_heads"}
    )
    config = getattr(transformers, f"{family}Config")(
        **sizes, bos_token_id=None, eos_token_id=None
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    base, weights, adapter, params = made(
        model, tmp_path / "base", r".*blocks/(to_out|up|down)/kernel"
    )
    save_adapter(
        tmp_path / "out",
        base,
        adapter,
        params,
        source=str(tmp_path / "base"),
        card="# An adapter\n",
    )
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [MARKER, *names]
    assert (
        json.loads((tmp_path / "out" / "adapter_config.json").read_text())[
            "lora_alpha"
        ]
        == 6.0
    )
    tokens = np.random.default_rng(0).integers(0, 61, (2, 9))
    adapted = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")).eval()
    with torch.no_grad():
        theirs = adapted(torch.tensor(tokens)).logits
    ours = jax.jit(adapter.apply)({"base": weights, "adapter": params}, tokens)
    agree(family, ours, theirs)
    differs(ours, jax.jit(base.apply)(weights, tokens))
    interop.save(tmp_path / "merged", base, merge(weights, params, adapter.scale))
    again = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        agree("merged", again(torch.tensor(tokens)).logits.numpy(), theirs)


@pytest.mark.full
@pytest.mark.parametrize("component", ["unet", "transformer"])
def test_diffusers_loads_it(component, tmp_path, agree):
    torch.manual_seed(0)
    draw = lambda *shape: (
        np.random.default_rng(len(shape)).standard_normal(shape).astype("f4")
    )
    if (
        component == "unet"
    ):  # linear maps, 1x1 convolutions that ours has as matrices
        model = diffusers.UNet2DConditionModel(**UNET).eval()
        x = draw(2, 8, 8, 4)
        text = draw(2, 7, 12)
        targets = r".*(attn[12]/to_[qkv]|to_out|up|down|proj_in|proj_out)/kernel"
    else:  # and a convolution over patches
        model = diffusers.WanTransformer3DModel(**WAN).eval()
        x = draw(2, 3, 4, 6, 4)
        text = draw(2, 7, 10)
        targets = r"(blocks/.*|patch_embed)/kernel"
    base, weights, adapter, params = made(model, tmp_path / "base", targets)
    save_adapter(tmp_path / "out", base, adapter, params)
    t = np.array([3, 500])
    ours = jax.jit(adapter.apply)(
        {"base": weights, "adapter": params}, x, t, {"text": text}
    )
    differs(ours, jax.jit(base.apply)(weights, x, t, {"text": text}))
    model.load_lora_adapter(
        str(tmp_path / "out"),
        prefix=component,
        weight_name="pytorch_lora_weights.safetensors",
    )
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
            timestep=torch.tensor(t),
            encoder_hidden_states=torch.from_numpy(text),
        )
    agree(component, np.moveaxis(np.asarray(ours), -1, 1), theirs.sample)


@pytest.mark.full
def test_diffusers_loads_convolutions(tmp_path, agree):
    """Every kernel of a U-Net: convolutions of stride 1 and 2, matrices, and 1x1 convolutions."""
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(**UNET).eval()
    draw = np.random.default_rng(0).standard_normal
    x = draw((2, 8, 8, 4), np.float32)
    text = draw((2, 7, 12), np.float32)
    t = np.array([3, 500])
    base, weights, adapter, params = made(model, tmp_path / "base", r".*kernel")
    check_adapter(tmp_path / "out", base, adapter)
    save_adapter(tmp_path / "out", base, adapter, params)
    file = tmp_path / "out" / "pytorch_lora_weights.safetensors"
    stored = safetensors.numpy.load_file(file)
    of_conv = "unet.down_blocks.0.resnets.0.conv1"
    assert stored[f"{of_conv}.lora_A.weight"].shape == (3, 8, 3, 3)
    assert stored[f"{of_conv}.lora_B.weight"].shape == (8, 3, 1, 1)
    apply = jax.jit(adapter.apply)
    ours = apply({"base": weights, "adapter": params}, x, t, {"text": text})
    differs(ours, jax.jit(base.apply)(weights, x, t, {"text": text}))
    weight_name = "pytorch_lora_weights.safetensors"
    model.load_lora_adapter(
        str(tmp_path / "out"), prefix="unet", weight_name=weight_name
    )
    with torch.no_grad():
        theirs = model(
            torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
            timestep=torch.tensor(t),
            encoder_hidden_states=torch.from_numpy(text),
        )
    theirs = theirs.sample.numpy()
    agree("convolutions", np.moveaxis(np.asarray(ours), -1, 1), theirs)
    assert np.abs(np.moveaxis(ours, -1, 1) - theirs).max() <= 1e-4 * theirs.std()


def test_what_is_no_matrix_is_refused(tmp_path):
    """Wan's table of shifts and scales has two dimensions, and is no layer in PyTorch."""
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**WAN)
    base, _, adapter, params = made(model, tmp_path / "base", r"(table|.*/table)")
    with pytest.raises(
        Refused,
        match=r"is not a matrix of its own in PyTorch; export without --adapter",
    ):
        save_adapter(tmp_path / "out", base, adapter, params)
    assert not (tmp_path / "out").exists()


def test_what_has_no_low_rank_is_refused(tmp_path):
    """Whole leaves, and adapters on adapters."""
    base = make_net(UNet(**OUR_UNET), config=UNet(**OUR_UNET))
    targets = r".*to_q/kernel"
    lower = adapt(base, base="teacher", rank=2, targets=targets)
    whole = adapt(
        base, base="teacher", rank=2, targets=targets, full="conv_out/bias"
    )
    upper = adapt(lower, base="student", rank=2, targets=targets)
    cases = {
        "conv_out/bias is trained as a whole": whole,
        "student has adapters": upper,
    }
    for said, adapter in cases.items():
        with pytest.raises(
            Refused, match=f"{said}.*; export without --adapter, merged"
        ):
            check_adapter(tmp_path / "out", base, adapter)
        with pytest.raises(Refused, match=said):
            save_adapter(tmp_path / "out", base, adapter, {})


def test_an_adapter_replaces_an_adapter_and_nothing_else(tmp_path):
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**LM, bos_token_id=None, eos_token_id=None)
    )
    base, _, adapter, params = made(model, tmp_path / "base", r".*to_q/kernel")
    for scale in (1.0, 2.0):
        save_adapter(
            tmp_path / "out",
            base,
            adapter,
            jax.tree.map(lambda w, s=scale: s * w, params),
        )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(Refused, match="not empty and not a model folder"):
        save_adapter(
            tmp_path / "other", base, adapter, jax.tree.map(jnp.zeros_like, params)
        )
