"""Imported first of all by the fork server of a local fan-out: it dies with its launcher, even while it imports the rest."""

from dist_spin.runtime.processes import die_with_parent

die_with_parent()
