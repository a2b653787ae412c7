"""Segment Anything as a proposer: the automatic masks of `SamAutomaticMaskGenerator`, computed with less work.

The image is embedded once per crop. Prompts are decoded in batches; masks of low predicted IoU are never enlarged, and
masks rejected by stability, the crop's border or box NMS never leave the device. The others become runs of pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field
from segment_anything import sam_model_registry
from segment_anything.modeling import Sam
from segment_anything.utils import amg
from segment_anything.utils.transforms import ResizeLongestSide
from torch import Tensor
from torchvision.ops import nms

from rayseg.config import Config
from rayseg.engine.tuning import reused_memory
from rayseg.errors import ModelError
from rayseg.models.encoders import read_state, unwrapped
from rayseg.models.pretrained_weights import everywhere, local_file
from rayseg.vision import rle
from rayseg.vision.proposals import Image, Proposals
from rayseg.vision.rle import Mask

Variant = Literal["vit_b", "vit_l", "vit_h"]

ORIGIN = "https://dl.fbaipublicfiles.com/segment_anything"
OFFICIAL: dict[Variant, tuple[str, str]] = {
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}
"""Variant -> name and SHA-256 of the published checkpoint."""
_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_ENLARGED = 32  # masks that a CPU enlarges to the image's size at once


def _checkpoint(checkpoint: str) -> str:
    if checkpoint in OFFICIAL:
        raise ValueError(f"{checkpoint} is a variant, expected a file or URL; set variant to it, leave checkpoint out")
    return checkpoint if checkpoint in {"", "random"} else everywhere(checkpoint)


class SamConfig(Config):
    """Automatic masks; the defaults are those of segment-anything."""

    variant: Variant = "vit_h"
    """Size of the image encoder."""
    checkpoint: Annotated[str, AfterValidator(_checkpoint)] = ""
    """Weights: a file or URL (docs/weights.md), or "random" to test the workflow; empty is the published file."""
    points: Annotated[int, Field(gt=0)] = 32
    """Points per side of the grid of prompts."""
    batch: Annotated[int, Field(gt=0)] | None = None
    """Points decoded at once; by default 64 on a CPU and 1024 on a GPU, halved when memory is short."""
    iou: float = 0.88
    """Predicted IoU above which a mask is kept; 0 keeps all."""
    stability: float = 0.95
    """Stability from which a mask is kept; 0 keeps all."""
    offset: float = 1.0
    """Shift of the logits' threshold by which stability is measured."""
    nms: float = 0.7
    """IoU of boxes above which the mask of lower predicted IoU is dropped."""
    crop_layers: Annotated[int, Field(ge=0)] = 0
    """Layers of crops; layer k repeats the prompts in 2^k x 2^k crops."""
    crop_nms: float = 0.7
    """IoU of boxes above which the mask of the larger crop is dropped."""
    crop_overlap: float = 512 / 1500
    """Share of the image's side by which crops of the first layer overlap."""
    crop_points: Annotated[int, Field(gt=0)] = 1
    """Points per side are divided by this from layer to layer."""
    half: bool | None = None
    """Compute in bfloat16; by default on GPUs only."""
    compiled: bool | None = None
    """Compile the image encoder; by default on GPUs only."""


class _Masks(NamedTuple):
    """Masks on the device, in the image's frame.

    `changes_M` are the first, last + 1, first, ... pixel of every row's runs, mask by mask; `counts_N` how many of them
    each mask has.
    """

    iou_N: Tensor
    stability_N: Tensor
    boxes_N4: Tensor
    changes_M: Tensor
    counts_N: Tensor


@dataclass(frozen=True, eq=False)
class SamProposer:
    """`(image, open) -> proposals`: SAM's automatic masks for prompts at points in open places.

    Args:
        sam: the model, on its device, in evaluation mode.
        config: prompts and thresholds.
    """

    sam: Sam
    config: SamConfig

    @reused_memory()
    @torch.inference_mode()
    def __call__(self, image_HWC: Image, open_HW: Mask) -> Proposals:
        """The masks, in the order of the crops and by predicted IoU within a crop."""
        size, config = image_HWC.shape[:2], self.config
        crops, layers = amg.generate_crop_boxes(size, config.crop_layers, config.crop_overlap)
        grids = amg.build_all_layer_point_grids(config.points, config.crop_layers, config.crop_points)
        parts = [self._crop(image_HWC, open_HW, crop, grids[layer]) for crop, layer in zip(crops, layers, strict=True)]
        if len(crops) > 1:  # of overlapping masks of several crops, keep that of the smallest crop
            areas = torch.tensor([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in crops], dtype=torch.float32)
            counts = torch.tensor([len(part.iou_N) for part in parts])
            masks = _joined(parts)
            scores_N = (1 / areas).repeat_interleave(counts).to(masks.boxes_N4.device)
            parts = [_taken(masks, nms(masks.boxes_N4.float(), scores_N, config.crop_nms))]
        proposals = []
        for part in parts:
            changes_M, counts_N = part.changes_M.cpu().numpy(), part.counts_N.cpu().numpy()
            pieces = np.split(changes_M, np.cumsum(counts_N)[:-1]) if len(counts_N) else []
            # Runs of neighbouring rows that meet end to end become one.
            masks_N = tuple(rle.joined(piece[::2], piece[1::2] - 1) for piece in pieces)
            scores = (part.iou_N.double().cpu().numpy(), part.stability_N.double().cpu().numpy())
            proposals.append(Proposals(masks_N, *scores))
        return Proposals.joined(proposals)

    def _crop(self, image_HWC: Image, open_HW: Mask, crop: list[int], grid_P2: NDArray[np.float64]) -> _Masks:
        """The masks of one crop (x0, y0, x1, y1) after box NMS by predicted IoU."""
        x0, y0, x1, y1 = crop
        points_P2 = grid_P2 * np.array([[x1 - x0, y1 - y0]])
        cols, rows = points_P2.astype(np.intp).T
        points_P2 = points_P2[open_HW[y0:y1, x0:x1][rows, cols]]
        if not len(points_P2):
            return _nothing(self.sam.device)
        # 1. embed the crop once
        resize = ResizeLongestSide(self.sam.image_encoder.img_size)
        small_hwC = resize.apply_image(image_HWC[y0:y1, x0:x1])
        pixels = torch.as_tensor(small_hwC, device=self.sam.device).permute(2, 0, 1)[None].contiguous()
        with self._precision():
            embedding: Tensor = self.sam.image_encoder(self.sam.preprocess(pixels))
        # 2. decode its points in batches
        frame = _Frame(crop, (y1 - y0, x1 - x0), image_HWC.shape[:2], small_hwC.shape[:2])
        prompts_P2 = torch.as_tensor(resize.apply_coords(points_P2, frame.size), device=self.sam.device)
        masks = _joined(list(self._batches(embedding, prompts_P2, frame)))
        # 3. drop duplicates
        return _taken(masks, nms(masks.boxes_N4.float(), masks.iou_N, self.config.nms))

    def _precision(self) -> torch.autocast:
        kind = self.sam.device.type
        wanted = kind == "cuda" if self.config.half is None else self.config.half
        return torch.autocast(kind, torch.bfloat16, enabled=wanted)

    def _batches(self, embedding: Tensor, points_P2: Tensor, frame: "_Frame") -> Iterator[_Masks]:
        """The masks of all points; a batch size that does not fit into memory is halved for all that follow."""
        batch, start = self.config.batch or (1024 if self.sam.device.type == "cuda" else 64), 0
        while start < len(points_P2):
            try:
                masks = self._batch(embedding, points_P2[start : start + batch], frame)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                torch.cuda.empty_cache()
                # The smaller batch stays: the next points need as much memory.
                batch //= 2
                continue
            yield masks
            start += batch

    def _batch(self, embedding: Tensor, points_P2: Tensor, frame: "_Frame") -> _Masks:
        with self._precision():
            low_Nhw, iou_N = decode(self.sam, embedding, points_P2, least_iou=self.config.iou)
        # A CPU enlarges few masks at a time: all of them would be 4 bytes x masks x pixels of the image.
        step = len(low_Nhw) if self.sam.device.type == "cuda" else _ENLARGED
        starts = range(0, len(low_Nhw), max(step, 1))
        parts = [self._enlarged(low_Nhw[k : k + step].float(), iou_N[k : k + step].float(), frame) for k in starts]
        return _joined(parts) if parts else _nothing(self.sam.device)

    def _enlarged(self, low_Nhw: Tensor, iou_N: Tensor, frame: "_Frame") -> _Masks:
        """The stable masks at the crop's size that the crop's border does not cut off."""
        config, threshold = self.config, self.sam.mask_threshold
        # 1. enlarge
        logits_NHW = self.sam.postprocess_masks(low_Nhw[:, None], frame.small, frame.size)[:, 0]
        stability_N = amg.calculate_stability_score(logits_NHW, threshold, config.offset)
        inside_NHW = logits_NHW > threshold
        # 2. select; a mask that the image's own border cuts off stays
        boxes_N4 = amg.batched_mask_to_box(inside_NHW)
        height, width = frame.image
        kept_N = ~amg.is_box_near_crop_edge(boxes_N4, frame.crop, [0, 0, width, height])
        if config.stability > 0:
            kept_N &= stability_N >= config.stability
        # 3. rows as runs: where a pixel and its left neighbour differ, a run begins or has ended
        padded = torch.nn.functional.pad(inside_NHW[kept_N], (1, 1))
        which, row, col = (padded[:, :, 1:] ^ padded[:, :, :-1]).nonzero(as_tuple=True)
        changes_M = (row + frame.crop[1]) * width + col + frame.crop[0]
        counts_N = torch.bincount(which, minlength=len(padded))
        boxes_N4 = amg.uncrop_boxes_xyxy(boxes_N4[kept_N], frame.crop)
        return _Masks(iou_N[kept_N], stability_N[kept_N], boxes_N4, changes_M, counts_N)


@dataclass(frozen=True)
class _Frame:
    """A crop (x0, y0, x1, y1), and the sizes of crop, image and encoder input, as (height, width)."""

    crop: list[int]
    size: tuple[int, int]
    image: tuple[int, int]
    small: tuple[int, int]


def decode(sam: Sam, embedding: Tensor, points_P2: Tensor, *, least_iou: float) -> tuple[Tensor, Tensor]:
    """Up to three masks of each point, as logits of low resolution, and their predicted IoU.

    Args:
        sam: the model.
        embedding: (1, C, h, w) of the image.
        points_P2: (x, y) in the encoder's pixels.
        least_iou: predicted IoU above which masks are returned, 0 for all; points without such a mask skip upscaling.

    Returns:
        (logits_Nhw, iou_N) of these masks, point by point.
    """
    decoder = sam.mask_decoder
    labels_P1 = torch.ones((len(points_P2), 1), dtype=torch.int, device=points_P2.device)
    sparse, dense = sam.prompt_encoder(points=(points_P2[:, None], labels_P1), boxes=None, masks=None)
    fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([fixed.expand(len(points_P2), -1, -1), sparse], dim=1)
    # One image for all points: the first layer then projects it once.
    image, position = embedding + dense[:1], sam.prompt_encoder.get_dense_pe()
    tokens, image_PNC = decoder.transformer(image, position, tokens)
    iou_P3 = decoder.iou_prediction_head(tokens[:, 0])[:, 1:]
    kept_P3 = iou_P3 > least_iou if least_iou > 0 else torch.ones_like(iou_P3, dtype=torch.bool)
    kept_P = kept_P3.any(dim=1)
    _, channels, height, width = embedding.shape
    image = image_PNC[kept_P].transpose(1, 2).reshape(-1, channels, height, width)
    fine = decoder.output_upscaling(image)
    # Token 0 is the IoU, token 1 the mask of unambiguous prompts, which a point is not.
    weights = [mlp(tokens[kept_P, 2 + k]) for k, mlp in enumerate(decoder.output_hypernetworks_mlps[1:])]
    logits_P3hw = torch.einsum("pkc,pchw->pkhw", torch.stack(weights, dim=1), fine)
    return logits_P3hw[kept_P3[kept_P]], iou_P3[kept_P3]


def _joined(parts: list[_Masks]) -> _Masks:
    return _Masks(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _taken(masks: _Masks, keep: Tensor) -> _Masks:
    """The masks at positions `keep`, in this order."""
    ends = masks.counts_N.cumsum(0)
    pieces = [masks.changes_M[end - count : end] for end, count in zip(ends[keep], masks.counts_N[keep], strict=True)]
    changes_M = torch.cat(pieces) if pieces else masks.changes_M[:0]
    return _Masks(masks.iou_N[keep], masks.stability_N[keep], masks.boxes_N4[keep], changes_M, masks.counts_N[keep])


def _nothing(device: torch.device) -> _Masks:
    empty, whole = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return _Masks(empty, empty, torch.zeros((0, 4), dtype=torch.int64, device=device), whole, whole)


# -- weights ----------------------------------------------------------------------------------------------------------


def load_sam(config: SamConfig, *, device: str | None = None) -> SamProposer:
    """The proposer, ready for images.

    Args:
        config: model, prompts and thresholds.
        device: torch device; by default the GPU if there is one.

    Raises:
        ModelError: the weights are missing, damaged or of another variant.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    state = None if config.checkpoint == "random" else checkpoint_state(config)
    model: Sam = sam_model_registry[config.variant]()
    if state is not None:
        model.load_state_dict(state)
    model = model.to(device).eval()
    if config.compiled or (config.compiled is None and device.startswith("cuda")):
        model.image_encoder.compile()
    return SamProposer(model, config)


def checkpoint_file(config: SamConfig) -> Path:
    """The file of the weights; those behind a URL are downloaded into the cache on first use.

    Raises:
        ModelError: it is missing, cannot be downloaded, or has another checksum.
    """
    name, digest = OFFICIAL[config.variant]
    wanted = config.checkpoint or f"{ORIGIN}/{name}"
    published = dict(OFFICIAL.values()) if wanted.startswith(("http://", "https://")) else {}
    path = local_file(wanted, sha256=published.get(wanted.rpartition("/")[2], ""))
    if not path.is_file():
        raise ModelError(
            f"SAM checkpoint {wanted} does not exist; download {ORIGIN}/{name} (SHA-256 {digest}) and give its "
            "path, or use proposer felzenszwalb, which needs none"
        )
    return path


def checkpoint_state(config: SamConfig) -> dict[str, Tensor]:
    """The tensors of the checkpoint that the variant has.

    Raises:
        ModelError: it is missing, damaged or of another variant.
    """
    path = checkpoint_file(config)
    # On the meta device a network has shapes and no memory.
    with torch.device("meta"):
        wanted = sam_model_registry[config.variant]().state_dict()
    state = unwrapped(read_state(str(path)), wanted, str(path))
    patch = state.get("image_encoder.patch_embed.proj.weight")
    variant = _WIDTHS.get(len(patch), f"SAM of width {len(patch)}") if patch is not None else "another model"
    if variant != config.variant:
        raise ModelError(
            f"SAM checkpoint {path} is of {variant}, expected {config.variant}; set sam.variant or another file"
        )
    wrong = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if wrong:
        lacking = f"lacks {len(wrong)} of {len(wanted)} tensors ({wrong[0]})"
        raise ModelError(f"SAM checkpoint {path} {lacking}; download it again")
    return {key: state[key] for key in wanted}
