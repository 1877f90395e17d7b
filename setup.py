"""Puts ``configs/`` and ``sweeps/``, which stand at the top of the repository, into the package.

The rest of the build is in pyproject.toml.
"""

from setuptools import find_packages, setup

SHIPPED = ("configs", "sweeps")

setup(
    packages=[
        *find_packages(include=["fingpt_lightning*", "callbacks*"]),
        *(f"fingpt_lightning.{name}" for name in SHIPPED),
    ],
    package_dir={f"fingpt_lightning.{name}": name for name in SHIPPED},
)
