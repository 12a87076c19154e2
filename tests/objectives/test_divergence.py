"""Token divergences against closed forms, limits and bounds (00-foundations, section 10)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill.core.types import Refused
from jaxdistill.objectives import divergence as dv
from jaxdistill.objectives.schedule import Linear, settled

DIVERGENCES = {
    "forward_kl": dv.ForwardKL(),
    "reverse_kl": dv.ReverseKL(),
    "jsd": dv.JensenShannon(beta=0.3),
    "skew_kl": dv.SkewKL(alpha=0.2),
    "skew_reverse_kl": dv.SkewReverseKL(alpha=0.2),
    "total_variation": dv.TotalVariation(),
    "adaptive_kl": dv.AdaptiveKL(),
}
forward_kl = DIVERGENCES["forward_kl"]
reverse_kl = DIVERGENCES["reverse_kl"]
adaptive_kl = DIVERGENCES["adaptive_kl"]
EPS64 = np.finfo(np.float64).eps


def pair(seed=0, shape=(4, 7), scale=2.0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return tuple(
        jnp.asarray(scale * rng.standard_normal(shape), dtype) for _ in range(2)
    )


@functools.partial(jax.jit, static_argnums=0)
def value(kind, teacher, student, temperature=1.0):
    return dv.token_divergence(
        DIVERGENCES[kind], teacher, student, temperature=temperature
    )


@functools.partial(jax.jit, static_argnums=0)
def student_grad(kind, teacher, student, temperature=1.0):
    return jax.grad(lambda z: value(kind, teacher, z, temperature).sum())(student)


def kl(a, b):
    return np.sum(a * np.log(a / b), -1)


def softmax(z):
    e = np.exp(np.asarray(z))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_zero_with_zero_gradient_at_equal_laws(x64, kind):
    teacher, _ = pair()
    student = teacher + 3.0
    tol = 50 * EPS64
    np.testing.assert_allclose(value(kind, teacher, student), 0.0, atol=tol)
    if kind != "total_variation":  # has a kink there
        np.testing.assert_allclose(
            student_grad(kind, teacher, student), 0.0, atol=tol
        )


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_positive_one_value_per_token_and_float32_inside(kind):
    teacher, student = pair(1, (2, 3, 11), dtype=jnp.bfloat16)
    out = value(kind, teacher, student)
    assert out.shape == (2, 3) and out.dtype == jnp.float32
    assert jnp.all(out > 0)
    same = value(kind, teacher.astype(jnp.float32), student.astype(jnp.float32))
    np.testing.assert_array_equal(out, same)


def test_values_by_definition(x64):
    teacher, student = pair(2)
    p = softmax(teacher)
    q = softmax(student)
    m = 0.3 * p + 0.7 * q
    want = {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "jsd": 0.3 * kl(p, m) + 0.7 * kl(q, m),
        "skew_kl": kl(p, 0.2 * p + 0.8 * q),
        "skew_reverse_kl": kl(q, 0.2 * q + 0.8 * p),
        "total_variation": np.abs(p - q).sum(-1) / 2,
    }
    for kind, expected in want.items():
        np.testing.assert_allclose(
            value(kind, teacher, student), expected, rtol=1e-12, err_msg=kind
        )


def test_gradients_by_closed_form(x64):
    """The table of section 10: q_i (h_i - sum_j q_j h_j)."""
    teacher, student = pair(3)
    p = softmax(teacher)
    q = softmax(student)
    through = lambda h: q * (h - np.sum(q * h, -1, keepdims=True))
    m = 0.3 * p + 0.7 * q
    skew = 0.2 * p + 0.8 * q
    rskew = 0.2 * q + 0.8 * p
    want = {
        "forward_kl": q - p,
        "reverse_kl": q * (np.log(q / p) - kl(q, p)[:, None]),
        "jsd": through(0.7 * np.log(q / m)),
        "skew_kl": through(-0.8 * p / skew),
        "skew_reverse_kl": through(np.log(q / rskew) - 0.2 * q / rskew),
        "total_variation": through(np.sign(q - p) / 2),
    }
    for kind, expected in want.items():
        np.testing.assert_allclose(
            student_grad(kind, teacher, student), expected, atol=1e-13, err_msg=kind
        )


def test_adaptive_kl_weighs_by_the_head_gap_under_stop_gradient(x64):
    p = np.asarray([[0.4, 0.3, 0.2, 0.1]])
    q = np.asarray([[0.1, 0.2, 0.3, 0.4]])
    teacher = np.log(p)[:, [2, 0, 3, 1]]
    student = np.log(q)[:, [2, 0, 3, 1]]
    w = (0.3 + 0.1) / (0.3 + 0.1 + 0.1 + 0.3)  # head: tokens of 0.4 and 0.3
    np.testing.assert_allclose(
        adaptive_kl(teacher, student), w * kl(p, q) + (1 - w) * kl(q, p), rtol=1e-12
    )
    mixed = w * student_grad("forward_kl", teacher, student) + (
        1 - w
    ) * student_grad("reverse_kl", teacher, student)
    np.testing.assert_allclose(
        student_grad("adaptive_kl", teacher, student), mixed, atol=1e-14
    )


def test_adaptive_head_stops_at_exactly_its_mass(x64):
    """Half the mass on one token is a whole head."""
    p = np.asarray([0.5, 0.25, 0.25])
    q = np.asarray([0.25, 0.25, 0.5])
    w = 0.25 / 0.5
    np.testing.assert_allclose(
        adaptive_kl(jnp.log(p), jnp.log(q)),
        w * kl(p, q) + (1 - w) * kl(q, p),
        rtol=1e-12,
    )


def test_limits_of_the_mixed_kinds(x64):
    teacher, student = pair(4)
    fkl = forward_kl(teacher, student)
    rkl = reverse_kl(teacher, student)
    for got, want in (
        (dv.JensenShannon(beta=0.0)(teacher, student), fkl),
        (dv.JensenShannon(beta=1.0)(teacher, student), rkl),
        (dv.SkewKL(alpha=0.0)(teacher, student), fkl),
        (dv.SkewReverseKL(alpha=0.0)(teacher, student), rkl),
        (dv.SkewKL(alpha=1.0)(teacher, student), 0 * fkl),
        (
            dv.JensenShannon(beta=0.3)(teacher, student),
            dv.JensenShannon(beta=0.7)(student, teacher),
        ),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)
    small = 1e-5
    np.testing.assert_allclose(
        dv.JensenShannon(beta=small)(teacher, student) / small, fkl, rtol=1e-3
    )
    np.testing.assert_allclose(
        dv.JensenShannon(beta=1 - small)(teacher, student) / small, rkl, rtol=1e-3
    )


def test_bounds(x64):
    teacher, student = pair(5, (200, 5), scale=8.0)
    fkl = forward_kl(teacher, student)
    assert dv.JensenShannon()(teacher, student).max() <= np.log(2)
    assert dv.SkewKL(alpha=0.1)(teacher, student).max() <= -np.log(0.1)
    assert dv.SkewReverseKL(alpha=0.1)(teacher, student).max() <= -np.log(0.1)
    assert jnp.all(
        dv.TotalVariation()(teacher, student) <= jnp.minimum(jnp.sqrt(fkl / 2), 1.0)
    )
    disjoint = jnp.asarray([[60.0, 0.0]]), jnp.asarray([[0.0, 60.0]])
    np.testing.assert_allclose(dv.JensenShannon()(*disjoint), np.log(2), rtol=1e-12)


def test_temperature_keeps_the_gradient_scale(x64):
    teacher, student = pair(6)
    np.testing.assert_allclose(
        dv.token_divergence(dv.ForwardKL(), teacher, student, temperature=3.0),
        9 * forward_kl(teacher / 3, student / 3),
        rtol=1e-14,
    )
    gap = student - teacher
    limit = jnp.sum((gap - gap.mean(-1, keepdims=True)) ** 2, -1) / (
        2 * gap.shape[-1]
    )
    for kind in ("forward_kl", "reverse_kl"):
        np.testing.assert_allclose(
            dv.token_divergence(
                DIVERGENCES[kind], teacher, student, temperature=1e4
            ),
            limit,
            rtol=1e-3,
        )


def test_banned_tokens_are_finite():
    """Logits of -inf on both sides (a padded vocabulary) give what the shorter vocabulary gives,
    gradients included.
    """
    teacher, student = pair(7, dtype=np.float32)
    wide = lambda z: jnp.concatenate([z, jnp.full((4, 2), -jnp.inf)], -1)

    def all_kinds(pad):
        one = lambda kind: jax.value_and_grad(
            lambda z: value(kind, pad(teacher), pad(z)).sum()
        )(student)
        return {kind: one(kind) for kind in DIVERGENCES}

    padded, plain = jax.jit(lambda: (all_kinds(wide), all_kinds(lambda z: z)))()
    # sums of 28 terms of order 1, in another order
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a, b, atol=28 * np.finfo(np.float32).eps
        ),
        padded,
        plain,
    )


def test_joint_chain_rule_of_two_tokens(x64):
    """KL of the joint law = KL of the first token + the second token's KL averaged over p (forward)
    or q (reverse).
    """
    rng = np.random.default_rng(8)
    first_p, first_q = jnp.asarray(rng.standard_normal((2, 5)))
    next_p, next_q = jnp.asarray(rng.standard_normal((2, 5, 5)))
    joint = lambda first, rest: (
        jax.nn.log_softmax(first)[:, None] + jax.nn.log_softmax(rest)
    ).ravel()
    for kind, first in (("forward_kl", first_p), ("reverse_kl", first_q)):
        whole = value(kind, joint(first_p, next_p), joint(first_q, next_q))
        parts = value(kind, first_p, first_q) + jax.nn.softmax(first) @ value(
            kind, next_p, next_q
        )
        np.testing.assert_allclose(whole, parts, rtol=1e-13)


@pytest.mark.parametrize(
    ("kind", "mean", "std", "cost"),
    [
        ("forward_kl", 0.0, np.sqrt(4.25), None),
        ("reverse_kl", 2.0, 0.5, np.log(2)),
    ],
)
def test_gaussian_fit_seeks_the_mean_or_a_mode(x64, kind, mean, std, cost):
    """One Gaussian fitted to 0.5 N(-2, .5) + 0.5 N(2, .5), densities on a grid read as logits;
    Newton from nearby.
    """
    x = jnp.linspace(-12, 12, 1201)
    normal = lambda m, s: -((x - m) ** 2) / (2 * s**2) - jnp.log(s)
    teacher = jnp.logaddexp(normal(-2.0, 0.5), normal(2.0, 0.5))
    cost_of = jax.jit(lambda fit: value(kind, teacher, normal(fit[0], fit[1])))
    curvature = jax.jit(jax.hessian(cost_of))
    slope = jax.jit(jax.grad(cost_of))
    fit = np.asarray([mean + 0.05, std * 1.05])
    for _ in range(8):
        fit -= np.linalg.solve(curvature(fit), slope(fit))
    # the two modes overlap by e^{-(2/.5)^2 / 2} = 3e-4 in density, which moves the reverse fit by
    # that order
    np.testing.assert_allclose(
        fit, [mean, std], atol=1e-6 if cost is None else 2e-3
    )
    if cost is not None:
        np.testing.assert_allclose(cost_of(fit), cost, atol=2e-3)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd", "adaptive_kl"])
def test_topk_equals_full_with_one_token_in_the_tail(x64, kind):
    teacher, student = pair(9)

    def total(z):
        kept = dv.topk_log_probs(teacher, teacher.shape[-1] - 1, temperature=2.0)
        values = dv.topk_divergence(DIVERGENCES[kind], *kept, z, temperature=2.0)
        return values.sum(), values

    grad, values = jax.jit(jax.grad(total, has_aux=True))(student)
    np.testing.assert_allclose(
        values, value(kind, teacher, student, temperature=2.0), rtol=1e-12
    )
    np.testing.assert_allclose(
        grad, student_grad(kind, teacher, student, temperature=2.0), atol=1e-13
    )


def test_tail_bucket_grows_to_the_full_kl_from_below(x64):
    teacher, student = pair(10, (20, 30))
    full = np.asarray(value("forward_kl", teacher, student))
    last = np.zeros_like(full)
    for k in (1, 5, 29):
        kept = lambda teacher, k=k: dv.topk_log_probs(teacher, k)
        run = jax.jit(
            lambda p, q, kept=kept: (
                kept(p),
                dv.topk_divergence(dv.ForwardKL(), *kept(p), q),
            )
        )
        (_, log_p, log_tail), part = jax.tree.map(np.asarray, run(teacher, student))
        np.testing.assert_allclose(
            np.exp(log_p).sum(-1) + np.exp(log_tail), 1.0, rtol=1e-13
        )
        assert np.all(part >= last - 1e-13) and np.all(part <= full + 1e-13)
        last = part


def test_renormalised_teacher_is_biased_and_the_tail_bucket_is_not(x64):
    """At q = p the k + 1 buckets have zero gradient; top-k renormalised against the full student
    has not.
    """
    teacher, _ = pair(11, (3, 9))
    ids, log_p, log_tail = jax.jit(lambda z: dv.topk_log_probs(z, 3))(teacher)
    grad = jax.jit(
        jax.grad(
            lambda z: dv.topk_divergence(
                dv.ForwardKL(), ids, log_p, log_tail, z
            ).sum()
        )
    )(teacher)
    np.testing.assert_allclose(grad, 0.0, atol=1e-14)
    renormalised = np.full(teacher.shape, -np.inf)
    np.put_along_axis(renormalised, np.asarray(ids), np.asarray(log_p), -1)
    grad = student_grad("forward_kl", renormalised, teacher)
    np.testing.assert_allclose(
        grad, softmax(teacher) - softmax(renormalised), atol=1e-14
    )
    # the largest kept token gains its share of the tail's mass
    assert np.all(np.abs(grad).max(-1) > 0.3 * np.exp(log_tail))


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_topk_of_every_token_is_the_full_divergence(x64, kind):
    """The tail is empty: values and gradients are finite, and those of the whole laws."""
    teacher, student = pair(15)
    ids = jnp.argsort(-teacher, -1)
    log_p = jnp.take_along_axis(jax.nn.log_softmax(teacher), ids, -1)
    tail = jnp.full(4, -jnp.inf)

    def total(z):
        values = dv.topk_divergence(DIVERGENCES[kind], ids, log_p, tail, z)
        return values.sum(), values

    grad, values = jax.grad(total, has_aux=True)(student)
    np.testing.assert_allclose(values, value(kind, teacher, student), rtol=1e-12)
    np.testing.assert_allclose(
        grad, student_grad(kind, teacher, student), atol=1e-13
    )


@pytest.mark.full
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("whose", ["teacher", "student", "both"])
def test_topk_with_a_tail_of_no_mass_is_finite(x64, kind, whose):
    """All tokens but three are impossible, to the one model or the other."""
    teacher, student = pair(16)
    kept = jnp.argsort(-teacher, -1)[:, :3]
    banned = lambda z: jnp.where(
        jnp.any(jnp.arange(7) == kept[..., None], 1), z, -jnp.inf
    )
    p = teacher if whose == "student" else banned(teacher)

    def total(z):
        q = z if whose == "teacher" else banned(z)
        return dv.topk_divergence(
            DIVERGENCES[kind], *dv.topk_log_probs(p, 3), q
        ).sum()

    got, grad = jax.value_and_grad(total)(student)
    assert np.isfinite(got) and np.isfinite(np.asarray(grad)).all()
    if whose == "both":  # three tokens are the whole vocabulary
        pick = lambda z: jnp.take_along_axis(z, kept, -1)
        wanted = np.zeros(student.shape)
        np.put_along_axis(
            wanted,
            np.asarray(kept),
            np.asarray(student_grad(kind, pick(teacher), pick(student))),
            -1,
        )
        np.testing.assert_allclose(
            got, value(kind, pick(teacher), pick(student)).sum(), rtol=1e-12
        )
        np.testing.assert_allclose(grad, wanted, atol=1e-13)


def test_topk_on_the_students_support(x64):
    teacher, student = pair(17, (5, 9))
    p = softmax(teacher)
    q = softmax(student)
    ids = np.argsort(-q, -1)[:, :3]
    rest = lambda law: np.append(
        np.take_along_axis(law, ids, -1),
        1 - np.take_along_axis(law, ids, -1).sum(-1, keepdims=True),
        -1,
    )
    got = dv.restricted_divergence(
        dv.ReverseKL(), teacher, student, 3, support="student"
    )
    np.testing.assert_allclose(got, kl(rest(q), rest(p)), rtol=1e-11)
    teachers = dv.restricted_divergence(dv.ReverseKL(), teacher, student, 3)
    np.testing.assert_array_equal(
        teachers,
        dv.topk_divergence(dv.ReverseKL(), *dv.topk_log_probs(teacher, 3), student),
    )


@pytest.mark.parametrize("support", dv.SUPPORTS)
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_renormalised_topk(x64, kind, support):
    """Both laws over the k tokens alone, at a temperature: the softmax of these logits."""
    teacher, student = pair(18, (5, 9))
    ids = np.argsort(-np.asarray(teacher if support == "teacher" else student), -1)[
        :, :4
    ]
    pick = lambda z: jnp.take_along_axis(z, ids, -1)
    options = dict(temperature=2.0)

    def total(z):
        values = dv.restricted_divergence(
            DIVERGENCES[kind],
            teacher,
            z,
            4,
            support=support,
            tail="dropped",
            **options,
        )
        return values.sum(), values

    grad, values = jax.grad(total, has_aux=True)(student)
    np.testing.assert_allclose(
        values, value(kind, pick(teacher), pick(student), 2.0), rtol=1e-12
    )
    wanted = np.zeros(student.shape)
    np.put_along_axis(
        wanted,
        ids,
        np.asarray(student_grad(kind, pick(teacher), pick(student), 2.0)),
        -1,
    )
    np.testing.assert_allclose(grad, wanted, atol=1e-13)


@pytest.mark.parametrize("longer", ["teacher", "student"])
def test_tables_of_different_lengths_are_compared_on_the_common_ids(x64, longer):
    teacher, student = pair(19)
    wide = lambda z: jnp.concatenate([z, jnp.full((4, 3), 5.0)], -1)
    p, q = (
        (wide(teacher), student)
        if longer == "teacher"
        else (teacher, wide(student))
    )
    for kind in DIVERGENCES:
        np.testing.assert_array_equal(
            value(kind, p, q), value(kind, teacher, student)
        )
    got = dv.restricted_divergence(dv.ForwardKL(), p, q, 3)
    np.testing.assert_array_equal(
        got, dv.restricted_divergence(dv.ForwardKL(), teacher, student, 3)
    )
    hidden = (teacher, student)
    eye = jnp.eye(7)
    head = jnp.concatenate([eye, jnp.ones((7, 3))], -1)
    heads = (head, eye) if longer == "teacher" else (eye, head)
    got = dv.chunked_divergence(
        dv.ForwardKL(), hidden[0], heads[0], hidden[1], heads[1], chunk=3
    )
    np.testing.assert_allclose(
        got, value("forward_kl", teacher, student), rtol=1e-12
    )


def test_beta_of_a_running_program_is_that_of_a_number(x64):
    """As schedules give it, the limits at 0 and 1 included."""
    teacher, student = pair(20)
    ramp = dv.JensenShannon(beta=Linear(start=0.0, end=1.0, steps=10))

    def both(divergence, z):
        return divergence(teacher, z), jax.grad(
            lambda z: divergence(teacher, z).sum()
        )(z)

    run = jax.jit(lambda z, step: both(settled(ramp, step), z))
    for step, beta in ((0, 0.0), (3, 0.3), (10, 1.0)):
        values, grad = run(student, step)
        wanted_values, wanted_grad = both(dv.JensenShannon(beta=beta), student)
        np.testing.assert_allclose(values, wanted_values, rtol=1e-13)
        np.testing.assert_allclose(grad, wanted_grad, atol=1e-14)


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "tol"), [(np.float32, 1e-6), (np.float64, 1e-12)]
)
@pytest.mark.parametrize("chunk", [1, 7, 23, 64])
def test_chunked_likelihood_equals_plain(x64, dtype, tol, chunk):
    """-log q and its gradients per token, and the argmax, of a vocabulary of 23 in chunks."""
    rng = np.random.default_rng(21)
    hidden, head = (
        jnp.asarray(0.5 * rng.standard_normal(shape), dtype)
        for shape in ((4, 5, 6), (6, 23))
    )
    labels = (
        jnp.argmax(hidden @ head, -1)
        .at[:, 1:]
        .set(jnp.asarray(rng.integers(0, 23, (4, 4))))
    )
    plain = lambda h, w: dv.cross_entropy(h @ w, labels)
    parts = lambda h, w: dv.chunked_likelihood(h, w, labels, chunk=chunk)
    nll, likeliest = parts(hidden, head)
    np.testing.assert_allclose(nll, plain(hidden, head), rtol=tol, atol=tol)
    np.testing.assert_array_equal(
        likeliest, jnp.argmax(hidden @ head, -1) == labels
    )
    assert likeliest[:, 0].all() and not likeliest.all()
    grads = lambda f: jax.grad(lambda *a: jnp.mean(f(*a)), argnums=(0, 1))(
        hidden, head
    )
    for got, want in zip(grads(lambda *a: parts(*a)[0]), grads(plain)):
        np.testing.assert_allclose(got, want, atol=tol)


def test_of_equal_logits_the_lower_id_is_the_likeliest():
    hidden = jnp.ones((1, 2))
    head = jnp.ones((2, 9))
    for label in range(9):
        assert bool(
            dv.chunked_likelihood(hidden, head, jnp.asarray([label]), chunk=2)[1][0]
        ) == (label == 0)


def hidden_and_heads(dtype=jnp.float32):
    """Teacher and student of different widths over a vocabulary of 23."""
    rng = np.random.default_rng(12)
    return [
        jnp.asarray(rng.standard_normal(shape), dtype)
        for shape in ((2, 3, 6), (6, 23), (2, 3, 4), (4, 23))
    ]


def test_chunked_equals_plain_for_every_kind():
    """Chunks of 7: four of them, 5 columns of padding."""
    args = hidden_and_heads()

    @jax.jit
    def both(th, tw, sh, sw):
        return [
            (
                dv.chunked_divergence(d, th, tw, sh, sw, chunk=7, temperature=1.5),
                dv.token_divergence(d, th @ tw, sh @ sw, temperature=1.5),
            )
            for d in DIVERGENCES.values()
            if isinstance(d, dv.Sum)
        ]

    for got, want in both(*args):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "chunk"), [("jsd", 7), ("reverse_kl", 23), ("forward_kl", 64)]
)
def test_chunked_has_the_plain_gradients(kind, chunk):
    weight = jnp.asarray(
        np.random.default_rng(13).standard_normal((2, 3)), jnp.float32
    )
    chunked = lambda *a: dv.chunked_divergence(
        DIVERGENCES[kind], *a, chunk=chunk, temperature=1.5
    )
    plain = lambda th, tw, sh, sw: dv.token_divergence(
        DIVERGENCES[kind], th @ tw, sh @ sw, temperature=1.5
    )
    grads = lambda f: jax.jit(
        jax.grad(lambda *a: jnp.sum(weight * f(*a)), argnums=(0, 1, 2, 3))
    )(*hidden_and_heads())
    for got, want in zip(grads(chunked), grads(plain)):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 23, 64])
def test_chunked_cross_entropy_equals_plain(chunk):
    rng = np.random.default_rng(14)
    hidden = jnp.asarray(rng.standard_normal((2, 3, 6)), jnp.float32)
    head = jnp.asarray(rng.standard_normal((6, 23)), jnp.float32)
    labels = jnp.asarray([[0, 22, 5], [5, 7, 14]])
    weight = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)
    chunked = lambda hidden, head: dv.chunked_cross_entropy(
        hidden, head, labels, chunk=chunk
    )
    plain = lambda hidden, head: (
        -jnp.take_along_axis(
            jax.nn.log_softmax(hidden @ head), labels[..., None], -1
        )[..., 0]
    )
    total = lambda f: lambda *a: (jnp.sum(weight * f(*a)), f(*a))
    run = lambda f: jax.jit(jax.grad(total(f), argnums=(0, 1), has_aux=True))(
        hidden, head
    )
    for got, want in zip(
        jax.tree.leaves(run(chunked)), jax.tree.leaves(run(plain))
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_chunked_never_holds_the_vocabulary():
    """No intermediate of the forward or the backward has as many elements as the logits."""
    batch = 64
    dim = 4
    vocab = 512
    chunk = 32
    args = (
        jnp.ones((batch, dim)),
        jnp.ones((dim, vocab)),
        jnp.ones((batch, dim)),
        jnp.ones((dim, vocab)),
    )
    f = lambda th, tw, sh, sw: dv.chunked_divergence(
        dv.JensenShannon(), th, tw, sh, sw, chunk=chunk
    ).sum()
    sizes = lambda jaxpr: [
        v.aval.size for e in _equations(jaxpr) for v in e.outvars
    ]
    assert (
        max(sizes(jax.make_jaxpr(jax.grad(f, argnums=(2, 3)))(*args).jaxpr))
        < batch * vocab
    )
    g = lambda hidden, head: dv.chunked_cross_entropy(
        hidden, head, jnp.zeros(batch, int), chunk=chunk
    ).sum()
    assert (
        max(sizes(jax.make_jaxpr(jax.grad(g, argnums=(0, 1)))(*args[2:]).jaxpr))
        < batch * vocab
    )
    plain = lambda th, tw, sh, sw: dv.token_divergence(
        dv.JensenShannon(), th @ tw, sh @ sw
    ).sum()
    assert max(sizes(jax.make_jaxpr(plain)(*args).jaxpr)) == batch * vocab


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for sub in jax.tree.leaves(
            list(eqn.params.values()),
            is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns"),
        ):
            inner = getattr(sub, "jaxpr", sub)
            if hasattr(inner, "eqns"):
                yield from _equations(inner)


def test_chunked_projects_bfloat16_into_float32():
    args = hidden_and_heads(jnp.bfloat16)
    run = jax.jit(lambda *a: dv.chunked_divergence(dv.ForwardKL(), *a, chunk=8))
    out = run(*args)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(
        out, run(*(a.astype(jnp.float32) for a in args)), rtol=1e-5
    )


def test_masked_sum_ignores_what_is_masked_out():
    values = jnp.asarray([[1.0, 2.0, jnp.nan], [jnp.inf, 4.0, 8.0]])
    mask = jnp.asarray([[1, 1, 0], [0, 1, 1]])
    assert [float(v) for v in dv.masked_sum(values, mask)] == [15.0, 4.0]
    assert [
        float(v) for v in dv.masked_sum(values, mask, jnp.asarray([[2.0], [1.0]]))
    ] == [
        18.0,
        4.0,
    ]
    np.testing.assert_array_equal(
        jax.grad(lambda v: dv.masked_sum(v, mask)[0])(values), mask
    )


def test_refusals():
    z = jnp.zeros((2, 5))
    with pytest.raises(
        Refused, match=r"divergence='forward_k1'.* did you mean 'forward_kl'"
    ):
        dv.described("forward_k1")
    with pytest.raises(Refused, match="k=5: expected 1 to 4"):
        dv.topk_log_probs(z, 5)
    head = jnp.zeros((5, 6))
    with pytest.raises(Refused, match=r"AdaptiveKL.* sorts the whole vocabulary"):
        dv.chunked_divergence(dv.AdaptiveKL(), z, head, z, head, chunk=2)
    with pytest.raises(Refused, match="chunk=0"):
        dv.chunked_divergence(dv.ForwardKL(), z, head, z, head, chunk=0)


class TestSequenceGradients:
    """A model of two steps over three tokens, enumerated: which estimator has which mean."""

    def laws(self):
        rng = np.random.default_rng(14)
        draw = lambda: {
            "first": jnp.asarray(rng.standard_normal(3)),
            "next": jnp.asarray(rng.standard_normal((3, 3))),
        }
        return draw(), draw()

    @staticmethod
    def log_probs(model):
        return jax.nn.log_softmax(model["first"]), jax.nn.log_softmax(model["next"])

    def sequence_kl(self, teacher, student):
        (p1, p2), (q1, q2) = self.log_probs(teacher), self.log_probs(student)
        joint = lambda first, rest: (first[:, None] + rest).ravel()
        return reverse_kl(joint(p1, p2), joint(q1, q2))

    def estimate(self, student, weights):
        """Mean over y ~ q of sum_t weight_t grad log q(y_t | y_<t), of weights() = (w_1, w_2)."""

        def objective(student):
            q1, q2 = self.log_probs(student)
            prob = jax.lax.stop_gradient(jnp.exp(q1[:, None] + q2))
            w1, w2 = weights()
            return jnp.sum(prob * (w1 * q1[:, None] + w2 * q2))

        return jax.jit(jax.grad(objective))(student)

    def ratios(self, teacher, student):
        """log p/q of the first token [3, 1] and of the second [3, 3]."""
        (p1, p2), (q1, q2) = self.log_probs(teacher), self.log_probs(student)
        return (p1 - q1)[:, None], p2 - q2

    def close(self, a, b, atol=1e-14):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), a, b)

    def test_reinforce_with_reward_to_go_is_the_sequence_gradient_with_or_without_baseline(
        self, x64
    ):
        teacher, student = self.laws()
        exact = jax.jit(jax.grad(lambda s: self.sequence_kl(teacher, s)))(student)
        l1, l2 = self.ratios(teacher, student)
        for baseline in (0.0, 1.0):
            self.close(
                self.estimate(
                    student, lambda b=baseline: (-(l1 + l2 - b), -(l2 - b))
                ),
                exact,
            )

    def test_minillm_splits_off_the_single_step(self, x64):
        """Single step exactly over the vocabulary, q differentiated inside the sum, plus the long
        term R_{t+1}.
        """
        teacher, student = self.laws()
        exact = jax.jit(jax.grad(lambda s: self.sequence_kl(teacher, s)))(student)
        (p1, p2), (q1, _) = self.log_probs(teacher), self.log_probs(student)
        held = jnp.exp(q1)
        single = jax.jit(
            jax.grad(
                lambda s: (
                    reverse_kl(p1, s["first"]) + held @ reverse_kl(p2, s["next"])
                )
            )
        )(student)
        _, l2 = self.ratios(teacher, student)
        long = self.estimate(student, lambda: (-l2, 0.0))
        self.close(jax.tree.map(jnp.add, single, long), exact)

        def outside(s):
            q1, q2 = self.log_probs(s)
            hold = lambda q: jax.lax.stop_gradient(jnp.exp(q))
            return jnp.sum(hold(q1) * (q1 - p1)) + jnp.sum(
                hold(q1) * jnp.sum(hold(q2) * (q2 - p2), -1)
            )

        self.close(
            jax.jit(jax.grad(outside))(student),
            jax.tree.map(jnp.zeros_like, student),
        )

    def test_per_token_advantage_holds_the_prefix_law_fixed(self, x64):
        """OPD: mean of A_t grad log q is the gradient of sum_t E KL(q || p)(prefix), not of the
        sequence's KL.
        """
        teacher, student = self.laws()
        (p1, p2), (q1, _) = self.log_probs(teacher), self.log_probs(student)
        l1, l2 = self.ratios(teacher, student)
        got = self.estimate(student, lambda: (-l1, -l2))
        prefix = jnp.exp(q1)
        want = jax.jit(
            jax.grad(
                lambda s: (
                    reverse_kl(p1, s["first"]) + prefix @ reverse_kl(p2, s["next"])
                )
            )
        )(student)
        self.close(got, want)
        exact = jax.jit(jax.grad(lambda s: self.sequence_kl(teacher, s)))(student)
        assert jnp.abs(got["first"] - exact["first"]).max() > 1e-2


def test_gkd_off_policy_at_small_beta_is_supervised_forward_kl(x64):
    """lambda = 0 (fixed data) and JSD(b)/b at b = 1e-5, per valid token: forward KL, in value and
    gradient.
    """
    teacher, student = pair(15, (3, 4, 6), scale=1.0)
    mask = jnp.asarray([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])

    def loss(z, per_token):
        total, count = dv.masked_sum(per_token(teacher, z), mask)
        return total / count

    run = lambda per_token: jax.jit(
        jax.value_and_grad(lambda z: loss(z, per_token))
    )(student)
    gkd = run(lambda p, q: dv.JensenShannon(beta=1e-5)(p, q) / 1e-5)
    kd = run(forward_kl)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4), gkd, kd
    )
