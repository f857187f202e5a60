"""The report of training runs: one HTML page that needs nothing beside itself (docs/run-report.md).

``folders.py`` reads what runs left, or have so far; ``status.py`` says in words how each of them is;
``findings.py`` what to look at, and what to do about it; ``panels.py`` lists the curves; ``contents.py``
collects the numbers; ``page.py`` writes all that into the frame of ``telemetry/page``, with ``run.css`` and
the scripts.
"""

from apo_megatron.telemetry.run_report.page import RUN_PAGE, write_run_report

__all__ = ["RUN_PAGE", "write_run_report"]
