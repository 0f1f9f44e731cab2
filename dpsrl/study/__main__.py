"""python -m dpsrl.study [study=NAME] [key=value ...]: makes the runs that are missing, then tables and figures."""

import sys

from dpsrl.study.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
