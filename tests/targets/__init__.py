"""Compiled for real GPUs and TPUs by their own compilers, on a machine that has neither."""
