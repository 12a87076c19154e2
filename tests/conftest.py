"""Before JAX starts: eight simulated devices on the CPU, and quick compilation rather than quick programs."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets; tests that ask for it are skipped where it is missing."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("JAXDISTILL_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is missing (set JAXDISTILL_DATA)")
    return folder
