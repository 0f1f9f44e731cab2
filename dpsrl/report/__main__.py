"""python -m dpsrl.report: see the package."""

import sys

from dpsrl.report import main

if __name__ == "__main__":
    sys.exit(main())
