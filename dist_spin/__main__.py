"""`python -m dist_spin` is `dist-spin`; ranks are started this way."""

import os
import sys

from dist_spin.cli import main

code = main()
sys.stdout.flush()
sys.stderr.flush()
# Not sys.exit: native threads of torch's process groups outlive the interpreter, and about one rank in ten was aborted on
# its way out, after its work was done and its exit code decided.
os._exit(code)
