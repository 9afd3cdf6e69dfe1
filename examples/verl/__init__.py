"""veRL's own PPO trainer, once on veRL's core and once on this one: `make verl`."""
