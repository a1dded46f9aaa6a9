"""Lay out the two packages of the one distribution: `bdcore`, and the folder `plugins/` as `bdcore_plugins`."""

from setuptools import find_packages, setup

plugins = ["bdcore_plugins", *(f"bdcore_plugins.{name}" for name in find_packages("plugins"))]

setup(packages=[*find_packages(include=["bdcore", "bdcore.*"]), *plugins], package_dir={"bdcore_plugins": "plugins"})
