"""Everything on disk: atomic files with checksums, locks, and the layout of a run directory."""
