"""Block swap: the same numbers, the same parameters, and nothing held longer than its block runs."""

import copy
import logging
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from library.checkpointing import checkpoint_blocks
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


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_checkpointed_step_copies_each_block_as_seldom_as_can_be_and_never_back(count: int) -> None:
    _, swapped, x = _stacks()
    values = {name: parameter.detach().clone() for name, parameter in swapped.named_parameters()}
    swap = place(swapped, blocks=list(swapped.blocks), device=CPU, swap=count)
    checkpoint_blocks(list(swapped.blocks))  # in this order, as training does
    alive: list[weakref.ref] = []
    copied: list[int] = []
    most = 0
    copy_block = swap._copy

    def counted(number: int) -> list[torch.Tensor]:
        nonlocal most
        copies = copy_block(number)
        copied.append(number)
        alive.append(weakref.ref(copies[0]))
        most = max(most, sum(each() is not None for each in alive))
        return copies

    swap._copy = counted
    for _ in range(3):
        copied.clear()
        swapped(x).square().sum().backward()
    # Up and down again; at both turns the copies in hand are used once more.
    assert copied == ([0, 0] if count == 1 else [*range(1, count), *reversed(range(count - 1))])
    assert most <= 2
    for name, parameter in swapped.named_parameters():
        assert torch.equal(parameter, values[name])
    with torch.no_grad():
        copied.clear()
        swapped(x), swapped(x)
    assert len(copied) <= 2 * count + 1


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
