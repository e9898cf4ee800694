"""The CORE bundle into the cache, once, for machines that train where no network is.

python -m looped_jax.evaluation.core.download
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from looped_jax import errors
from looped_jax.data import fetch
from looped_jax.evaluation.core.bundle import cached_bundle, load_bundle

COMMAND = "python -m looped_jax.evaluation.core.download"


def main(argv: Sequence[str] | None = None) -> Path:
    flags = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    flags.add_argument("--out", type=Path, help="folder to make; the cache's own by default")
    flags.add_argument("--url", default=fetch.BUNDLE_URL, help="where the zip is")
    args = flags.parse_args(argv)
    with errors.printed():
        folder = fetch.fetch_bundle(args.out or cached_bundle(), args.url)
        print(f"{len(load_bundle(folder).tasks)} tasks in {folder}")
    return folder


if __name__ == "__main__":
    main()
