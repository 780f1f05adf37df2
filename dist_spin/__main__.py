"""`python -m dist_spin` is `dist-spin`."""

import sys

from dist_spin.cli import main

sys.exit(main())
