"""The model: `transformer` runs the `block`s in a `loop_scan`, `loop_rules` say how, `parts` add.

Nothing in here knows of files, processes or the optimizer.
"""
