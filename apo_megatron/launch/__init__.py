"""The same run on a Ray cluster: Ray places and supervises processes, the trainer knows nothing of it."""
