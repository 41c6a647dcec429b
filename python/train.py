"""``kimi train`` from a checkout: ``python python/train.py --help`` has its options."""

import sys

from kimi_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
