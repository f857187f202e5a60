"""The report of evaluations: one HTML page that needs nothing beside itself (docs/evaluation.md, Report).

``folders.py`` reads what an evaluation left, ``samples.py`` chooses samples to show, ``contents.py`` collects
numbers, ``reader_warnings.py`` says what to mind, ``page.py`` writes all that into the frame of
``telemetry/page`` with ``samples.css`` and the scripts.
"""

from apo_megatron.evaluation.report.page import write_report

__all__ = ["write_report"]
