"""Fits and trains maps that stand for layers: bridges, which cross segments, and fills, which give keys and values."""
