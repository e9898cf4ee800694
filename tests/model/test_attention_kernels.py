"""Fused attention equals the plain one, forward and backward, or is refused by name."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.resolved import ModelConfig
from looped_jax.config.settings import MeshConfig
from looped_jax.errors import ConfigError
from looped_jax.model import attention_kernels as kernels
from looped_jax.planning.communication import equations
from looped_jax.runtime import hardware, sharding
from looped_jax.runtime.hardware import AttentionSupport

MODEL = ModelConfig(width=256, heads=2, kv_heads=1, seq_len=256, vocab_size=64)


def arguments(dtype, *, heads=2, kv_heads=1, head_dim=128):
    shapes = [(1, 256, n, head_dim) for n in (heads, kv_heads, kv_heads)]
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def value_and_gradients(kernel, arrays, window):
    model = dataclasses.replace(MODEL, kernel=kernel)
    attend = kernels.for_mesh(model, sharding.one_device())

    def total(*arrays):
        mixed = attend(*arrays, window)
        weights = jnp.cos(jnp.arange(mixed.size, dtype=jnp.float32)).reshape(mixed.shape)
        return jnp.sum(mixed.astype(jnp.float32) * weights), mixed

    grads, mixed = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*arrays)
    return [mixed, *grads]


@pytest.mark.parametrize("window", [None, 1, 48, 700])
@pytest.mark.parametrize("time", [5, 255, 777])
def test_parts_of_plain_attention_equal_the_library(window, time):
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(k, (2, time, n, 8)) for k, n in zip(keys, (6, 2, 2), strict=True)]

    def library(*arrays):
        before = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(*arrays, is_causal=True, local_window_size=before)

    ours = kernels.plain(*arrays, window)
    np.testing.assert_allclose(ours, library(*arrays), atol=1e-5)


@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 128), (2, 128), (2, 96)])
def test_the_splash_kernel_equals_plain_attention(window, kv_heads, head_dim):
    arrays = arguments("float32", kv_heads=kv_heads, head_dim=head_dim)
    plain, fused = (value_and_gradients(k, arrays, window) for k in ("xla", "splash"))
    for a, b in zip(plain, fused, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 48])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_cudnn_equals_plain_attention(window, kv_heads):
    arrays = arguments("bfloat16", kv_heads=kv_heads)
    exact = value_and_gradients("xla", [a.astype("float32") for a in arrays], window)
    plain, fused = (value_and_gradients(k, arrays, window) for k in ("xla", "cudnn"))
    for a, b, c in zip(exact, plain, fused, strict=True):
        rounding = float(jnp.abs(a - b.astype("float32")).max())
        assert float(jnp.abs(a - c.astype("float32")).max()) < 2 * rounding


def test_gradients_of_plain_attention_equal_the_library_s():
    keys = jax.random.split(jax.random.key(0), 3)
    arrays = [jax.random.normal(k, (2, 300, n, 8)) for k, n in zip(keys, (6, 2, 2), strict=True)]

    def gradients(attend):
        def total(*arrays):
            return jnp.sum(jnp.sin(attend(*arrays)))

        return jax.grad(total, argnums=(0, 1, 2))(*arrays)

    library = gradients(lambda *a: jax.nn.dot_product_attention(*a, is_causal=True))
    for ours, theirs in zip(gradients(lambda *a: kernels.plain(*a, None)), library, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_products_of_plain_attention_are_of_matrices():
    """One axis of each side and one in common: XLA's CPU programs are slow with others."""
    arrays = [jnp.ones((2, 256, heads, 8)) for heads in (6, 2, 2)]

    def gradients(*arrays):
        mixed, backward = jax.vjp(lambda *a: kernels.plain(*a, None), *arrays)
        return backward(mixed)

    program = jax.make_jaxpr(gradients)(*arrays).jaxpr
    products = [e for e, *_ in equations(program) if e.primitive.name == "dot_general"]
    assert len(products) == 4 * 6  # parts; two products forward, four backward
    for product in products:
        (left, _), (batch, _) = product.params["dimension_numbers"]
        assert len(left) == 1 and len(batch) == 2
        assert all(side.aval.ndim == 4 for side in product.invars)


@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2), (1, 1, 2)])
@pytest.mark.parametrize("window", [None, 48, 256, 999])
def test_a_fused_kernel_sees_its_own_rows_and_heads_on_a_mesh(sizes, window):
    """Inside a program that is manual over the batch axes alone, as all of ours are."""
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    model = dataclasses.replace(MODEL, kernel="splash")
    query, key, value = (jnp.tile(a, (4, 1, 1, 1)) for a in arguments("float32", kv_heads=2))
    rows = jax.sharding.PartitionSpec(sharding.BATCH_AXES)

    def on_mesh(attend):
        program = jax.shard_map(
            lambda *arrays: attend(*arrays, window), mesh=mesh, in_specs=(rows,) * 3,
            out_specs=rows, axis_names=set(sharding.BATCH_AXES), check_vma=False,
        )  # fmt: skip
        return jax.jit(program)(query, key, value)

    fused, plain = (
        on_mesh(kernels.for_mesh(model, mesh)),
        on_mesh(kernels.plain),
    )
    np.testing.assert_allclose(fused, plain, atol=2e-5)


CPU, TPU = AttentionSupport("cpu"), AttentionSupport("tpu", "splash")
NVIDIA = AttentionSupport("gpu", "cudnn")
OLD = AttentionSupport("gpu", None, "cudnn needs compute capability 8.0, Tesla T4 has 7.5")


@pytest.mark.parametrize(
    ("changes", "support", "kernel", "reason"),
    [
        ({}, CPU, "xla", None),
        ({}, NVIDIA, "cudnn", None),
        ({}, OLD, "xla", "Tesla T4 has 7.5"),
        ({"dtype": "float32"}, NVIDIA, "xla", "bfloat16 alone"),
        ({}, TPU, "splash", None),
        ({"heads": 4}, TPU, "splash", None),
        ({"seq_len": 250}, TPU, "xla", "rows of 250 tokens"),
        ({"kernel": "xla"}, NVIDIA, "xla", None),
        ({"kernel": "xla"}, OLD, "xla", None),
        # named for training on other hardware
        ({"kernel": "cudnn"}, CPU, "xla", "cudnn needs an NVIDIA GPU, this is cpu"),
        ({"kernel": "cudnn"}, TPU, "splash", "cudnn needs an NVIDIA GPU, this is tpu"),
        ({"kernel": "splash"}, NVIDIA, "cudnn", "splash needs a TPU, this is gpu"),
        ({"kernel": "splash", "seq_len": 100}, CPU, "xla", "rows of 100 tokens"),
    ],
)
def test_each_platform_gets_its_kernel_where_it_fits(changes, support, kernel, reason):
    config = dataclasses.replace(MODEL, **changes)
    choice = kernels.choose(config, support, time=config.seq_len)
    assert choice.kernel == kernel
    assert reason in choice.reason if reason else choice.reason is None
    assert str(choice).startswith(f"attention: {kernel}") and "\n" not in str(choice)


@pytest.mark.parametrize(
    ("changes", "support", "message"),
    [
        ({"kernel": "cudnn"}, CPU, "model.kernel=cudnn: cudnn needs an NVIDIA GPU, this is cpu"),
        ({"kernel": "cudnn", "dtype": "float32"}, NVIDIA, "model.dtype=bfloat16"),
        ({"kernel": "cudnn", "heads": 1}, NVIDIA, "not 256; change model.heads"),
        ({"kernel": "cudnn"}, OLD, "Tesla T4 has 7.5; or choose model.kernel=auto"),
        ({"kernel": "splash", "seq_len": 100}, TPU, "rows of 100 tokens do not divide"),
        ({"kernel": "splash"}, NVIDIA, "splash needs a TPU"),
        ({"kernel": "cudnn", "seq_len": 255}, NVIDIA, "even length, not 255; change model.seq_len"),
    ],
)
def test_training_refuses_a_named_kernel_that_cannot_be_had(changes, support, message):
    with pytest.raises(ConfigError, match=message):
        kernels.check(dataclasses.replace(MODEL, **changes), support)


class Device(SimpleNamespace):
    __hash__ = object.__hash__


def device(platform, **facts):
    return Device(platform=platform, device_kind="Some Device", **facts)


@pytest.mark.parametrize(
    ("found", "kernel", "missing"),
    [
        (device("tpu"), "splash", None),
        (device("cpu"), None, None),
        (device("gpu", compute_capability="9.0"), "cudnn", None),
        (device("gpu", compute_capability="10.0"), "cudnn", None),
        (device("gpu", compute_capability="7.5"), None, "capability 8.0, Some Device has 7.5"),
        (device("gpu", compute_capability="gfx90a"), None, "needs NVIDIA, this is Some Device"),
    ],
)
def test_a_device_says_what_it_offers(found, kernel, missing):
    support = hardware.support_of(found, here=False)
    assert support.platform == found.platform and support.kernel == kernel
    assert missing in support.missing if missing else support.missing is None


def test_a_gpu_that_is_here_is_tried_and_a_failure_is_told(monkeypatch):
    """This machine's library cannot run cuDNN, as some pairs of CUDA and cuDNN cannot."""
    working, failing = (device("gpu", compute_capability="8.0") for _ in range(2))
    monkeypatch.setattr(hardware, "_try_cudnn", lambda _: None)
    assert hardware.support_of(working, here=True).kernel == "cudnn"
    monkeypatch.undo()
    monkeypatch.setattr(jax, "default_device", lambda _: jax.transfer_guard("allow"))
    support = hardware.support_of(failing, here=True)
    assert support.kernel is None and support.missing.startswith("cudnn fails on Some Device: ")
    choice = kernels.choose(MODEL, support, time=256)
    assert choice.kernel == "xla" and support.missing in str(choice)


def test_an_odd_row_is_trained_plainly_and_scored_fused():
    config = dataclasses.replace(MODEL, seq_len=255)
    assert kernels.check(config, NVIDIA).kernel == "xla"
    assert kernels.choose(config, NVIDIA, time=255).kernel == "cudnn"


def test_a_gpu_is_tried_even_while_a_program_is_traced(monkeypatch):
    tried = []

    def failing(device):
        tried.append(float(jnp.ones(()) + 1))  # a tracer would raise here
        return "broken"

    monkeypatch.setattr(hardware, "_try_cudnn", failing)
    gpu = device("gpu", compute_capability="9.0", process_index=0)
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    mesh = SimpleNamespace(local_devices=[gpu], devices=np.array([gpu]))

    @jax.jit
    def program(x):
        assert "broken" in hardware.attention_support(mesh).missing
        return x

    program(1.0)
    assert tried == [2.0]


def test_the_platform_is_that_of_the_mesh_not_of_the_process():
    mesh = SimpleNamespace(local_devices=[], devices=np.array([device("tpu", process_index=0)]))
    assert hardware.attention_support(mesh) == TPU
