"""One page of a run, or of several side by side, from what their folders hold."""
