"""Quantising the merged weights layer by layer with GPTQ or round-to-nearest, in this process or in many jobs."""
