"""Memory and arithmetic of a run, from its configuration and the model's config.json alone. Pure."""
