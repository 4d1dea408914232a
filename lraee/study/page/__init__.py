"""The page of a study: one HTML file without network, and small pictures for a README."""

from lraee.study.page.page import write_page
from lraee.study.page.reading import read_doses, read_report
from lraee.study.page.saving import remade, write_doses, write_report

__all__ = ["read_doses", "read_report", "remade", "write_doses", "write_page", "write_report"]
