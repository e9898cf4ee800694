"""Text to rows of tokens: `corpus` finds shards, `tokenizer` cuts text, `packing` makes rows."""


class DataError(ValueError):
    """Data that cannot be used; the message names the file or setting and the mend."""
