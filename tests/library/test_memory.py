"""Block swap: the same numbers, the same parameters, and nothing held longer than its block runs."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.memory import BlockSwap, clamp_swap, place

CPU = torch.device("cpu")


class Block(nn.Module):
    """A frozen linear with a trained adapter; notes where its weights lay when it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(6, 6)
        self.adapter = nn.Linear(6, 6, bias=False)
        self.frozen.requires_grad_(False)
        self.seen: list[int] = []

    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        self.seen.append(self.frozen.weight.data_ptr())
        return x + scale * torch.tanh(self.frozen(x) + self.adapter(x))


class Stack(nn.Module):
    def __init__(self, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, scale=0.5, use_reentrant=False) if self.checkpointed else block(x, scale=0.5)
        return x


def _stacks(*, checkpointed: bool = False, device: torch.device = CPU) -> tuple[Stack, Stack, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    plain = Stack(checkpointed=checkpointed)
    for parameter in plain.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return plain.to(device), copy.deepcopy(plain).to("cpu"), torch.randn(3, 6, generator=generator).to(device)


DEVICES = [
    CPU,
    pytest.param(
        torch.device("cuda"),
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_outputs_and_gradients_are_those_of_the_plain_model(
    device: torch.device, count: int, checkpointed: bool
) -> None:
    plain, swapped, x = _stacks(checkpointed=checkpointed, device=device)
    before = {name: parameter for name, parameter in swapped.named_parameters()}
    place(swapped, blocks=list(swapped.blocks), device=device, swap=count)
    for _ in range(2):
        assert torch.equal(swapped(x), plain(x))
    swapped(x).square().sum().backward()
    plain(x).square().sum().backward()
    after = dict(swapped.named_parameters())
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(after[name].grad, parameter.grad) and after[name].device.type == device.type
        else:
            assert after[name].grad is None


def test_swapped_blocks_run_on_copies_and_the_others_do_not() -> None:
    _, swapped, x = _stacks()
    own = [block.frozen.weight.data_ptr() for block in swapped.blocks]
    place(swapped, blocks=list(swapped.blocks), device=CPU, swap=2)
    with torch.no_grad():
        swapped(x)
    assert [block.seen[0] != pointer for block, pointer in zip(swapped.blocks, own, strict=True)] == [
        False, True, False, True, False
    ]  # fmt: skip
    assert [block.frozen.weight.data_ptr() for block in swapped.blocks] == own


def test_parameters_come_back_after_an_error() -> None:
    _, swapped, x = _stacks()
    BlockSwap(list(swapped.blocks), device=CPU)
    with pytest.raises(RuntimeError):
        swapped(x[:, :3])
    assert all(isinstance(block.frozen.weight, nn.Parameter) for block in swapped.blocks)


def test_clamping_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert clamp_swap(8, available=20, device=CPU) == 0
        assert clamp_swap(8, available=3, device=torch.device("cuda")) == 3
        assert clamp_swap(2, available=3, device=torch.device("cuda")) == 2
        assert clamp_swap(0, available=3, device=CPU) == 0
    assert [record.message for record in caplog.records] == [
        "--blocks_to_swap 8: 0 used, there is no GPU memory to save on cpu",
        "--blocks_to_swap 8: 3 used, the model has no more blocks",
    ]
