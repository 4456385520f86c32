"""Models edited by task vectors, and the vectors' files."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path

import pytest
import torch
from helpers.closeness import State, bits_equal, close
from helpers.nets import Net, perturbed
from torch import nn

from weightops import Checkpoint, TaskVector, open_checkpoint
from weightops.errors import (
    CheckpointError,
    MismatchError,
    NonfiniteError,
    SpaceError,
    UnknownNameError,
)


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


def test_infinities_that_all_share_stay() -> None:
    pre = {"mask": torch.tensor([0.0, -math.inf]), "w": torch.zeros(2)}
    ft = {"mask": pre["mask"].clone(), "w": torch.ones(2)}
    assert torch.equal(TaskVector(pre, ft).apply(pre, 0.5)["mask"], pre["mask"])


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


def test_another_base_is_distinguished_even_when_edited(
    net: nn.Module, tuned: nn.Module, saved: tuple[Path, Path]
) -> None:
    half, most = (TaskVector(net, tuned).apply(open_checkpoint(net), a) for a in (0.3, 0.7))
    vector = TaskVector(half, tuned)
    vector.apply(half, strict=True)
    with pytest.raises(MismatchError, match="made from"):
        vector.apply(most, strict=True)
    assert half.fingerprint != most.fingerprint
