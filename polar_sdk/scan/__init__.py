"""Scanning: which layers a model can do without, measured against its own full depth on calibration prompts."""

from polar_sdk.scan.data import CalibrationItem, builtin_items, read_items
from polar_sdk.scan.report import ProgramScore, ScanReport
from polar_sdk.scan.scanner import Scanner

__all__ = ["CalibrationItem", "ProgramScore", "ScanReport", "Scanner", "builtin_items", "read_items"]
