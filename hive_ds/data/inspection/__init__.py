"""Looking at a folder of shards: is it sound (`verify`), what does it hold (`stats`), how does it look (`show`)."""
