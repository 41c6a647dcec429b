"""``kimi evaluate`` from a checkout: ``python python/evaluate.py --help`` has its options."""

import sys

from kimi_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
