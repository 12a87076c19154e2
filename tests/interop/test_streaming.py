"""Loading holds little beside what it loads: a checkpoint of 6 GB in shards, into arrays sharded
over 8 devices.
"""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from jaxdistill import interop
from jaxdistill.core.net import make_net, paths
from jaxdistill.interop.safetensors import write_folder, write_json
from jaxdistill.models.language.lm import LM

CFG = LM(vocab=32000, dim=4096, mlp=11008, heads=32, depth=6, norm_eps=1e-5)

SCRIPT = """
    import json, os, sys, threading, time
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    import jax
    from jaxdistill import interop
    from jaxdistill.core import sharding
    from jaxdistill.core.net import make_net

    def anonymous():  # bytes of this process that are no pages of files
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024

    folder, dtype = sys.argv[1:]
    config = interop.describe(folder)
    net = make_net(config, config=config)
    mesh = sharding.make_mesh(sharding.MeshShape(data=1, fsdp=4, tensor=2))
    where = sharding.fits(sharding.param_shardings(mesh, sharding.Rules(), net.axes), net.shapes)
    place = lambda s, at: jax.ShapeDtypeStruct(s.shape, dtype, sharding=at)
    abstract = jax.tree.map(place, net.shapes, where)
    jax.device_put(0.0)
    before, peak, running = anonymous(), [0], True

    def watch():
        while running:
            peak[0] = max(peak[0], anonymous())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    params = jax.block_until_ready(interop.load_into(folder, net, abstract))
    running = False
    thread.join()
    leaves = jax.tree.leaves(params)
    assert all(len(w.sharding.device_set) == 8 for w in leaves)
    held = sum(s.data.nbytes for w in leaves for s in w.addressable_shards)
    last = [float(w.addressable_shards[-1].data[(-1,) * w.ndim]) for w in leaves]
    loaded = sum(w.nbytes for w in leaves)
    print(json.dumps({"beside": peak[0] - before - held, "loaded": loaded, "last": last}))
"""


@pytest.mark.slow
def test_a_large_checkpoint_streams(tmp_path):
    """What the process holds at most beside the arrays: under 1.3 times the largest tensor and 1
    GB.
    """
    net = make_net(CFG, config=CFG)
    leaves = paths(net.shapes)
    rows = {row.path: row for row in interop.families.llama.table(CFG)}
    shapes = {
        n: row.torch_shape(leaves[p].shape)
        for p, row in rows.items()
        for n in row.names(leaves[p].shape)
    }
    sizes = {name: 4 * int(np.prod(shape)) for name, shape in shapes.items()}
    for file, value in interop.families.llama.FAMILY.write(CFG).items():
        write_json(tmp_path / file, value)
    number = {name: i for i, name in enumerate(sizes)}
    write_folder(
        tmp_path,
        "model",
        sizes,
        lambda name: np.full(shapes[name], number[name] / 8, np.float32),
        10**9,
    )
    assert (
        5.5e9 < sum(sizes.values()) < 6.5e9
        and len(list(tmp_path.glob("*.safetensors"))) > 4
    )
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(SCRIPT),
        str(tmp_path),
        "float32",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    largest = max(sizes.values())
    print(
        f"loaded {found['loaded'] / 1e9:.2f} GB, at most {found['beside'] / 1e9:.2f} GB beside; "
        f"largest tensor {largest / 1e9:.2f} GB"
    )
    assert found["loaded"] == sum(sizes.values())
    assert found["beside"] < 1.3 * largest + 1e9
    last = {
        path: max(number[n] for n in rows[path].names(leaves[path].shape)) / 8
        for path in leaves
    }
    assert found["last"] == [last[path] for path in leaves]
