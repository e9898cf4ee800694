"""Several runs side by side: what each left behind, rows of seeds, and one table of all."""
