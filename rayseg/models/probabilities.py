"""From logits to probabilities."""

from torch import Tensor, nn


class Probabilities(nn.Module):
    """A model's logits (N, K, H, W) as probabilities, float32: of class 1 where K is 1, else of all, adding up to one.

    Args:
        model: gives the logits.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Probabilities of images."""
        logits: Tensor = self.model(x_NCHW).float()
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(1)
