"""Imported by the fork server of a local fan-out: what its jobs need, so that they begin in milliseconds.

What libraries say while they are imported would reach the launcher's terminal once for each fork server, so they are silenced
meanwhile.
"""

from dist_spin.runtime.console import libraries_quiet

with libraries_quiet():
    import dist_spin.evaluate.stage
    import dist_spin.optimize.train
    import dist_spin.quantize.stage  # noqa: F401
