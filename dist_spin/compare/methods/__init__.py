"""The other systems of the published tables, one file each."""
