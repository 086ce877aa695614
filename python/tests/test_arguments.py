"""Rules that all functions follow: numbers, seeds, autocast, types of parameters."""

import heed
import pytest
import torch
from calls import CALLS, Q, call
from reference import random
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

ATTENTION = [name for name in heed.__all__ if name not in ("merge_attention", "na1d", "na3d")]
MAKERS = ("lightning_slopes", "random_permutation")


def test_every_function_is_called_here():
    assert sorted(CALLS) == sorted(name for name in ATTENTION if name not in MAKERS)


@pytest.mark.parametrize(
    "name, number", [(name, number) for name, (*_, numbers) in CALLS.items() for number in numbers]
)
def test_a_learned_number_is_an_error(name, number):
    learned = torch.nn.Parameter(torch.tensor(0.5))
    # Without the error its gradient is lost.
    with pytest.raises(TypeError, match=f"{name}: {number} is a tensor, needed is a number"):
        call(name, **{number: learned})


def test_learned_numbers_elsewhere():
    learned = torch.nn.Parameter(torch.tensor(0.5))
    line, space = torch.ones(1, 5, 2, 8), torch.ones(1, 1, 1, 5, 2, 8)
    for function, x in ((heed.na1d, line), (heed.na3d, space)):
        with pytest.raises(TypeError, match="scale is a tensor, needed is a number"):
            function(x, x, x, 1, scale=learned)
    with pytest.raises(TypeError, match="num_heads is a tensor, needed is a number"):
        heed.lightning_slopes(learned)


def test_whole_numbers_may_be_tensors():
    found = call("stochastic_attention", window=torch.tensor(3))
    assert torch.equal(found[0], call("stochastic_attention")[0])


@pytest.mark.parametrize("specialize_float", [False, True])
def test_numbers_of_a_graph(specialize_float):
    def scaled(q, scale, softcap):
        return heed.flash_attention(q, q, q, scale=scale, softcap=softcap)

    torch.compiler.reset()
    with torch._dynamo.config.patch(specialize_float=specialize_float):
        compiled = torch.compile(scaled, fullgraph=True, dynamic=True, backend="aot_eager")
        for scale in (0.25, 0.5):
            assert torch.equal(compiled(Q, scale, 2.0), scaled(Q, scale, 2.0))


DROPPING = ["flash_attention", "flash_attention_varlen", "scaled_dot_product_attention"]


def dropped(name):
    return call(name, dropout_p=0.5)[0]


@pytest.mark.parametrize("name", DROPPING)
def test_every_call_drops_other_weights(name):
    torch.manual_seed(3)
    first, second = dropped(name), dropped(name)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(dropped(name), first)


@pytest.mark.parametrize("name", DROPPING)
def test_without_dropout_nothing_is_drawn(name):
    before = torch.get_rng_state()
    call(name)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", DROPPING)
def test_drawn_seeds_under_compile(name):
    torch.compiler.reset()
    compiled = torch.compile(dropped, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    found = [compiled(name), compiled(name)]
    torch.manual_seed(3)
    for one in found:
        assert torch.equal(one, dropped(name))


class Dropped(torch.nn.Module):
    def forward(self, q):
        return heed.flash_attention(q, q, q, dropout_p=0.5)


def test_drawn_seeds_export():
    exported = torch.export.export(Dropped(), (Q,)).module()
    torch.manual_seed(3)
    first, second = exported(Q), exported(Q)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(Dropped()(Q), first)


def test_a_checkpoint_drops_the_same_again():
    gradients = []
    for again in (False, True):
        q = Q.clone().requires_grad_()
        torch.manual_seed(3)
        out = checkpoint(Dropped(), q, use_reentrant=False) if again else Dropped()(q)
        out.sum().backward()
        gradients.append(q.grad)
    assert torch.equal(*gradients)


KEEPING = {  # what the backward reads besides the inputs
    "affine_scaled_attention": 2,
    "head_gated_attention": 2,
    "parallax_attention": 3,
    "recurrent_softmax_attention": 2,
}


class Results(TorchDispatchMode):
    """The sizes of what the operators of heed return."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        results = op(*args, **(kwargs or {}))
        if op.namespace == "heed":
            self.sizes.append([result.numel() for result in results])
        return results


def wanting(name, **options):
    own = {key: t.clone().requires_grad_() for key, t in CALLS[name][0].items()}
    return own, call(name, own, **options)


@pytest.mark.parametrize("name", KEEPING)
def test_results_for_a_backward_are_only_made_where_one_may_follow(name):
    with Results() as made:
        plain = call(name)[0]
        kept = wanting(name)[1][0]
        with torch.no_grad():
            wanting(name)
    assert torch.equal(plain, kept)
    empty = [sizes.count(0) for sizes in made.sizes]
    assert empty == [KEEPING[name], 0, KEEPING[name]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KEEPING)
def test_results_have_the_same_bits_with_and_without_a_backward(name, dtype):
    own, others, _ = CALLS[name]
    own = {key: t.to(dtype) for key, t in own.items()}
    if dtype == torch.float64:
        others = {key: t.double() for key, t in others.items()}
    with_backward = own | {"v": own["v"].clone().requires_grad_()}
    assert torch.equal(call(name, own, **others)[0], call(name, with_backward, **others)[0])


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("name", KEEPING)
def test_opcheck_with_and_without_results_for_a_backward(name, statistics):
    own, others, _ = CALLS[name]
    tensors = tuple(t.clone().requires_grad_() for t in own.values())
    operator = getattr(torch.ops.heed, name).default
    opcheck(operator, tensors, others | {"statistics": statistics})


@pytest.mark.parametrize("name", KEEPING)
def test_a_backward_that_nobody_foresaw(name):
    own, results = wanting(name)
    expected = torch.autograd.grad(results[0].square().sum(), own["q"])[0]
    q = own["q"].detach()

    def each(x):  # below vmap nothing tells that gradients are wanted
        return call(name, {"q": x})[0].square().sum()

    batch = torch.stack([q, 2 * q])
    found = torch.func.grad(lambda x: torch.vmap(each)(x).sum())(batch)
    assert torch.equal(found[0], expected)
    assert torch.equal(torch.vmap(torch.func.grad(each))(batch)[0], expected)


# As gradients of sums and means are: strides of 0 in some or in all dimensions.
@pytest.mark.parametrize("name", sorted(set(CALLS) - {"decode_attention"}))
def test_gradients_of_results_may_be_broadcast(name):
    own, results = wanting(name)
    results = [t for t in results if t.requires_grad]
    for last in (True, False):
        seeds = [random(*t.shape[-1:]) if last and t.dim() else torch.tensor(0.5) for t in results]
        spread = [seed.expand(t.shape) for seed, t in zip(seeds, results)]
        found, expected = (
            torch.autograd.grad(results, list(own.values()), grads, True, allow_unused=True)
            for grads in (spread, [g.contiguous() for g in spread])
        )
        assert all(f is e is None or torch.equal(f, e) for f, e in zip(found, expected))


class Calling(torch.nn.Module):
    def __init__(self, name, **options):
        super().__init__()
        self.name, self.options = name, options

    def forward(self, tensors):
        own = {key: tensors[n] for n, key in enumerate(CALLS[self.name][0])}
        return call(self.name, own, **self.options)


# What acts as a tensor sees the call itself, as with PyTorch's own functions.
@pytest.mark.parametrize("name", CALLS)
def test_traced_by_torch_fx(name):
    traced = torch.fx.symbolic_trace(Calling(name))
    assert getattr(heed, name) in [node.target for node in traced.graph.nodes]
    found = tree_leaves(traced(list(CALLS[name][0].values())))
    assert all(map(torch.equal, found, call(name)))


@pytest.mark.parametrize("name", DROPPING)
def test_a_traced_call_drops_other_weights_each_time(name):
    traced = torch.fx.symbolic_trace(Calling(name, dropout_p=0.5))
    first, second = (traced(list(CALLS[name][0].values()))[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", sorted(set(CALLS) - {"decode_attention"}))
def test_nodes_are_called_after_their_operator(name):
    node = next(t.grad_fn for t in wanting(name)[1] if t.requires_grad)
    while not node.name().startswith("heed::"):
        node = node.next_functions[0][0]
    assert node.name().endswith("_backward")


AUTOCAST = torch.bfloat16


def in_type(name, *dtypes):
    """The tensors of one type that the function takes, in these types in turn, as leaves."""
    own = CALLS[name][0].items()
    cast = {key: t.to(dtypes[n % len(dtypes)]) for n, (key, t) in enumerate(own)}
    return {key: t.detach().clone().requires_grad_() for key, t in cast.items()}


def gradients(own, results):
    loss = sum(t.double().square().sum() for t in results if t.requires_grad)
    return torch.autograd.grad(loss, list(own.values()), allow_unused=True)


@pytest.mark.parametrize("name", CALLS)
def test_autocast(name):
    # As after a rotation in float32: the first is float32, the second not.
    mixed, plain = in_type(name, torch.float32, AUTOCAST), in_type(name, AUTOCAST)
    with torch.autocast("cpu", AUTOCAST):
        found = call(name, mixed)
    expected = call(name, plain)
    for f, e in zip(found, expected):
        assert f.dtype == e.dtype and torch.equal(f, e)
    if name == "decode_attention":  # forward only
        return
    for f, e, x in zip(gradients(mixed, found), gradients(plain, expected), mixed.values()):
        assert (f is None) == (e is None)
        assert f is None or (f.dtype == x.dtype and torch.equal(f.to(e.dtype), e))


@pytest.mark.parametrize("name", CALLS)
def test_autocast_leaves_float64(name):
    own, others, _ = CALLS[name]
    wide = {key: t.double() if is_float(t) else t for key, t in (own | others).items()}
    expected = call(name, **wide)
    with torch.autocast("cpu", AUTOCAST):
        found = call(name, **wide)
    assert all(f.dtype == torch.float64 and torch.equal(f, e) for f, e in zip(found, expected))


def is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


@pytest.mark.parametrize("name", [name for name in CALLS if len(CALLS[name][0]) > 1])
def test_mixed_types_are_an_error_without_autocast(name):
    with pytest.raises((TypeError, ValueError), match="type"):
        call(name, in_type(name, torch.float32, AUTOCAST))
    with torch.autocast("cpu", enabled=False), pytest.raises((TypeError, ValueError), match="type"):
        call(name, in_type(name, torch.float32, AUTOCAST))


def parameters(name, dtype):
    """The parameters of the call in a type, as leaves; those without a gradient stay none."""
    own = {key: t.clone().to(dtype) for key, t in CALLS[name][1].items() if is_float(t)}
    return {key: t.requires_grad_(key != "projection") for key, t in own.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("type_of_q", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in CALLS if parameters(name, torch.float32)])
def test_parameters_of_any_floating_type(name, type_of_q, dtype):
    own = {key: t.to(type_of_q) for key, t in CALLS[name][0].items()}
    given = parameters(name, dtype)
    found = call(name, own, **given)
    statistics = torch.float64 if type_of_q == torch.float64 else torch.float32
    wide = {key: t.detach().to(statistics) for key, t in given.items()}
    wide = {key: t.requires_grad_(given[key].requires_grad) for key, t in wide.items()}
    expected = call(name, own, **wide)
    for f, e in zip(found, expected):
        torch.testing.assert_close(f, e, rtol=1e-2 if dtype == type_of_q else 0, atol=0)
    for parameter, f, e in zip(
        given.values(), parameter_gradients(given, found), parameter_gradients(wide, expected)
    ):
        assert f.dtype == parameter.dtype
        torch.testing.assert_close(f, e.to(f.dtype), rtol=2e-2, atol=2e-2)


def parameter_gradients(given, results):
    return gradients({key: t for key, t in given.items() if t.requires_grad}, results)


@pytest.mark.parametrize("name", CALLS)
def test_element_types_of_inputs_are_type_errors(name):
    first = next(iter(CALLS[name][0]))
    with pytest.raises(TypeError, match=f"{name}: {first} has type int32, needed is float64"):
        call(name, {key: t.int() for key, t in CALLS[name][0].items()})


@pytest.mark.parametrize(
    "name, parameter", [(name, key) for name in CALLS for key in parameters(name, torch.float32)]
)
def test_element_types_of_parameters_are_value_errors(name, parameter):
    with pytest.raises(ValueError, match=f"{name}: .*{parameter}.*int32"):
        call(name, **{parameter: CALLS[name][1][parameter].int()})


@pytest.mark.parametrize("name", [name for name in CALLS if name != "decode_attention"])
def test_training_under_autocast_compiles(name):
    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    everything = []
    for function in (compiled, call):
        own = in_type(name, torch.float32)
        with torch.autocast("cpu", AUTOCAST):
            results = function(name, own)
        everything.append(gradients(own, results))
    for found, expected in zip(*everything):
        assert (found is None) == (expected is None)
        assert found is None or torch.equal(found, expected)
