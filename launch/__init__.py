"""Where stages run: this machine, torchrun, a scheduler. Thin: what is computed never depends on it."""
