"""The operators inside PyTorch: errors, fake tensors, compile, autograd, the package."""

import subprocess
import sys
from pathlib import Path

import heed
import numpy as np
import pytest
import torch
from reference import random
from torch.library import opcheck

Q = random(2, 4, 5, 8)
K = random(2, 2, 7, 8, seed=1)
V = random(2, 2, 7, 6, seed=2)
LSE = random(2, 4, 5)
LENGTHS = torch.tensor([7, 5])
ENDS = (torch.tensor([0, 2, 5]), torch.tensor([0, 4, 7]))  # of packed queries and keys

OPS = torch.ops.heed
CALLS = {
    "flash_attention": (
        OPS.flash_attention.default,
        (Q, K, V),
        {"causal": True, "window_left": 3, "lengths": LENGTHS, "scale": 0.3},
    ),
    "flash_attention_varlen": (
        OPS.flash_attention_varlen.default,
        (*(t[0].transpose(0, 1) for t in (Q, K, V)), *ENDS),
        {"alibi_slopes": random(4), "sink": random(4), "dropout_p": 0.25, "seed": 3},
    ),
    "flash_attention with a drawn seed": (
        OPS.flash_attention.default,
        (Q, K, V),
        {"dropout_p": 0.25, "drawn_seed": torch.tensor(2**61)},
    ),
    "decode_attention": (
        OPS.decode_attention.default,
        (Q, K, V, LENGTHS),
        {"window": 4, "sink": random(4), "softcap": 1.5, "alibi_slopes": random(4)},
    ),
    "merge_attention": (OPS.merge_attention.default, (Q, LSE, Q, LSE), {}),
    "sigmoid_attention": (
        OPS.sigmoid_attention.default,
        (Q, K, V),
        {"bias": random(4), "lengths": LENGTHS, "alibi_slopes": random(4)},
    ),
}


def flash(q=Q, k=K, v=V, **options):
    return heed.flash_attention(q, k, v, **options)


def sigmoid(q=Q, k=K, v=V, **options):
    return heed.sigmoid_attention(q, k, v, **options)


def decode(q=Q, k=K, v=V, lengths=LENGTHS, **options):
    return heed.decode_attention(q, k, v, lengths, **options)


def merge(out_a=Q, lse_a=LSE, out_b=Q, lse_b=LSE):
    return heed.merge_attention(out_a, lse_a, out_b, lse_b)


def wide(d):
    return torch.zeros(2, 2, 5, d)


QKV_MISTAKES = [
    (lambda f: f(q=None), TypeError, ["q ", "None"]),
    (lambda f: f(v=None), TypeError, ["v ", "None"]),
    (lambda f: f(q=Q[0]), ValueError, ["q ", "3", "4"]),
    (lambda f: f(k=K[..., :4]), ValueError, ["k ", "4", "8"]),
    (lambda f: f(k=K[:1]), ValueError, ["k ", "1", "2"]),
    (lambda f: f(v=V[:1]), ValueError, ["v ", "1", "2"]),
    (lambda f: f(v=V[:, :, :3]), ValueError, ["v ", "3", "7"]),
    (lambda f: f(v=V[:, :1]), ValueError, ["v ", "1", "2"]),
    (lambda f: f(q=Q[:, :3]), ValueError, ["q ", "3", "2"]),
    (lambda f: f(q=random(2, 4, 8, 5).mT), ValueError, ["q ", "stride"]),
    (lambda f: f(k=random(2, 2, 8, 7).mT), ValueError, ["k ", "stride"]),
    (lambda f: f(v=random(2, 2, 6, 7).mT), ValueError, ["v ", "stride"]),
    (lambda f: f(q=Q[..., :0], k=K[..., :0]), ValueError, ["q ", "head dim 0"]),
    (lambda f: f(q=Q.int(), k=K.int(), v=V.int()), TypeError, ["q ", "int32"]),
    (lambda f: f(q=Q.cfloat()), TypeError, ["q ", "ComplexFloat"]),
    (lambda f: f(k=K.double()), TypeError, ["k ", "float64", "float32"]),
    (lambda f: f(v=V.bfloat16()), TypeError, ["v ", "bfloat16", "float32"]),
    (lambda f: f(k=K.to("meta")), RuntimeError, ["k ", "meta", "cpu"]),
    (lambda f: f(q=Q.to_sparse()), RuntimeError, ["q ", "Sparse", "cpu"]),
    (lambda f: f(lengths=torch.tensor([7, 8])), ValueError, ["lengths", "8", "7"]),
    (lambda f: f(lengths=torch.tensor([7, -1])), ValueError, ["lengths", "-1"]),
    (lambda f: f(lengths=torch.tensor([7])), ValueError, ["lengths", "1", "2"]),
    (lambda f: f(lengths=torch.tensor(7)), ValueError, ["lengths", "0", "1"]),
    (lambda f: f(lengths=torch.tensor([7.0, 5.0])), ValueError, ["lengths", "float32", "int"]),
    (lambda f: f(lengths=torch.tensor([7, 5], dtype=torch.int8)), TypeError, ["lengths", "Char"]),
    (lambda f: f(lengths=LENGTHS.to("meta")), RuntimeError, ["lengths", "meta"]),
    (lambda f: f(lengths=[7, 5]), RuntimeError, ["lengths", "list"]),
    (lambda f: f(scale="1"), RuntimeError, ["scale", "str"]),
]

WIDE_MISTAKES = [
    (lambda f: f(q=random(2, 4, 5, 257), k=random(2, 2, 7, 257)), ValueError, ["q ", "257", "256"]),
    (lambda f: f(v=random(2, 2, 7, 257)), ValueError, ["v ", "257", "256"]),
]

WINDOW_MISTAKES = [
    (lambda f: f(window=(-2, 0)), ValueError, ["window[0]", "-2"]),
    (lambda f: f(window=(0, -5)), ValueError, ["window[1]", "-5"]),
    (lambda f: f(window=3), TypeError, ["window", "3"]),
    (lambda f: f(window=(1, 2, 3)), TypeError, ["window", "(1, 2, 3)"]),
    (lambda f: f(window=(None, 2)), TypeError, ["window", "(None, 2)", "whole"]),
]


def expect_error(call, operator, error, words):
    with pytest.raises(error) as caught:
        call(operator)
    message = str(caught.value).replace("k_cache ", "k ").replace("v_cache ", "v ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("operator", [flash, sigmoid])
@pytest.mark.parametrize("call, error, words", QKV_MISTAKES + WINDOW_MISTAKES)
def test_mistakes(operator, call, error, words):
    expect_error(call, operator, error, [f"{operator.__name__}_attention", *words])


@pytest.mark.parametrize("call, error, words", WIDE_MISTAKES)
def test_mistakes_of_head_dims(call, error, words):
    expect_error(call, sigmoid, error, ["sigmoid_attention", *words])


@pytest.mark.parametrize("call, error, words", QKV_MISTAKES)
def test_decode_mistakes(call, error, words):
    expect_error(call, decode, error, ["decode_attention", *words])


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: decode(q=random(2, 4, 17, 8)), ValueError, ["q ", "17", "16"]),
        (lambda: decode(window=-2), ValueError, ["window", "-2"]),
        (lambda: decode(splits=-1), ValueError, ["splits", "-1"]),
        (lambda: decode(lengths=None), TypeError, ["lengths", "None"]),
        (lambda: decode(softcap=-1.0), ValueError, ["decode_attention", "softcap", "-1"]),
        (lambda: decode(softcap=float("nan")), ValueError, ["softcap", "nan"]),
        (lambda: decode(alibi_slopes=torch.ones(2)), ValueError, ["alibi_slopes", "[2]", "[4]"]),
        (lambda: decode(alibi_slopes=torch.ones(4, 1)), ValueError, ["alibi_slopes", "2", "1"]),
        (lambda: decode(alibi_slopes=torch.ones(4).int()), ValueError, ["alibi_slopes", "int32"]),
        (lambda: decode(sink=torch.ones(3)), ValueError, ["sink", "[3]", "[4]"]),
        (lambda: merge(out_a=None), TypeError, ["out_a", "None"]),
        (lambda: sigmoid(bias=torch.zeros(3)), ValueError, ["bias", "3", "4"]),
        (lambda: sigmoid(bias=torch.zeros(())), ValueError, ["bias", "0", "1"]),
        (lambda: sigmoid(bias=torch.zeros(4).int()), ValueError, ["bias", "int32"]),
        (lambda: sigmoid(bias="-8"), RuntimeError, ["bias", "str"]),
        (lambda: sigmoid(alibi_slopes=torch.zeros(2)), ValueError, ["alibi_slopes", "2", "4"]),
        (lambda: merge(out_b=Q[:, :2]), ValueError, ["out_b", "2"]),
        (lambda: merge(lse_a=LSE[:, :2]), ValueError, ["lse_a", "2"]),
        (lambda: merge(lse_b=LSE[..., None]), ValueError, ["lse_b", "4", "3"]),
        (lambda: merge(lse_b=LSE.double()), ValueError, ["lse_b", "float64", "float32"]),
        (lambda: merge(out_b=Q.half()), TypeError, ["out_b", "float16", "float32"]),
    ],
)
def test_more_mistakes(call, error, words):
    expect_error(lambda _: call(), None, error, words)


def test_options_are_keyword_only():
    with pytest.raises(TypeError):
        heed.flash_attention(Q, K, V, True)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    opcheck(*CALLS[name])


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck_of_other_types(name, dtype):
    op, args, options = CALLS[name]
    statistics = torch.float64 if dtype == torch.float64 else torch.float32

    def cast(t):
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t.to(statistics if t.dim() < 4 else dtype)

    opcheck(op, tuple(map(cast, args)), {k: cast(x) for k, x in options.items()})


@pytest.mark.parametrize("name", CALLS)
def test_opcheck_where_gradients_are_wanted(name):
    op, (first, *rest), options = CALLS[name]
    args = (first.clone().requires_grad_(), *rest)
    # The fourth test of opcheck calls backward, which is an error where there is none.
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name != "decode_attention":
        tests.append("test_aot_dispatch_dynamic")
    opcheck(op, args, options, test_utils=tests)


BACKWARDS = {
    "flash_attention": (OPS.flash_attention, (), {"alibi_slopes": (4,), "bias": (7,), "sink": (4,)}),
    "flash_attention_varlen": (
        OPS.flash_attention_varlen,
        ENDS,
        {"alibi_slopes": (4,), "sink": (4,)},
    ),
    "sigmoid_attention": (OPS.sigmoid_attention, (), {"bias": (4,), "alibi_slopes": (4,)}),
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_opcheck_of_backwards_whose_results_are_not_all_wanted(name):
    op, boundaries, shapes = BACKWARDS[name]
    backward = getattr(OPS, f"{name}_backward").default
    inputs = [t.bfloat16() for t in (Q, K, V)]
    if boundaries:
        inputs = [t[0].transpose(0, 1) for t in inputs]
    options = {option: random(*shape) for option, shape in shapes.items()}
    results = op(*inputs, *boundaries, **options)
    if isinstance(results, tuple):  # the backward reads them, and no gradient of lse arrives
        arguments = (results[0], None, *inputs, *results, *boundaries)
    else:
        arguments = (results, *inputs)
    every = backward(*arguments, **options)
    for unwanted in range(len(every)):
        mask = [place != unwanted for place in range(len(every))]
        some = backward(*arguments, **options, output_mask=mask)
        assert some[unwanted].numel() == 0
        assert all(torch.equal(s, e) for s, e, given in zip(some, every, mask) if given)
        opcheck(backward, arguments, {**options, "output_mask": mask})


def test_backward_is_an_error_that_names_the_operator():
    op, (first, *rest), options = CALLS["decode_attention"]
    out, _ = op(first.clone().requires_grad_(), *rest, **options)
    assert out.requires_grad
    with pytest.raises(RuntimeError, match="derivative for heed::decode_attention "):
        out.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_is_refused(requires_grad):
    # A tangent that got lost would say that the derivative is zero.
    def lightning(q):
        return heed.lightning_attention(q, q, q)

    for call in (flash, sigmoid, lightning):
        q = random(2, 4, 5, 8).requires_grad_(requires_grad)
        with pytest.raises(RuntimeError, match="forward-mode derivatives are not offered"):
            torch.func.jvp(call, (q,), (q.detach(),))


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(name, mode):
    op, (first, *rest), options = CALLS[name]
    expected = op(first, *rest, **options)
    with mode():
        found = op(first.clone().requires_grad_(), *rest, **options)
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
    for f, e in zip(found, expected):
        assert not f.requires_grad
        assert torch.equal(f, e)


@pytest.mark.parametrize("name", CALLS)
def test_results_have_fresh_memory(name):
    op, args, options = CALLS[name]
    first, second = op(*args, **options), op(*args, **options)
    if not isinstance(first, tuple):
        first, second = (first,), (second,)
    assert len({t.data_ptr() for t in (*first, *second, *args)}) == len(first) * 2 + len(
        {t.data_ptr() for t in args}
    )


def everything(q, k, v, lengths):
    out, lse = heed.flash_attention(q, k, v, causal=True, window=(9, -1), return_lse=True)
    merged, _ = heed.merge_attention(out, lse, out, lse)
    return (
        merged,
        heed.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        heed.decode_attention(
            q, k, v, lengths, window=5, softcap=2.0, alibi_slopes=q.mean((0, 2, 3))
        ),
        heed.flash_attention_varlen(
            *(t[0].transpose(0, 1) for t in (q, k, v)),
            *(torch.tensor([0, t.shape[2]]) for t in (q, k)),
            sink=q.mean((0, 2, 3)),
            dropout_p=0.25,
            seed=3,
        ),
        heed.sigmoid_attention(q, k, v, bias=-1.0, lengths=lengths),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch.compiler.reset()
    # "aot_eager" has everything of the compiler that sees an operator, without a C++ compiler.
    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for b, lq, lk in [(2, 5, 7), (2, 7, 5), (3, 6, 6)]:
        q, k, v = random(b, 4, lq, 8), random(b, 2, lk, 8, seed=1), random(b, 2, lk, 8, seed=2)
        lengths = torch.full((b,), lk)
        for found, expected in zip(compiled(q, k, v, lengths), everything(q, k, v, lengths)):
            assert torch.equal(found, expected)


def drop(q, seed):
    return heed.flash_attention(q, q, q, dropout_p=0.5, seed=seed)


def drop_packed(q, seed):
    tokens = q[0].transpose(0, 1)
    ends = torch.tensor([0, tokens.shape[0]])
    return heed.flash_attention_varlen(
        tokens, tokens, tokens, ends, ends, dropout_p=0.5, seed=seed
    )


@pytest.mark.parametrize("dropped", [drop, drop_packed])
def test_one_graph_serves_all_seeds(dropped):
    torch.compiler.reset()
    compiled = torch.compile(dropped, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (11, 12, 2**62):
            assert torch.equal(compiled(Q, seed), dropped(Q, seed))


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1])
def test_seeds_are_any_64_bits(seed):
    same = seed + 2**64 if seed < 0 else seed - 2**64
    for draw in (
        lambda s: heed.random_permutation(s, 50),
        lambda s: heed.nn.random_projection(1, 4, 4, seed=s),
        lambda s: drop(Q, s),
        lambda s: drop_packed(Q, s),
    ):
        assert torch.equal(draw(seed), draw(same))
        assert not torch.equal(draw(seed), draw(7))


def test_seeds_drawn_in_the_graph():
    def drawn(x):
        return drop(x, int(torch.randint(2**62, ())))

    torch.compiler.reset()
    compiled = torch.compile(drawn, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    found = compiled(Q)
    torch.manual_seed(3)
    assert torch.equal(found, drawn(Q))


def test_seeds_of_numpy_and_pytorch():
    for seed in (np.uint64(2**64 - 1), np.uint64(2**63), np.int64(-5), torch.tensor(3)):
        assert torch.equal(heed.random_permutation(seed, 50), heed.random_permutation(int(seed), 50))
    for seed in (3.0, "3", None):
        with pytest.raises(TypeError):
            heed.random_permutation(seed, 50)


def test_compile_to_code():
    torch.compiler.reset()
    compiled = torch.compile(lambda q, k, v: heed.flash_attention(2 * q, k, v) + 1, fullgraph=True)
    torch.testing.assert_close(compiled(Q, K, V), heed.flash_attention(2 * Q, K, V) + 1)


def test_one_dynamic_graph_serves_all_lengths():
    torch.compiler.reset()
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda q, k, v: heed.flash_attention(q, k, v, causal=True),
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for lq, lk in [(5, 7), (6, 9), (11, 8)]:
        q, k, v = random(2, 4, lq, 8), random(2, 2, lk, 8, seed=1), random(2, 2, lk, 6, seed=2)
        assert torch.equal(compiled(q, k, v), heed.flash_attention(q, k, v, causal=True))
    assert len(graphs) == 1


@pytest.mark.parametrize("operator", [flash, sigmoid, decode])
@pytest.mark.parametrize(
    "change, words",
    [
        ({"k": K[..., :4]}, ["k", "4", "8"]),
        ({"v": V[:1]}, ["v", "1", "2"]),
        ({"q": Q[:, :3]}, ["q", "3", "2"]),
        ({"v": V[:, :, :3]}, ["v", "3", "7"]),
    ],
)
def test_fake_tensors_are_checked(operator, change, words):
    arguments = {"q": Q, "k": K, "v": V} | change
    if operator is decode:
        arguments["lengths"] = LENGTHS
    meta = {name: t.to("meta") for name, t in arguments.items()}
    expect_error(lambda f: f(**meta), operator, ValueError, words)


def test_vmap():
    q = random(3, 2, 4, 5, 8)
    found = torch.vmap(lambda x: heed.flash_attention(x, K, V))(q)
    expected = torch.stack([heed.flash_attention(x, K, V) for x in q])
    assert torch.equal(found, expected)


def test_gradients_of_torch_func():
    q = random(3, 2, 4, 5, 8)

    for op in (heed.flash_attention, heed.sigmoid_attention):

        def loss(x, op=op):
            return op(x, K, V).square().sum()

        found = torch.vmap(torch.func.grad(loss))(q)
        for f, x in zip(found, q):
            x.requires_grad_()
            assert torch.equal(f, torch.autograd.grad(loss(x), x)[0])
        _, back = torch.func.vjp(loss, Q)
        assert torch.equal(back(torch.ones(()))[0], torch.func.grad(loss)(Q))
        with pytest.raises(RuntimeError, match=f"derivative for heed::{op.__name__}_backward"):
            torch.func.grad(lambda x, f=loss: torch.func.grad(f)(x).sum())(Q)


def test_compiled_autograd():
    torch.compiler.reset()
    grads = []
    for compiler in (None, torch.compile(backend="aot_eager")):
        q = Q.clone().requires_grad_()
        loss = heed.flash_attention(q, K, V).square().sum()
        if compiler is None:
            loss.backward()
        else:
            with torch._dynamo.compiled_autograd._enable(compiler):
                loss.backward()
        grads.append(q.grad)
    assert torch.equal(*grads)


def test_negated_view_of_memory():
    imaginary = torch.complex(Q, Q).conj().imag
    assert imaginary.is_neg()
    strided = heed.scaled_dot_product_attention(imaginary, Q, Q)
    assert torch.equal(strided, heed.scaled_dot_product_attention(-Q, Q, Q))


def test_version_is_that_of_the_core():
    header = Path(__file__).parents[2] / "include/heed/version.h"
    assert f'"{heed.__version__}"' in header.read_text()


def test_package_is_typed_and_documented():
    assert Path(heed.__file__).with_name("py.typed").exists()
    for name in heed.__all__:
        function = getattr(heed, name)
        for part in ("Args:", "Raises:", "arXiv", "["):
            assert part in function.__doc__
        assert "return" in function.__annotations__


def test_import_in_a_fresh_process_before_torch():
    script = "import heed, torch; print(heed.flash_attention(*[torch.ones(1, 1, 2, 3)] * 3).sum())"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "tensor(6.)\n"


def test_importing_leaves_the_compiler_of_pytorch_alone():
    code = "import sys, heed; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
