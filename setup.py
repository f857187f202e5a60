"""Package metadata. The versions that the tests run with are in constraints.txt; docs/design-notes.md says
what each dependency is for."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# In one place, where the program finds it without being installed.
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "apo_megatron/__init__.py").read_text("utf-8"), re.M)
assert VERSION is not None

# Lower bounds are what the code, or megatron-core, is known to need; upper bounds stop at the next release
# that may break an interface we use.
INSTALL_REQUIRES = [
    "megatron-core>=0.16,<0.17",  # reaches into its schedules and optimizer: one minor version at a time
    "torch>=2.6",  # megatron-core's own lower bound
    "transformers>=5,<6",
    "safetensors>=0.8",
    "tokenizers>=0.23",
    "datasets>=5,<6",
    "math-verify>=0.9,<0.10",
    "pebble>=5.2,<6",
    "numpy>=2",
    "packaging>=24",
    "pydantic>=2.7,<3",
    "pyyaml>=6",
    "jinja2>=3.1",
    "pyarrow>=24",  # the lower bound of datasets
    "xxhash>=3.5",
    "aiohttp>=3.11,<4",
    "orjson>=3.10",
    "psutil>=5.9",  # megatron-core does not declare it, and its checkpoint writers cannot work without it
    "rich>=13",
    "tensorboard>=2.16",
    "matplotlib>=3.8",
]
# NVIDIA Apex is not on the package index, where an unrelated project holds its name: it is built from source
# where wanted (docs/design-notes.md) and nothing requires it.
EXTRAS_REQUIRE = {
    "gpu": [
        "transformer-engine[pytorch]>=1.10",
        "triton",
    ],  # torch's CUDA builds bring triton and pin its version
    "sglang": ["sglang"],  # pins its own torch and transformers: give it an environment of its own
    "ray": ["ray>=2.50,<3"],  # the launcher reaches into its list of free resources, which has no public name
    "wandb": ["wandb"],
    "dev": [
        "build>=1.2",
        "coverage>=7.6",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "ruff",
        "mypy",
        "types-PyYAML",
        "pre-commit",
        "ray>=2.50,<3",
        "triton>=3.7,<4",  # its interpreter and its compiler are enough to test kernels without a GPU
    ],
}

setup(
    name="apo_megatron",
    version=VERSION[1],
    description="RL with verifiable rewards on Megatron-Core, with Anchored Policy Optimization (APO)",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(
        include=["apo_megatron", "apo_megatron.*", "checkpoints_convert", "checkpoints_convert.*"]
    ),
    package_data={"": ["*.html", "*.css", "*.js"]},
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    entry_points={
        "console_scripts": [
            "apo-train = apo_megatron.train:main",
            "apo-sft = apo_megatron.sft:main",
            "apo-eval = apo_megatron.evaluate:main",
            "apo-doctor = apo_megatron.doctor:main",
            "apo-ray = apo_megatron.launch.entry:main",
            "apo-convert = checkpoints_convert.command:main",
            "apo-report = apo_megatron.report:main",
        ]
    },
)
