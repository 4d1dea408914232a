"""How a tower becomes integers: the scheme, weights ahead of time, activations at run time."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lraee.ops.backend import Backend, operators
from lraee.ops.reference import Quantized

Site = Literal["in_proj", "out_proj", "c_fc", "c_proj"]
SITES: tuple[Site, ...] = get_args(Site)

Granularity = Literal["row", "row_symmetric", "batch", "batch_7bit"]
"""Where one scale of an activation holds, and over which range (see quantize_activation)."""

AttentionKind = Literal["auto", "int8", "float"]

FROM_IMAGES = "images"
_DIGEST = re.compile("[0-9a-f]{64}")
_MOST_COPIES = 8
_CLIP_RATIOS = tuple(1.0 - 0.02 * i for i in range(1, 26))


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Scheme: {name} must be one of {', '.join(choices)}, got {value!r}")


@dataclass(frozen=True)
class Scheme:
    """Which parts of a tower are quantized, and with how fine a step.

    Args:
      weights: one scale per output channel, or per tensor.
      activations: one scale per token, or for the whole batch at once.
      attention: Q K^T in int8, or all of attention in float. "auto": int8 on a CPU; float on a GPU,
        whose tensor cores multiply the float scores faster than they are quantized.
      patch_embedding: in float, or in int8 with one scale per patch.
      symmetric: linears whose input is quantized without a zero point. The zero point costs
        nothing at run time, so none by default.
      clip_weights: search, per output channel, the range with the least squared weight error.
      keep_float: linears left float, by block and path in it: the last word of the block list's
        path, the block's number, the linear, such as "blocks.11.mlp.fc2".
      calibration: empty; "images", which accelerate(calibration=…) is to be given; of a calibrated
        tower the sha256 of its linears and norms.
    """

    weights: Literal["channel", "tensor"] = "channel"
    activations: Literal["token", "batch"] = "token"
    attention: AttentionKind = "auto"
    patch_embedding: Literal["float", "int8"] = "float"
    symmetric: tuple[Site, ...] = ()
    clip_weights: bool = False
    keep_float: tuple[str, ...] = ()
    calibration: str = ""

    def __post_init__(self) -> None:
        """Raises ValueError on a value that is none of the choices."""
        _require_choice("weights", self.weights, ("channel", "tensor"))
        _require_choice("activations", self.activations, ("token", "batch"))
        _require_choice("attention", self.attention, get_args(AttentionKind))
        _require_choice("patch_embedding", self.patch_embedding, ("float", "int8"))
        for site in self.symmetric:
            _require_choice("symmetric", site, SITES)
        if self.calibration not in ("", FROM_IMAGES) and not _DIGEST.fullmatch(self.calibration):
            raise ValueError(
                f"Scheme: calibration must be empty, {FROM_IMAGES!r} or a sha256, got"
                f" {self.calibration!r}"
            )

    @property
    def fields(self) -> dict[str, Any]:
        """The options as JSON; calibration only where there is one, so that older versions read
        the file of any other scheme.
        """
        fields = asdict(self)
        return (
            fields if self.calibration else {k: v for k, v in fields.items() if k != "calibration"}
        )

    def on(self, device: torch.device) -> "Scheme":
        """The scheme as it is computed on a device, with attention int8 or float."""
        return replace(self, attention=attention_on(self.attention, device))

    def granularity(self, site: Site) -> Granularity:
        """How the input of this linear is quantized."""
        if self.activations == "batch":
            # torch passes reduce_range to its dynamic linear always; qnnpack alone ignores it
            is_reduced = torch.backends.quantized.engine != "qnnpack"
            return "batch_7bit" if is_reduced else "batch"
        return "row_symmetric" if site in self.symmetric else "row"


def attention_on(kind: AttentionKind, device: torch.device) -> Literal["int8", "float"]:
    """How attention of this kind is computed on a device."""
    if kind == "auto":
        return "float" if device.type == "cuda" else "int8"
    return kind


INT8 = Scheme()
INT8_PATCHES = Scheme(patch_embedding="int8")
"""INT8, and the patch embedding as well: a few per cent of the FLOPs of a ViT-B/32, a tenth of its
time on a CPU where it is float."""
INT8_CALIBRATED = Scheme(calibration=FROM_IMAGES)
"""INT8, its weights and norms calibrated on images: accelerate(model, calibration=images)."""
PAPER = Scheme(weights="tensor", activations="batch", attention="float")
"""The numerics of torch.ao.quantization.quantize_dynamic on all linears of the tower.

torch's own pass would leave half of them float: of open_clip's nn.MultiheadAttention it touches
neither in_proj_weight (a raw parameter) nor out_proj (NonDynamicallyQuantizableLinear).
"""

SINCE = {"patch_embedding": "float", "calibration": ""}
"""Options that older files lack, and what they stand for there."""

_NAMED = {
    "int8": INT8, "int8-patches": INT8_PATCHES, "int8-calibrated": INT8_CALIBRATED, "paper": PAPER,
}  # fmt: skip


def find_scheme(scheme: str | Scheme) -> Scheme:
    """The scheme of this name, or the scheme itself.

    Raises: ValueError on an unknown name, TypeError on anything else.
    """
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        raise TypeError(
            f"accelerate: scheme must be a str or a Scheme, got {type(scheme).__name__}"
        )
    if scheme not in _NAMED:
        names = ", ".join(_NAMED)
        raise ValueError(f"accelerate: scheme must be one of {names} or a Scheme, got {scheme!r}")
    return _NAMED[scheme]


def quantize_weight(
    weight: Tensor, scheme: Scheme, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """Weight ~ w_q * w_scale[:, None].

    Args:
      weight: any float type [N, K].
      scheme: per channel: w_scale = max|row| / 127, w_q in [-127, 127]; per tensor: torch's
        default weight observer, w_scale = max|weight| / 127.5, w_q in [-128, 127].
      backend: what quantizes; the numbers are the same in each.
    Returns: w_q int8 [N, K], w_scale float32 [N].
    Raises: ValueError on NaN or Inf.
    """
    weight = weight.detach().float()
    if scheme.weights == "tensor":
        w_q, w_scale = _quantize_tensor(weight)
    else:
        w_q, w_scale, _ = operators(backend).quantize_rows(weight, symmetric=True)
    if not torch.isfinite(w_scale).all():
        raise ValueError("quantize_weight: weight must be finite, got NaN or Inf")
    if scheme.weights == "channel" and scheme.clip_weights:
        return _clip(weight, w_q, w_scale)
    return w_q, w_scale


def channel_copies(gamma: Tensor, beta: Tensor | None) -> Tensor:
    """Into how many equal parts each input channel behind a norm is cut, so that none is loud.

    size = max(|gamma|, |beta|); ceil(size / limit) parts, at most 8. The limit is 1.5 times the
    median size, doubled until no more than K / 16 parts are added. x @ w.T stays as it is, each
    part having the whole channel's weight; the range of a row of x is then that of its ordinary
    channels, and the weight's rows keep theirs.

    Args:
      gamma, beta: of the norm, any float type [K], or None for zeros.
    Returns: float32 [K], whole numbers.
    Source: outlier channel splitting (Zhao et al. 2019, arXiv:1901.09504), with the norm's
      parameters in place of measured ranges.
    """
    size = gamma.detach().float().abs()
    if beta is not None:
        size = torch.maximum(size, beta.detach().float().abs())
    limit = 1.5 * size.median().clamp(min=2.0**-20)
    while True:
        copies = (size / limit).ceil().clamp(1, _MOST_COPIES)
        if (copies - 1).sum() <= len(copies) // 16:
            return copies
        limit = limit * 2


def _quantize_tensor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's default_weight_observer and quantize_per_tensor."""
    largest = weight.abs().amax() if weight.numel() else weight.new_zeros(())
    scale = (largest / 127.5).clamp(min=torch.finfo(torch.float32).eps)
    # quantize_per_tensor multiplies by the reciprocal
    w_q = torch.round(weight * (1.0 / scale)).clamp(-128, 127).to(torch.int8)
    return w_q, scale.expand(weight.shape[0]).clone()


def _clip(weight: Tensor, w_q: Tensor, full_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Per channel, the range among 50 % .. 100 % of max|row| with the least squared error."""
    best_q, best_scale = w_q, full_scale
    best_error = (best_q * best_scale[:, None] - weight).square().sum(1)
    for ratio in _CLIP_RATIOS:
        scale = full_scale * ratio
        w_q = torch.round(weight / scale[:, None]).clamp(-127, 127)
        error = (w_q * scale[:, None] - weight).square().sum(1)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        best_scale = torch.where(is_better, scale, best_scale)
        best_q = torch.where(is_better[:, None], w_q.to(torch.int8), best_q)
    return best_q, best_scale


def quantize_activation(x: Tensor, granularity: Granularity, backend: Backend) -> Quantized:
    """X ~ (x_q - x_zero) * x_scale.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      granularity: row, row_symmetric: one scale per row, see lraee.ops.reference.quantize_rows;
        batch, batch_7bit: one scale and zero point for all rows, as quantize_batch.
      backend: what quantizes rows.
    Returns: x_q int8 [M, K], x_scale float32 [M], x_zero int32 [M].
    """
    if granularity in ("batch", "batch_7bit"):
        return quantize_batch(x, reduce_range=granularity == "batch_7bit")
    symmetric = granularity == "row_symmetric"
    return operators(backend).quantize_rows(x, symmetric=symmetric)  # type: ignore[no-any-return]


def quantize_batch(x: Tensor, *, reduce_range: bool) -> Quantized:
    """One scale and zero point for the batch, as torch's quantized::linear_dynamic takes them.

    torch counts steps in u8, 0..255 or 0..127 with reduce_range; here each is 128 less, in x_q and
    x_zero alike, which leaves x_q - x_zero as it was. One NaN or Inf makes every row NaN.

    Args:
      x: float32, bfloat16 or float16 [M, K].
      reduce_range: use 7 of the 8 bits.
    Returns: x_q int8 [M, K], x_scale float32 [M] and x_zero int32 [M], the same in every row.
    Source: ChooseQuantizationParams in ATen/native/quantized/cpu/QuantUtils.h.
    """
    x = x.float()
    steps = 127 if reduce_range else 255
    if x.numel() == 0:
        rows = x.new_zeros(x.shape[0])
        return x.to(torch.int8), rows + 1.0, rows.to(torch.int32)
    lo = x.amin().clamp(max=0.0).double()
    hi = x.amax().clamp(min=0.0).double()
    scale = (hi - lo) / steps
    is_zero = (scale.float() == 0) | torch.isinf(1.0 / scale.float())
    scale = torch.where(is_zero, 0.1, scale)
    # A step below 6.1e-5 is widened, and the range with it
    smallest = torch.tensor(6.1e-5, dtype=torch.float32, device=x.device).double()
    widen = torch.where(scale < smallest, smallest / scale.float().double(), 1.0)
    scale, lo, hi = torch.where(scale < smallest, smallest, scale), lo * widen, hi * widen
    from_lo, from_hi = -lo / scale, steps - hi / scale
    is_lo = lo / scale < steps - hi / scale
    zero = torch.round(torch.where(is_lo, from_lo, from_hi)).clamp(0, steps)
    x_scale = scale.float()
    x_q = torch.round(x * (1.0 / x_scale)) + zero.float()
    x_q = x_q.clamp(0, steps) - 128
    is_finite = torch.isfinite(x_scale)
    x_q = torch.where(is_finite, x_q, 0.0).to(torch.int8)
    x_zero = torch.where(is_finite, zero - 128, 0.0).to(torch.int32)
    x_scale = torch.where(is_finite, x_scale, torch.nan)
    return x_q, x_scale.expand(x.shape[0]).contiguous(), x_zero.expand(x.shape[0]).contiguous()
