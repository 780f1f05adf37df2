"""Imported first of all by the fork server of a local fan-out: how it is ended, even while it imports the rest.

It dies with its launcher. A ctrl-C, which a terminal sends to every process, is the launcher's to act on; the fork server ignores
it once it serves, and must before that too, or it would leave a traceback and jobs that start slowly.
"""

import signal

from dist_spin.runtime.processes import die_with_parent

signal.signal(signal.SIGINT, signal.SIG_IGN)
die_with_parent()
