"""A look into a trained loop: `measure` the tokens, `weights` the matrices, `drawings` of both."""
