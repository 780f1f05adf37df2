"""The other methods of the published tables, on the same sites, solver and data; each learns one decoder layer at a time."""
