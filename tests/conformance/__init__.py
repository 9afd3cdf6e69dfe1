"""A package, so that its groups end with its last test."""
