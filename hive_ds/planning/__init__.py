"""What a run will send, need and take on a cluster, before it starts."""
