"""Segment Anything as a proposer: the automatic masks of `SamAutomaticMaskGenerator`, with less work for the same.

The image is embedded once per crop. Prompts are decoded in batches; what the predicted IoU rules out is never
enlarged, and what stability, the crop's border or box NMS rule out never leaves the device. Survivors are runs.
"""

import hashlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import httpx
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
from rayseg.models.encoders import read_state
from rayseg.store import absolute, cache_dir, put_file
from rayseg.vision import rle
from rayseg.vision.proposals import Image, Proposals
from rayseg.vision.rle import Mask, Runs

Variant = Literal["vit_b", "vit_l", "vit_h"]
WEB = ("http://", "https://")
ORIGIN = "https://dl.fbaipublicfiles.com/segment_anything"
OFFICIAL: dict[Variant, tuple[str, str]] = {
    "vit_b": ("sam_vit_b_01ec64.pth", "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"),
    "vit_l": ("sam_vit_l_0b3195.pth", "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"),
    "vit_h": ("sam_vit_h_4b8939.pth", "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"),
}
"""Variant -> name and SHA-256 of the published checkpoint."""
_WIDTHS = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
_ENLARGED = 32  # masks enlarged to the image's size at once on a CPU


def checkpoint_everywhere(checkpoint: str) -> str:
    """The name of a checkpoint, or its file as it is understood from any working folder."""
    named = checkpoint in {"", "random"} or checkpoint.startswith(WEB)
    return checkpoint if named else absolute(checkpoint)


class SamConfig(Config):
    """Automatic masks; the defaults are those of segment-anything."""

    variant: Variant = "vit_h"
    """Size of the image encoder."""
    checkpoint: Annotated[str, AfterValidator(checkpoint_everywhere)] = ""
    """Weights: a file, a URL of one of the published files, or "random" to try the path; empty is the published one."""
    points: Annotated[int, Field(gt=0)] = 32
    """Points per side of the grid of prompts."""
    batch: Annotated[int, Field(gt=0)] | None = None
    """Points decoded at once; by default 64 on a CPU and 1024 on a GPU, where lack of memory halves it."""
    iou: float = 0.88
    """Predicted IoU above which a mask is kept; 0 keeps all."""
    stability: float = 0.95
    """Stability from which a mask is kept; 0 keeps all."""
    offset: float = 1.0
    """Shift of the logits' threshold by which stability is measured."""
    nms: float = 0.7
    """IoU of boxes above which the mask of lower predicted IoU goes."""
    crop_layers: Annotated[int, Field(ge=0)] = 0
    """Layer k asks again in 2^k x 2^k crops."""
    crop_nms: float = 0.7
    """IoU of boxes above which the mask of the larger crop goes."""
    crop_overlap: float = 512 / 1500
    """Share of the image's side by which crops of the first layer overlap."""
    crop_points: Annotated[int, Field(gt=0)] = 1
    """Points per side are divided by this from layer to layer."""
    half: bool | None = None
    """Compute in bfloat16; by default on GPUs only."""
    compiled: bool | None = None
    """Compile the image encoder; by default on GPUs only."""


class _Found(NamedTuple):
    """Masks on the device, in the image's frame: where rows change from outside to inside and back, by mask."""

    iou_N: Tensor
    stability_N: Tensor
    boxes_N4: Tensor
    changes_M: Tensor
    counts_N: Tensor


@dataclass(frozen=True, eq=False)
class SamProposer:
    """`(image, open) -> proposals`: SAM's automatic masks of what points in open places mark.

    Args:
        sam: the model, on its device, in evaluation mode.
        config: how it is asked.
    """

    sam: Sam
    config: SamConfig

    @reused_memory()
    @torch.inference_mode()
    def __call__(self, image_HWC: Image, open_HW: Mask) -> Proposals:
        """The masks, in the order of the crops and within one by predicted IoU."""
        size, config = image_HWC.shape[:2], self.config
        crops, layers = amg.generate_crop_boxes(size, config.crop_layers, config.crop_overlap)
        grids = amg.build_all_layer_point_grids(config.points, config.crop_layers, config.crop_points)
        found = [self._crop(image_HWC, open_HW, crop, grids[layer]) for crop, layer in zip(crops, layers, strict=True)]
        if len(crops) > 1:
            found = self._smaller_crops_first(found, crops)
        return Proposals.joined([_proposals(one) for one in found])

    def _smaller_crops_first(self, found: list[_Found], crops: list[list[int]]) -> list[_Found]:
        sizes = torch.tensor([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in crops], dtype=torch.float32)
        counts = torch.tensor([len(one.iou_N) for one in found])
        whole = _Found(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        scores_N = (1 / sizes).repeat_interleave(counts).to(whole.boxes_N4.device)
        return [_taken(whole, nms(whole.boxes_N4.float(), scores_N, self.config.crop_nms))]

    def _crop(self, image_HWC: Image, open_HW: Mask, crop: list[int], grid_P2: NDArray[np.float64]) -> _Found:
        """The masks of one crop (x0, y0, x1, y1), without those of lower predicted IoU over the same box."""
        x0, y0, x1, y1 = crop
        points_P2 = grid_P2 * np.array([[x1 - x0, y1 - y0]])
        cols, rows = points_P2.astype(np.intp).T
        points_P2 = points_P2[open_HW[y0:y1, x0:x1][rows, cols]]
        if not len(points_P2):
            return _nothing(self.sam.device)
        resize = ResizeLongestSide(self.sam.image_encoder.img_size)
        with self._precision():
            small_hwC = resize.apply_image(image_HWC[y0:y1, x0:x1])
            embedding = self._embedded(small_hwC)
        frame = _Frame(crop, (y1 - y0, x1 - x0), image_HWC.shape[:2], small_hwC.shape[:2])
        asked_P2 = torch.as_tensor(resize.apply_coords(points_P2, frame.size), device=self.sam.device)
        parts = list(self._batches(embedding, asked_P2, frame))
        whole = _Found(*(torch.cat(kind) for kind in zip(*parts, strict=True)))
        return _taken(whole, nms(whole.boxes_N4.float(), whole.iou_N, self.config.nms))

    def _embedded(self, small_hwC: Image) -> Tensor:
        pixels = torch.as_tensor(small_hwC, device=self.sam.device).permute(2, 0, 1)[None].contiguous()
        embedding: Tensor = self.sam.image_encoder(self.sam.preprocess(pixels))
        return embedding

    def _precision(self) -> torch.autocast:
        kind = self.sam.device.type
        wanted = kind == "cuda" if self.config.half is None else self.config.half
        return torch.autocast(kind, torch.bfloat16, enabled=wanted)

    def _batches(self, embedding: Tensor, points_P2: Tensor, frame: "_Frame") -> Iterator[_Found]:
        """The masks of all points; a batch that does not fit into memory is halved for good."""
        batch, start = self.config.batch or (1024 if self.sam.device.type == "cuda" else 64), 0
        while start < len(points_P2):
            try:
                found = self._batch(embedding, points_P2[start : start + batch], frame)
            except torch.OutOfMemoryError:
                if batch == 1:
                    raise
                torch.cuda.empty_cache()
                batch //= 2
                continue
            yield found
            start += batch

    def _batch(self, embedding: Tensor, points_P2: Tensor, frame: "_Frame") -> _Found:
        with self._precision():
            low_Nhw, iou_N = decode(self.sam, embedding, points_P2, least_iou=self.config.iou)
        step = len(low_Nhw) if self.sam.device.type == "cuda" else _ENLARGED
        starts = range(0, len(low_Nhw), max(step, 1))
        parts = [self._enlarged(low_Nhw[k : k + step].float(), iou_N[k : k + step].float(), frame) for k in starts]
        if not parts:
            return _nothing(self.sam.device)
        return _Found(*(torch.cat(kind) for kind in zip(*parts, strict=True)))

    def _enlarged(self, low_Nhw: Tensor, iou_N: Tensor, frame: "_Frame") -> _Found:
        """The masks at the crop's size that are stable and not cut off by the crop's border."""
        config, threshold = self.config, self.sam.mask_threshold
        logits_NHW = self.sam.postprocess_masks(low_Nhw[:, None], frame.small, frame.size)[:, 0]
        stability_N = amg.calculate_stability_score(logits_NHW, threshold, config.offset)
        inside_NHW = logits_NHW > threshold
        boxes_N4 = amg.batched_mask_to_box(inside_NHW)
        height, width = frame.image
        kept_N = ~amg.is_box_near_crop_edge(boxes_N4, frame.crop, [0, 0, width, height])
        if config.stability > 0:
            kept_N &= stability_N >= config.stability
        changes_M, counts_N = _changes(inside_NHW[kept_N], frame)
        boxes_N4 = amg.uncrop_boxes_xyxy(boxes_N4[kept_N], frame.crop)
        return _Found(iou_N[kept_N], stability_N[kept_N], boxes_N4, changes_M, counts_N)


@dataclass(frozen=True)
class _Frame:
    """A crop (x0, y0, x1, y1), its size, that of the image, and of what the encoder saw, as (height, width)."""

    crop: list[int]
    size: tuple[int, int]
    image: tuple[int, int]
    small: tuple[int, int]


def decode(sam: Sam, embedding: Tensor, points_P2: Tensor, *, least_iou: float) -> tuple[Tensor, Tensor]:
    """Three masks of each point, as logits of low resolution, and their predicted IoU.

    Args:
        sam: the model.
        embedding: (1, C, h, w) of the image.
        points_P2: (x, y) in the encoder's pixels.
        least_iou: masks must be predicted above it, unless it is 0; points without one are not decoded to the end.

    Returns:
        (logits_Nhw, iou_N) of the masks that are, point by point.
    """
    decoder = sam.mask_decoder
    labels_P1 = torch.ones((len(points_P2), 1), dtype=torch.int, device=points_P2.device)
    sparse, dense = sam.prompt_encoder(points=(points_P2[:, None], labels_P1), boxes=None, masks=None)
    fixed = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    tokens = torch.cat([fixed.expand(len(points_P2), -1, -1), sparse], dim=1)
    image, place = embedding + dense[:1], sam.prompt_encoder.get_dense_pe()  # one for all points: the first layer's
    tokens, image_PNC = decoder.transformer(image, place, tokens)  # projections of the image are then computed once
    iou_P3 = decoder.iou_prediction_head(tokens[:, 0])[:, 1:]
    kept_P3 = iou_P3 > least_iou if least_iou > 0 else torch.ones_like(iou_P3, dtype=torch.bool)
    asked = kept_P3.any(dim=1)
    _, channels, height, width = embedding.shape
    image = image_PNC[asked].transpose(1, 2).reshape(-1, channels, height, width)
    fine = decoder.output_upscaling(image)
    weights = [
        mlp(tokens[asked, 2 + k]) for k, mlp in enumerate(decoder.output_hypernetworks_mlps[1:])
    ]  # mask token 0 is for a single mask, not asked for
    logits_P3hw = torch.einsum("pkc,pchw->pkhw", torch.stack(weights, dim=1), fine)
    return logits_P3hw[kept_P3[asked]], iou_P3[kept_P3]


def _changes(inside_NHW: Tensor, frame: _Frame) -> tuple[Tensor, Tensor]:
    """(first, last + 1, first, ...) pixel of every row's runs in the image, and how many numbers are each mask's."""
    padded = torch.nn.functional.pad(inside_NHW, (1, 1))
    which, row, col = (padded[:, :, 1:] ^ padded[:, :, :-1]).nonzero(as_tuple=True)
    places = (row + frame.crop[1]) * frame.image[1] + col + frame.crop[0]
    return places, torch.bincount(which, minlength=len(inside_NHW))


def _taken(found: _Found, keep: Tensor) -> _Found:
    """Some masks, in that order."""
    ends = found.counts_N.cumsum(0)
    pieces = [found.changes_M[end - count : end] for end, count in zip(ends[keep], found.counts_N[keep], strict=True)]
    changes_M = torch.cat(pieces) if pieces else found.changes_M[:0]
    return _Found(found.iou_N[keep], found.stability_N[keep], found.boxes_N4[keep], changes_M, found.counts_N[keep])


def _nothing(device: torch.device) -> _Found:
    empty, whole = torch.zeros(0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    return _Found(empty, empty, torch.zeros((0, 4), dtype=torch.int64, device=device), whole, whole)


def _proposals(found: _Found) -> Proposals:
    changes_M, counts_N = found.changes_M.cpu().numpy(), found.counts_N.cpu().numpy()
    pieces = np.split(changes_M, np.cumsum(counts_N)[:-1]) if len(counts_N) else []
    runs: list[Runs] = [rle.joined(piece[::2], piece[1::2] - 1) for piece in pieces]
    return Proposals(tuple(runs), found.iou_N.double().cpu().numpy(), found.stability_N.double().cpu().numpy())


# -- weights ----------------------------------------------------------------------------------------------------------


def load_sam(config: SamConfig, *, device: str | None = None) -> SamProposer:
    """The proposer, ready to be asked.

    Args:
        config: which model and how it is asked.
        device: torch device; by default the GPU if there is one.

    Raises:
        ModelError: there are no such weights, they are damaged or of another variant.
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
    """The file of the weights, fetched into the cache if it is one of the published ones and not there yet.

    Raises:
        ModelError: it is not there, cannot be fetched, or is not what it should be.
    """
    name, digest = OFFICIAL[config.variant]
    wanted = config.checkpoint or f"{ORIGIN}/{name}"
    if not wanted.startswith(WEB):
        if not Path(wanted).is_file():
            raise ModelError(
                f"SAM checkpoint {wanted} is not there; fetch {ORIGIN}/{name} (SHA-256 {digest}) and give its path, "
                "or use proposer felzenszwalb, which needs none"
            )
        return Path(wanted)
    known = dict(OFFICIAL.values())
    file = wanted.rpartition("/")[2]
    if file not in known:
        raise ModelError(
            f"SAM checkpoint {wanted} is none of the published files {', '.join(known)}; fetch it and give its path"
        )
    path = cache_dir() / "sam" / file
    if not path.is_file():
        _fetch(wanted, path, known[file])
    return path


def _fetch(url: str, path: Path, digest: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part, found = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part"), hashlib.sha256()  # others may fetch too
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=60) as answer, part.open("wb") as file:
            answer.raise_for_status()
            for block in answer.iter_bytes(1 << 20):
                found.update(block)
                file.write(block)
    except (httpx.HTTPError, OSError) as error:
        part.unlink(missing_ok=True)
        raise ModelError(
            f"SAM checkpoint {url} cannot be fetched ({error}); bring the file here another way and give its path "
            "with --set sam.checkpoint=FILE, or use proposer felzenszwalb, which needs none"
        ) from None
    if found.hexdigest() != digest:
        part.unlink()
        raise ModelError(f"{url} has SHA-256 {found.hexdigest()}, expected {digest}; fetch it again or elsewhere")
    put_file(path, part)


def checkpoint_state(config: SamConfig) -> dict[str, Tensor]:
    """The tensors of the checkpoint, all that the variant has and no others.

    Raises:
        ModelError: it is not to be had, damaged or of another variant.
    """
    path = checkpoint_file(config)
    state = read_state(str(path))
    patch = state.get("image_encoder.patch_embed.proj.weight")
    found = _WIDTHS.get(len(patch), f"a SAM of width {len(patch)}") if patch is not None else "no SAM of these kinds"
    if found != config.variant:
        raise ModelError(
            f"SAM checkpoint {path} is of {found}, expected {config.variant}; set sam.variant or another file"
        )
    with torch.device("meta"):
        wanted = sam_model_registry[config.variant]().state_dict()
    wrong = [key for key in wanted if key not in state or state[key].shape != wanted[key].shape]
    if wrong:
        lacking = f"lacks {len(wrong)} of {len(wanted)} tensors ({wrong[0]})"
        raise ModelError(f"SAM checkpoint {path} {lacking}; fetch it anew")
    return {key: state[key] for key in wanted}
