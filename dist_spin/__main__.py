"""`python -m dist_spin` and `dist-spin`; ranks are started this way."""

import os
import sys

from dist_spin.runtime import processes, signals


def main() -> None:
    """Run the command line and leave with its exit code."""
    processes.die_with_parent()
    signals.survive_terminal()
    signals.watch()  # before the imports, which take seconds

    from dist_spin import cli

    code = cli.main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: native threads of torch's process groups outlive the interpreter, and about one rank in ten was aborted on
    # its way out, after its work was done and its exit code decided.
    os._exit(code)


if __name__ == "__main__":
    main()
