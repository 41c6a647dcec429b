"""``kimi reward`` from a checkout: ``python python/train_reward.py --help`` has its options."""

import sys

from kimi_core.cli import main

if __name__ == "__main__":
    sys.exit(main(["reward", *sys.argv[1:]]))
