"""How fast the product's own code runs: nothing is timed here that a stage does not call."""
