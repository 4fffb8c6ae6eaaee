"""What training costs, computed without weights: FLOPs, memory, and what becomes of the paper's claims about both."""
