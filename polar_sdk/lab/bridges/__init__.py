"""Fits and trains bridges, the maps that stand for segments of skipped layers."""
