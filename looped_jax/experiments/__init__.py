"""Many runs as one experiment: a grid of settings and seeds, and the workers that train it."""
