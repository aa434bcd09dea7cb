"""The smaller model against the big one with layers bypassed, and output columns of heads and channels zeroed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from thinwire.model.anatomy import Layer, Layout, Part, Width
from thinwire.model.meta import hollow
from thinwire.model.shrink import Cut, proxy, renamed, shape_of, sliced

DEPTH, CHANNELS, VOCABULARY = 5, 24, 32
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": CHANNELS,
    "num_attention_heads": 8,
    "num_hidden_layers": DEPTH,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": [1, 2, 3, 4, 5],  # as long as the model is deep
}
GROUPED = SMALL | {"num_key_value_heads": 4, "head_dim": 4}
KINDS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_inner": CHANNELS, "n_head": 4, "n_layer": DEPTH}
MAKERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=False)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, tie_word_embeddings=True)),
    "llama, biases": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, num_key_value_heads=4, layer_types=KINDS, sliding_window=3, use_sliding_window=True)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GROUPED, layer_types=KINDS, sliding_window=3, query_pre_attn_scalar=4)
    ),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**GROUPED, no_rope_layers=[1, 0, 1, 1, 0])),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2, scaled": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL | {"num_attention_heads": 4})),
    "bert, classes": lambda: BertForSequenceClassification(BertConfig(**SMALL | {"num_attention_heads": 4})),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL | {"num_attention_heads": 4})),
}
PATHS = {"gpt2": "transformer.h", "bert": "bert.encoder.layer", "gpt-": "gpt_neox.layers"}
every = pytest.mark.parametrize("name", list(MAKERS))
narrowable = pytest.mark.parametrize("name", [name for name in MAKERS if name != "gpt-neox"])
LAYERS = (0, 1, 4)  # of a model with kinds of layers by number, both kinds are dropped and kept
WIDTHS = {1: Width((0, 2), (0, 3, 4, 10, 23)), 4: Width((1, 2, 3), tuple(range(1, 20)))}
CUTS = {
    "nothing": Cut(tuple(range(DEPTH))),
    "layers": Cut(LAYERS),
    "widths": Cut(tuple(range(DEPTH)), WIDTHS),
    "both": Cut(LAYERS, WIDTHS),
}
cuts = pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def made(name: str) -> tuple[Any, str]:
    """A random model of that architecture, with no bias 0 and no norm 1, and the path of its layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MAKERS[name]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
    model.config.use_cache = False
    return model, next((path for start, path in PATHS.items() if name.startswith(start)), "model.layers")


def shrunk(model: Any, cut: Cut, path: str, dtype: torch.dtype = torch.float32) -> Any:
    """The proxy, as a server and a client would make it between them."""
    layout = Layout.of(hollow(type(model), model.config), path)
    tensors = {}
    for name, parameter in model.named_parameters():
        small = sliced(name, parameter.detach().to(dtype), cut, layout)
        if small is not None:
            tensors[renamed(name, cut, layout)] = small
    assert None not in tensors
    return proxy(type(model), model.config, cut, tensors, path)


def wounded(model: Any, cut: Cut, path: str) -> Any:
    """The big model that computes what the proxy should: the oracle, written for each family by hand."""
    big = copy.deepcopy(model)
    for index, layer in enumerate(big.get_submodule(path)):
        if index not in cut.layers:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
            continue
        if index not in cut.widths:
            continue
        names = {"model.layers": ("self_attn.o_proj", "mlp.down_proj"), "transformer.h": ("attn.c_proj", "mlp.c_proj")}
        out, down = names.get(path, ("attention.output.dense", "output.dense"))
        width, groups = cut.widths[index], 4
        with torch.no_grad():
            for linear, kept, count in ((out, width.heads, groups), (down, width.channels, CHANNELS)):
                weight = layer.get_submodule(linear).weight
                columns = weight if path == "transformer.h" else weight.T  # a view: [inputs, outputs]
                size = len(columns) // count
                for member in set(range(count)) - set(kept):
                    columns[member * size : (member + 1) * size] = 0
    return big


def close(found: Tensor, expected: Tensor, within: float = 2e-6) -> bool:
    return bool((found - expected).abs().max() <= within * expected.abs().max().clamp(min=1))


@narrowable
@cuts
def test_the_proxy_computes_what_the_big_model_does_with_the_rest_silenced(name: str, cut: Cut) -> None:
    model, path = made(name)
    small, big = shrunk(model, cut, path), wounded(model, cut, path)
    with torch.no_grad():
        whole, expected, found = (m(input_ids=IDS).logits for m in (model, big, small))
        if cut is CUTS["nothing"]:
            assert torch.equal(found, whole)
        else:
            assert not close(expected, whole, 1e-3)  # what is cut off does matter
            assert close(found, expected)
        mask = torch.ones_like(IDS)
        mask[0, :4] = 0
        expected, found = (m(input_ids=IDS, attention_mask=mask).logits for m in (big, small))
        assert close(found, expected)


@pytest.mark.parametrize("kept", [(0, 1, 4), (2,), (1, 2, 3, 4)])
def test_any_architecture_may_lose_layers_but_not_width(kept: tuple[int, ...]) -> None:
    model, path = made("gpt-neox")
    cut = Cut(kept)
    small, big = shrunk(model, cut, path), wounded(model, cut, path)
    with torch.no_grad():
        assert torch.equal(small(input_ids=IDS).logits, big(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="GPTNeoXLayer"):
        shrunk(model, Cut(kept, {kept[0]: Width((0,), (0,))}), path)


@every
def test_training_a_kept_layer_gives_the_big_models_gradients(name: str) -> None:
    model, path = made(name)
    cut = CUTS["both"] if name != "gpt-neox" else CUTS["layers"]
    layout = Layout.of(model, path)
    small, big = shrunk(model, cut, path), wounded(model, cut, path)
    for each in (small, big):
        each(input_ids=IDS).logits.float().log_softmax(-1)[..., :2].mean().backward()
    gradients = {name: parameter.grad for name, parameter in small.named_parameters()}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values() if gradient is not None)
    met = 0
    for big_name, parameter in big.named_parameters():
        new = renamed(big_name, cut, layout)
        if new is not None:
            grad, expected = gradients.pop(new), parameter.grad
            assert (grad is None) == (expected is None)
            if expected is not None:
                kept = sliced(big_name, expected, cut, layout)
                assert kept is not None
                # some gradients are zero but for rounding, as of a bias of keys
                assert (grad - kept).abs().max() <= 1e-4 * expected.abs().max() + 1e-6 * largest, big_name
                met += f"{path}.0." in new and bool(grad.any())
    assert not gradients
    assert met >= 5


@narrowable
def test_the_proxy_is_smaller_by_what_was_cut_off(name: str) -> None:
    model, path = made(name)
    cut, layout = CUTS["both"], Layout.of(model, path)
    small = shrunk(model, cut, path)
    shapes = {
        renamed(name, cut, layout): shape_of(name, parameter.shape, cut, layout)
        for name, parameter in model.named_parameters()
    }
    assert shapes.pop(None) is None
    assert {name: tuple(parameter.shape) for name, parameter in small.named_parameters()} == shapes
    assert small.num_parameters() == sum(torch.Size(shape or ()).numel() for shape in shapes.values())
    assert small.num_parameters() < model.num_parameters()
    for layer, heads, channels in ((0, 4, CHANNELS), (1, 2, 5), (2, 3, 19)):
        width = Layout.of(small, path).layers[layer]
        assert (width.heads, width.channels) == (heads, channels)


def test_the_counts_by_hand() -> None:
    model, path = made("llama")
    cut = Cut((0, 2), {2: Width((1,), (5, 6))})
    small = shrunk(model, cut, path)
    whole = 16 * 32 * 2 + 16 * 16 * 2 + 3 * 16 * CHANNELS + 2 * 16
    narrow = 16 * 8 * 2 + 16 * 4 * 2 + 3 * 16 * 2 + 2 * 16
    assert small.num_parameters() == whole + narrow + 2 * VOCABULARY * 16 + 16
    attention, old = small.model.layers[1].self_attn, model.model.layers[2].self_attn
    assert torch.equal(attention.q_proj.weight, old.q_proj.weight[8:16])
    assert torch.equal(attention.k_proj.weight, old.k_proj.weight[4:8])
    assert torch.equal(attention.o_proj.weight, old.o_proj.weight[:, 8:16])
    assert torch.equal(small.model.layers[1].mlp.down_proj.weight, model.model.layers[2].mlp.down_proj.weight[:, 5:7])
    assert (attention.q_proj.in_features, attention.q_proj.out_features) == (16, 8)


def test_the_counts_by_hand_where_query_key_and_value_are_one() -> None:
    model, path = made("gpt2")
    small = shrunk(model, Cut((3,), {3: Width((0, 2), (7,))}), path)
    attention, old = small.transformer.h[0].attn, model.transformer.h[3].attn
    columns = [*range(4), *range(8, 12), *range(16, 20), *range(24, 28), *range(32, 36), *range(40, 44)]
    assert torch.equal(attention.c_attn.weight, old.c_attn.weight[:, columns])
    assert torch.equal(attention.c_attn.bias, old.c_attn.bias[columns])
    assert torch.equal(attention.c_proj.bias, old.c_proj.bias)
    assert (attention.num_heads, attention.split_size, attention.head_dim) == (2, 8, 4)
    assert (attention.c_attn.nx, attention.c_attn.nf) == (16, 24)


@every
def test_config_and_numbers_of_layers_agree(name: str) -> None:
    model, path = made(name)
    before = model.config.to_dict()
    small = shrunk(model, CUTS["layers"], path)
    config, stack = small.config, small.get_submodule(path)
    assert config is not model.config
    assert model.config.to_dict() == before
    assert config.num_hidden_layers == len(stack) == len(LAYERS)
    numbers = {
        index: {m.layer_idx for m in layer.modules() if hasattr(m, "layer_idx")} for index, layer in enumerate(stack)
    }
    assert all(found <= {index} for index, found in numbers.items())
    if name in ("qwen2", "gemma3"):
        assert config.layer_types == [KINDS[i] for i in LAYERS]
    if name == "smollm3":
        assert config.no_rope_layers == [1, 0, 0]
    assert config.eos_token_id == model.config.eos_token_id
    assert config.use_cache is False
    assert not any(module.training for module in small.modules())
    drops = [[m.p for m in each.modules() if isinstance(m, nn.Dropout)] for each in (small, model)]
    assert set(drops[0]) == set(drops[1])


@every
def test_the_parameters_are_the_given_tensors_and_the_generator_is_left_alone(name: str) -> None:
    model, path = made(name)
    cut = CUTS["both"] if name != "gpt-neox" else CUTS["layers"]
    layout = Layout.of(model, path)
    generator = torch.random.get_rng_state()
    small = shrunk(model, cut, path)
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert not any(tensor.is_meta for tensor in [*small.parameters(), *small.buffers()])
    assert all(parameter.requires_grad for parameter in small.parameters())
    mine = {name: parameter.data_ptr() for name, parameter in small.named_parameters()}
    shared = 0
    for big_name, parameter in model.named_parameters():
        place = layout.place(big_name)
        new = renamed(big_name, cut, layout)
        if new is not None and (place is None or place[0] == 0):
            assert mine[new] == parameter.data_ptr()
            shared += 1
    assert shared > 5
    with torch.no_grad():
        assert close(small(input_ids=IDS).logits, wounded(model, cut, path)(input_ids=IDS).logits)
    buffers = dict(model.named_buffers())
    for buffer_name, buffer in small.named_buffers():
        assert torch.equal(buffer, buffers[buffer_name])


def test_tied_weights_are_one_parameter_given_under_either_name() -> None:
    model, path = made("llama, tied")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert "lm_head.weight" not in tensors
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors.pop("model.embed_tokens.weight", model.lm_head.weight.detach())
        if name == "lm_head.weight":
            tensors.pop("model.embed_tokens.weight", None)
        small: Any = proxy(type(model), model.config, CUTS["nothing"], tensors, path)
        assert small.lm_head.weight is small.model.embed_tokens.weight
        assert small.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()
    with pytest.raises(ValueError, match="2 times"):
        proxy(
            type(model),
            model.config,
            CUTS["nothing"],
            tensors | {"model.embed_tokens.weight": tensors["lm_head.weight"]},
            path,
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_is_the_tensors(dtype: torch.dtype) -> None:
    model, path = made("gemma3")
    small = shrunk(model, CUTS["both"], path, dtype)
    assert {parameter.dtype for parameter in small.parameters()} == {dtype}
    with torch.no_grad():
        expected = wounded(model.to(dtype), CUTS["both"], path)(input_ids=IDS).logits
        found = small(input_ids=IDS).logits
    assert found.dtype == dtype
    assert close(found.float(), expected.float(), 0.03)


class Largest(TorchDispatchMode):
    """Notes the largest tensor with memory of its own that is made inside."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.numbers = known, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta and leaf.untyped_storage().data_ptr() not in self.known:
                self.numbers = max(self.numbers, leaf.numel())
        return out


def test_no_memory_is_taken_for_the_big_model() -> None:
    config = LlamaConfig(vocab_size=50_000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    with Largest(set()) as seen:
        big = hollow(LlamaForCausalLM, config)
    assert big.num_parameters() > 400_000_000
    assert all(parameter.is_meta for parameter in big.parameters())
    assert seen.numbers < 10_000
    model, path = made("llama, tied")
    with Largest(set()) as seen:  # the control: building one does take it
        LlamaForCausalLM(model.config)
    assert seen.numbers >= VOCABULARY * 16
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with Largest({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) as seen:
        proxy(type(model), model.config, CUTS["nothing"], tensors, path)
    assert seen.numbers <= 32


def broken(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    name = "model.layers.0.mlp.up_proj.weight"
    if how == "missing":
        del tensors[name]
    elif how == "unknown":
        tensors["model.layers.5.mlp.up_proj.weight"] = tensors[name]
    elif how == "shape":
        tensors[name] = tensors[name].T
    elif how == "whole numbers":
        tensors[name] = tensors[name].int()
    elif how == "hollow":
        tensors[name] = tensors[name].to("meta")
    return tensors


@pytest.mark.parametrize("how", ["missing", "unknown", "shape", "whole numbers", "hollow"])
def test_tensors_that_do_not_fill_the_proxy_are_refused(how: str) -> None:
    model, path = made("llama")
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    proxy(type(model), model.config, CUTS["nothing"], broken(dict(tensors), ""), path)
    with pytest.raises(ValueError, match="up_proj"):
        proxy(type(model), model.config, CUTS["nothing"], broken(tensors, how), path)


def test_paths_and_cuts_of_another_model_are_refused() -> None:
    model, path = made("llama")
    for cut in (Cut((0, DEPTH)), Cut((0,), {0: Width((4,), (0,))}), Cut((0,), {0: Width((0,), (CHANNELS,))})):
        with pytest.raises(ValueError, match="is kept"):
            proxy(type(model), model.config, cut, {}, path)
    with pytest.raises(ValueError, match="no list of layers at 'model'"):
        proxy(type(model), model.config, Cut((0,)), {}, "model")
    with pytest.raises(ValueError, match=r"q_proj\.weight has the shape"):
        sliced("model.layers.1.self_attn.q_proj.weight", torch.ones(31, 16), CUTS["widths"], Layout.of(model, path))


def test_layers_that_only_look_like_one_of_the_families_are_not_narrowed() -> None:
    whole = tiny_model()
    assert Layout.of(whole, "model.layers").layers[0].parts
    whole.model.layers[0].mlp.inner_norm = nn.LayerNorm(64)  # over all channels
    whole.model.layers[1].self_attn.extra = nn.Linear(32, 32)
    assert [layer.parts for layer in Layout.of(whole, "model.layers").layers] == [{}, {}]
    norms_all_heads: Any = Olmo2ForCausalLM(Olmo2Config(**SMALL))
    assert not Layout.of(norms_all_heads, "model.layers").layers[0].parts
    for one_key in (False, True):
        head_by_head: Any = GPTBigCodeForCausalLM(GPTBigCodeConfig(**GPT2, multi_query=one_key))
        assert not Layout.of(head_by_head, "transformer.h").layers[0].parts


@pytest.mark.parametrize(
    ("layers", "widths"),
    [
        ((), {}),
        ((1, 0), {}),
        ((0, 0), {}),
        ((-1, 0), {}),
        ((0, 1), {2: Width((0,), (0,))}),
    ],
)
def test_a_cut_that_cannot_be(layers: tuple[int, ...], widths: dict[int, Width]) -> None:
    with pytest.raises(ValueError, match="kept"):
        Cut(layers, widths)


@pytest.mark.parametrize(("heads", "channels"), [((), (0,)), ((0,), ()), ((1, 0), (0,)), ((0,), (2, 2)), ((-1,), (0,))])
def test_a_width_that_cannot_be(heads: tuple[int, ...], channels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="kept"):
        Width(heads, channels)


LAYOUT = Layout("layers", (Layer("L", 4, 8, {"q.weight": Part("heads", 0)}),) * 3 + (Layer("M"),))


@cuts
def test_a_cut_comes_back_from_its_tensors(cut: Cut) -> None:
    model, path = made("llama")
    tensors = cut.packed()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.int32}
    assert Cut.unpacked(tensors, Layout.of(model, path)) == cut


GOOD = {"layers": [0, 2, 3], "heads.2": [0, 3], "channels.2": [7]}


@pytest.mark.parametrize(
    "change",
    [
        {"layers": None},
        {"heads.2": None},
        {"channels.2": None},
        {"layers": []},
        {"heads.2": []},
        {"layers": [2, 0, 3]},
        {"layers": [0, 2, 2]},
        {"layers": [0, 2, 4]},
        {"layers": [-1, 2, 3]},
        {"layers": [0, 3]},  # layer 2 has a width
        {"heads.2": [0, 4]},
        {"heads.2": [3, 0]},
        {"heads.2": [-1, 0]},
        {"channels.2": [8]},
        {"channels.2": [7, 7]},
        {"heads.3": [0], "channels.3": [0]},  # which cannot be narrowed
        {"heads.1": [0], "channels.1": [0]},  # which is dropped
        {"heads.9": [0], "channels.9": [0]},
        {"heads.02": [0], "channels.02": [0]},
        {"heads.-2": [0], "channels.-2": [0]},
        {"heads.": [0], "channels.": [0]},
        {"heads.²": [0], "channels.²": [0]},
        {"heads.2\n": [0], "channels.2\n": [0]},
        {"heads." + "9" * 5000: [0]},
        {"more": [0]},
        {"layers.0": [0]},
        {"layers": torch.tensor([[0, 2, 3]], dtype=torch.int32)},
        {"layers": torch.tensor([0, 2, 3])},
        {"layers": torch.tensor([0.0, 2.0, 3.0])},
        {"heads.2": torch.tensor(0, dtype=torch.int32)},
    ],
)
def test_tensors_that_are_no_cut_are_refused(change: dict[str, Any]) -> None:
    fields = {name: value for name, value in (GOOD | change).items() if value is not None}
    tensors = {n: v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.int32) for n, v in fields.items()}
    good = {n: torch.tensor(v, dtype=torch.int32) for n, v in GOOD.items()}
    assert Cut.unpacked(good, LAYOUT) == Cut((0, 2, 3), {2: Width((0, 3), (7,))})
    with pytest.raises(ValueError, match=r"."):
        Cut.unpacked(tensors, LAYOUT)


NUMBERS = st.lists(st.integers(-2, 9), max_size=5)
NAMES = (
    st.sampled_from(["layers", "heads.0", "channels.0", "heads.2", "channels.2", "heads.3", "channels.3"]) | st.text()
)
DTYPES = st.sampled_from([torch.int32, torch.int32, torch.int32, torch.int64, torch.float32, torch.bool])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(NAMES, st.builds(lambda n, d: torch.tensor(n).to(d), NUMBERS, DTYPES)))
def test_whatever_comes_is_a_legal_cut_or_a_value_error(tensors: dict[str, Tensor]) -> None:
    try:
        cut = Cut.unpacked(tensors, LAYOUT)
    except ValueError:
        return
    again = cut.packed()
    assert set(again) == set(tensors)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
