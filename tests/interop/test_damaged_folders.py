"""Damaged model folders: each loads, with the shapes of its network, or is refused in one line that
names the file.
"""

import json
import math
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net, paths
from jaxdistill.models.autoencoders.vae import VAE
from jaxdistill.models.denoisers.dit import DiT
from jaxdistill.models.denoisers.sana import Sana
from jaxdistill.models.denoisers.wan import Wan
from jaxdistill.models.language.bert import BertClassifier
from jaxdistill.models.language.gemma import Gemma2
from jaxdistill.models.language.lm import LM
from jaxdistill.models.language.neox import NeoX
from jaxdistill.models.language.t5 import T5
from jaxdistill.models.vision.clip import ClipText
from jaxdistill.models.vision.vit import ViT
from tests import damage

# thousands are for by hand
FOLDERS = int(os.environ.get("JAXDISTILL_DAMAGED_FOLDERS", "100"))
MODELS = {
    "llama": LM(
        vocab=13,
        dim=8,
        mlp=12,
        heads=2,
        depth=2,
        rope_factor=8.0,
        rope_original=64,
        eos=(2, 3),
    ),
    "tied": LM(vocab=13, dim=8, mlp=12, heads=2, depth=2, tied=True),
    "gemma": Gemma2(vocab=13, dim=8, mlp=12, heads=2, head_dim=4, depth=2),
    "neox": NeoX(vocab=13, dim=16, mlp=12, heads=2, depth=2),
    "t5": T5(vocab=13, dim=8, mlp=12, heads=2, head_dim=4, depth=2),
    "bert": BertClassifier(
        vocab=13, dim=8, mlp=12, heads=2, depth=2, max_length=16, classes=3
    ),
    "clip": ClipText(vocab=13, dim=8, mlp=12, heads=2, depth=2, max_length=16),
    "vit": ViT(size=8, patch=4, dim=8, mlp=12, heads=2, depth=2),
    "dit": DiT(size=4, patch=2, channels=2, dim=8, depth=2, heads=2, classes=3),
    "sana": Sana(
        size=4, channels=2, dim=8, depth=2, heads=2, cross_heads=2, text_dim=4
    ),
    "wan": Wan(
        channels=2, dim=24, mlp=12, depth=2, heads=2, text_dim=4, time_dim=4
    ),
    "vae": VAE(size=8, widths=(8, 8), layers=1, groups=4),
}
HOME = {"llama", "t5", "dit", "wan"}  # stored in several files


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """name -> a folder that loads."""
    home = tmp_path_factory.mktemp("undamaged")
    for name, cfg in MODELS.items():
        net = make_net(cfg, config=cfg)
        fill = lambda s: jnp.asarray(
            np.random.default_rng(0).standard_normal(s.shape), s.dtype
        )
        shards = {"max_shard_bytes": net.size * 2} if name in HOME else {}
        interop.save(home / name, net, jax.tree.map(fill, net.shapes), **shards)
        assert (len(list((home / name).glob("*.safetensors"))) > 1) == (
            name in HOME
        )
    return home


def in_header(file, rng):
    """Damage inside a safetensors header: as JSON, its length put right, or as bytes."""
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    if rng.random() < 0.3:
        return damage.flip(file, rng, end=8 + size)
    header = file.with_suffix(".json")
    header.write_bytes(raw[8 : 8 + size])
    how = damage.damage(header, rng)
    text = header.read_bytes()
    header.unlink()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + size :])
    return f"header of {file.name}, {how}"


def damaged(folder, rng):
    """Damages one or two files of a folder; what was done."""
    done = []
    for _ in range(int(rng.integers(1, 3))):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        weights = [
            file
            for file in files
            if file.suffix == ".safetensors" and file.stat().st_size >= 8
        ]
        kind = rng.random()
        if kind < 0.35 and weights:
            try:
                done.append(
                    in_header(weights[int(rng.integers(len(weights)))], rng)
                )
                continue
            except (ValueError, OverflowError):  # damaged before
                pass
        pool = (
            [file for file in files if file.suffix == ".json"]
            if kind < 0.8
            else files
        )
        file = pool[int(rng.integers(len(pool)))] if pool else None
        if file is not None:
            done.append(
                damage.remove(file, rng)
                if rng.random() < 0.03
                else damage.damage(file, rng)
            )
    return "; ".join(done)


def test_a_damaged_folder_loads_or_is_refused_in_one_line(
    undamaged, tmp_path, record_property
):
    rng = np.random.default_rng(0)
    counts = {"loaded": 0, "refused": 0}
    folder = tmp_path / "model"
    for i in range(FOLDERS):
        name = sorted(MODELS)[i % len(MODELS)]
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(undamaged / name, folder)
        how = damaged(folder, rng)
        found = []
        try:
            with damage.quiet(tmp_path):
                message = damage.outcome(
                    lambda found=found: found.append(interop.load(folder)),
                    str(folder),
                )
        except BaseException as error:
            error.add_note(f"{i}, {name}: {how}")
            raise
        counts["loaded" if message is None else "refused"] += 1
        for net, params in found:
            shapes = paths(net.shapes)
            leaves = paths(params)
            assert leaves.keys() == shapes.keys(), how
            assert all(
                leaves[path].shape == shapes[path].shape for path in leaves
            ), how
            assert net.size == sum(math.prod(w.shape) for w in leaves.values()), how
    record_property("damaged folders", json.dumps(counts))
    print("damaged folders:", counts)
    assert min(counts.values()) >= FOLDERS // 20  # neither all nor nothing
