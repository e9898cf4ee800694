"""Text to rows of tokens: `corpus` finds shards, `tokenizer` cuts text, `packing` makes rows."""
