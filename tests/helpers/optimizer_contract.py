"""What every optimizer must keep to, as functions of one that a room's tests call."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax

SHAPES = {
    "embed": {"table": (23, 6)},
    "blocks": {"q_proj": {"kernel": (3, 7, 6), "bias": (3, 7)}, "attn_norm": {"scale": (3, 6)}},
    "final_norm": {"scale": (6,)},
    "head": {"kernel": (23, 6)},
}


def tree(seed=0, dtype=jnp.float32, shapes=SHAPES):
    """A tree like a decoder's parameters, of normal numbers."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(draw.normal(size=shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@functools.cache
def compiled(optimizer):
    """Its update under jit, one program for all that a test asks of it."""
    return jax.jit(optimizer.update)


def run(optimizer, params, seeds, state=None):
    """The updates of each step and the last state."""
    state = optimizer.init(params) if state is None else state
    updates = []
    for seed in seeds:
        update, state = compiled(optimizer)(tree(seed), state, params)
        updates.append(update)
    return updates, state


def form(state):
    return jax.tree.structure(state), [(x.shape, x.dtype) for x in jax.tree.leaves(state)]


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_close(a, b, rtol=2e-5, atol=1e-7):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def zero_gradient_gives_zero_update(optimizer):
    params = tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, state = compiled(optimizer)(zero, optimizer.init(params), params)
    for leaf in jax.tree.leaves(updates):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def state_is_stable_and_compiles_once(optimizer):
    params = tree()
    state = optimizer.init(params)
    first, step = form(state), compiled(optimizer)
    for seed in range(3):
        updates, state = step(tree(seed), state, params)
        assert form(state) == first
        assert form(updates) == form(params)
    assert step._cache_size() == 1


def updates_have_the_gradients_dtype(optimizer, tolerance):
    params = tree()
    state = optimizer.init(params)
    narrow = tree(1, jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    of_narrow, after_narrow = compiled(optimizer)(narrow, state, params)
    of_wide, after_wide = compiled(optimizer)(wide, state, params)
    assert {x.dtype for x in jax.tree.leaves(of_narrow)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(of_wide)} == {jnp.dtype(jnp.float32)}
    assert_close(after_narrow, after_wide, rtol=1e-6)  # the arithmetic was float32 in both
    assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), of_narrow), of_wide, rtol=tolerance)


def runs_within_scan(optimizer):
    params = tree()
    gradients = jax.tree.map(lambda *x: jnp.stack(x), *(tree(seed) for seed in range(4)))

    @jax.jit
    def scanned(state):
        def body(state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(body, state, gradients)

    state, updates = scanned(optimizer.init(params))
    expected, expected_state = run(optimizer, params, range(4))
    assert_close(updates, jax.tree.map(lambda *x: jnp.stack(x), *expected))
    assert_close(state, expected_state)


def resumes_with_the_same_bits(make):
    """``make`` builds the optimizer anew, as another process would."""
    params, first = tree(), make()
    _, middle = run(first, params, range(3))
    whole, end = run(first, params, range(3, 7), middle)
    leaves, structure = jax.tree.flatten(middle)
    file = io.BytesIO()
    np.savez(file, *leaves)
    file.seek(0)
    with np.load(file) as saved:
        restored = jax.tree.unflatten(structure, [jnp.asarray(saved[f"arr_{i}"]) for i in range(len(leaves))])
    rest, resumed_end = run(make(), params, range(3, 7), restored)
    assert_same_bits(rest, whole)
    assert_same_bits(resumed_end, end)


def goes_downhill(make, *, steps):
    """Half the squared distance to a point falls below a thousandth under a rate that decays to zero."""
    target = tree(5)
    optimizer = make(optax.cosine_decay_schedule(0.05, steps))
    params = jax.tree.map(jnp.zeros_like, target)

    def distance(params):
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum((x - y) ** 2) / 2, params, target)))

    @jax.jit
    def train(params, state):
        def body(_, carry):
            params, state = carry
            updates, state = optimizer.update(jax.grad(distance)(params), state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, steps, body, (params, state))[0]

    assert distance(train(params, optimizer.init(params))) < 1e-3 * distance(params)
