"""What several verbs build in the same way: model, sites, variants, fingerprints, initial rotations."""
