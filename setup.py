"""Package metadata. Tool settings are in pyproject.toml, the exact versions of CI in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
README = ROOT / "README.md"
LAUNCHES = sorted(path.name for path in (ROOT / "examples" / "accelerate").glob("*.yaml"))
# Only pre-releases can be installed (0.0.1 was withdrawn), and pip takes one where it is named alone.
FLASH = "flash-attn-4>=4.0.0b36"

setup(
    name="hf_fpdt",
    version="0.1.0",
    description="Train a stock Hugging Face decoder on sequences of millions of tokens (FPDT)",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    author="The hf_fpdt authors",
    project_urls={"Paper": "https://arxiv.org/abs/2408.16978"},
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["hf_fpdt", "hf_fpdt.*"]),
    package_data={"hf_fpdt": ["py.typed"], "hf_fpdt.commands.finetune": ["template.md"]},
    # For accelerate launch where there is no clone: share/hf_fpdt/accelerate in the environment.
    data_files=[("share/hf_fpdt/accelerate", [f"examples/accelerate/{name}" for name in LAUNCHES])],
    entry_points={"console_scripts": ["hf-fpdt = hf_fpdt.commands.main:main"]},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.15",
        "peft>=0.21",
        "datasets",
        "safetensors",
        "psutil",
        "pyyaml",
        "tqdm",
        "rich>=13",
        "shtab>=1.7",
    ],
    extras_require={
        "flash": [FLASH],
        # All that hf-fpdt finetune uses where there is a GPU, its picture included.
        "gpu": [FLASH, "liger-kernel", "matplotlib"],
        # Kernels of the gated delta rule and KDA. Those of Mamba-2 (mamba-ssm, causal-conv1d) are built from source.
        "recurrent": ["flash-linear-attention>=0.6.0"],
        # Weights in NF4 or int8: hf-fpdt finetune --quantize, or a model loaded with a BitsAndBytesConfig.
        "quantized": ["bitsandbytes>=0.50"],
        "bench": ["matplotlib", "liger-kernel", "pyte"],
        "dev": [
            "filelock",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "mypy",
            "pre-commit",
            "matplotlib",
            "trl",
            "bitsandbytes",
        ],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
