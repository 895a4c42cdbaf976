"""What a config costs, what devices have, and whether the one fits the other."""
