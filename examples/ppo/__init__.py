"""RLHF with actor, critic, reference and a rule as reward: `python -m examples.ppo --help`."""
