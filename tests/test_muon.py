"""Muon: timm's, which on a CPU calculates in float32 instead of bfloat16."""

import pytest
import timm.optim
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from raftmlp.processes import Processes
from raftmlp.train import TrainSettings
from raftmlp.train.learner import Learner
from raftmlp.train.muon import Muon

SHAPES = [(12, 20), (20, 12), (8, 6, 3, 3), (7,)]


class Dtypes(TorchDispatchMode):
    """Collects the dtypes of what the operators in this context return."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.seen.add(out.dtype)
        return out


def trained(kind, weights, gradients):
    """Return the weights after a step for each of the gradients, the optimizer, and the dtypes that it used."""
    parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
    optimizer = kind(parameters, lr=0.1, weight_decay=0.05, nesterov=True)
    with Dtypes() as dtypes:
        for values in gradients:
            for parameter, value in zip(parameters, values):
                parameter.grad = value.clone()
            optimizer.step()
    return [parameter.detach() for parameter in parameters], optimizer, dtypes.seen


def numbers(count):
    return [[torch.randn(shape, generator=torch.manual_seed(number)) for shape in SHAPES] for number in range(count)]


def test_its_steps_are_timms_in_float32():
    weights, *gradients = numbers(3)
    ours, optimizer, dtypes = trained(Muon, weights, gradients)
    timms, other, dtypes_of_timm = trained(timm.optim.Muon, weights, gradients)
    assert dtypes == {torch.float32} and torch.bfloat16 in dtypes_of_timm
    for weight, mine, its in zip(weights, ours, timms):
        assert (mine - its).norm() < 0.01 * (its - weight).norm()
    assert torch.equal(ours[3], timms[3]) and not torch.equal(ours[0], timms[0])  # a vector's AdamW has no bfloat16
    other.load_state_dict(optimizer.state_dict())  # their states are the same


def test_a_step_is_what_its_source_says():
    weights, gradients = numbers(2)
    found, _, _ = trained(Muon, weights, [gradients])
    u, _, v = torch.linalg.svd(gradients[0], full_matrices=False)  # the first momentum is a share of the gradient
    moved = (found[0] - weights[0] * (1 - 0.1 * 0.05)) / (-0.1 * 0.2 * 20**0.5)
    singular = torch.diagonal(u.T @ moved @ v.T)
    assert ((singular > 0.6) & (singular < 1.3)).all()  # five iterations bring all singular values near 1
    assert torch.allclose(u @ torch.diag(singular) @ v, moved, atol=1e-4)  # and leave the vectors


@pytest.mark.parametrize("name", timm.optim.list_optimizers("*muon"))
def test_every_muon_of_the_train_command_calculates_in_float32(name):
    model = timm.create_model("raftmlp_digits", embed_dims=(8,) * 4, depths=(1,) * 4)
    learner = Learner(TrainSettings(opt=name, epochs=1, lr=0.01), model, 1, Processes(torch.device("cpu")))
    before = model.head.weight.detach().clone()
    learner.start_at(0)
    with Dtypes() as dtypes:
        learner.update(iter([(torch.randn(4, 3, 32, 32), torch.arange(4))]), 1, 1)
    assert torch.float32 in dtypes.seen and torch.bfloat16 not in dtypes.seen
    assert not torch.equal(model.head.weight, before)
