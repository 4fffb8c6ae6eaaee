"""Is this machine, and are these hosts, data and folders fit to train? Every finding that is not fine says what to do."""
