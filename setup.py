from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent


def requirements(name: str) -> list[str]:
    lines = (here / "requirements" / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


setup(
    name="nemo_vlm",
    version="0.1.0",
    description="Train, convert, serve and evaluate vision-language models on Megatron-Core",
    packages=find_packages(include=["nemo_vlm", "nemo_vlm.*"]),
    python_requires=">=3.10",
    install_requires=requirements("base.txt"),
    extras_require={name: requirements(f"{name}.txt") for name in ("gpu", "dev", "slurm", "energon")},
)
