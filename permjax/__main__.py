"""`python -m permjax` is the `permjax` command."""

import sys

from permjax.cli import main

sys.exit(main())
