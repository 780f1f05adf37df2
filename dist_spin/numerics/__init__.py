"""Tensors in, tensors out: rotations, quantisers and solvers, with no modules, files or process groups."""
