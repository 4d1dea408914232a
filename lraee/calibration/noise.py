"""What quantization does to the tokens after each block, and which exits it spoils."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockNoise:
    """The noise of the tokens after one block; norms are per image, means over images.

    Args:
      natural_step: ||z_L^fp - z_(L-1)^fp||.
      quantization_error: ||z_L^int8 - z_L^fp||.
      nsr: quantization_error / natural_step, noise to signal.
      mse: mean squared error of a value.
      cosine: of all tokens of an image with their float form.
      max_abs: the largest float activation.
      inr: ||E_x z_L||^2 / Var_x[z_L^int8 - z_L^fp], information to noise.
    """

    natural_step: float
    quantization_error: float
    nsr: float
    mse: float
    cosine: float
    max_abs: float
    inr: float


class NoiseMeter:
    """Adds up, batch by batch in float64, what BlockNoise of each block needs."""

    def __init__(self, blocks: int) -> None:
        """A meter for this many blocks."""
        self._sums: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
        self._images = 0

    def add(self, before: Tensor, in_float: Sequence[Tensor], in_int8: Sequence[Tensor]) -> None:
        """Adds a batch; images that are not finite are left out.

        Args:
          before: float tokens [B, L, D] before the first block.
          in_float, in_int8: tokens [B, L, D] after each block, of the same images.
        """
        is_finite = (in_float[-1] + in_int8[-1]).flatten(1).isfinite().all(1)
        if not is_finite.all():  # one broken image would spoil every figure
            before = before[is_finite]
            in_float, in_int8 = [z[is_finite] for z in in_float], [z[is_finite] for z in in_int8]
        if not len(before):
            return
        previous = before.double()
        for sums, z, noisy in zip(self._sums, in_float, in_int8, strict=True):
            z = z.double()
            noise = noisy.double() - z
            flat, other = z.flatten(1), noisy.double().flatten(1)
            largest = z.abs().amax()
            terms = {
                "step": (z - previous).flatten(1).norm(dim=1).sum(),
                "error": noise.flatten(1).norm(dim=1).sum(),
                "cosine": torch.cosine_similarity(flat, other).sum(),
                "z": z.sum(0),
                "noise": noise.sum(0),
                "noise_squared": noise.square().sum(0),
            }
            for name, value in terms.items():
                sums[name] = sums[name] + value if name in sums else value
            sums["largest"] = torch.maximum(sums["largest"], largest) if self._images else largest
            previous = z
        self._images += len(before)

    def result(self) -> list[BlockNoise]:
        """One row per block.

        Raises: ValueError if there was no finite image.
        """
        n, rows = self._images, []
        if not n:
            raise ValueError("calibrate: images must be finite, got none among those for the noise")
        for sums in self._sums:
            mean_noise = sums["noise"] / n
            variance = (sums["noise_squared"] / n - mean_noise.square()).clamp(min=0).sum()
            step, error = float(sums["step"] / n), float(sums["error"] / n)
            rows.append(
                BlockNoise(
                    natural_step=step,
                    quantization_error=error,
                    nsr=error / step if step else 0.0,
                    mse=float((sums["noise_squared"] / n).mean()),
                    cosine=float(sums["cosine"] / n),
                    max_abs=float(sums["largest"]),
                    inr=float((sums["z"] / n).square().sum() / variance.clamp(min=1e-30)),
                )
            )
        return rows


def pathological(inr: Mapping[int, float], kappa: float) -> list[int]:
    """The exits to drop: INR(L) < kappa * mean INR over the candidates (0.5 in the paper).

    Args:
      inr: depth of each candidate -> its INR.
      kappa: 0 keeps all.
    """
    mean = sum(inr.values()) / max(len(inr), 1)
    return [depth for depth, value in inr.items() if value < kappa * mean]


def as_rows(noise: Sequence[BlockNoise]) -> list[dict[str, float]]:
    """The profile as JSON: one object per block."""
    return [{"block": i, **asdict(row)} for i, row in enumerate(noise, 1)]
