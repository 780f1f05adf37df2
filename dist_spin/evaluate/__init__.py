"""Perplexity and zero-shot tasks, a layer in memory at a time; text continued by the quantised model."""
