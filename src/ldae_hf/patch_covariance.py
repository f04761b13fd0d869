"""Exact streaming PCA of image patches (the patch-wise PCA of section 4.2): sums that are bit for bit the same in any
order and over any shards."""

from typing import NamedTuple

import numpy as np
import torch


# Patches are shifted by this grey level, so that uint8 becomes -128...127.
SHIFT = 128
# A float32 product of so many shifted rows is exact: |x| <= 2^7 gives sums <= 2^10 * 2^14 = 2^24, all whole numbers
# that float32 holds. Added up in float64 they stay exact below 2^53, which is 2^39 patches.
ROWS = 1024


class PatchBasis(NamedTuple):
    """A PCA of patches, in float64: `components` (P,P) with one direction per row by falling variance, the `mean`
    patch (P,), and `explained_variance` (P,), the variance along each direction."""

    components: torch.Tensor
    mean: torch.Tensor
    explained_variance: torch.Tensor


class PatchCovariance:
    """Count, sum and second moments of patches (M,P), from which the PCA follows.

    For uint8 patches all sums are whole numbers and exact, so order, batching, shards and processes change no bit of
    the result, and adding two states is as good as one pass; a float32 covariance would have negative eigenvalues and
    wrong tail directions. Memory: one P×P float64 matrix and a few MB of buffer.

    Args:
        patch_dim: P, the number of values in a patch.
    """

    def __init__(self, patch_dim: int):
        self.patch_dim = patch_dim
        self.count = 0
        self._sum = np.zeros(patch_dim)
        self._gram = np.zeros((patch_dim, patch_dim))
        # Images may send a patch or two each; the buffer turns these into products of ROWS rows.
        self._buffer = np.empty((ROWS, patch_dim), dtype=np.float32)
        self._pending = 0

    def update(self, patches: np.ndarray | torch.Tensor) -> "PatchCovariance":
        """Adds patches (M,P) of grey levels 0...255: uint8 exactly, floating point in float64 products.

        Raises:
            ValueError: the shape is not (M,P), the dtype is neither uint8 nor floating point, or a value is NaN or
                outside 0...255.
        """
        patches = patches.cpu().numpy() if isinstance(patches, torch.Tensor) else np.asarray(patches)
        if patches.ndim != 2 or patches.shape[1] != self.patch_dim:
            raise ValueError(f"Patches must have the shape (M, {self.patch_dim}), not {patches.shape}.")
        if patches.dtype == np.uint8:
            self._buffer_rows(patches)
        elif patches.dtype.kind == "f":
            # Written so that NaN fails it too.
            if not np.all((patches >= 0) & (patches <= 255)):
                raise ValueError("Floating-point patches must be grey levels in 0...255 without NaN; rescale them.")
            for start in range(0, len(patches), ROWS):
                self._add(patches[start : start + ROWS].astype(np.float64) - SHIFT)
        else:
            raise ValueError(f"Patches must be uint8 or floating point, not {patches.dtype}.")
        self.count += len(patches)
        return self

    def merge(self, other: "PatchCovariance") -> "PatchCovariance":
        """Adds all that `other` has seen; `other` stays as it is.

        Raises:
            ValueError: the patches have different sizes.
        """
        return self._add_state(other.state_dict())

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`count` () int64, `sum` (P,) and `gram` (P,P) float64 of the shifted patches, ready for safetensors.

        States add up: an all-reduce (sum) of the three tensors over processes is the state of all patches.
        """
        self._flush()
        return {
            "count": torch.tensor(self.count),
            "sum": torch.from_numpy(self._sum.copy()),
            "gram": torch.from_numpy(self._gram.copy()),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor]) -> "PatchCovariance":
        """The inverse of `state_dict`.

        Raises:
            ValueError: tensors are missing or superfluous, their shapes do not fit, or a value is not finite.
        """
        if state.keys() != {"count", "sum", "gram"}:
            raise ValueError(f"A covariance state holds count, sum and gram, not {', '.join(sorted(state))}.")
        if state["sum"].ndim != 1:
            raise ValueError(f"The sum in a covariance state must be one row, not {tuple(state['sum'].shape)}.")
        return cls(len(state["sum"]))._add_state(state)

    def principal_components(self, scale: torch.Tensor, offset: torch.Tensor) -> PatchBasis:
        """The PCA of `patch * scale + offset` (both (P,); the patch in grey levels), divisor M - 1.

        Each direction's sign makes its product with one fixed random vector positive: unlike a rule about the largest
        entry, that has no ties.

        Raises:
            ValueError: there are fewer than P + 1 patches, or all of them are equal.
        """
        if self.count < self.patch_dim + 1:
            raise ValueError(
                f"PCA of patches with {self.patch_dim} values needs at least {self.patch_dim + 1} patches, but there "
                f"are {self.count}; give more images or a larger num_patches."
            )
        self._flush()
        mean = self._sum / self.count
        covariance = (self._gram - np.outer(self._sum, mean)) / (self.count - 1)
        # Of equal patches rounding may leave a variance, but a far smaller one than this part of the second moment.
        if not np.diag(covariance).max() > 1e-12 * np.diag(self._gram).max() / self.count:
            raise ValueError("All patches are equal, so there is nothing for PCA to find; give images with content.")
        scale, offset = np.asarray(scale, dtype=np.float64), np.asarray(offset, dtype=np.float64)
        variances, vectors = np.linalg.eigh(scale[:, None] * covariance * scale)
        components = vectors.T[::-1]
        # RandomState: the generator whose stream NumPy promises never to change.
        signs = np.where(components @ np.random.RandomState(0).standard_normal(self.patch_dim) < 0, -1.0, 1.0)
        return PatchBasis(
            components=torch.from_numpy(np.ascontiguousarray(components * signs[:, None])),
            mean=torch.from_numpy((mean + SHIFT) * scale + offset),
            # A zero eigenvalue may come out as minus 1e-17.
            explained_variance=torch.from_numpy(np.maximum(variances[::-1], 0.0)),
        )

    def _buffer_rows(self, patches: np.ndarray) -> None:
        while len(patches):
            taken = min(ROWS - self._pending, len(patches))
            rows = self._buffer[self._pending : self._pending + taken]
            np.subtract(patches[:taken], SHIFT, out=rows, dtype=np.float32, casting="unsafe")
            self._pending += taken
            patches = patches[taken:]
            if self._pending == ROWS:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            rows, self._pending = self._buffer[: self._pending], 0
            self._add(rows)

    def _add(self, rows: np.ndarray) -> None:
        self._sum += rows.sum(axis=0)
        # NumPy computes X.T @ X as a symmetric product (syrk), at half the cost of a general one.
        self._gram += rows.T @ rows

    def _add_state(self, state: dict[str, torch.Tensor]) -> "PatchCovariance":
        shapes = {"count": (), "sum": (self.patch_dim,), "gram": (self.patch_dim, self.patch_dim)}
        for name, shape in shapes.items():
            if tuple(state[name].shape) != shape or not torch.isfinite(state[name]).all():
                raise ValueError(
                    f"The {name} of a covariance state for patches of {self.patch_dim} values must be finite and have "
                    f"the shape {shape}, not {tuple(state[name].shape)}."
                )
        self.count += int(state["count"])
        self._sum += state["sum"].cpu().numpy()
        self._gram += state["gram"].cpu().numpy()
        return self
