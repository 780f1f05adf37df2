"""Learned rotations and 4-bit quantisation of large language models on the cluster you already have."""

__version__ = "0.1.0"
