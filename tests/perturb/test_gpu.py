"""The directions in plain torch and in Triton, against the specifications in numpy.

The Triton kernels are checked in three ways, each where it can be: on a GPU; in Triton's interpreter, which runs them
on CPU tensors; and by what they compile to. The last two run this file as a program, because whether a kernel is
interpreted is settled when Triton is imported.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from thinwire.perturb import directions, philox, sign_cpu, torch_kernels

TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU = TRITON and torch.cuda.is_available() and not INTERPRETED
needs_triton = pytest.mark.skipif(not TRITON, reason="needs triton")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")

LAWS = ("gaussian", "sign")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY, PID = 0xFEDCBA9876543210, 0xCAFEBABE
MIXED = [40, 5, 31, 40, 0, 900, 33, 2**32 - 1]
# n, start, seeds, scale
CASES = [
    (0, 3, [5], 0.9),
    (1, 1, [7], 0.5),
    (50, 3, [], 1.0),
    (50, 3, [], 0.9),
    (40, 0, [2**32 - 1], 1.0),
    (1001, 5, [31], 0.9),
    (1029, 2**34 - 13, MIXED, 0.9),
    (3000, 2**35 - 1001, MIXED[:3], 1.0),
    (2048, 0, MIXED, 1.0),
    (77, 2**62 - 100, MIXED, -0.3),
]
NARROW = [(np.arange(70) * 5 % 97, 3, 130), (np.array([31]), 2**34 - 5, 10), (np.arange(64), 0, 128)]


def as_bits(tensor):
    return tensor.cpu().view({4: torch.int32, 2: torch.int16}[tensor.element_size()])


def weights(n, dtype):
    """Ordinary, tiny, huge and negative zero."""
    rng = np.random.default_rng(n)
    weight = (rng.standard_normal(n) * 10.0 ** rng.choice([0, -2, -40, 30], n)).astype(np.float32)
    weight[::17] = -0.0
    return torch.from_numpy(weight).to(dtype)


def coefs_for(seeds):
    return np.random.default_rng(len(seeds)).uniform(-1, 1, len(seeds)).astype(np.float32)


def specified(law, weight, seeds, coefs, scale, start, run_key=KEY, pid=PID):
    """In float32, not yet rounded to weight's dtype."""
    replay = philox.accumulate if law == "gaussian" else sign_cpu.reference
    return torch.from_numpy(replay(weight.float().numpy(), run_key, pid, seeds, coefs, scale, start))


def replayed(accumulate, law, weight, seeds, coefs, scale, start, in_place, device="cpu"):
    given_weight = weight.to(device, copy=True)
    out = given_weight if in_place else torch.full_like(given_weight, torch.nan)
    accumulate(law, given_weight, out, KEY, PID, seeds, coefs, scale, start)
    if not in_place:
        assert torch.equal(as_bits(given_weight), as_bits(weight))
    return out


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), st.integers(0, 2**64 - 1))
def test_the_words_are_those_of_the_generator(counter, key):
    expected = philox.philox4x32(counter, [key & 0xFFFFFFFF, key >> 32]).tolist()
    tensors = [torch.tensor([word]) for word in counter]
    assert [word.item() for word in torch_kernels.words(*tensors, key)] == expected
    assert list(torch_kernels.words(*counter, key)) == expected
    mixed = torch_kernels.words(tensors[0], counter[1], counter[2], counter[3], key)
    assert [word.item() for word in mixed] == expected


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("tile", [100, torch_kernels.TILE])
def test_torch_equals_the_specification_to_the_bit(law, dtype, in_place, tile):
    for n, start, seeds, scale in CASES:
        weight, coefs = weights(n, dtype), coefs_for(seeds)
        with mock.patch.object(torch_kernels, "TILE", tile):
            found = replayed(torch_kernels.accumulate, law, weight, seeds, coefs, scale, start, in_place)
        expected = specified(law, weight, seeds, coefs, scale, start).to(dtype)
        assert torch.equal(as_bits(found), as_bits(expected)), (n, start)


@pytest.mark.parametrize("law", LAWS)
@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 200),
    start=st.integers(0, 100) | st.integers(2**34 - 300, 2**34 + 20) | st.integers(0, 2**62 - 300),
    pairs=st.lists(st.tuples(st.integers(0, 70) | st.integers(0, 2**32 - 1), st.floats(-1, 1, width=32)), max_size=9),
    run_key=st.integers(0, 2**64 - 1),
    pid=st.integers(0, 2**32 - 1),
)
def test_torch_equals_the_specification_at_any_address(law, n, start, pairs, run_key, pid):
    seeds, coefs = [seed for seed, _ in pairs], [coef for _, coef in pairs]
    weight = weights(n, torch.float32)
    out = torch.empty_like(weight)
    with mock.patch.object(torch_kernels, "TILE", 64):
        torch_kernels.accumulate(law, weight, out, run_key, pid, seeds, coefs, 0.9, start)
    assert torch.equal(as_bits(out), as_bits(specified(law, weight, seeds, coefs, 0.9, start, run_key, pid)))


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("coef", [0.0, -0.0, 1e-41, 1e-38, 1e30])
def test_torch_with_denormal_and_large_coefs(law, coef):
    seeds = np.random.default_rng(3).permutation(4096)[:64]
    weight, coefs = weights(2000, torch.float32), (coef * coefs_for(seeds)).astype(np.float32)
    found = replayed(torch_kernels.accumulate, law, weight, seeds, coefs, 0.999, 6, False)
    assert torch.equal(as_bits(found), as_bits(specified(law, weight, seeds, coefs, 0.999, 6)))


@pytest.mark.parametrize("tile", [1, 700, torch_kernels.TILE])
def test_the_matrix_in_torch_is_that_of_the_specification(tile):
    with mock.patch.object(torch_kernels, "TILE", tile):
        for seeds, start, count in [*NARROW, (np.array(MIXED), 2**62 - 100, 77), (np.arange(0), 0, 5), ([3], 1, 0)]:
            found = torch_kernels.matrix(KEY, PID, seeds, start, count)
            assert found.dtype == torch.float32
            np.testing.assert_array_equal(found.numpy(), sign_cpu.matrix(KEY, PID, seeds, start, count))


def test_what_does_not_fit_is_refused():
    weight = torch.zeros(16)
    refused = [
        (("lowrank", weight, weight), [1], "unknown law"),
        (("sign", weight[::2], weight[:8]), [1], "weight must be contiguous"),
        (("sign", weight, weight.view(4, 4)), [1], "out must be contiguous"),
        (("sign", weight.double(), weight.double()), [1], "weight must be contiguous"),
        (("sign", weight, weight[:8]), [1], "out is torch.float32 of 8"),
        (("sign", weight, weight.half()), [1], "out is torch.float16"),
        (("sign", weight, weight), [1, 2], "2 seeds"),
        (("sign", weight, weight), [-1], "seed"),
    ]
    for (law, source, target), seeds, text in refused:
        with pytest.raises(ValueError, match=text):
            torch_kernels.accumulate(law, source, target, 0, 0, seeds, [1.0])
    with pytest.raises(ValueError, match="start"):
        torch_kernels.accumulate("sign", weight, weight, 0, 0, [1], [1.0], start=-1)
    with pytest.raises(ValueError, match="parameter id"):
        torch_kernels.matrix(0, 2**32, [1], 0, 1)


def run_here(part, interpreted, folder):
    """What this file prints as a program, with nothing that an earlier run compiled."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TRITON_CACHE_DIR": str(folder)}
    environment["TRITON_INTERPRET"] = str(int(interpreted))
    done = subprocess.run([sys.executable, __file__, part], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
def test_the_kernels_in_the_interpreter(tmp_path):
    assert run_here("interpret", True, tmp_path) == 3 * len(CASES) + len(NARROW)


def interpret():
    """All checks on CPU tensors; their number."""
    from thinwire.perturb import triton_kernels

    count = 0
    for seeds, start, rows in NARROW:
        found = triton_kernels.matrix(KEY, PID, seeds, start, rows, "cpu").numpy()
        np.testing.assert_array_equal(found, sign_cpu.matrix(KEY, PID, seeds, start, rows))
        count += 1
    for i, (n, start, seeds, scale) in enumerate(CASES):
        # the interpreter takes its time: one law has one dtype in each case, the other has the other two
        for law, dtype in [(LAWS[i % 2], DTYPES[i % 3]), *((LAWS[1 - i % 2], DTYPES[i % 3 - j]) for j in (1, 2))]:
            weight, coefs = weights(n, dtype), coefs_for(seeds)
            found = replayed(triton_kernels.accumulate, law, weight, seeds, coefs, scale, start, i % 2 == 0)
            whole = specified(law, weight, seeds, coefs, scale, start)
            allowed = [whole.to(dtype)]
            if dtype == torch.bfloat16:
                # the interpreter cuts off what a GPU rounds
                allowed.append((whole.view(torch.int32) >> 16 << 16).view(torch.float32).to(dtype))
            assert any(torch.equal(as_bits(found), as_bits(each)) for each in allowed), (law, n, start, dtype)
            count += 1
    return count


COMPILED = ["gaussian bf16", "gaussian fp16", "gaussian fp32", "sign bf16", "sign fp32", "matrix fp32"]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """The PTX for an H100 (sm_90), which needs no GPU; "fused" as well, where sums may be fused."""
    return run_here("compile", False, tmp_path_factory.mktemp("triton"))


@needs_triton
@pytest.mark.parametrize("kernel", COMPILED)
def test_the_kernels_compile_without_a_fused_multiply_add(kernel, assembly):
    text = assembly[kernel]
    assert ".target sm_90" in text
    arithmetic = set(re.findall(r"^\s+(?:@%\w+ )?((?:add|sub|mul|fma|mad)\.\S*f(?:16|32|64)\S*)\s", text, re.M))
    # without .rn the assembler itself might fuse them
    assert arithmetic == (set() if kernel == "matrix fp32" else {"add.rn.f32", "mul.rn.f32"})
    assert ".ftz" not in text
    rounded = set(re.findall(r"cvt\.rn\.(b?f16)(?:x2)?\.f32", text))
    assert rounded == {"bf16": {"bf16"}, "fp16": {"f16"}, "fp32": set()}[kernel.split()[1]]


@needs_triton
def test_a_fused_multiply_add_would_be_seen(assembly):
    assert "fma.rn.f32" in assembly["fused"]


def compile_all():
    """The PTX of each kernel in the variant for lead = 1, and of one that may fuse."""
    import triton
    from triton.backends.compiler import GPUTarget

    from thinwire.perturb import triton_kernels

    kernels = {"gaussian": triton_kernels._gaussian, "sign": triton_kernels._sign, "matrix": triton_kernels._matrix}
    blocks = {
        "gaussian": triton_kernels.GAUSSIAN_BLOCKS,
        "sign": triton_kernels.SIGN_BLOCKS,
        "matrix": triton_kernels.MATRIX_BLOCKS,
    }
    types = {"lead": "constexpr", "blocks": "constexpr", "size": "i64", "scale": "fp32"}
    types |= dict.fromkeys(("tile", "pid", "key0", "key1", "many", "groups"), "i32")
    types |= dict.fromkeys(("seeds", "numbers", "bounds", "columns", "bits"), "*i32")
    types |= dict.fromkeys(("coefs", "tables", "table"), "*fp32")

    def compiled(name, dtype, fused):
        kernel = kernels[name]
        known = types | {"weight": f"*{dtype}", "out": f"*{dtype}"}
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={argument: known[argument] for argument in kernel.arg_names},
            constexprs={"lead": 1, "blocks": blocks[name]},
        )
        options = triton_kernels.LAUNCH | ({"enable_fp_fusion": True} if fused else {})
        return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

    return {name: compiled(*name.split(), False) for name in COMPILED} | {"fused": compiled("gaussian", "fp32", True)}


@needs_gpu
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_equals_the_specification_to_the_bit(law, dtype):
    from thinwire.perturb import triton_kernels

    many = np.random.default_rng(1).integers(0, 4096, 70)
    for n, start, seeds, scale in [*CASES, (1_000_003, 2**34 - 500_001, many, 0.9)]:
        weight, coefs = weights(n, dtype), coefs_for(seeds)
        expected = as_bits(specified(law, weight, seeds, coefs, scale, start).to(dtype))
        for accumulate in (triton_kernels.accumulate, torch_kernels.accumulate):
            for in_place in (True, False):
                found = replayed(accumulate, law, weight, seeds, coefs, scale, start, in_place, "cuda")
                assert torch.equal(as_bits(found), expected), (n, start, accumulate)


@needs_gpu
def test_the_matrix_on_a_gpu_is_that_of_the_specification():
    from thinwire.perturb import triton_kernels

    many = np.random.default_rng(1).integers(0, 4096, 70)
    for seeds, start, count in [*NARROW, (np.arange(4096), 7, 1000), (many, 2**34 - 50_001, 100_003)]:
        expected = sign_cpu.matrix(KEY, PID, seeds, start, count)
        for matrix in (triton_kernels.matrix, torch_kernels.matrix):
            np.testing.assert_array_equal(matrix(KEY, PID, seeds, start, count, "cuda").cpu().numpy(), expected)


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compile_all}[sys.argv[1]]()))  # noqa: T201


@pytest.mark.parametrize("law", ["gaussian", "sign", "lowrank"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(33,), (20, 7), (4, 5, 6), ()])
def test_directions_off_the_cpu_are_those_on_it(law, dtype, shape, monkeypatch):
    """By way of plain torch, as on a device without Triton; strided tensors too."""
    pool = directions.Directions(KEY, law, 2)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    seeds, coefs = [5, 40, 900, 5, 33, 7], [0.5, -1.0, 2.0, 0.25, 1e-3, 1.0]
    forms = [weight, weight.clone().T if weight.dim() == 2 else weight]
    expected = [pool.apply(form, "w", seeds, coefs, scale=0.9) for form in forms]
    monkeypatch.setattr(directions, "_kernels", lambda device: torch_kernels)
    for form, here in zip(forms, expected, strict=True):
        there = pool.apply(form, "w", seeds, coefs, scale=0.9)
        assert torch.equal(as_bits(here.contiguous()), as_bits(there.contiguous()))
        inside = form.clone(memory_format=torch.preserve_format)
        pool.apply(inside, "w", seeds, coefs, scale=0.9, out=inside)
        assert torch.equal(as_bits(here.contiguous()), as_bits(inside.contiguous()))


@needs_gpu
@pytest.mark.parametrize("law", ["gaussian", "sign", "lowrank"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_on_a_gpu(law, dtype):
    pool = directions.Directions(KEY, law, 2)
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    seeds, coefs = np.arange(70), np.linspace(-1, 1, 70)
    here, there = (pool.apply(form, "w", seeds, coefs, scale=0.9) for form in (weight, weight.cuda()))
    if law == "lowrank":
        torch.testing.assert_close(
            there.cpu().float(), here.float(), rtol=1e-2 if dtype != torch.float32 else 1e-5, atol=1e-4
        )
    else:
        assert torch.equal(as_bits(here), as_bits(there))
