"""What all tests share. Before JAX starts: eight simulated devices on the CPU, quick compilation
rather than quick programs, and one cache of compiled programs for all workers and the processes
that they start.
"""

import atexit
import collections
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The last two save a third of the time. A newer XLA stops at the last, which it does not know.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false"
        if version("jaxlib").startswith("0.10.")
        else "",
    ]
)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(
        prefix="jaxdistill-tests-"
    )
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
    )
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

from tests import typed
from tests.times import (  # noqa: F401
    pytest_addoption,
    pytest_collection_finish,
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)

typed.install()

TESTS = Path(__file__).parent
# of folders: identities first, then files of minutes, so that no worker is idle at the end
ORDER = (
    "objectives",
    "diffusion",
    "samplers",
    "surgery",
    "models",
    "methods",
    "",  # tests of the whole library
    "run",
    "interop",
    "launch",
    "tools",
)


def pytest_collection_modifyitems(items):
    """Folders in their `ORDER`, the others after them."""
    items.sort(key=lambda item: place(item.path.relative_to(TESTS).parts))


def place(parts: tuple[str, ...]) -> int:
    folder = parts[0] if len(parts) > 1 else ""
    return ORDER.index(folder) if folder in ORDER else len(ORDER)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets. A test that needs it is skipped where it is missing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("JAXDISTILL_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing (set JAXDISTILL_DATA)")
    return folder


@pytest.fixture
def compilations():
    """compilations["train_step"]: how many programs of the jitted function `train_step` this test
    has compiled so far.
    """
    count = collections.Counter()

    def listen(event, seconds, *, fun_name="", **_):
        if event == "/jax/core/compile/backend_compile_duration":
            count[fun_name.removeprefix("jit(").removesuffix(")")] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def lowers_for_tpu():
    """lowers_for_tpu(programs) checks that every pattern of turns becomes a TPU program, from the
    traces that counted the flops.
    """

    def check(programs):
        key = jax.eval_shape(lambda: jax.random.key(0))
        for active in programs.patterns:
            traced = programs.step.trace(
                programs.abstract, programs.batch, key, active
            )
            assert (
                "stablehlo"
                in traced.lower(lowering_platforms=("tpu",)).as_text()[:2000]
            )

    return check


@pytest.fixture
def x64():
    """Float64, also in the threads of callbacks, which `jax.enable_x64` does not reach."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture(scope="module", autouse=True)
def _compiled_programs_are_dropped():
    """A worker that runs the complete suite would hold 8 GiB of them."""
    yield
    jax.clear_caches()
