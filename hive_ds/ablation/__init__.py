"""One recipe in several arms (routes, baselines) and seeds: expand, run or submit, gather."""
