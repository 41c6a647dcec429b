"""``python -m kimi_core.cli``: the ``kimi`` command without its script."""

import sys

from kimi_core.cli import main

if __name__ == "__main__":
    sys.exit(main())
