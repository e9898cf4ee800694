"""The parts that come with this package, one technique in each file; see model/part.py."""
