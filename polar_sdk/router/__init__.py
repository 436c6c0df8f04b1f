"""Routers, which map a prompt to a program.

Four kinds. `identity` (full depth) and `static` (one program for every prompt) need no training. `menu` predicts how
well each of a few whole programs would do and takes the cheapest that is good enough; `policy` decides layer by layer
whether to skip, execute or loop it. Both are trained, calibrated and saved (`polar lab train`, `polar lab calibrate`).
"""
