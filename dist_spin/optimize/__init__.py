"""Learning the rotations: `train.py` holds the main loop."""
