"""Published checkpoints become releases, and nothing in them is trusted."""
