"""The algebra of task vectors: laws, bits and goldens."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from helpers.nets import Net, perturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightops import Checkpoint, TaskVector, average, interpolate, open_checkpoint
from weightops.errors import (
    CheckpointError,
    MismatchError,
    NonfiniteError,
    OptionError,
    SpaceError,
    UnknownNameError,
)

State = dict[str, torch.Tensor]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (8, 1), (3, 5), (2, 3, 4), (70_000,)]


@st.composite
def families(draw: st.DrawFn, members: int = 3) -> tuple[torch.dtype, list[State]]:
    """State dicts of one architecture: random names, shapes and values of one dtype, and an integer tensor."""
    dtype = draw(st.sampled_from(DTYPES))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base = {
        f"layer.{i}": torch.randn(shape, generator=generator, dtype=torch.float64)
        for i, shape in enumerate(shapes)
    }
    states = []
    for i in range(members):
        state = {
            n: (t + 0.05 * i * torch.randn(t.shape, generator=generator, dtype=torch.float64)).to(
                dtype
            )
            for n, t in base.items()
        }
        states.append({**state, "position_ids": torch.arange(3) + i})
    return dtype, states


def bits_equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        x.dtype == y.dtype and torch.equal(x, y)
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def close(actual: torch.Tensor, exact: torch.Tensor, ulps: float = 1.0) -> bool:
    """Within so many units in the last place of the result's dtype, at the size of what was added up."""
    eps = torch.finfo(actual.dtype).eps
    return bool(((actual.double() - exact).abs() <= ulps * eps * exact.abs().clamp(min=1.0)).all())


@settings(max_examples=60, deadline=None)
@given(families(2))
def test_alpha_0_and_1_to_the_bit(family: tuple[torch.dtype, list[State]]) -> None:
    _, (pre, ft) = family
    tau = TaskVector(pre, ft)
    assert bits_equal(tau.apply(pre, 0), pre)
    assert bits_equal(tau.apply(pre, 1), {**ft, "position_ids": pre["position_ids"]})
    assert bits_equal(interpolate(pre, ft, 0.0), pre)


@settings(max_examples=60, deadline=None)
@given(families(3), st.floats(-2, 2), st.floats(-2, 2))
def test_linear_forms_against_float64(
    family: tuple[torch.dtype, list[State]], a: float, b: float
) -> None:
    dtype, (pre, x, y) = family
    originals = copy.deepcopy([pre, x, y])
    result = (a * TaskVector(pre, x) - TaskVector(pre, y) * b).apply(pre)
    for name in (n for n in pre if n != "position_ids"):
        p, u, v = (s[name].double() for s in (pre, x, y))
        assert result[name].dtype == dtype
        assert close(
            result[name],
            p + a * (u - p) - b * (v - p),
            6.0 if dtype in (torch.float32, torch.float64) else 0.51,
        )
    assert all(
        bits_equal(before, after) for before, after in zip(originals, [pre, x, y], strict=True)
    )


@settings(max_examples=30, deadline=None)
@given(families(3), st.floats(-2, 2))
def test_group_laws(family: tuple[torch.dtype, list[State]], a: float) -> None:
    _, (pre, x, y) = family
    s, t = TaskVector(pre, x), TaskVector(pre, y)

    def same(left: TaskVector, right: TaskVector) -> bool:
        return all(close(left[name], right[name].double(), 4.0) for name in left)

    assert same(s + t, t + s)
    assert same((s + t) + s, s + (t + s))
    assert same(a * (s + t), a * s + a * t)
    assert same(sum([s, t]), s + t)
    assert same(s - t, -(t - s))
    assert same(s / 2, 0.5 * s)
    assert (s - s).norm() == 0
    assert bits_equal((s - s).apply(pre), pre)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tensors_stay_to_the_bit(dtype: torch.dtype) -> None:
    pre = {"same": torch.randn(1000).to(dtype), "other": torch.randn(1000).to(dtype)}
    models = [
        {"same": pre["same"].clone(), "other": (pre["other"].float() + i).to(dtype)}
        for i in range(3)
    ]
    assert torch.equal(
        sum(TaskVector(pre, m) for m in models).apply(pre, 0.37)["same"], pre["same"]
    )
    assert torch.equal(average(models, [0.2, 0.5, 0.31])["same"], pre["same"])


def test_half_precision_is_rounded_once() -> None:
    pre = {"w": torch.full((1000,), 0.02, dtype=torch.bfloat16)}
    ft = {"w": (pre["w"].float() + torch.linspace(-3e-4, 3e-4, 1000)).bfloat16()}
    exact = pre["w"].double() + 0.3 * (ft["w"].double() - pre["w"].double())
    assert torch.equal(TaskVector(pre, ft).apply(pre, 0.3)["w"], exact.float().bfloat16())


def test_every_kind_of_input(net: nn.Module, tuned: nn.Module, saved: tuple[Path, Path]) -> None:
    expected = {
        n: t + 0.4 * (tuned.state_dict()[n] - t) if t.is_floating_point() else t
        for n, t in net.state_dict().items()
    }

    def right(state: State) -> bool:
        return all(torch.allclose(state[n], t, atol=1e-6) for n, t in expected.items())

    pairs = [
        (net, tuned),
        (net.state_dict(), tuned.state_dict()),
        saved,
        tuple(map(str, saved)),
        tuple(map(open_checkpoint, saved)),
        (net, saved[1]),
    ]
    for pre, ft in pairs:
        result = TaskVector(pre, ft).apply(pre, alpha=0.4)
        if isinstance(pre, nn.Module):
            assert type(result) is Net
            assert result is not net
            assert right(result.state_dict())
            assert result.out.weight is result.embed.weight
            assert not result.frozen.requires_grad
            assert result.scale.requires_grad
            assert torch.equal(result.mask, net.mask)
        elif isinstance(pre, dict):
            assert type(result) is dict
            assert right(result)
        else:
            assert isinstance(result, Checkpoint)
            assert right(result.state_dict())


def test_other_kinds_of_one_base_still_give_the_bits(
    net: nn.Module, tuned: nn.Module, saved: tuple[Path, Path]
) -> None:
    edited = TaskVector(saved[0], tuned).apply(net, 1.0)
    assert bits_equal(
        dict(edited.state_dict()),
        {
            **tuned.state_dict(),
            **{n: t for n, t in net.state_dict().items() if not t.is_floating_point()},
        },
    )


def test_awkward_tensors() -> None:
    pre = {
        "t": torch.randn(6, 4).T,
        "expanded": torch.ones(1).expand(5),
        "leaf": torch.randn(3, requires_grad=True),
        "flag": torch.tensor(True),
    }
    ft = {n: (t.detach() + 1 if t.is_floating_point() else ~t) for n, t in pre.items()}
    result = TaskVector(pre, ft).apply(pre, 0.5)
    assert torch.allclose(result["t"], pre["t"] + 0.5)
    assert torch.equal(result["expanded"], torch.full((5,), 1.5))
    assert not result["leaf"].requires_grad
    assert result["flag"].item() is True


def test_alpha_by_pattern(net: nn.Module, tuned: nn.Module) -> None:
    tau = TaskVector(net, tuned)
    result = tau.apply(net, {"hidden.weight": 0.5, "hidden.*": 1.0}).state_dict()
    before, after = net.state_dict(), tuned.state_dict()
    assert torch.equal(result["hidden.bias"], after["hidden.bias"])
    assert torch.allclose(
        result["hidden.weight"], (before["hidden.weight"] + after["hidden.weight"]) / 2
    )
    assert torch.equal(result["embed.weight"], before["embed.weight"])
    with pytest.raises(UnknownNameError, match=r"no tensor that matches 'hiden.\*'"):
        tau.apply(net, {"hiden.*": 1.0})


def test_select(net: nn.Module, tuned: nn.Module) -> None:
    part = TaskVector(net, tuned).select(["hidden.*", "scale"])
    assert sorted(part) == ["hidden.bias", "hidden.weight", "scale"]
    result = part.apply(net).state_dict()
    assert torch.equal(result["scale"], tuned.scale)
    assert torch.equal(result["embed.weight"], net.embed.weight)
    with pytest.raises(UnknownNameError, match="'visual'"):
        part.select("visual")


def test_norm_dot_cosine(net: nn.Module, tuned: nn.Module) -> None:
    other = perturbed(net, 2)
    s, t = TaskVector(net, tuned), TaskVector(net, other)
    names = [n for n in s if n != "out.weight"]  # tied: counted once
    x, y = (torch.cat([v[n].double().reshape(-1) for n in names]) for v in (s, t))
    assert s.norm() == pytest.approx(x.norm().item(), rel=1e-6)
    assert s.dot(t) == pytest.approx((x @ y).item(), rel=1e-5)
    assert s.cosine(t) == pytest.approx((x @ y / x.norm() / y.norm()).item(), rel=1e-5)
    assert s.cosine(-s) == pytest.approx(-1)
    assert math.isnan(s.cosine(s - s))
    assert s.norm(per_tensor=True)["scale"] == pytest.approx(
        abs((tuned.scale - net.scale).item()), rel=1e-6
    )


def test_apply_in_place(net: nn.Module, tuned: nn.Module) -> None:
    tau, module = TaskVector(net, tuned), perturbed(net, 3)
    for alpha in (0.9, 0.3, 0.0):
        pointers = [p.data_ptr() for p in module.parameters()]
        assert tau.apply_(module, alpha) is module
        expected = tau.apply(net, alpha).state_dict()
        assert all(torch.equal(t, expected[n]) for n, t in module.state_dict().items() if n in tau)
        assert [p.data_ptr() for p in module.parameters()] == pointers
    with pytest.raises(CheckpointError, match="own tensors take part"):
        tau.apply_(net, 0.5)
    with pytest.raises(MismatchError, match="lacks"):
        tau.apply_(nn.Linear(2, 2), 0.5)


def test_save_and_load(
    net: nn.Module, tuned: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tau = 0.5 * TaskVector(net, tuned)
    loaded = TaskVector.load(tau.save(tmp_path / "tau.safetensors"))
    with caplog.at_level(logging.WARNING):
        again = loaded.apply(net).state_dict()
    assert all(
        close(t, again[n].double(), 2.0) for n, t in tau.apply(net).state_dict().items() if n in tau
    )
    assert not caplog.records
    stranger = perturbed(net, 9)
    with caplog.at_level(logging.WARNING):
        loaded.apply(stranger)
    assert "was made from Net" in caplog.text
    with pytest.raises(MismatchError, match="made from Net"):
        loaded.apply(stranger, strict=True)
    with pytest.raises(CheckpointError, match="doesn't hold its base"):
        loaded.apply_(copy.deepcopy(net))
    open_checkpoint(net).save(tmp_path / "weights.safetensors")
    with pytest.raises(SpaceError, match="holds weights, not a task vector"):
        TaskVector.load(tmp_path / "weights.safetensors")


def test_mismatches_name_what_differs() -> None:
    pre = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    with pytest.raises(
        MismatchError,
        match=r"1 only in the first: c\n.*1 only in the second: d\n.*1 of other shape: b \(3,\) / \(4,\)",
    ):
        TaskVector(pre, {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)})
    with pytest.raises(
        MismatchError, match=r"of other dtype: a float32 / bfloat16(?s:.)*\.to\(torch.float32\)"
    ):
        TaskVector({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.bfloat16)})
    with pytest.raises(MismatchError, match="no tensor name in common"):
        TaskVector({"a": torch.zeros(2)}, {"b": torch.zeros(2)})


def test_missing_names_are_left_out_on_request_and_named(caplog: pytest.LogCaptureFixture) -> None:
    pre = {"a": torch.zeros(2), "b[0]": torch.full((3,), 5.0)}
    tau = TaskVector(pre, {"a": torch.ones(2), "c": torch.ones(1)}, strict=False)
    assert "b[0], c" in caplog.text
    assert list(tau) == ["a"]
    for alpha in (0.0, 0.4, 1.0):
        assert torch.equal(tau.apply(pre, alpha)["b[0]"], pre["b[0]"])
    full = TaskVector(pre, {"a": torch.ones(2), "b[0]": torch.ones(3)})
    assert torch.equal((tau + full).apply(pre)["b[0]"], torch.ones(3))
    with pytest.raises(MismatchError, match="no tensor name in common"):
        TaskVector(pre, {"z": torch.ones(2)}, strict=False)


def test_spaces() -> None:
    weights = open_checkpoint({"a": torch.zeros(1)}).form
    with pytest.raises(SpaceError, match="can't be added to weights"):
        weights.plus(weights)
    with pytest.raises(SpaceError, match="can't be multiplied"):
        weights.times(2.0)


def test_nonfinite_is_reported_by_name(caplog: pytest.LogCaptureFixture) -> None:
    pre = {
        "good": torch.zeros(40_000),
        "bad": torch.zeros(40_000),
        "large": torch.full((40_000,), 3e38),
    }
    ft = {
        "good": torch.ones(40_000),
        "bad": torch.ones(40_000),
        "large": torch.full((40_000,), 3e38),
    }
    ft["bad"][39_999] = math.nan
    tau = TaskVector(pre, ft)
    assert torch.isnan(tau.apply(pre, 1.0)["bad"][-1])
    assert not caplog.records
    tau.apply(pre, 0.5, on_nonfinite="warn")
    assert "NaN or Inf in 1 tensor: bad" in caplog.text
    with pytest.raises(NonfiniteError, match="bad"):
        tau.apply(pre, 0.5, on_nonfinite="error")
    half = {"w": torch.full((5,), 6e4, dtype=torch.float16)}
    with pytest.raises(NonfiniteError, match="w"):
        TaskVector(half, {"w": -half["w"]}).apply(half, -1.0, on_nonfinite="error")


def test_average_and_interpolate(net: nn.Module) -> None:
    models = [perturbed(net, i) for i in range(3)]
    mean = average(models)
    for name, tensor in mean.state_dict().items():
        if tensor.is_floating_point():
            exact = sum(m.state_dict()[name].double() for m in models) / 3
            assert close(tensor, exact, 2.0)
    assert mean.out.weight is mean.embed.weight
    with pytest.raises(OptionError, match="at least one model"):
        average([])
    with pytest.raises(OptionError, match="as many weights"):
        average(models, [1.0])


def test_a_vector_is_lazy(saved: tuple[Path, Path]) -> None:
    tau = TaskVector(*saved)
    edited = tau.apply(saved[0], 0.4)
    assert repr(tau).startswith("TaskVector(+1 ")
    first = edited["scale"]
    assert torch.equal(first, edited.state_dict()["scale"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_within_one_unit(net: nn.Module, tuned: nn.Module) -> None:
    on_cpu = TaskVector(net, tuned).apply(net, 0.4).state_dict()
    on_gpu = TaskVector(net, tuned).apply(copy.deepcopy(net).cuda(), 0.4).state_dict()
    for name, tensor in on_cpu.items():
        assert on_gpu[name].device.type == "cuda"
        assert torch.allclose(
            tensor.double(),
            on_gpu[name].cpu().double(),
            rtol=torch.finfo(torch.float32).eps,
            atol=0,
        )


def test_ties_are_edited_alike_or_not_at_all(net: nn.Module, tuned: nn.Module) -> None:
    tau = TaskVector(net, tuned)
    with pytest.raises(MismatchError, match="are one tensor in the target and two in"):
        tau.select("out.weight").apply(net)
    untied = {n: t.clone() for n, t in tuned.state_dict().items()}
    untied["out.weight"] += 1
    with pytest.raises(MismatchError, match=r"embed.weight and out.weight are one tensor"):
        TaskVector(net, untied).apply(net, 0.5)
    separate = {n: t.clone() for n, t in net.state_dict().items()}
    edited = TaskVector(separate, untied).apply(separate, 1.0)
    assert torch.equal(edited["out.weight"], untied["out.weight"])
    by_data = copy.deepcopy(net)
    by_data.out.weight = nn.Parameter(by_data.embed.weight.data)
    assert torch.equal(tau.apply(by_data, 0.0).out.weight, net.embed.weight)
    loose = nn.ModuleDict({"embed": nn.Embedding(7, 5), "out": nn.Linear(5, 7, bias=False)})
    open_checkpoint(net).load_into(loose, strict=False)
    assert torch.equal(loose["out"].weight, net.embed.weight)


def test_a_model_is_not_filled_from_itself(net: nn.Module, tuned: nn.Module) -> None:
    checkpoint = open_checkpoint(net)
    with pytest.raises(CheckpointError, match="own tensors take part"):
        TaskVector(checkpoint, tuned).apply(checkpoint, 0.25).load_into(net)


def test_a_vector_follows_its_checkpoints(net: nn.Module) -> None:
    ft = copy.deepcopy(net)
    tau = TaskVector(net, ft)
    with torch.no_grad():
        ft.scale.add_(1)
    assert tau.norm() == 1


def test_infinities_that_all_share_stay(net: nn.Module) -> None:
    pre = {"mask": torch.tensor([0.0, -math.inf]), "w": torch.zeros(2)}
    ft = {"mask": pre["mask"].clone(), "w": torch.ones(2)}
    assert torch.equal(TaskVector(pre, ft).apply(pre, 0.5)["mask"], pre["mask"])


def test_coefficients_of_all_kinds(net: nn.Module, tuned: nn.Module) -> None:
    import numpy as np

    tau = TaskVector(net, tuned)
    assert (np.float64(0.5) * tau).norm() == pytest.approx(tau.norm() / 2)
    assert (tau * torch.tensor(0.5)).norm() == pytest.approx(tau.norm() / 2)
    with pytest.raises(OptionError, match="finite"):
        tau.apply(net, math.nan)
    with pytest.raises(SpaceError, match="multiplied with each other"):
        tau * tau
    with pytest.raises(SpaceError, match="task vector was given where weights are needed"):
        tau.apply(tau)  # type: ignore[type-var]
    with torch.inference_mode():
        assert tau.apply(net, 0.5).scale.item() == pytest.approx(
            (net.scale.item() + tuned.scale.item()) / 2
        )


def test_another_base_is_told_apart_even_when_edited(
    net: nn.Module, tuned: nn.Module, saved: tuple[Path, Path]
) -> None:
    half, most = (TaskVector(net, tuned).apply(open_checkpoint(net), a) for a in (0.3, 0.7))
    vector = TaskVector(half, tuned)
    vector.apply(half, strict=True)
    with pytest.raises(MismatchError, match="made from"):
        vector.apply(most, strict=True)
    assert half.fingerprint != most.fingerprint
