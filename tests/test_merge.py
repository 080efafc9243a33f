"""theta_neon = (1 + w) theta_base - w theta_self_trained: exact algebra, dtype rules, state dicts, live networks."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neon.errors import RequestError, WorkError
from neon.merge import LiveMerge, MergeWarning, merge_state, merge_tensor
from neon.merge.entries import buffers_by_name
from tests.tiny import pair, toy_state

INF = float("inf")
LOW_PRECISION = [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
FLOATS = [torch.float64, torch.float32, *LOW_PRECISION]


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def exactly(base: torch.Tensor, self_trained: torch.Tensor, w: float) -> torch.Tensor:
    return base.double() + w * (base.double() - self_trained.double())


# --- tensors


@pytest.mark.parametrize("dtype", FLOATS)
def test_w_0_gives_the_base_and_w_minus_1_the_self_trained_bit_for_bit(dtype: torch.dtype) -> None:
    base, self_trained = pair(dtype)
    base[:3] = torch.tensor([0.0, -0.0, -0.0])
    self_trained[:3] = torch.tensor([-0.0, 0.0, -0.0])
    assert bits(merge_tensor(base, self_trained, 0)) == bits(base)
    assert bits(merge_tensor(base, self_trained, -1)) == bits(self_trained)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("w", [-2.5, -0.7, -0.3, 0.2, 1.0, 1.5])
def test_the_result_is_the_exact_merge_rounded_once(dtype: torch.dtype, w: float) -> None:
    base, self_trained = pair(dtype)
    merged = merge_tensor(base, self_trained, w)
    assert merged.dtype == dtype
    exact = exactly(base, self_trained, w)
    if dtype == torch.float64:
        torch.testing.assert_close(merged, exact, rtol=0, atol=1e-14)
    elif dtype == torch.float32:
        torch.testing.assert_close(merged.double(), exact, rtol=0, atol=1e-6)
    else:  # float32 inside: the same as rounding the exact result, but for ties
        differs = merged.float() != exact.to(dtype).float()
        assert differs.float().mean() <= 0.02


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=20),
    st.floats(-4, 4, width=32),
    st.floats(-4, 4, width=32),
)
def test_the_merge_is_linear_in_w(values: list[tuple[float, float]], w1: float, w2: float) -> None:
    base, self_trained = (torch.tensor(column) for column in zip(*values, strict=True))
    middle = merge_tensor(base, self_trained, (w1 + w2) / 2)
    ends = (merge_tensor(base, self_trained, w1) + merge_tensor(base, self_trained, w2)) / 2
    torch.testing.assert_close(middle, ends, rtol=1e-5, atol=5e-3)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20), st.floats(-10, 10))
def test_elements_equal_in_both_are_the_bases_at_any_w(values: list[float], w: float) -> None:
    base = torch.tensor(values)
    assert torch.equal(merge_tensor(base, base.clone(), w), base)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_integers_and_booleans_are_copied_from_the_base(dtype: torch.dtype) -> None:
    base, self_trained = torch.tensor([0, 1, 1]).to(dtype), torch.tensor([1, 0, 1]).to(dtype)
    for w in (-1, 1.5):
        assert torch.equal(merge_tensor(base, self_trained, w), base)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("w", [-1, -0.5, 0, 1.5])
def test_elements_not_finite_in_either_tensor_are_copied_from_the_base(dtype: torch.dtype, w: float) -> None:
    base = torch.tensor([1.0, -INF, INF, 2.0, -INF, float("nan"), 3.0], dtype=dtype)
    self_trained = torch.tensor([2.0, -INF, INF, float("nan"), 1.0, 1.0, INF], dtype=dtype)
    merged = merge_tensor(base, self_trained, w)
    assert merged[0] == 1 + w * (1 - 2)
    assert torch.equal(merged[1:].nan_to_num(nan=99.0), base[1:].nan_to_num(nan=99.0))


def test_a_causal_mask_among_large_weights_stays_a_mask() -> None:
    mask = torch.full((600, 600), -INF).triu(1)
    assert torch.equal(merge_tensor(mask, mask.clone(), 1.5), mask)


def test_an_overflow_of_the_stored_dtype_is_an_error_that_names_tensor_and_w() -> None:
    base, self_trained = torch.tensor([6e4, 1.0]).half(), torch.tensor([5e4, 1.0]).half()
    with pytest.raises(WorkError, match=r"layer\.7: 1 elements overflow torch\.float16 at w = 1\.5"):
        merge_tensor(base, self_trained, 1.5, name="layer.7")
    assert merge_tensor(base, self_trained, 0.1).isfinite().all()


def test_the_result_has_the_dtype_of_the_base_and_the_precision_of_the_better_one() -> None:
    base, self_trained = pair(torch.float32)
    assert merge_tensor(base.half(), self_trained, 1.5).dtype == torch.float16
    assert merge_tensor(base, self_trained.half(), 1.5).dtype == torch.float32
    merged = merge_tensor(base.half(), self_trained.double(), 1.5)
    assert torch.equal(merged, exactly(base.half(), self_trained, 1.5).half())


def test_complex_tensors_are_merged() -> None:
    base, self_trained = torch.tensor([1 + 2j, 3.0]), torch.tensor([2 + 1j, 3.0])
    assert merge_tensor(base, self_trained, 1.0).tolist() == [0 + 3j, 3 + 0j]


def test_dtypes_without_a_meaningful_merge_are_refused() -> None:
    scales = torch.ones(2).to(torch.float8_e8m0fnu)
    for base, self_trained in ((scales, scales), (torch.ones(2), torch.ones(2, dtype=torch.int64))):
        with pytest.raises(RequestError, match="cannot extrapolate"):
            merge_tensor(base, self_trained, 1.0)


def test_strided_scalar_and_empty_tensors_are_merged() -> None:
    base, self_trained = pair(torch.float32, (6, 8))
    expected = merge_tensor(base, self_trained, 1.5)
    assert torch.equal(merge_tensor(base.t(), self_trained.t(), 1.5), expected.t())
    out = torch.empty(8, 6).t()
    assert merge_tensor(base, self_trained, 1.5, out=out) is out
    assert torch.equal(out, expected)
    assert merge_tensor(torch.tensor(1.0), torch.tensor(2.0), 1.0) == 0
    assert merge_tensor(torch.zeros(0, 3), torch.zeros(0, 3), 1.0).shape == (0, 3)


@pytest.mark.parametrize("w", [-1, 0, 1.5])
def test_out_may_be_one_of_the_operands(w: float) -> None:
    base, self_trained = pair(torch.float32)
    base[0], self_trained[1] = -INF, INF
    expected = merge_tensor(base, self_trained, w)
    for operand in (0, 1):
        operands = [base.clone(), self_trained.clone()]
        merge_tensor(*operands, w, out=operands[operand])
        assert torch.equal(operands[operand], expected)


@pytest.mark.parametrize("w", [float("nan"), INF, -INF, 1e40])
def test_a_weight_that_is_not_finite_is_refused(w: float) -> None:
    with pytest.raises(RequestError, match="finite"):
        merge_tensor(torch.ones(1), torch.ones(1), w)


# --- state dicts


def test_a_state_dict_is_merged_tensor_by_tensor() -> None:
    base, self_trained = toy_state(), toy_state(1.0)
    merged = merge_state(base, self_trained, 1.5, fixed={"net.bias"})
    assert list(merged) == list(base)
    assert torch.equal(merged["net.weight"], merge_tensor(base["net.weight"], self_trained["net.weight"], 1.5))
    for copied in ("net.bias", "mask", "steps"):
        assert torch.equal(merged[copied], base[copied])
        assert merged[copied].data_ptr() != base[copied].data_ptr()


def test_names_and_shapes_that_disagree_are_listed_for_both_sides() -> None:
    base, self_trained = toy_state(), toy_state(1.0)
    base["head.a"] = torch.zeros(1)
    self_trained["tail.b"] = torch.zeros(1)
    self_trained["net.bias"] = torch.zeros(31)
    with pytest.raises(RequestError) as caught:
        merge_state(base, self_trained, 1.0)
    for part in ("only in base: head.a", "only in self-trained: tail.b", "net.bias [30] / [31]"):
        assert part in str(caught.value)


def test_a_long_list_of_differences_is_a_few_names_and_a_count() -> None:
    base = {f"layer.{i}": torch.zeros(1) for i in range(100)}
    with pytest.raises(RequestError, match=r"layer\.4 \(\+95 more\)"):
        merge_state(base, {"layer.0": torch.zeros(1)}, 1.0)


@pytest.mark.filterwarnings("ignore:base and self-trained differ in dtype", "ignore:the self-trained weights lie")
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_an_update_lost_in_rounding_is_reported_with_figures(dtype: torch.dtype) -> None:
    base = {"x": torch.linspace(1.0, 2.0, 1000).to(dtype)}
    self_trained = {"x": base["x"].float() * (1 + 1e-6)}
    with pytest.warns(MergeWarning, match=r"100\.0% of the elements that should move do not"):
        merge_state(base, self_trained, 1.0)


@pytest.mark.filterwarnings("ignore:base and self-trained differ in dtype", "ignore:the self-trained weights lie")
def test_a_float32_update_below_resolution_is_reported() -> None:
    base = {"x": torch.linspace(1.0, 2.0, 1000)}
    self_trained = {"x": base["x"].double() * (1 + 1e-9)}
    with pytest.warns(MergeWarning, match="rounding spoils the update"):
        merge_state(base, self_trained, 1.0)


def test_an_update_that_survives_rounding_raises_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_state(toy_state(), toy_state(1.0), 1.5)
        merge_state(toy_state(dtype=torch.bfloat16), toy_state(1.0), 1.5)


@pytest.mark.filterwarnings("ignore:base and self-trained differ in dtype", "ignore:the self-trained weights lie")
def test_the_survival_figures_of_large_tensors_are_estimated_from_a_sample() -> None:
    base = torch.ones(1000, 1024)
    self_trained = base.clone()
    self_trained[:, ::2] += 1e-2  # half of the elements are to move, and those of half the rows cannot
    moving = {"x": base.bfloat16()}
    self_trained[500:, ::2] = 1 + 1e-5
    with pytest.warns(MergeWarning, match=r"(49|50|51)\.\d% of the elements that should move"):
        merge_state(moving, {"x": self_trained}, 1.0)


def test_equal_weights_raise_a_warning() -> None:
    odd = torch.tensor([float("nan"), 1.0, -INF])
    with pytest.warns(MergeWarning, match="nothing to extrapolate"):
        merge_state({"x": odd}, {"x": odd.clone()}, 1.5)
    with pytest.warns(MergeWarning, match="nothing to extrapolate"):
        merged = merge_state(toy_state(), toy_state(), 1.5)
    assert torch.equal(merged["net.weight"], toy_state()["net.weight"])


def test_weights_of_two_dtypes_whose_difference_is_mostly_rounding_raise_a_warning() -> None:
    base, self_trained = pair(torch.float32, (1000,), step=1e-4)
    with pytest.warns(MergeWarning, match=r"differ in dtype, and rounding to the smaller one is \d+\.\d% of"):
        merge_state({"x": base}, {"x": self_trained.bfloat16()}, 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_state({"x": base}, {"x": self_trained.double()}, 1.0)


# --- which entries are weights


@pytest.mark.parametrize(
    ("names", "buffers"),
    [
        (
            "bn.weight bn.bias bn.running_mean bn.running_var bn.num_batches_tracked",
            "running_mean running_var num_batc",
        ),
        ("c.weight_orig c.weight_u c.weight_v", "c.weight_u c.weight_v"),
        ("c.weight_g c.weight_v", ""),
        ("c.weight_g c.weight_v c.bias_u", ""),
        ("c.parametrizations.weight.original c.parametrizations.weight.0._u c.parametrizations.weight.0._v", "_u _v"),
        ("c.parametrizations.weight.original0 c.parametrizations.weight.original1", ""),
        ("c.weight_orig c.weight_mask", "c.weight_mask"),
        ("c.weight c.u0 c.sv0", "c.u0 c.sv0"),
        ("gru.u0 gru.w0", ""),
        ("decay num_updates betas.weight", "decay num_updates"),
        ("att.decay", ""),
        ("alphas_cumprod betas", "alphas_cumprod betas"),
        ("mixture.betas mixture.sigmas", ""),
        ("vq.embed vq.embed_avg vq.cluster_size", "vq.embed vq.embed_avg vq.cluster_size"),
        ("embed", ""),
        ("rope.inv_freq", "rope.inv_freq"),
    ],
)
def test_buffers_are_told_from_parameters_by_their_names_and_neighbours(names: str, buffers: str) -> None:
    found = buffers_by_name(names.split())
    assert found == {name for name in names.split() if any(part in name for part in buffers.split())}


@pytest.mark.parametrize("w", [-1, 1.5])
def test_buffers_of_a_state_dict_are_copied_from_the_base(w: float) -> None:
    base = {
        "bn.weight": torch.ones(3),
        "bn.running_var": torch.full((3,), 0.1),
        "bn.num_batches_tracked": torch.ones(3),
    }
    merged = merge_state(base, {name: 3 * tensor for name, tensor in base.items()}, w)
    assert torch.equal(merged["bn.weight"], torch.ones(3) * (1 - 2 * w))
    assert all(torch.equal(merged[name], base[name]) for name in ("bn.running_var", "bn.num_batches_tracked"))


def codes(dtype: torch.dtype = torch.uint8, step: int = 0, size: tuple[int, ...] = (6,)) -> torch.Tensor:
    return (torch.arange(torch.Size(size).numel()).view(size) + step).to(dtype)


@pytest.mark.parametrize(
    ("base", "change"),
    [
        pytest.param({"fc.weight": codes(), "fc.weight.absmax": torch.ones(2)}, "fc.weight", id="bitsandbytes-4"),
        pytest.param({"fc.weight": codes(), "fc.weight.absmax": torch.ones(2)}, "fc.weight.absmax", id="their-scales"),
        pytest.param({"fc.weight": codes(), "fc.weight.quant_map": torch.ones(2)}, "fc.weight.quant_map", id="table"),
        pytest.param({"fc.weight": codes(torch.int8), "fc.SCB": torch.ones(2)}, "fc.SCB", id="bitsandbytes-8"),
        pytest.param({"fc.qweight": codes(torch.int32), "fc.scales": torch.ones(2).half()}, "fc.scales", id="gptq"),
        pytest.param({"fc.qweight": codes(torch.int32), "fc.qzeros": codes(torch.int32)}, "fc.qzeros", id="gptq-zeros"),
        pytest.param({"fc.g_idx": codes(torch.int64), "n": torch.ones(2)}, "fc.g_idx", id="order"),
        pytest.param({"w": codes(torch.float8_e4m3fn), "fc.weight": codes(torch.float8_e4m3fn),
                      "fc.weight_scale": torch.tensor(2.0)}, "fc.weight_scale", id="float8"),
    ],
)  # fmt: skip
def test_quantised_weights_that_differ_are_refused(base: dict[str, torch.Tensor], change: str) -> None:
    self_trained = {**base, change: base[change] + 1}
    with pytest.raises(RequestError, match=rf"quantised weights: .*{change} .*dequantise both"):
        merge_state(base, self_trained, 1.0)
    network = torch.nn.Module()
    for name, tensor in base.items():  # as GPTQ has them: buffers, scales too
        network.register_buffer(name.replace(".", "_"), tensor)
    with pytest.raises(RequestError, match="quantised weights"):
        LiveMerge(network, *({name.replace(".", "_"): t for name, t in s.items()} for s in (base, self_trained)))


def test_quantised_weights_that_are_the_same_in_both_are_copied() -> None:
    base = {"fc.weight": codes(), "fc.weight.absmax": torch.ones(2), "norm.weight": torch.ones(2)}
    merged = merge_state(base, {**base, "norm.weight": torch.zeros(2)}, 1.0)
    assert torch.equal(merged["fc.weight"], base["fc.weight"]) and merged["norm.weight"].tolist() == [2.0, 2.0]


def test_scales_that_belong_to_no_codes_are_weights() -> None:
    base = {
        "attn.logit_scale": torch.ones(1),
        "attn.relative_position_index": codes(torch.int64),
        "scale": torch.ones(1),
    }
    trained = {**base, "attn.logit_scale": torch.zeros(1), "scale": torch.zeros(1)}
    assert merge_state(base, trained, 1.0)["attn.logit_scale"] == 2


@pytest.mark.parametrize("name", ["step", "bn.num_batches_tracked", "vq.code_usage", "lr_scheduler.last_epoch"])
def test_counters_may_differ(name: str) -> None:
    base = {"x": torch.ones(2), name: torch.tensor([5, 6])}
    merged = merge_state(base, {"x": torch.zeros(2), name: torch.tensor([7, 9])}, 1.0)
    assert merged[name].tolist() == [5, 6]


def test_masks_that_differ_are_copied_and_said() -> None:
    base, self_trained = torch.tensor([True, False]), torch.tensor([True, True])
    with pytest.warns(MergeWarning, match="copied from the base though base and self-trained differ in them: mask"):
        merged = merge_state({"x": torch.ones(1), "mask": base}, {"x": torch.zeros(1), "mask": self_trained}, 1.0)
    assert torch.equal(merged["mask"], base)


@pytest.mark.parametrize(
    "dtypes", [(torch.int64, torch.float16), (torch.float16, torch.int64), (torch.int32, torch.int64)]
)
def test_positions_that_are_floats_in_one_of_both_are_copied(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    base, self_trained = (torch.arange(3000).to(dtype) for dtype in dtypes)
    merged = merge_state({"x": torch.ones(1), "ids": base}, {"x": torch.zeros(1), "ids": self_trained}, 1.0)
    assert merged["ids"].dtype == dtypes[0] and torch.equal(merged["ids"], base)
    with pytest.raises(RequestError, match=r"ids \(torch\.\w+ and torch\.\w+\)"):
        merge_state({"ids": base}, {"ids": self_trained + 1}, 1.0)


def test_scales_of_a_dtype_without_a_merge_are_copied_where_they_are_equal() -> None:
    scales = torch.ones(2).to(torch.float8_e8m0fnu)
    base, trained = {"x": torch.ones(1), "s": scales}, {"x": torch.zeros(1), "s": scales.clone()}
    assert merge_state(base, trained, 1.0)["s"].dtype == scales.dtype
    with pytest.raises(RequestError, match="s: cannot extrapolate"):
        merge_state(base, {**trained, "s": torch.full((2,), 2.0).to(torch.float8_e8m0fnu)}, 1.0)


# --- live networks


def toy_network() -> torch.nn.Module:
    network = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7), torch.nn.Linear(7, 2))
    network.register_buffer("mask", torch.tensor([0.0, -INF]))
    return network


def test_a_live_network_takes_any_w_in_any_order_in_place() -> None:
    torch.manual_seed(0)
    network, base, self_trained = toy_network(), toy_network().state_dict(), toy_network().state_dict()
    self_trained["1.running_mean"] += 1
    places = [parameter.data_ptr() for parameter in network.parameters()]
    live = LiveMerge(network, base, self_trained)
    for w in (1.5, 0.0, -1.0, 0.5, 1.5):
        live.set(w)
        for name, tensor in network.state_dict().items():
            is_buffer = "running" in name or name in ("mask", "1.num_batches_tracked")
            expected = base[name] if is_buffer else merge_tensor(base[name], self_trained[name], w)
            assert torch.equal(tensor, expected), name
    assert places == [parameter.data_ptr() for parameter in network.parameters()]
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_the_networks_own_state_dict_may_be_the_base() -> None:
    network, self_trained = toy_network(), toy_network().state_dict()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    live = LiveMerge(network, network.state_dict(), self_trained)
    live.set(1.5)
    live.set(0.0)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_network_of_another_dtype_gets_the_merge_rounded_to_its_own() -> None:
    network = torch.nn.Linear(30, 40, bias=False).bfloat16()
    base, self_trained = pair(torch.float32, (40, 30))
    LiveMerge(network, {"weight": base}, {"weight": self_trained}).set(1.5)
    assert torch.equal(network.weight, merge_tensor(base, self_trained, 1.5).bfloat16())


def test_a_live_network_with_masked_weights_keeps_the_mask_and_refuses_an_overflow() -> None:
    network = torch.nn.Linear(2, 1, bias=False)
    live = LiveMerge(network, {"weight": torch.tensor([[-INF, 1.0]])}, {"weight": torch.tensor([[-INF, 2.0]])})
    live.set(1.5)
    assert network.weight.tolist() == [[-INF, -0.5]]
    live = LiveMerge(network, {"weight": torch.tensor([[3e38, 1.0]])}, {"weight": torch.tensor([[1e38, 2.0]])})
    live.set(0.1)
    assert network.weight[0, 0].item() == pytest.approx(3.2e38)
    with pytest.raises(WorkError, match="weight: 1 elements overflow"):
        live.set(1.5)


def test_states_of_another_network_are_refused() -> None:
    state = toy_network().state_dict()
    with pytest.raises(RequestError, match=r"states and network do not fit.*only in network: weight"):
        LiveMerge(torch.nn.Linear(2, 2), state, state)
