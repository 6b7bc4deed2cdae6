"""``python -m histill``."""

import sys

from histill.cli import main

sys.exit(main())
