import ast
import dataclasses
import json
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from safetensors.numpy import load_file, save_file

from jaxdistill import interop
from jaxdistill.core.net import cast, make_net, paths
from jaxdistill.core.sharding import make_mesh
from jaxdistill.core.types import Refused
from jaxdistill.interop.folder import MARKER
from jaxdistill.interop.tables import LINEAR, Row
from jaxdistill.models.denoisers.mlp import MLP
from jaxdistill.models.language.bert import MaskedBert
from jaxdistill.models.language.gemma import Gemma2
from jaxdistill.models.language.lm import LM
from jaxdistill.models.language.neox import NeoX
from jaxdistill.models.language.qwen import Qwen2, Qwen3
from jaxdistill.models.language.t5 import T5, T5Encoder

CFG = LM(
    vocab=13, dim=8, mlp=12, heads=2, kv_heads=1, head_dim=4, depth=2, eos=(2,)
)
NET = make_net(CFG, config=CFG)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), NET.shapes
    )


@pytest.fixture
def folder(tmp_path, params):
    interop.save(tmp_path / "model", NET, params, card="# A student\n")
    return tmp_path / "model"


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for path, leaf in paths(a).items():
        assert leaf.dtype == paths(b)[path].dtype
        np.testing.assert_array_equal(leaf, paths(b)[path], err_msg=path)


def edit(folder, change):
    """Rewrites the stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_round_trip_is_bit_exact(folder, params):
    net, found = interop.load(folder)
    assert net.config == CFG == interop.describe(folder)
    same(found, params)
    assert (folder / "README.md").read_text() == "# A student\n"
    names = [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert sorted(p.name for p in folder.iterdir()) == [MARKER, *names]


def test_round_trip_in_bfloat16_and_shards(tmp_path, params):
    half = cast(params, jnp.bfloat16)
    interop.save(tmp_path / "half", NET, half, max_shard_bytes=300)
    assert len(list((tmp_path / "half").glob("*.safetensors"))) > 3
    assert not (tmp_path / "half" / "README.md").exists()
    same(interop.load(tmp_path / "half", "bfloat16")[1], half)
    same(interop.load(tmp_path / "half")[1], cast(half, jnp.float32))


def test_saving_again_replaces_the_folder(folder, params):
    interop.save(folder, NET, jax.tree.map(jnp.zeros_like, params))
    assert not any(w.any() for w in jax.tree.leaves(interop.load(folder)[1]))
    assert not (folder / "README.md").exists()


def test_load_into_places_every_leaf_in_its_sharding(folder, params):
    mesh = make_mesh()
    place = lambda s, axes: jax.ShapeDtypeStruct(
        s.shape,
        jnp.bfloat16,
        sharding=NamedSharding(mesh, jax.P(*[None] * len(s.shape))),
    )
    found = interop.load_into(
        folder, NET, jax.tree.map(place, NET.shapes, NET.axes)
    )
    same(found, cast(params, jnp.bfloat16))
    assert all(w.sharding.mesh == mesh for w in jax.tree.leaves(found))


@pytest.mark.parametrize(
    "path",
    [
        "blocks/to_k/kernel",
        "blocks/norm_mlp/scale",
        "embed/embedding",
        "unembed/kernel",
    ],
)
def test_a_shard_is_that_part_of_the_leaf(folder, params, path):
    (row,) = (row for row in interop.families.llama.table(CFG) if row.path == path)
    whole = np.asarray(paths(params)[path])
    tensors = interop.read_folder(folder, "model")
    read = interop._reader(row, [tensors[name] for name in row.names(whole.shape)])
    for index in (
        (slice(None),) * whole.ndim,
        tuple(slice(n // 2, n) for n in whole.shape),
        (slice(0, 1), *[slice(1, 3)] * (whole.ndim - 1)),
    ):
        np.testing.assert_array_equal(read(index), whole[index])


def test_repeated_weights_must_agree(tmp_path):
    row = Row("time", "layer.{i}.time", LINEAR, copies=2)
    w = np.arange(6.0).reshape(2, 3)
    tensors = [
        interop.Tensor(tmp_path / "x", w),
        interop.Tensor(tmp_path / "y", w.copy()),
    ]
    np.testing.assert_array_equal(
        interop._reader(row, tensors)((slice(None),) * 2), w.T
    )
    tensors[1].data[1, 1] = 9
    with pytest.raises(Refused, match=r"y: the copies of layer.\{i\}.time differ"):
        interop._reader(row, tensors)


def test_torch_is_not_needed():
    code = (
        "import sys; import jaxdistill.interop; "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_net_weight_has_a_row():
    for tied in (False, True):
        cfg = dataclasses.replace(CFG, tied=tied)
        assert {row.path for row in interop.families.llama.table(cfg)} == paths(
            make_net(cfg).shapes
        ).keys()


def refused(match, folder):
    with pytest.raises(Refused, match=match) as error:
        interop.load(folder)
    assert "\n" not in str(error.value)


def test_refuses_other_classes(folder, tmp_path):
    configure(folder, architectures=["LlamaForCausalLMX"])
    refused(
        r"config.json: class='LlamaForCausalLMX': did you mean 'LlamaForCausalLM'\?",
        folder,
    )
    configure(folder, architectures=["ZebraNet"])
    refused("class='ZebraNet': expected one of .*LlamaForCausalLM", folder)
    configure(folder, architectures=None)
    refused("class=''", folder)
    (folder / "config.json").unlink()
    refused("config.json: no such file", folder)
    (tmp_path / "model_index.json").write_text("{}")
    refused("a diffusers pipeline; give the folder of its model", tmp_path)


def test_refuses_missing_and_unexpected_keys(folder):
    edit(
        folder,
        lambda t: t.update(
            {
                "model.layers.1.mlp.up_proj.weigth": t.pop(
                    "model.layers.1.mlp.up_proj.weight"
                )
            }
        ),
    )
    refused(
        r"model.layers.1.mlp.up_proj.weight \[12, 8\] is missing; "
        r"did you mean 'model.layers.1.mlp.up_proj.weigth'\?",
        folder,
    )
    edit(
        folder,
        lambda t: t.update(
            {
                "model.layers.1.mlp.up_proj.weight": t[
                    "model.layers.1.mlp.up_proj.weigth"
                ]
            }
        ),
    )
    refused(
        "model.safetensors: unexpected key model.layers.1.mlp.up_proj.weigth",
        folder,
    )
    edit(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weigth"))
    interop.load(folder)
    edit(folder, lambda t: t.pop("model.norm.weight"))
    refused(r"model.norm.weight \[8\] is missing$", folder)


def test_constants_of_old_files_are_ignored(folder, params):
    edit(
        folder,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
        ),
    )
    same(interop.load(folder)[1], params)


def test_refuses_other_shapes(folder):
    edit(
        folder,
        lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:5].copy()}),
    )
    refused(
        r"model.safetensors: lm_head.weight has shape \[5, 8\], expected \[13, 8\]",
        folder,
    )


def test_refuses_truncated_and_pickled_weights(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    refused(
        f"truncated, {len(whole) - 7} bytes where the header says {len(whole)}",
        folder,
    )
    file.unlink()
    refused("no model.safetensors and no model.safetensors.index.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    refused(
        "pytorch_model.bin is pickled .* python -c 'from transformers import LlamaForCausalLM",
        folder,
    )


def test_load_into_refuses_another_network(folder):
    into = lambda cfg: interop.load_into(
        folder, make_net(cfg, config=cfg), make_net(cfg).shapes
    )
    into(
        dataclasses.replace(
            CFG, dtype="bfloat16", remat="full", max_length=99, eos=()
        )
    )
    with pytest.raises(
        Refused, match=r"config.json: rope_theta is 10000.0, expected 500.0"
    ):
        into(dataclasses.replace(CFG, rope_theta=500.0))
    with pytest.raises(Refused, match="hidden_size is 8, expected 16"):
        into(dataclasses.replace(CFG, dim=16))
    with pytest.raises(Refused, match="holds a LlamaForCausalLM, expected a MLP"):
        into(MLP())


def test_save_refuses_what_has_no_place(tmp_path, params):
    target = tmp_path / "out"
    with pytest.raises(Refused, match="no PyTorch class for MLP; supported: "):
        interop.save(target, make_net(MLP(), config=MLP()), {})
    with pytest.raises(Refused, match="LlamaForCausalLM has no place for extra"):
        interop.save(target, NET, params | {"extra": jnp.ones(3)})
    with pytest.raises(Refused, match="LlamaForCausalLM needs norm/scale"):
        interop.save(target, NET, {k: v for k, v in params.items() if k != "norm"})
    with pytest.raises(
        Refused, match=r"norm/scale has shape \[3\], expected \[8\]"
    ):
        interop.save(target, NET, params | {"norm": {"scale": jnp.ones(3)}})
    assert list(tmp_path.iterdir()) == []


TIED = dataclasses.replace(CFG, tied=True)
TIES = [  # (a network whose embedding is its head too, the head's name in files, the embedding's)
    (TIED, "lm_head.weight", "model.embed_tokens.weight"),
    (
        Qwen2(vocab=13, dim=8, mlp=12, heads=2, depth=1, tied=True),
        "lm_head.weight",
        "model.embed_tokens.weight",
    ),
    (
        Qwen3(vocab=13, dim=8, mlp=12, heads=2, depth=1, tied=True),
        "lm_head.weight",
        "model.embed_tokens.weight",
    ),
    (
        Gemma2(vocab=13, dim=8, mlp=12, heads=2, head_dim=4, depth=1),
        "lm_head.weight",
        "model.embed_tokens.weight",
    ),
    (
        NeoX(vocab=13, dim=16, mlp=12, heads=2, depth=1, tied=True),
        "embed_out.weight",
        "gpt_neox.embed_in.weight",
    ),
    (
        NeoX(vocab=13, dim=16, mlp=12, heads=2, depth=1, tied=True),
        "lm_head.weight",
        "gpt_neox.embed_in.weight",
    ),
    (
        T5(vocab=13, dim=8, mlp=12, heads=2, head_dim=4, depth=1, tied=True),
        "lm_head.weight",
        "shared.weight",
    ),
    (
        T5(vocab=13, dim=8, mlp=12, heads=2, head_dim=4, depth=1, tied=False),
        "decoder.embed_tokens.weight",
        "shared.weight",
    ),
    (
        T5Encoder(vocab=13, dim=8, mlp=12, heads=2, head_dim=4, depth=1),
        "encoder.embed_tokens.weight",
        "shared.weight",
    ),
    (
        MaskedBert(vocab=13, dim=8, mlp=12, heads=2, depth=1),
        "cls.predictions.decoder.weight",
        "bert.embeddings.word_embeddings.weight",
    ),
    (
        MaskedBert(vocab=13, dim=8, mlp=12, heads=2, depth=1),
        "cls.predictions.decoder.bias",
        "cls.predictions.bias",
    ),
]


@pytest.mark.parametrize(
    ("cfg", "copy", "name"),
    TIES,
    ids=[f"{type(cfg).__name__}-{copy}" for cfg, copy, _ in TIES],
)
def test_a_tied_weight_may_stand_under_any_of_its_names_and_has_one_value(
    tmp_path, cfg, copy, name
):
    net = make_net(cfg, config=cfg)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), net.shapes
    )
    interop.save(tmp_path / "model", net, params)
    edit(tmp_path / "model", lambda t: t.update({copy: t[name].copy()}))
    same(interop.load(tmp_path / "model")[1], params)  # both
    edit(tmp_path / "model", lambda t: t.pop(name))
    same(interop.load(tmp_path / "model")[1], params)  # the other alone
    edit(tmp_path / "model", lambda t: t.update({name: t[copy] + 1}))
    copy = copy.replace("lm_head", "embed_out") if isinstance(cfg, NeoX) else copy
    refused(
        rf"model.safetensors: {copy} differs from {name}, to which config.json ties it",
        tmp_path / "model",
    )


def test_an_untied_head_is_a_weight_of_its_own(folder, params):
    assert not (
        np.asarray(params["embed"]["embedding"])
        == np.asarray(params["unembed"]["kernel"]).T
    ).any()
    same(interop.load(folder)[1], params)
    edit(folder, lambda t: t.pop("lm_head.weight"))
    refused(r"lm_head.weight \[13, 8\] is missing", folder)


def test_two_names_of_one_tensor_have_one_value(tmp_path):
    cfg = NeoX(vocab=13, dim=16, mlp=12, heads=2, depth=1)
    net = make_net(cfg, config=cfg)
    interop.save(
        tmp_path / "model",
        net,
        jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), net.shapes),
    )
    # renamed to the other
    edit(
        tmp_path / "model",
        lambda t: t.update({"lm_head.weight": t["embed_out.weight"].copy()}),
    )
    interop.load(tmp_path / "model")
    edit(
        tmp_path / "model",
        lambda t: t.update({"lm_head.weight": t["embed_out.weight"] + 1}),
    )
    refused(
        "embed_out.weight is stored twice with different values", tmp_path / "model"
    )


def test_refuses_weights_that_are_no_plain_floats(folder):
    name = "model.layers.0.mlp.up_proj."
    for key in (
        "weight_scale",
        "weight_scale_inv",
        "scale_weight",
        "qweight",
        "scales",
        "weight.absmax",
        "SCB",
        "weight_packed",
    ):
        edit(
            folder,
            lambda t, key=key: t.update({name + key: np.ones(1, np.float32)}),
        )
        refused(
            rf"model.safetensors: {name}{key} says that the weights are quantised",
            folder,
        )
        edit(folder, lambda t, key=key: t.pop(name + key))
    edit(
        folder,
        lambda t: t.update({name + "weight": t[name + "weight"].astype(np.int8)}),
    )
    refused(
        f"model.safetensors: {name}weight has numbers of type int8, expected plain floats",
        folder,
    )
    configure(folder, quantization_config={"quant_method": "fp8"})
    refused(
        r"config.json: quantization_config=\{'quant_method': 'fp8'\} is not supported, "
        "expected None",
        folder,
    )


@pytest.mark.parametrize(
    "kind",
    [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz],
)
def test_weights_of_eight_bits_load_exactly(folder, kind):
    rounded = {
        k: v.astype(kind)
        for k, v in load_file(folder / "model.safetensors").items()
    }
    code = {
        "e4m3fn": "F8_E4M3",
        "e5m2": "F8_E5M2",
        "e4m3fnuz": "F8_E4M3FNUZ",
        "e5m2fnuz": "F8_E5M2FNUZ",
    }[np.dtype(kind).name[7:]]
    header = {}
    data = b""
    for name, w in rounded.items():
        header[name] = {
            "dtype": code,
            "shape": w.shape,
            "data_offsets": [len(data), len(data) + w.nbytes],
        }
        data += w.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data
    )
    for dtype in ("float32", "bfloat16"):
        found = interop.load(folder, dtype)[1]
        want = rounded["model.embed_tokens.weight"].astype(np.float32)
        np.testing.assert_array_equal(
            np.asarray(found["embed"]["embedding"], np.float32), want
        )


def test_refuses_what_is_no_class(folder):
    for value in ("LlamaForCausalLM", [5], {"a": 1}, 7, [["LlamaForCausalLM"]]):
        configure(folder, architectures=value)
        refused(
            "config.json: architectures is .*, expected the name of a class", folder
        )
    configure(folder, architectures=["LlamaForCausalLM"], _class_name=["X"])
    refused("config.json: _class_name is .*, expected the name of a class", folder)


@pytest.mark.parametrize("name", ["a'b; rm -rf x", 'a"b`id`$(id)', "a b", "plain"])
def test_a_folders_name_in_a_command_is_a_name(name, tmp_path):
    """The line that converts pickles, as a shell splits it: three words, the third Python with the
    path in it.
    """
    for family, file in (
        (interop.families.llama.FAMILY, "pytorch_model.bin"),
        (interop.families.edm.SONG, "net.pkl"),
        (interop.families.lpips.FAMILY, "vgg.pth"),
    ):
        pickled = tmp_path / name / file
        python, flag, code = shlex.split(
            interop._pickled(pickled, family).split("convert it with: ")[1]
        )
        assert (python, flag) == ("python", "-c")
        texts = [
            node.value
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        inside = {str(pickled.parent), str(pickled.with_suffix(""))}
        assert any(text.startswith(path) for text in texts for path in inside)
