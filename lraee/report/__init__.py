"""The page of a study: one HTML file without network, and small pictures for a README."""

from lraee.report.page import write_page
from lraee.report.reading import read_report
from lraee.report.saving import write_report

__all__ = ["read_report", "write_page", "write_report"]
