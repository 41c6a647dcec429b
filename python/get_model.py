"""Fetch a model that training would otherwise fetch at its first use, and print its folder.

    python python/get_model.py smollm2-135m

The folder is below $KIMI_CACHE, or ~/.cache/kimi_core.
"""

import argparse
import sys

from kimi_core.models.smollm2 import SMOLLM2, get_smollm2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[SMOLLM2], help="which model to fetch")
    parser.parse_args()
    try:
        print(get_smollm2())
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
