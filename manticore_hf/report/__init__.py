"""The report on a hybrid: is it worth it, for whom, why, and what next."""

from manticore_hf.report.write import write_report

__all__ = ["write_report"]
