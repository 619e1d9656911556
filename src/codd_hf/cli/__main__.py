"""`python -m codd_hf.cli`, the same as `codd-hf`."""

import sys

from . import main

sys.exit(main())
