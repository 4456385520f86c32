"""The algebra of task vectors: laws, bits, and formulas in float64."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.closeness import State, bits_equal, close
from helpers.nets import perturbed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightops import TaskVector, average, interpolate, merge, open_checkpoint
from weightops.errors import MismatchError, OptionError, SpaceError, UnknownNameError

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (0,), (1,), (8, 1), (3, 5), (2, 3, 4), (70_000,)]


@st.composite
def families(draw: st.DrawFn, members: int = 3) -> tuple[torch.dtype, list[State]]:
    """State dicts of random shapes and values, all of one dtype, with an integer tensor each."""
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
        states.append({**state, "num_batches_tracked": torch.tensor(i)})
    return dtype, states


@settings(max_examples=60, deadline=None)
@given(families(2))
def test_alpha_0_and_1_to_the_bit(family: tuple[torch.dtype, list[State]]) -> None:
    _, (pre, ft) = family
    tau = TaskVector(pre, ft)
    assert bits_equal(tau.apply(pre, 0), pre)
    assert bits_equal(tau.apply(pre, 1), {**ft, "num_batches_tracked": pre["num_batches_tracked"]})
    assert bits_equal(interpolate(pre, ft, 0.0), pre)


@settings(max_examples=60, deadline=None)
@given(families(3), st.floats(-2, 2), st.floats(-2, 2))
def test_linear_forms_against_float64(
    family: tuple[torch.dtype, list[State]], a: float, b: float
) -> None:
    dtype, (pre, x, y) = family
    originals = copy.deepcopy([pre, x, y])
    result = (a * TaskVector(pre, x) - TaskVector(pre, y) * b).apply(pre)
    for name in (n for n in pre if n != "num_batches_tracked"):
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


def test_select(net: nn.Module, tuned: nn.Module) -> None:
    selected = TaskVector(net, tuned).select(["hidden.*", "scale"])
    assert sorted(selected) == ["hidden.bias", "hidden.weight", "scale"]
    result = selected.apply(net).state_dict()
    assert torch.equal(result["scale"], tuned.scale)
    assert torch.equal(result["embed.weight"], net.embed.weight)
    with pytest.raises(UnknownNameError, match="'visual'"):
        selected.select("visual")


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


def test_mismatches_name_what_differs() -> None:
    pre = {"a": torch.zeros(2), "b": torch.zeros(3), "c": torch.zeros(1)}
    both = r"1 only in the first: c\n.*1 only in the second: d\n"
    with pytest.raises(MismatchError, match=both + r".*1 of other shape: b \(3,\) / \(4,\)"):
        TaskVector(pre, {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1)})
    with pytest.raises(MismatchError, match=r"of other dtype: a float32 / int64(?s:.)*one program"):
        TaskVector({"a": torch.zeros(2)}, {"a": torch.zeros(2, dtype=torch.int64)})
    with pytest.raises(MismatchError, match="no tensor name in common"):
        TaskVector({"a": torch.zeros(2)}, {"b": torch.zeros(2)})


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_base", [True, False])
def test_a_narrower_model_is_widened_with_a_warning(
    narrow: torch.dtype, is_base: bool, caplog: pytest.LogCaptureFixture
) -> None:
    generator = torch.Generator().manual_seed(0)
    pre, ft = (torch.randn(50, generator=generator) for _ in range(2))
    pre, ft = (pre.to(narrow), ft) if is_base else (pre, ft.to(narrow))
    tau = TaskVector({"a": pre}, {"a": ft})
    assert "other dtypes: a " in caplog.text
    assert torch.equal(tau["a"].float(), (ft.float() - pre.float()).to(tau["a"].dtype).float())
    for alpha in (0.0, 0.4, 1.0):
        model = tau.apply({"a": pre}, alpha)
        expected = pre.double() + alpha * (ft.double() - pre.double())
        assert model["a"].dtype == pre.dtype
        assert torch.allclose(
            model["a"].double(), expected, rtol=torch.finfo(pre.dtype).eps, atol=1e-6
        )
    assert torch.equal(tau.apply({"a": pre}, 1.0)["a"], ft.to(pre.dtype))


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


def test_a_vector_is_lazy(saved: tuple[Path, Path]) -> None:
    tau = TaskVector(*saved)
    edited = tau.apply(saved[0], 0.4)
    assert repr(tau).startswith("TaskVector('")
    first = edited["scale"]
    assert torch.equal(first, edited.state_dict()["scale"])


def test_a_vector_follows_its_checkpoints(net: nn.Module) -> None:
    ft = copy.deepcopy(net)
    tau = TaskVector(net, ft)
    with torch.no_grad():
        ft.scale.add_(1)
    assert tau.norm() == 1


def test_coefficients_of_all_kinds(net: nn.Module, tuned: nn.Module) -> None:
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


def test_ties_that_sources_name_after_different_ends(tmp_path: Path) -> None:
    shared, other, body = torch.ones(3, 2), torch.full((3, 2), 3.0), torch.ones(2)
    a = {"embed": shared, "head": shared, "body": body}
    b = {"head": other, "body": body * 2, "embed": other}
    for merged in (merge([a, b]), TaskVector(a, b).apply(open_checkpoint(a), 0.5)):
        state = merged.state_dict()
        assert state["embed"].eq(2).all()
        assert state["head"] is state["embed"]
        assert merged.save(tmp_path / "m.safetensors", overwrite=True)
        written = open_checkpoint(tmp_path / "m.safetensors")
        assert written.source.ties == {"head": "embed"}
    apart = {"head": other, "body": body, "embed": other.clone()}
    assert merge([a, apart]).state_dict()["head"] is not merge([a, apart]).state_dict()["embed"]
