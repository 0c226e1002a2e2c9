"""The joint connection: each modality also reads the other one, the noisier of the two more (JointDiT, section 3.1).

Shape suffixes: M modality, B batch, H heads, L tokens, K head width, D width = H K.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from library.flux.attention import Kernel, attend

ALPHA = 3.0  # sharpness of the scheduling weights, in all of the paper's experiments

Weighting = Callable[[Tensor], Tensor]


def _share(level_MB: Tensor) -> Tensor:
    """Each modality's share of the sum over M; an equal share where the sum is 0 (the released code gives NaN)."""
    total_B = level_MB.sum(dim=0, keepdim=True)
    return torch.where(total_B > 0, level_MB / total_B.where(total_B > 0, 1), 0.5)


def released_weights(t_MB: Tensor) -> Tensor:
    """w_m = sigmoid(3 (t_m / (t_rgb + t_depth) - 1/2)): the released weights' formula; the noisier one listens more."""
    return torch.sigmoid(ALPHA * (_share(t_MB) - 0.5))


def paper_weights(t_MB: Tensor) -> Tensor:
    """The paper's eq. (6), whose time is 1 - t: w_rgb = sigmoid(3 ((1 - t_depth) / (2 - t_rgb - t_depth) - 1/2))."""
    return torch.sigmoid(ALPHA * (_share(1 - t_MB).flip(0) - 0.5))


def reversed_weights(t_MB: Tensor) -> Tensor:
    """The released weights the wrong way round, a control: the cleaner modality listens more."""
    return released_weights(t_MB).flip(0)


def constant_weights(value: float) -> Weighting:
    """w = value at all noise levels: a control that leaves the connection its strength but not its schedule."""
    return lambda t_MB: torch.full_like(t_MB, value)


WEIGHTINGS: dict[str, Weighting] = {
    "released": released_weights,
    "paper": paper_weights,
    "none": constant_weights(1.0),  # the ablation of JointDiT, Tables 3 and 4
    "reversed": reversed_weights,
    "constant_0.5": constant_weights(0.5),  # what the released weights are where both levels are the same
    "constant_0.82": constant_weights(0.82),  # the most they can be: sigmoid(1.5)
    "unconnected": constant_weights(0.0),  # the joint connection off: two modalities that never meet
}


class JointAttention:
    """What a block of JointDiT calls: self-attention plus the weighted joint connection.

    self_m = Attn(q_m, k_m, v_m), cross_m = Attn(q_m, k_other, v_other), then
    out_m = self_m + w_m Linear([cross_rgb ; cross_depth])_m, before the block's output projection.
    With a text mask, self-attention uses each sample's own, cross-attention the RGB row's in both directions.
    """

    def __init__(self, *, weight_MB: Tensor, mask_MBL: Tensor | None, kernel: Kernel):
        self.weight_MB11 = weight_MB[..., None, None]
        self.mask_MBL = mask_MBL
        self.cross_mask_MBL = None if mask_MBL is None else mask_MBL[:1].expand_as(mask_MBL)
        self.kernel = kernel

    def __call__(self, block: nn.Module, q_MBHLK: Tensor, k_MBHLK: Tensor, v_MBHLK: Tensor) -> Tensor:
        """Return the mixed values (M, B, L, D); the joint linear layer is the one the block keeps."""
        own_MBLD = attend(q_MBHLK, k_MBHLK, v_MBHLK, mask_BL=self.mask_MBL, kernel=self.kernel)
        cross_MBLD = attend(q_MBHLK, k_MBHLK.flip(0), v_MBHLK.flip(0), mask_BL=self.cross_mask_MBL, kernel=self.kernel)
        joint = connection_of(block)(rearrange(cross_MBLD, "M B L D -> B L (M D)"))
        joint_MBLD = rearrange(joint, "B L (M D) -> M B L D", M=len(cross_MBLD))
        return own_MBLD + self.weight_MB11.to(joint_MBLD) * joint_MBLD


CONNECTION_NAMES = {"double_blocks": "joint1", "single_blocks": "joint2"}


def add_connection(block: nn.Module, name: str, *, width: int, modalities: int) -> None:
    """Give a block its joint linear layer under its released name."""
    block.add_module(name, nn.Linear(modalities * width, modalities * width))


def connection_of(block: nn.Module) -> nn.Module:
    """Return the joint linear layer a block keeps."""
    return next(getattr(block, name) for name in CONNECTION_NAMES.values() if hasattr(block, name))
