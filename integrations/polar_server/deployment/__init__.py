"""How a server is started: from options, under uvicorn or on Ray Serve."""
