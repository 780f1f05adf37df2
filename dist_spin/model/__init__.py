"""A transformers model seen as sites, rotations and weights on disk; nothing here is forked from transformers."""
