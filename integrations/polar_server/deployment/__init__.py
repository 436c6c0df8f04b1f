"""Start of a server: from options, under uvicorn or on Ray Serve."""
