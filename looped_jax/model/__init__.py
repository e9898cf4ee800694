"""The looped language model: `transformer` holds the loop, `variants` its rules, `block` the layer.

Nothing in here knows of training, data, files or devices.
"""
