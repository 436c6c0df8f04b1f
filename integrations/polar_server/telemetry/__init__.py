"""What the server did and does: metrics, traces, and the state of the engine."""
