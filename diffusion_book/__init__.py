"""Diffusion models from the ground up: the library that the chapters of the book export."""

from importlib.metadata import version

__version__ = version("diffusion_book")
