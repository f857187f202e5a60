"""The report of training runs; the same as apo-report (docs/run-report.md)."""

import sys

from apo_megatron.report import main

if __name__ == "__main__":
    sys.exit(main())
