"""Fits and trains maps that replace layers: bridges, which cross segments, and fills, which give keys and values."""
