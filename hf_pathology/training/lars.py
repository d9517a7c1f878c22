"""LARS, stochastic gradient descent whose rate is scaled layer by layer (You et al. 2017, arXiv 1708.03888)."""

from collections.abc import Callable

import torch

from .clipping import tensor_norms


class Lars(torch.optim.Optimizer):
    """SGD with momentum in which the step of each weight is `eta * |weight| / |update|` times the rate.

    Biases and one-dimensional parameters are neither decayed nor scaled, as in DINO and the self-supervised codes before
    it; nor is what has a norm of zero scaled.

    Args:
        params: parameters, or groups of them.
        lr, weight_decay, momentum: as for SGD; the decay is part of the update that is scaled.
        eta: the trust in a layer's update.
    """

    def __init__(
        self, params, lr: float = 0.0, weight_decay: float = 0.0, momentum: float = 0.9, eta: float = 0.001
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """Moves all parameters that have a gradient; returns the loss that `closure` gives, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            updates = [parameter.grad.clone() for parameter in parameters]
            self._decay_and_scale(parameters, updates, group["weight_decay"], group["eta"])
            momenta = [self._momentum_of(parameter) for parameter in parameters]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, updates)
            torch._foreach_add_(parameters, momenta, alpha=-group["lr"])
        return loss

    @staticmethod
    def _decay_and_scale(
        parameters: list[torch.Tensor], updates: list[torch.Tensor], weight_decay: float, eta: float
    ) -> None:
        """Adds the decay to the updates of the weights, those with more than one dimension, and scales them."""
        pairs = [(parameter, update) for parameter, update in zip(parameters, updates) if parameter.ndim != 1]
        if not pairs:
            return
        weights, of_weights = map(list, zip(*pairs))
        torch._foreach_add_(of_weights, weights, alpha=weight_decay)
        weight_norms, update_norms = tensor_norms(weights), tensor_norms(of_weights)
        trust = eta * weight_norms / update_norms
        trust = torch.where((weight_norms > 0) & (update_norms > 0), trust, torch.ones_like(trust))
        for update, factor in zip(of_weights, trust.unbind()):
            update.mul_(factor)

    def _momentum_of(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        return state["momentum"]
