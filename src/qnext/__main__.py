"""``python -m qnext`` is the command ``qnext``."""

import sys

from qnext.cli import main

sys.exit(main())
