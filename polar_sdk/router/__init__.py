"""Routers: what maps a prompt to a program.

Four kinds. `identity` (full depth) and `static` (one program for every prompt) need no training. `menu` predicts how
well each of a few whole programs would do and takes the cheapest that is good enough; `policy` says skip, execute or
loop layer by layer. Both are trained, calibrated and saved (`polar train`, `polar calibrate`).

The names below load on first use, so that asking for a fixed router imports no torch.
"""
