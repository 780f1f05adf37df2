"""An export in the engine that it is served with, beside `dist_spin.load`."""
