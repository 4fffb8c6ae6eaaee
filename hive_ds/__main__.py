"""``python -m hive_ds``: the ``hive-ds`` command, for those who name a Python rather than a command."""

import sys

from hive_ds.cli import main

if __name__ == "__main__":
    sys.exit(main())
