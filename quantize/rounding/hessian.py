"""What a solver needs to know of a matrix's inputs: their second moments, and how many there were.

Shape letters: K inputs of the matrix. Knows nothing of weights.
"""

import torch
from torch import Tensor


class Moments:
    """Sums of `share * x x^T` and `share * e x^T` over inputs x, e what the unrounded model has there.

    Args:
        crossed: whether to keep the second.
    """

    def __init__(self, width: int, device: torch.device, *, crossed: bool) -> None:
        self.hessian = torch.zeros(width, width, device=device)
        self.cross = torch.zeros(width, width, device=device) if crossed else None
        self.tokens = 0
        self._shares = self._squares = 0.0

    def add(
        self, inputs: Tensor, shares: Tensor | None = None, *, exact: Tensor | None = None
    ) -> None:
        """Add inputs [..., K].

        Args:
            shares: [n], what each counts; None counts every one as 1.
            exact: as `inputs`, in the unrounded model.
        """
        width = self.hessian.shape[0]
        flat = inputs.reshape(-1, width)
        other = None if exact is None else exact.reshape(-1, width)
        self.tokens += len(flat)
        if shares is None:
            self._shares += len(flat)
            self._squares += len(flat)
        else:
            self._shares += float(shares.sum())
            self._squares += float(shares.square().sum())
            root = shares.sqrt()[:, None]
            flat, other = flat * root, None if other is None else other * root
        self.hessian.addmm_(flat.T, flat)
        assert (other is None) == (self.cross is None)
        if self.cross is not None and other is not None:
            self.cross.addmm_(other.T, flat)

    @property
    def samples(self) -> float:
        """How many inputs of equal shares tell as much (Kish's effective sample size)."""
        return self._shares**2 / self._squares if self._squares else 0.0

    def copy(self) -> "Moments":
        found = Moments.__new__(Moments)
        found.__dict__.update(self.__dict__)
        found.hessian = self.hessian.clone()
        found.cross = None if self.cross is None else self.cross.clone()
        return found
