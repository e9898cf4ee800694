"""Before jax starts: eight fake devices on the CPU, so that meshes can be tested on any machine."""

import gc
import os
from pathlib import Path

from tests import QUICK

if "LOOPED_JAX_TARGETS" in os.environ:  # set by `make test-targets`
    os.environ["JAX_PLATFORMS"] = "cpu,cuda"
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # no driver is here, and nothing will run
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # a compiler for each test process
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # what is compiled for others is not read back
elif os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = " ".join(
        [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8", QUICK]
    )
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two test processes share a GPU

# Tests compile the same small programs again and again, many in processes of their own.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.devices()  # made now: later a test may have set the environment for a program of its own
gc.set_threshold(200_000, 20, 100)  # what tracing makes lives on: looking often finds nothing
flags.FLAGS.mark_as_parsed()  # grain's worker processes read absl flags
if "LOOPED_JAX_TARGETS" not in os.environ:  # TPU kernels refuse it for bfloat16
    jax.config.update("jax_default_matmul_precision", "highest")  # goldens are true float32


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in ("gpu", "tpu"):
            if marker in item.keywords and jax.default_backend() != marker:
                item.add_marker(pytest.mark.skip(reason=f"needs a {marker.upper()}"))
        if "targets" in item.keywords and "LOOPED_JAX_TARGETS" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="needs make test-targets"))


def pytest_runtest_teardown(item, nextitem):
    """What is compiled is let go of between files before there is too much of it.

    XLA maps memory for every program, and Linux gives a process 65,530 pieces; beyond, XLA fails to
    "materialize symbols".
    """
    maps = Path("/proc/self/maps")
    if (nextitem is None or nextitem.path != item.path) and maps.exists():
        if maps.read_bytes().count(b"\n") <= 40_000:
            return
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A small corpus of this project's own sources, and a cache for the tokenizer."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "text").mkdir()
    sources = [
        p.read_text() for p in sorted((Path(__file__).parents[1] / "looped_jax").rglob("*.py"))
    ]
    documents = [part for source in sources for part in source.split("\n\n\n")]
    for name, share in (("a", documents[::2]), ("b", documents[1::2]), ("v", documents[::9])):
        table = pa.table({"text": share})
        pq.write_table(table, folder / "text" / f"{name}.parquet", row_group_size=4)
    return folder
