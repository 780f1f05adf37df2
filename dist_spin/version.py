"""The version, which the distribution package takes from here."""

__version__ = "0.1.0"
