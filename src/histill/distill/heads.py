"""What stands on the student during a run and is thrown away after it: prototype heads and adaptors.

Shapes: D student features, H hidden features, B bottleneck, K prototypes, E teacher features; any leading shape.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Adaptor", "PrototypeHead", "WeightNormedLinear"]

_INIT_STD = 0.02


class PrototypeHead(nn.Module):
    """DINO's head: an MLP to a bottleneck on the unit sphere, then one direction per prototype.

    Source: Caron et al., DINO, ICCV 2021, appendix C; parameter names as in DINOv2's checkpoints (``mlp.0.weight``,
    ..., ``last_layer.weight_g``, ``last_layer.weight_v``), so that their heads load as they are.

    Parameters
    ----------
    features
        D, width of the tokens that come in.
    prototypes
        K, number of logits.
    hidden
        H, width of the MLP.
    bottleneck
        B, width of the last layer's input.
    layers
        Number of linear layers before the last layer, at least 1.
    train_scale
        Also train the lengths of the prototypes' directions; otherwise they stay 1 and logits lie in [-1, 1].
    """

    def __init__(
        self,
        features: int,
        prototypes: int,
        *,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        train_scale: bool = False,
    ) -> None:
        super().__init__()
        assert layers >= 1, f"a head has at least 1 layer, got {layers}"
        widths = [features] + [hidden] * (layers - 1) + [bottleneck]
        modules: list[nn.Module] = []
        for wide_in, wide_out in itertools.pairwise(widths):
            modules += [_linear(wide_in, wide_out), nn.GELU()]
        self.mlp = nn.Sequential(*modules[:-1])
        self.last_layer = WeightNormedLinear(bottleneck, prototypes, train_scale=train_scale)

    def hidden(self, x_D: Tensor) -> Tensor:
        """Bottleneck on the unit sphere, (..., B), in the parameters' precision also under autocast."""
        bottleneck_B = self.mlp(x_D)
        return F.normalize(bottleneck_B.to(self.last_layer.weight_v.dtype), dim=-1)

    def weight(self) -> Tensor:
        """Weight of the last layer, (K, B)."""
        return self.last_layer.weight()

    def forward(self, x_D: Tensor) -> Tensor:
        """Logits, (..., K), before any temperature."""
        logits_K: Tensor = self.last_layer(self.hidden(x_D))
        return logits_K


class WeightNormedLinear(nn.Module):
    """Linear layer without bias, whose rows have a direction ``weight_v`` and a length ``weight_g``.

    Source: Salimans and Kingma, *Weight normalization*, NeurIPS 2016, equation 2. The product is taken outside
    autocast: the temperature that follows would multiply the rounding of bf16 by ten.

    Parameters
    ----------
    features_in, features_out
        Widths.
    train_scale
        Whether ``weight_g`` is trained; it starts at 1.
    """

    def __init__(self, features_in: int, features_out: int, *, train_scale: bool = False) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(features_out, 1), requires_grad=train_scale)
        self.weight_v = nn.Parameter(torch.empty(features_out, features_in))
        nn.init.trunc_normal_(self.weight_v, std=_INIT_STD)

    def weight(self) -> Tensor:
        """Rows of length ``weight_g``, (features_out, features_in)."""
        return F.normalize(self.weight_v, dim=1) * self.weight_g

    def forward(self, x: Tensor) -> Tensor:
        """Multiply the last dimension."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight_v.dtype), self.weight())


class Adaptor(nn.Module):
    """From the student's width to a teacher's, for the token objectives; one per teacher and kind of token.

    Parameters
    ----------
    features_in, features_out
        D and E.
    hidden
        Width of the layer between, followed by a GELU; 0 makes the adaptor linear.
    """

    def __init__(self, features_in: int, features_out: int, *, hidden: int = 0) -> None:
        super().__init__()
        self.layers = (
            nn.Sequential(_linear(features_in, hidden), nn.GELU(), _linear(hidden, features_out))
            if hidden
            else nn.Sequential(_linear(features_in, features_out))
        )

    def forward(self, x_D: Tensor) -> Tensor:
        """Teacher-like tokens, (..., E)."""
        y_E: Tensor = self.layers(x_D)
        return y_E


def _linear(features_in: int, features_out: int) -> nn.Linear:
    layer = nn.Linear(features_in, features_out)
    nn.init.trunc_normal_(layer.weight, std=_INIT_STD)
    nn.init.zeros_(layer.bias)
    return layer
