"""Planning: bytes and traffic compared with programs compiled here, and the TPU compiler on toy
configs.
"""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxdistill.core import build, sharding
from jaxdistill.core.sharding import MeshShape
from jaxdistill.core.types import Refused
from jaxdistill.methods.language.kd import KD
from jaxdistill.run import chips, hlo, loop, plan
from jaxdistill.run.experiment import Experiment
from tools import bench_cases
from tools import plan as plan_command

ROOT = Path(__file__).parents[1]
TOYS = sorted(p.stem for p in (ROOT / "configs/toy").glob("[!_]*.py"))
# networks of points and of language, decoding, forward mode; the contract lowers every toy
QUICK = (
    "dmd2",
    "gkd",
    "grpo",
    "scm",
)


@pytest.fixture
def quickly():
    """Switches off the TPU compiler's search for the best tiles."""
    plan.set_effort(-1.0)
    yield
    plan.set_effort(0.0)


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow)
        for name in TOYS
    ],
)
def test_every_toy_compiles_for_tpu(quickly, name):
    pytest.importorskip(
        "libtpu", reason="no TPU compiler: pip install 'jaxdistill[tpu]'"
    )
    config = importlib.import_module(f"configs.toy.{name}").get_config()
    config.steps = 2 * max(1, config.method.get("critic_steps", 1))
    found = plan.compile_for(config, "v5e:2x2")
    assert (
        found.fits
        and found.chips == 4
        and all(p.model_flops > 0 for p in found.patterns)
    )


@pytest.fixture(scope="module")
def live():
    """The digits DMD2 step on a 2 x 2 mesh of this machine: (plan's bytes of the state, its
    programs, the compiled program).
    """
    config = importlib.import_module("configs.digits.dmd2").get_config()
    config.steps = 10
    config.mesh = build.plain(MeshShape(data=1, fsdp=2, tensor=2))
    experiment = Experiment(config, Path("unused"))
    with sharding.use(experiment.mesh, experiment.settings.rules):
        programs, nets = loop.abstract_programs(experiment)
        key = jax.eval_shape(lambda: jax.random.key(0))
        compiled = programs.step.lower(
            programs.abstract, programs.batch, key, (0, 1)
        ).compile()
    return plan.by_role(programs.abstract, nets), programs, compiled


@pytest.mark.full
def test_bytes_of_the_state_are_those_that_the_program_takes(live):
    by_role, programs, compiled = live
    expected = sum(sum(parts.values()) for parts in by_role.values()) + plan._bytes(
        programs.batch
    )
    assert (
        abs(compiled.memory_analysis().argument_size_in_bytes / expected - 1) < 0.1
    )


def test_the_state_is_donated(live):
    """The weights are not copied: results are stored where the arguments were, except a few
    scalars.
    """
    _, _, compiled = live
    memory = compiled.memory_analysis()
    assert memory.output_size_in_bytes - memory.alias_size_in_bytes < 4096


def test_traffic_of_a_loop_counts_every_turn():
    def f(x, w):
        return jax.lax.scan(lambda c, wi: (jnp.tanh(c @ wi), None), x, w)[0]

    read = lambda n: (
        hlo.moved(
            jax.jit(f)
            .lower(jnp.zeros((64, 128)), jnp.zeros((n, 128, 128)))
            .compile()
            .as_text()
        ).memory
    )
    per_turn = (read(30) - read(10)) / 20
    # a slice of w read and perhaps copied (64 KiB each), x read, the product and tanh written and
    # read: 32 KiB each
    assert 128 * 2**10 <= per_turn <= 400 * 2**10


def test_collectives_by_hand():
    mesh = jax.make_mesh(
        (4,),
        ("x",),
        axis_types=(jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:4],
    )
    put = lambda spec: NamedSharding(mesh, spec)
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32, sharding=put(P("x")))
    compile = lambda f, out: (
        hlo.moved(
            jax.jit(f, out_shardings=put(out)).lower(x).compile().as_text()
        ).sent
    )
    # three others' quarters of 32 KiB
    assert compile(lambda x: x * 2, P())["all-gather"] == 3 * 8 * 1024
    assert compile(lambda x: x.sum(0), P())["all-reduce"] == 2 * 4096 * 3 / 4


@pytest.mark.parametrize(
    "groups, expected",
    [
        (
            "mesh['axis_0'=4,'axis_1'=1,'axis_2'=8], device_ids=([8,4]T(1,0)) {'axis_0'}",
            4,
        ),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("[2,16]<=[32]", 16),
        ("{{0,1,2},{3,4,5}}", 3),
    ],
)
def test_chips_in_a_collective(groups, expected):
    assert (
        hlo._group(f"%x), channel_id=1, replica_groups={groups}, dimensions={{1}}")
        == expected
    )


def test_parses_tuples_layouts_and_known_trip_counts():
    text = """HloModule m
%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %g = bf16[32,128]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], bf16[8,128]{1,0}) tuple(%p, %x)
}
ENTRY %main (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %w = (s32[], bf16[8,128]{1,0}) while(%a), condition=%c, body=%body, BACKEND
  ROOT %r = bf16[8,128]{1,0} get-tuple-element(%w), index=1
}
"""
    count = 'backend_config={"known_trip_count":{"n":"5"}}'
    moved = hlo.moved(text.replace("BACKEND", count))
    assert moved.sent == {"all-gather": 5 * 2048 * 3}
    assert moved.memory == 5 * (2048 + 8192)


def test_gpu_nodes_from_constants():
    config = importlib.import_module("configs.toy.dmd2").get_config()
    found = plan.gpus(config, "h100:8x2")
    assert found.chips == 16 and found.mesh == {"fsdp": 16} and found.fits
    assert all(p.network > 0 and 0 < p.utilisation <= 1 for p in found.patterns)


def test_any_stage_is_planned():
    """Each stage has optimisers of the roles that it trains."""
    config = importlib.import_module("configs.toy.multi_student").get_config()
    stages = build.build(config.method).stages(config.steps)
    found = []
    for stage in range(len(stages)):
        own = config.copy_and_resolve_references()
        plan.shorten(own, stage)
        found.append(plan.gpus(own, "h100:1x1", stage))
    for one, stage in zip(found, stages):
        moments = {role for role, parts in one.by_role.items() if parts["opt"] > 0}
        assert moments == set(stage.method.inits)
    with pytest.raises(Refused, match=f"--stage={len(stages)}: MultiStudent has"):
        plan.shorten(config, len(stages))


def test_chips_by_name_and_by_kind():
    assert (
        chips.of("NVIDIA H100 80GB HBM3") is chips.CHIPS["h100"]
        and chips.of("TPU v5 lite") is chips.CHIPS["v5e"]
    )
    assert chips.of("cpu") is None
    with pytest.raises(Refused, match="chip='v5x'"):
        chips.chip("v5x")


@pytest.mark.parametrize(
    "name", ["v5p", "v5p:4", "h100:8x4", "v9:2x2", "v5p:4x4x4x4"]
)
def test_another_topology_is_refused(name):
    with pytest.raises(Refused):
        plan.topology(name)


def test_search_starts_with_plain_fsdp_and_stays_within_the_chips():
    config = importlib.import_module("configs.toy.dmd2").get_config()
    tried = list(plan.candidates(config, 16))
    assert tried[0]["mesh"] == dict(data=1, fsdp=16, sequence=1, tensor=1)
    first = [
        c["accumulate"]
        for c in tried
        if c["mesh"] == tried[0]["mesh"] and c["place"] == "device"
    ]
    # what holds least comes first
    assert first == sorted(first, reverse=True) and first[-1] == 1
    assert all(np.prod(list(c["mesh"].values())) == 16 for c in tried)
    assert len({json.dumps(c) for c in tried}) == len(tried)


def test_search_leaves_out_what_cannot_help(monkeypatch):
    """Frozen weights go to the host only where their size is enough to make up for the memory that
    the compiler says is missing.
    """
    config = bench_cases.language(KD())
    said = (
        "Ran out of memory on HBM, the total memory required for HLO temporaries ({}G) "
        "exceeds available HBM (15.75G)."
    )

    def places(needed):
        tried = []

        def refuse(changed, name, every, stage):
            tried.append(changed.roles.teacher.place)
            raise jax.errors.JaxRuntimeError(said.format(needed))

        monkeypatch.setattr(plan, "compile_for", refuse)
        list(plan.search(config, "v5e:2x2", most=4))
        return set(tried)

    assert places("35.22") == {"device"} and places("15.75") == {"device", "host"}


@pytest.mark.full
def test_a_candidate_is_left_at_the_first_pattern_that_does_not_fit(
    quickly, monkeypatch
):
    pytest.importorskip(
        "libtpu", reason="no TPU compiler: pip install 'jaxdistill[tpu]'"
    )
    config = importlib.import_module("configs.toy.dmd2").get_config()
    # not the program of the toy's own test: one from the cache of compiled programs cannot be
    # loaded
    config.data.batch_size = 64
    plan.shorten(config)
    devices, kind = plan.topology("v5e:2x2")
    monkeypatch.setattr(
        plan, "topology", lambda name: (devices, dataclasses.replace(kind, hbm=1))
    )
    found = plan.compile_for(config, "v5e:2x2", every=False)
    assert [p.turns for p in found.patterns] == [
        "0+1"
    ] and not found.fits  # not the critics' own steps


def test_an_interrupted_search_has_what_it_found(capsys):
    """The result is the faster one of the two that fit before the interruption."""
    found = lambda seconds: SimpleNamespace(fits=True, peak=2**30, seconds=seconds)
    change = {
        "mesh": {"fsdp": 4},
        "accumulate": 1,
        "remat": "full",
        "place": "device",
    }

    def candidates(config, name, most, stage):
        yield change, found(3.0)
        yield change, "does not hold it"
        yield change, found(2.0)
        raise KeyboardInterrupt

    best = plan_command.search(
        SimpleNamespace(search=candidates), None, "v5e:2x2", 4
    )
    assert (
        best.seconds == 2.0
        and capsys.readouterr().out.splitlines()[-1]
        == "interrupted; the best so far:"
    )


@pytest.mark.full
def test_command_refuses_and_reports(tmp_path):
    run = lambda *a: subprocess.run(
        [sys.executable, "tools/plan.py", *a],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run("--config=configs/toy/dmd2.py").returncode == 2
    refused = run(
        "--config=configs/toy/dmd2.py", "--topology=h100:8x1", "--effort=2"
    )
    assert (
        refused.returncode == 2
        and refused.stderr.strip()
        == "refused: --effort=2: expected a number from -1 to 1"
    )
    done = run(
        "--config=configs/toy/dmd2.py",
        "--topology=h100:8x1",
        f"--json={tmp_path / 'plan.json'}",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "8 chips, fsdp 8; fits" in done.stdout
        and "turns 0+1" in done.stdout
        and "binds:" in done.stdout
    )
    assert json.loads((tmp_path / "plan.json").read_text())["chips"] == 8
