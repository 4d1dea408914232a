"""Builds lraee."""

from setuptools import setup

setup()
