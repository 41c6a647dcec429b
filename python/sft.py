"""``kimi sft`` from a checkout: ``python python/sft.py --help`` has its options."""

import sys

from kimi_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["sft", *sys.argv[1:]]))
