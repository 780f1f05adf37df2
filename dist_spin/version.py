"""The version, which the distribution package takes from here, and the version that runs are compared by."""

__version__ = "0.2.0"

# The oldest version whose learning steps do the same from the same settings. A run that was started with another one is not
# continued (`optimize` keeps it in the run's fingerprint): raise it when a step comes to compute something else.
LEARNS_AS = "0.1.0"
