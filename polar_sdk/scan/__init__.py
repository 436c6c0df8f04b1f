"""Scanning: which layers a model can do without, measured against its own full depth on calibration prompts."""

from polar_sdk.data import Item as CalibrationItem
from polar_sdk.data import builtin_items, read_items
from polar_sdk.scan.report import ProgramScore, ScanReport
from polar_sdk.scan.scanner import Scanner

__all__ = ["CalibrationItem", "ProgramScore", "ScanReport", "Scanner", "builtin_items", "read_items"]
