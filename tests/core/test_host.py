"""Freed memory is kept: a step that has run before takes no new pages from the kernel."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import jax, jax.numpy as jnp
from jaxdistill.core import host
if len(sys.argv) > 1 and not host.keep_freed_memory():
    raise SystemExit(7)
step = jax.jit(lambda x: jnp.sin(x) @ x + jnp.cos(x).T @ x)
x = jnp.ones((1500, 1500))
for _ in range(8):
    step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
"""


PLAIN = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, programs as users get them


def pages(*arguments) -> float:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, env=PLAIN)
    if done.returncode == 7:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


def test_a_step_takes_few_new_pages():
    """A result of 9 MB and temporaries of as much again: thousands of pages a step where they are mapped anew."""
    assert pages("keep") < pages() / 4
