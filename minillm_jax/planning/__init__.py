"""What a config costs, what a machine has, and whether the one fits the other."""
