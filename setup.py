"""Builds the wheel; everything it needs to know is in pyproject.toml."""

from setuptools import setup

setup()
