"""``python -m fastmrc``."""

from __future__ import annotations

import sys

from fastmrc.cli import main

if __name__ == "__main__":
    sys.exit(main())
