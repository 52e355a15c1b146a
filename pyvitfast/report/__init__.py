"""Reports of runs: before/after table, figures, one HTML page."""

from pyvitfast.report.measure import Facts, latencies, measure
from pyvitfast.report.write import Subject, write_report

__all__ = ["Facts", "Subject", "latencies", "measure", "write_report"]
