"""Rounding the merged weights layer by layer, in this process or in many jobs."""
