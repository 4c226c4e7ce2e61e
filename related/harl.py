"""HARL: heuristic attention representation learning.

V. N. Tran, S.-H. Liu, Y.-H. Li, J.-C. Wang: "Heuristic Attention Representation Learning for
Self-Supervised Pretraining", Sensors 22(14):5169, 2022. We read the abstract, the READMEs and the
authors' code, TranNhiem/Heuristic_Attention_Represenation_Learning_SSL_Pytorch (PT) and its
TensorFlow twin (TF), not the paper's body.

    x -> x1, x2, m1, m2      two views; the same crops and flips of the image's mask
    h = maps(x)              feature maps                                          (N, C, h, w)
    whole, fg, bg            their means over everything, object, surroundings     (3, N, C)
    L = beta L_whole + (1 - beta) (alpha L_fg + (1 - alpha) L_bg), each as in BYOL

Sourced, [S: PT harl/methods/mncrl.py, TF] unless said
    One mask per image, made offline, pooled at the size of the feature maps; one projector and
    predictor for the three streams; L as above with alpha from 0.5 to 1 by half a cosine. InfoNCE
    within foregrounds and within backgrounds [S: TF binary_mask_nt_xent]. The original masks are
    DRFI's (a random forest, Matlab) or a saliency network's, which is not in its repository.
Our reading
    Our masks need no weights: a centre prior times (contrast with the image's border + half the
    spectral residual, Hou & Zhang 2007), a threshold of Otsu's kind, area 20 to 65 %. Behind a
    CIFAR stem the maps are 4 x 4, where "resize, then > 0" would make nearly every cell foreground;
    here a cell weighs as much as the mask covers it (there: 0 or 1, and sums divided by the
    area + 1). A stream of less than 5 % of the crop is replaced by the whole crop's (there: crops
    redrawn, up to 5 times, until 20 %). beta is 0.5 throughout; 1 - cos, mean of both ways (there:
    2 - 2 cos, summed, four times the gradient); m constant (there: from 0.99 to 1); SGD (there:
    LARS); SACL's heads (there: a predictor of 256, 4096, 256); no vertical flips. The InfoNCE form
    keeps SACL's keys and temperature, and a whole stream.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import sacl
from related.baselines import TwoNetworks, cosine
from sacl import Config, Images, UsageError, info_nce

OBJECTIVES = ("byol", "nce")
SMALLEST = 0.05  # least share of a crop that a stream is pooled from


class HARL(TwoNetworks):
    """masks (L, w, w), one for each training image, of bool or a probability.

    objective: one of OBJECTIVES; alpha: the foreground's first share, beta: the whole view's.
    """

    def __init__(self, cfg: Config, masks: Tensor, objective="byol", alpha=0.5, beta=0.5):
        super().__init__(cfg, len(masks))
        if objective not in OBJECTIVES:
            raise UsageError(f"objective {objective}: must be one of {', '.join(OBJECTIVES)}")
        self.objective, self.first_alpha, self.beta = objective, alpha, beta
        self.register_buffer("masks", masks, persistent=False)  # like the images, no state

    def views(self, x: Tensor, texture: None, index: Tensor) -> tuple[Tensor, ...]:
        """Two views (N, 3, H, W) and their parts of the mask (N, 1, H, W)."""
        size, masks = self.cfg.image_size, self.masks[index].float()[:, None]  # (N, 1, w, w)
        params = [sacl.sample_view(len(x), self.cfg, x.device) for _ in range(2)]
        views = (sacl.augment(x, view, size) for view in params)
        return *views, *(crop_mask(masks, view["crop"], size) for view in params)

    def forward(self, x1: Tensor, x2: Tensor, m1: Tensor, m2: Tensor) -> Tensor:
        p1, p2 = self.streams(x1, m1), self.streams(x2, m2)
        k1, k2 = self.stream_keys(x1, m1), self.stream_keys(x2, m2)
        self.monitor = sacl.similarities(p1[:1], k2[0], None)
        whole, fg, bg = (self.compare(*s) for s in zip(p1, p2, k1, k2, strict=True))
        alpha = self.alpha()
        return self.beta * whole + (1 - self.beta) * (alpha * fg + (1 - alpha) * bg)

    def streams(self, x: Tensor, mask: Tensor) -> Tensor:
        """Online network: predictions of whole, foreground and background, (3, N, D)."""
        return torch.stack(
            [self.predictor(self.projector(h)) for h in pool(self.encoder.maps(x), mask)]
        )

    @torch.no_grad()
    def stream_keys(self, x: Tensor, mask: Tensor) -> Tensor:
        """Target network: keys of whole, foreground and background, (3, N, D)."""
        return torch.stack(
            [self.target_projector(h) for h in pool(self.target_encoder.maps(x), mask)]
        )

    def compare(self, p1: Tensor, p2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
        """One stream's loss, mean of both ways: 1 - cos, or InfoNCE over the batch's streams."""
        if self.objective == "byol":
            return 1 - (cosine(p1, k2) + cosine(p2, k1)) / 2
        tau = self.cfg.tau
        return (info_nce(p1[None], k2, tau) + info_nce(p2[None], k1, tau)) / 2

    def alpha(self) -> Tensor:
        """The foreground's share, from its first value to 1 by half a cosine."""
        return 1 - (1 - self.first_alpha) * (1 + torch.cos(math.pi * self.progress())) / 2


def crop_mask(masks: Tensor, crop: Tensor, size: int) -> Tensor:
    """What sacl.augment crops, of masks (N, 1, w, w): (N, 1, size, size) in [0, 1]."""
    grid = F.affine_grid(crop, [len(masks), 1, size, size], align_corners=False)
    return F.grid_sample(masks, grid, padding_mode="reflection", align_corners=False)


def pool(maps: Tensor, mask: Tensor) -> Tensor:
    """Means of maps (N, C, h, w) over everything, mask (N, 1, H, W) and the rest: (3, N, C)."""
    cover = F.adaptive_avg_pool2d(mask, maps.shape[2:])  # (N, 1, h, w), 0 to 1
    whole = maps.mean((2, 3))

    def part(weight: Tensor) -> Tensor:
        mean = (maps * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-6)
        return torch.where(weight.mean((2, 3)) < SMALLEST, whole, mean.to(whole.dtype))

    return torch.stack([whole, part(cover), part(1 - cover)])


# ------------------------------------------------------------ masks


def make_masks(data: Images) -> Tensor:
    """The masks (L, w, w), bool, of all images; half a millisecond each at 32 px."""
    batches = torch.arange(len(data.pixels)).split(500)
    pixels = (sacl.take(data.pixels, index, torch.device("cpu")) for index in batches)
    return torch.cat([heuristic_masks(x) for x in pixels])


def heuristic_masks(x: Tensor) -> Tensor:
    """Masks (N, w, w), bool, of the objects in uint8 images (N, 3, S, S); w = min(S, 64).

    Otsu's threshold is relaxed, and moved where it would leave less than 20 or more than 65 % of
    the image; then each pixel goes with the majority of its 3 x 3 neighbourhood.
    """
    s = saliency(x)
    shares = torch.tensor([1 - 0.65, 1 - 0.2], device=s.device)
    bounds = torch.quantile(s.flatten(1), shares, dim=1)  # (2, N)
    threshold = (0.75 * otsu(s)).clamp(*bounds)
    mask = (s >= threshold[:, None, None]).float()
    return F.avg_pool2d(mask, 3, 1, 1) > 0.45


def saliency(x: Tensor) -> Tensor:
    """How much each pixel of uint8 images (N, 3, S, S) stands out, (N, w, w) in [0, 1].

    Lengths in pixels are those of 32 px images, in proportion.
    """
    x = x.float() / 255
    if x.shape[-1] > 64:  # larger ones are seen coarsely, so that texture does not stand out
        x = F.interpolate(x, size=(64, 64), mode="area")
    unit = x.shape[-1] / 32
    r, g, b = x.unbind(1)
    opponent = torch.stack([(r + g + b) / 3, r - g, (r + g) / 2 - b], 1)  # (N, 3, w, w)
    opponent = blur(opponent, 0.6 * unit)
    contrast = rescale(border_contrast(opponent, max(2, round(2 * unit))))
    residual = rescale(blur(spectral_residual(opponent[:, 0])[:, None], 1.5 * unit)[:, 0].sqrt())
    at = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    centre = torch.exp(-(at[:, None] ** 2 + at**2) / (2 * 0.6**2))  # photographers aim
    return rescale(blur(((contrast + 0.5 * residual) * centre)[:, None], 0.8 * unit)[:, 0])


def border_contrast(x: Tensor, strip: int) -> Tensor:
    """Mahalanobis distance of each pixel's colour to the image's four sides: (N, w, w).

    The geometric mean over sides: a pixel that is like any one side is background.
    """
    colours = x.flatten(2)  # (N, 3, w w)
    logs = []
    for side in (x[:, :, :strip], x[:, :, -strip:], x[..., :strip], x[..., -strip:]):
        side = side.flatten(2)  # (N, 3, strip w)
        mean = side.mean(2, keepdim=True)
        spread = (side - mean) @ (side - mean).transpose(1, 2) / side.shape[2]  # (N, 3, 3)
        spread = spread + 4e-3 * torch.eye(3, device=x.device)  # a flat side is not infinitely so
        away = colours - mean
        logs.append(torch.log((away * torch.linalg.solve(spread, away)).sum(1) + 1e-2))
    return (sum(logs) / 8).exp().unflatten(1, x.shape[2:])  # / 8: of four squares


def spectral_residual(grey: Tensor) -> Tensor:
    """Energy of what is unusual in the spectrum of images (N, w, w) (Hou & Zhang 2007)."""
    spectrum = torch.fft.fft2(grey)
    log = torch.log(spectrum.abs() + 1e-6)
    usual = F.avg_pool2d(F.pad(log[:, None], (1, 1, 1, 1), "circular"), 3, 1)[:, 0]
    return torch.fft.ifft2(torch.polar((log - usual).exp(), spectrum.angle())).abs() ** 2


def otsu(s: Tensor, bins: int = 32) -> Tensor:
    """The threshold that best parts the values of s (N, w, w) in [0, 1] into two classes: (N,)."""
    level = (s.flatten(1) * (bins - 1)).round().long()
    share = torch.zeros(len(s), bins, device=s.device)
    share.scatter_add_(1, level, torch.ones_like(level, dtype=share.dtype) / level.shape[1])
    value = torch.arange(bins, device=s.device) / (bins - 1)
    below, moment = share.cumsum(1), (share * value).cumsum(1)  # (N, bins) each
    between = (moment[:, -1:] * below - moment) ** 2 / (below * (1 - below) + 1e-8)
    return value[between.argmax(1)] + 0.5 / (bins - 1)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of images (N, C, w, w), edges repeated."""
    reach = max(1, round(2.5 * sigma))
    at = torch.arange(-reach, reach + 1, device=x.device)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
    x = F.conv2d(F.pad(x, (reach, reach, 0, 0), "replicate"), kernel, groups=x.shape[1])
    x = F.pad(x, (0, 0, reach, reach), "replicate")
    return F.conv2d(x, kernel.transpose(2, 3), groups=x.shape[1])


def rescale(s: Tensor) -> Tensor:
    """Each image's values (N, w, w) stretched to [0, 1]; 0 where they are all the same."""
    low, high = s.amin((1, 2), keepdim=True), s.amax((1, 2), keepdim=True)
    return (s - low) / (high - low + 1e-8)
