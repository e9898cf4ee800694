"""The model: `transformer` loops the `block`s, `loop_rules` say how, `parts` add to it.

Nothing in here knows of files, processes or the optimizer.
"""
