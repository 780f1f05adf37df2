"""Who owns the memory while rotations are learned: one small interface, one file per engine."""
