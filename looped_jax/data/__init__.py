"""Text to rows of tokens: `corpus` finds files, `tokenizer` cuts text, `packing` makes rows."""
