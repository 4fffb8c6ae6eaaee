"""How fast hierarchical attention is, against its floor and against other ways to compute it (docs/kernel.md)."""
