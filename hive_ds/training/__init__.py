"""Training a stage: what trains, the engine, the loop, checkpoints, and what watches over them."""
