"""Dose and response: the study repeated while outliers of a known size are put into the tower."""
