"""The loss of discrete-time survival (Zadeh and Schmid 2020, arXiv 2012.07258, as in MCAT and Patch-GCN)."""

import torch


SMALLEST = 1e-7  # of a probability before its logarithm is taken


def discrete_survival_loss(
    logits: torch.Tensor, interval: torch.Tensor, event: torch.Tensor, alpha: float = 0.0
) -> torch.Tensor:
    """The negative log-likelihood of each case, (B,).

    The hazard of an interval, sigmoid(logits), is the probability of the event there for those who reached it; whoever had
    it in interval y survived those before, whoever left the study in y survived y too.

    Args:
        logits: (B, C), of the hazard in each of C intervals of time.
        interval: int (B,), that of the event, or the last in which the case was seen, from 0.
        event: (B,), 1 when the event was seen, 0 when the case was censored.
        alpha: from 0 to 1, by how much less a censored case counts.
    """
    hazard = logits.sigmoid()
    survival = torch.cat([torch.ones_like(hazard[:, :1]), (1 - hazard).cumprod(dim=1)], dim=1)  # (B, 1 + C)
    at = interval.long().unsqueeze(1)
    reached, had, outlived = (
        table.gather(1, index).squeeze(1).clamp(min=SMALLEST).log()
        for table, index in ((survival, at), (hazard, at), (survival, at + 1))
    )
    event = event.to(logits.dtype)
    return -event * (reached + had) - (1 - alpha) * (1 - event) * outlived
