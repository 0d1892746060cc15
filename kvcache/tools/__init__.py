"""Plan, profile, tune and examine anything that has a name."""
