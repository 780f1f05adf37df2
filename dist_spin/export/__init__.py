"""Checkpoints for the runtimes that models are served with, and the way back in: `dist_spin.load`."""
