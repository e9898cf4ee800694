"""The looped transformer and its training recipe in plain PyTorch, written independently of JAX.

A second implementation that shares no model code with the first: where the two agree, both read
the reference alike. Its state dict is the reference's checkpoint layout.
"""
