"""Adam with decoupled weight decay for stacked, independent models, each with a learning rate of its own.

Adam is elementwise, so one update of a stacked tensor is one update of every model in it. PyTorch's optimisers take
one learning rate for a tensor; here it is a tensor, so that heads with different rates share one update, and a rate
of 0 freezes a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["StackedAdam"]

_BETAS, _EPS = (0.9, 0.999), 1e-8


class StackedAdam:
    """AdamW (betas 0.9 and 0.999, eps 1e-8), the arithmetic of :class:`torch.optim.AdamW`.

    Parameters
    ----------
    parameters
        Tensors that are updated in place.
    weight_decay
        Decoupled, times the learning rate.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], weight_decay: float) -> None:
        self.parameters = list(parameters)
        self._decay = weight_decay
        self._first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self._work = [torch.empty_like(parameter) for parameter in self.parameters]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], lr: torch.Tensor) -> None:
        """Update once.

        Parameters
        ----------
        gradients
            One per parameter, same shapes.
        lr
            Learning rates (R,) of the models on the first axis.
        """
        self._steps += 1
        first_share = 1 - _BETAS[0] ** self._steps
        second_share = (1 - _BETAS[1] ** self._steps) ** 0.5
        state = zip(self.parameters, gradients, self._first, self._second, self._work, strict=True)
        for parameter, gradient, first, second, work in state:
            rate = lr.view(-1, *[1] * (parameter.ndim - 1))
            if self._decay:
                parameter.mul_(1 - rate * self._decay)
            first.lerp_(gradient, 1 - _BETAS[0])
            second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
            torch.sqrt(second, out=work)
            # lr / first_share * first / (sqrt(second) / second_share + eps), its factors gathered in the denominator:
            # few passes over memory, and a rate of 0 divides by infinity
            work.add_(_EPS * second_share).div_(rate)
            parameter.addcdiv_(first, work, value=-second_share / first_share)

    def keep(self, models: torch.Tensor) -> None:
        """Go on with some of the stacked models only.

        Parameters
        ----------
        models
            Their positions on the first axis.
        """
        for tensors in (self.parameters, self._first, self._second, self._work):
            tensors[:] = [tensor[models].contiguous() for tensor in tensors]
