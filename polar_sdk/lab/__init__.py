"""The laboratory: heal, search, train, calibrate, evaluate and scan. Serving never imports it."""
