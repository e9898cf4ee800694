"""Many runs as one experiment: a grid, the workers that train it, and what compares its runs."""
