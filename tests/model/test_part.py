"""What has to hold for every part, those of this package and those that users register.

A part is off: the same program. It is on: the model starts as without it, unless the part says
that it never does; decoding equals the full pass, meshes change nothing, gradients reach its
weights, and it has a place on every mesh. Quick tests hold all together, slow ones each alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from looped_jax.config.options import Parts
from looped_jax.config.registry import LOOP_RULES, PARTS
from looped_jax.config.settings import (
    MeshConfig,
    ModelSettings,
    OptimConfig,
    Settings,
    TrainSettings,
)
from looped_jax.errors import ConfigError
from looped_jax.model import flops, loss, transformer
from looped_jax.model.loop_rules import LoopRule
from looped_jax.model.norm import rms_norm
from looped_jax.model.parts.base import OF_LAYER, OF_MODEL, Part
from looped_jax.model.weights import weight
from looped_jax.resolve import resolve
from looped_jax.runtime import sharding
from looped_jax.training import optimizers, train_step
from looped_jax.training.row_draws import RowDraws
from tests.model.test_kv_cache import PREFILL, full_logits

TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12)).astype(np.int32)
ROWS = np.random.default_rng(1).integers(0, 97, (1, 8, 13)).astype(np.int32)
ALL = tuple(PARTS)
SLOWLY = [pytest.param((name,), marks=pytest.mark.slow) for name in PARTS]
IDENTITIES = tuple(name for name in PARTS if PARTS[name].starts_as_identity)


def with_parts(names, **model):
    sizes = {"layers": 2, "loops": 3, "width": 32, "heads": 4, "kv_heads": 2, "seq_len": 12} | model
    if "exit_gate" in names:
        sizes["loss"] = "EXIT"  # which trains it
    on = {name: dataclasses.replace(PARTS[name].Settings(), on=True) for name in names}
    if "state_init" in names and not LOOP_RULES[sizes.get("variant", "FLT")].rereads_embedding:
        on["state_init"] = dataclasses.replace(on["state_init"], kind="embedding")
    parts = Parts(on)
    return resolve(
        Settings(
            model=ModelSettings(dtype="float32", parts=parts, **sizes),
            optim=OptimConfig(newton_schulz_dtype="float32"),
            train=TrainSettings(steps=4, tokens_per_step=8 * sizes["seq_len"]),
        ),
        vocab_size=97,
    )


def batch_of(config, step=1):
    """ROWS as a step of one micro-batch has them."""
    return jax.tree.map(lambda rows: rows[None], RowDraws(config).join(ROWS[0], step))


def loud(config, scale=0.25):
    """Random weights, so that nothing is hidden by zeros."""
    params = transformer.init_params(config, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return {
        name: scale * jax.random.normal(key, weight.shape)
        for key, (name, weight) in zip(keys, sorted(params.items()), strict=True)
    }


def gradients(config, params):
    mesh = sharding.one_device()
    return functools.partial(train_step.gradients, config, mesh)(params, batch_of(config))


def program(parts):
    config = with_parts(())
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, parts=parts))
    shapes = transformer.init_shapes(config.model)
    return str(jax.make_jaxpr(functools.partial(gradients, config))(shapes))


def test_off_they_are_the_same_program():
    off = Parts({name: PARTS[name].Settings(on=False) for name in PARTS})
    plain = program(Parts())
    assert program(off) == plain
    on = Parts({"kv_shift": PARTS["kv_shift"].Settings(on=True)})
    assert program(on) != plain


@pytest.mark.parametrize("names", [*((name,) for name in PARTS if name not in IDENTITIES)])
def test_one_that_is_never_the_plain_model_says_so(names):
    plain, parted = with_parts(()).model, with_parts(names).model
    params = transformer.init_params(parted, jax.random.key(0)) | loud(plain)
    ours, theirs = (
        transformer.forward(c, {n: params[n] for n in transformer.weights(c)}, TOKENS).hidden
        for c in (parted, plain)
    )
    assert np.abs(ours - theirs).max() > 0.01


@pytest.mark.parametrize("names", [*((name,) for name in IDENTITIES), IDENTITIES])
def test_a_fresh_model_starts_as_without_it(names):
    plain, parted = with_parts(()).model, with_parts(names).model
    ours = transformer.init_params(parted, jax.random.key(0))
    theirs = transformer.init_params(plain, jax.random.key(0))
    assert ours.keys() >= theirs.keys()
    for name, array in theirs.items():
        np.testing.assert_array_equal(ours[name], array, err_msg=name)
    loud_ones = {n: w + loud(plain)[n] for n, w in theirs.items()}
    states = transformer.forward(parted, ours | loud_ones, TOKENS).hidden
    np.testing.assert_allclose(
        states, transformer.forward(plain, loud_ones, TOKENS).hidden, atol=1e-5
    )


@pytest.mark.parametrize("names", [ALL, *SLOWLY])
@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, marks=[pytest.mark.slow] * (v not in ("FLT", "diagonal")))
        for v in LOOP_RULES
    ],
)
def test_decoding_equals_the_full_pass(names, variant):
    config = with_parts(names, variant=variant, window_pattern="SL").model
    # Weights may be of a loop, so beyond the trained ones too; but a product of states makes every
    # rounding grow: 1e-7 on the weights moves the logits of gate by 5e-5 after five loops.
    more = () if variant == "gate" else (5,)
    check_decoding(config, loop_counts=(1, config.loops, *more))


def check_decoding(config, loop_counts=(1, 4)):
    """A prompt, two tokens, then one by one."""
    params = loud(config)
    everything = full_logits(config, params, TOKENS, loop_counts)
    extend = jax.jit(
        functools.partial(transformer.extend, config), static_argnames=("loops", "first")
    )
    for loops, full in zip(loop_counts, everything, strict=True):
        memory = transformer.empty_cache(config, batch=2, length=15, loops=loops)
        places, found = np.broadcast_to(np.arange(12), TOKENS.shape), []
        for start, end in ((0, PREFILL), (PREFILL, 7), *((t, t + 1) for t in range(7, 12))):
            cut = slice(start, end)
            hidden, memory = extend(
                params, TOKENS[:, cut], places[:, cut], memory, loops=loops, first=start == 0
            )
            found.append(loss.logits(config, params, hidden))
        np.testing.assert_allclose(jnp.concatenate(found, axis=1), full, atol=1e-4)


@pytest.mark.parametrize("names", [ALL, *SLOWLY])
def test_gradients_reach_it_and_meshes_change_nothing(names):
    check_gradients(with_parts(names))


def check_gradients(config):
    """Three steps on one device and on eight: alike, and every weight has moved."""
    found, losses = [], []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        optimizer = optimizers.make_optimizer(config, mesh)
        current = train_step.create(config, optimizer, mesh)
        where = transformer.shardings(config.model, mesh)
        current = dataclasses.replace(
            current, params=jax.device_put(loud(config.model, 0.1), where)
        )
        before = jax.device_get(current.params)
        step = train_step.make_train_step(config, optimizer, mesh)
        for _ in range(3):
            current, metrics = step(current, batch_of(config))
        losses.append(float(metrics["loss"]))
        found.append(jax.device_get(current.params))
    np.testing.assert_allclose(*losses, atol=1e-4)
    for name, array in found[0].items():
        assert np.abs(array - before[name]).max() > 0, name


@pytest.mark.parametrize("name", PARTS)
def test_it_says_what_it_is(name):
    part = PARTS[name]
    assert issubclass(part, Part) and set(vars(part)) & {*OF_LAYER, *OF_MODEL}
    module = __import__(part.__module__, fromlist=["_"])
    assert "Source: " in (module.__doc__ or "")


def test_parts_are_counted():
    plain, parted = (flops.count(with_parts(names).model) for names in ((), ALL))
    own = [w.size for n, w in transformer.weights(with_parts(ALL).model).items() if "parts" in n]
    assert parted.parameters - plain.parameters == sum(own) > 0


def test_parts_are_settings():
    values = {"model": {"parts": {"kv_shift": {"on": True}}}}
    config = Settings.from_dict(values)
    assert config.model.parts.on() == ("kv_shift",)
    assert Settings.from_dict(config.to_dict()) == config
    assert config.to_dict()["model"]["parts"] == {"kv_shift": {"on": True}}
    assert "parts" not in Settings().to_dict()["model"]  # later parts refuse no older run
    assert "model.parts.kv_shift.on = True" in config.describe()
    assert "model.parts" not in Settings().describe()
    with pytest.raises(ConfigError, match="model.parts.kv_shit is no setting; nearest: .*kv_shift"):
        Settings.from_dict({"model": {"parts": {"kv_shit": {"on": True}}}})
    with pytest.raises(ConfigError, match="model.parts.kv_shift.on=3 is not of type bool"):
        Settings.from_dict({"model": {"parts": {"kv_shift": {"on": 3}}}})


# The other two see states of any loops and times.
WITH_HISTORY = tuple(site for site in OF_MODEL if site not in ("stop", "readout"))


def looking_back(each_layer, sites, rule=False):
    """A part that adds what stood one and two positions before, at every site that it may."""

    def act(site):
        def method(self, x, here):
            before, earlier = (here.history.previous("x", x, n) for n in (1, 2))
            return x + 0.3 * self.share[...].astype(x.dtype).mean() * (before - earlier)

        return method

    def make(self, settings, config, layer, *, rngs):
        self.share = weight(jnp.ones((3,)), None, group="vector")

    return type(
        "LooksBack", (Part,),
        {"each_layer": each_layer, "__init__": make, **{site: act(site) for site in sites}},
    )  # fmt: skip


@pytest.fixture
def registered():
    """Registers for one test; every cache of programs by config forgets it afterwards."""
    added = []

    def register(registry, name, thing):
        added.append((registry, name))
        registry.register(name)(thing)
        return thing

    yield register
    for registry, name in added:
        del registry._found[name]
    for cached in (
        transformer._skeleton,
        transformer.weights,
        transformer.history_shapes,
        transformer.carried_names,
        flops.count,
    ):
        cached.cache_clear()


@pytest.mark.parametrize("variant", ["FLT", pytest.param("LT", marks=pytest.mark.slow)])
def test_looking_back_is_right_at_every_site_and_in_all_at_once(registered, variant):
    registered(PARTS, "of_layers", looking_back(True, OF_LAYER))
    registered(PARTS, "of_model", looking_back(False, WITH_HISTORY))
    check_decoding(with_parts(("of_layers", "of_model"), variant=variant, layers=2).model)


def drawing(each_layer, sites, says=True):
    """A part that adds noise at every one of its sites."""

    def act(site):
        def method(self, x, here):
            return x + 0.3 * here.draw(jax.random.normal, x.shape[2:]).astype(x.dtype)

        return method

    own = {"each_layer": each_layer, "draws": says, **{site: act(site) for site in sites}}
    return type("Draws", (Part,), own)


def test_what_is_drawn_is_the_same_in_decoding(registered):
    class Noisy(LoopRule):
        draws = True

        def start(self, here):
            return rms_norm(here.e + here.h) + 0.3 * here.draw(jax.random.normal, (32,))

    registered(LOOP_RULES, "noisy", Noisy)
    registered(PARTS, "of_layers", drawing(True, ("entry", "value")))
    registered(PARTS, "of_model", drawing(False, ("initial_state",)))
    config = with_parts(("of_layers", "of_model"), variant="noisy", layers=1).model
    check_decoding(config, loop_counts=(2,))


def test_what_draws_without_saying_so_is_refused(registered):
    registered(PARTS, "silent", drawing(True, ("mlp_input",), says=False))
    config = with_parts(("silent",)).model
    with pytest.raises(TypeError, match="mlp_input.silent draws .* say draws = True"):
        transformer.forward(config, loud(config), TOKENS)


def test_a_part_may_attend_by_itself(registered):
    class Attends(Part):
        def __init__(self, settings, config, layer, *, rngs):
            self.share = weight(jnp.ones((1,)), None, group="vector")

        def mlp_input(self, x, here):
            heads = x.reshape(*x.shape[:2], 4, -1)
            return x + 0.3 * here.history.attend(heads, heads, heads, 3).reshape(x.shape)

    registered(PARTS, "attends", Attends)
    check_decoding(with_parts(("attends",)).model)


def test_a_part_at_the_readout_changes_logits_losses_and_decoding_alike(registered):
    class Bias(Part):
        each_layer = False

        def __init__(self, settings, config, layer, *, rngs):
            bias = jnp.linspace(-3, 3, config.padded_vocab)
            self.bias = weight(bias, "vocab", group="vector")

        def readout(self, z, here):
            return z + self.bias[...] + 0.1 * here.h.mean(-1, keepdims=True).astype(z.dtype)

    registered(PARTS, "bias", Bias)
    config = with_parts(("bias",)).model
    params, chunked = loud(config), dataclasses.replace(config, loss_chunk=5)
    hidden = transformer.forward(config, params, TOKENS, return_loops=(0, 2)).hidden
    z = hidden @ params["head"] + params["parts.bias.bias"] + 0.1 * hidden.mean(-1, keepdims=True)
    z = (15 * jnp.tanh(z / 15))[..., : config.vocab_size]
    np.testing.assert_allclose(loss.logits(config, params, hidden), z, atol=1e-5)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(z), TOKENS[None, ..., None], axis=-1)[..., 0]
    found = loss.token_losses(chunked, params, hidden, TOKENS)
    np.testing.assert_allclose(found, nats, atol=1e-5)
    grad = jax.grad(lambda p: loss.token_losses(chunked, p, hidden, TOKENS).sum())(params)
    assert np.abs(grad["parts.bias.bias"]).max() > 0.1
    check_decoding(config)


def test_a_rule_may_look_back_without_any_part(registered):
    class LooksBack(LoopRule):
        def start(self, here):
            e = here.e + 0.5 * here.history.previous("e", here.e, 1) + here.h
            return rms_norm(e)

        def inject(self, x, here):
            return x, 0.5 * x + 0.5 * here.history.previous("x", x, 2)

    registered(LOOP_RULES, "looks_back", LooksBack)
    check_decoding(with_parts((), variant="looks_back").model)


def test_two_streams_of_one_name_are_refused(registered):
    class Twice(Part):
        def mlp_input(self, x, here):
            return x + here.history.previous("x", x, 1) + here.history.previous("x", 2 * x, 1)

    registered(PARTS, "twice", Twice)
    with pytest.raises(ValueError, match="mlp_input.twice looks back at two streams as 'x'"):
        transformer.empty_cache(with_parts(("twice",)).model, batch=1, length=4, loops=2)


@pytest.mark.parametrize(
    ("each_layer", "sites", "message"),
    [
        (True, ("loop_start",), "acts at loop_start, which is no site of each layer"),
        (
            False,
            ("key",),
            "acts at key, which is no site of the model: entry, initial_state, loop_start",
        ),
        (True, ("mlp_out",), "acts at mlp_out, which is no site"),
        (True, (), "acts at no site"),
    ],
)
def test_a_site_that_nobody_calls_is_refused(each_layer, sites, message):
    with pytest.raises(TypeError, match=message):
        looking_back(each_layer, sites)


def test_a_part_may_derive_from_another():
    class Quieter(PARTS["kv_shift"]):
        """Says nothing of its own sites."""

    assert Quieter.key is PARTS["kv_shift"].key


def test_matrices_have_two_axes():
    with pytest.raises(ValueError, match="a matrix has two axes"):
        weight(jnp.zeros((3, 4, 4)), None, "embed", "heads")


def test_settings_of_parts_compare_by_what_is_not_default(registered):
    plain, other = Parts(), Parts({"kv_shift": PARTS["kv_shift"].Settings()})
    before = hash(plain)
    assert plain == other and before == hash(other)
    registered(PARTS, "later", looking_back(True, ("mlp_input",)))
    assert hash(plain) == before
    with pytest.raises(ConfigError, match="nope is no part; choose .*kv_shift"):
        Parts({"nope": PARTS["kv_shift"].Settings()})
