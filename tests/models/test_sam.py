"""SAM's automatic masks: the same as the published generator's from the same weights, and weights refused clearly."""

from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from rayseg.errors import ModelError
from rayseg.models import sam as sams
from rayseg.models.sam import SamConfig, SamProposer
from rayseg.vision import rle

torch.set_num_threads(1)


def small_sam(*, side=128, width=32, seed=0):
    """A SAM of 1 block that has learnt nothing, whose masks are of all sizes and whose predicted IoU is around 0.5."""
    torch.manual_seed(seed)
    encoder = ImageEncoderViT(
        img_size=side,
        depth=1,
        embed_dim=32,
        num_heads=2,
        out_chans=width,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=4,
        global_attn_indexes=(0,),
    )
    prompts = PromptEncoder(
        embed_dim=width,
        image_embedding_size=(side // 16, side // 16),
        input_image_size=(side, side),
        mask_in_chans=4,
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=width, mlp_dim=64, num_heads=2)
    decoder = MaskDecoder(transformer_dim=width, transformer=transformer, iou_head_hidden_dim=32)
    model = Sam(encoder, prompts, decoder).eval()
    model.mask_threshold = 16.0  # of logits that vary by 6: masks are small then, and lie in different places
    with torch.no_grad():
        for name, weights in transformer.named_parameters():
            weights.mul_(6 if "proj.weight" in name else 1)
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight *= 200
        decoder.iou_prediction_head.layers[-1].weight *= 8
        decoder.iou_prediction_head.layers[-1].bias += 0.5
    return model


def picture(seed=0, shape=(120, 160)):
    """Coloured blocks with noise."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (6, 8, 3)).repeat(20, axis=0).repeat(20, axis=1)[: shape[0], : shape[1]]
    return np.clip(blocks + rng.normal(0, 12, (*shape, 3)), 0, 255).astype(np.uint8)


def published(model, image, config):
    """What the published generator finds, as (runs, predicted IoU, stability)."""
    generator = SamAutomaticMaskGenerator(
        model,
        points_per_side=config.points,
        pred_iou_thresh=config.iou,
        stability_score_thresh=config.stability,
        stability_score_offset=config.offset,
        box_nms_thresh=config.nms,
        crop_n_layers=config.crop_layers,
        crop_nms_thresh=config.crop_nms,
        crop_n_points_downscale_factor=config.crop_points,
    )
    return [
        (rle.encode(one["segmentation"]), one["predicted_iou"], one["stability_score"])
        for one in generator.generate(image)
    ]


def ours(model, image, config):
    return SamProposer(model, config)(image, np.ones(image.shape[:2], bool))


def the_same(model, image, config):
    expected, found = published(model, image, config), ours(model, image, config)
    got = list(zip(found.masks, found.iou_N, found.stability_N, strict=True))
    one, other = (sorted(rows, key=lambda row: (row[0].tobytes(), row[1])) for rows in (expected, got))
    assert [runs.tobytes() for runs, _, _ in one] == [runs.tobytes() for runs, _, _ in other]
    for (runs, *expected_scores), (_, *scores) in zip(one, other, strict=True):
        pixel = 1 / max(rle.area(runs), 1)  # a share of pixels: rounding may bring one over the threshold
        np.testing.assert_allclose(scores, expected_scores, rtol=0, atol=1e-4 + pixel)  # NaN, of no mask, equals NaN
    return len({runs.tobytes() for runs, _, _ in one})


@pytest.mark.parametrize(
    "config",
    [
        SamConfig(points=12, iou=0.05, stability=0.2, offset=0.3, nms=0.9),
        SamConfig(points=8, iou=0.0, stability=0.0, nms=0.9),
        SamConfig(points=8, iou=0.05, stability=0.1, offset=0.3, crop_layers=1, nms=0.9, crop_nms=0.9),
        SamConfig(points=8, iou=0.0, stability=0.1, crop_layers=2, crop_points=2, nms=0.9, crop_nms=0.8),
    ],
)
def test_the_masks_are_those_of_the_published_generator(config):
    assert the_same(small_sam(), picture(), config) > 3


@pytest.mark.real
@pytest.mark.parametrize("layers", [0, 1])
def test_the_masks_are_those_of_the_published_generator_on_real_images(shared, layers):
    for name in ("0018", "0716"):
        image = np.array(Image.open(shared / f"data/agri/{name}.jpg"))[300:640, 200:660]
        assert (
            the_same(
                small_sam(),
                image,
                SamConfig(points=12, iou=0.05, stability=0.1, offset=0.3, nms=0.9, crop_nms=0.9, crop_layers=layers),
            )
            > 3
        )


def test_the_size_of_a_batch_changes_nothing():
    model, image = small_sam(), picture()
    whole = ours(model, image, SamConfig(points=8, iou=0.05, stability=0.0, batch=64))
    parts = ours(model, image, SamConfig(points=8, iou=0.05, stability=0.0, batch=7))
    assert [runs.tobytes() for runs in whole.masks] == [runs.tobytes() for runs in parts.masks]


def test_points_where_it_is_not_open_are_not_asked(monkeypatch):
    asked = []

    def noted(sam, embedding, points_P2, *, least_iou):
        asked.extend(points_P2.tolist())
        return decode(sam, embedding, points_P2, least_iou=least_iou)

    decode = sams.decode
    monkeypatch.setattr(sams, "decode", noted)
    image, open_HW = picture(), np.zeros((120, 160), bool)
    open_HW[:, 80:] = True
    SamProposer(small_sam(), SamConfig(points=8, iou=0.0, stability=0.0))(image, open_HW)
    assert len(asked) == 32
    assert min(x for x, _ in asked) > 80 * 128 / 160
    asked.clear()
    assert len(SamProposer(small_sam(), SamConfig(points=8))(image, np.zeros((120, 160), bool))) == 0
    assert asked == []


def test_lack_of_memory_halves_the_batch(monkeypatch):
    decode, sizes = sams.decode, []

    def scarce(sam, embedding, points_P2, *, least_iou):
        sizes.append(len(points_P2))
        if len(points_P2) > 20:
            raise torch.OutOfMemoryError
        return decode(sam, embedding, points_P2, least_iou=least_iou)

    expected = ours(small_sam(), picture(), SamConfig(points=8, iou=0.05, stability=0.0))
    monkeypatch.setattr(sams, "decode", scarce)
    found = ours(small_sam(), picture(), SamConfig(points=8, iou=0.05, stability=0.0, batch=64))
    assert sizes == [64, 32, 16, 16, 16, 16]
    assert [runs.tobytes() for runs in found.masks] == [runs.tobytes() for runs in expected.masks]


# -- weights ----------------------------------------------------------------------------------------------------------


def test_a_missing_checkpoint_says_where_to_get_it(tmp_path):
    with pytest.raises(ModelError, match=r"sam_vit_b_01ec64\.pth \(SHA-256 ec2df6.*proposer felzenszwalb"):
        sams.load_sam(SamConfig(variant="vit_b", checkpoint=str(tmp_path / "none.pth")))


def test_a_damaged_checkpoint_is_refused_with_its_name_and_reason(tmp_path):
    path = tmp_path / "broken.pth"
    torch.save(small_sam().state_dict(), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"broken\.pth \(5000 bytes\) are damaged"):
        sams.load_sam(SamConfig(variant="vit_b", checkpoint=str(path)))


@pytest.mark.real
def test_a_truncated_download_is_refused_with_its_name_and_reason(shared):
    with pytest.raises(ModelError, match=r"mobile_sam_truncated\.pt \(1835008 bytes\) are damaged"):
        sams.load_sam(SamConfig(variant="vit_b", checkpoint=str(shared / "weights/mobile_sam_truncated.pt")))


def test_a_checkpoint_of_another_variant_is_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"image_encoder.patch_embed.proj.weight": torch.zeros(1024, 3, 16, 16)}, path)
    with pytest.raises(ModelError, match=r"is of vit_l, expected vit_b; set sam.variant"):
        sams.load_sam(SamConfig(variant="vit_b", checkpoint=str(path)))
    torch.save({"patch_embed.weight": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match="is of another model, expected vit_b"):
        sams.load_sam(SamConfig(variant="vit_b", checkpoint=str(path)))


def test_a_checkpoint_of_a_training_is_found_under_its_prefix(tmp_path, monkeypatch):
    monkeypatch.setitem(sams.sam_model_registry, "vit_b", small_sam)
    monkeypatch.setitem(sams._WIDTHS, 32, "vit_b")
    state = small_sam().state_dict()
    torch.save({"state_dict": {f"model.sam.{key}": t for key, t in state.items()}}, tmp_path / "w.ckpt")
    found = sams.checkpoint_state(SamConfig(variant="vit_b", checkpoint=str(tmp_path / "w.ckpt")))
    assert all(torch.equal(tensor, state[key]) for key, tensor in found.items())
    assert found.keys() == state.keys()


def test_the_published_file_is_downloaded_and_a_variant_is_not_a_file(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(sams, "local_file", lambda name, *, sha256: asked.append((name, sha256)) or tmp_path / "none")
    for checkpoint in ("", f"{sams.ORIGIN}/{sams.OFFICIAL['vit_b'][0]}", "s3://bucket/w.pth#sha256=" + "0" * 64):
        with pytest.raises(ModelError, match="does not exist; download https"):
            sams.checkpoint_file(SamConfig(variant="vit_b", checkpoint=checkpoint))
    name, digest = sams.OFFICIAL["vit_b"]
    assert asked == [(f"{sams.ORIGIN}/{name}", digest)] * 2 + [("s3://bucket/w.pth#sha256=" + "0" * 64, "")]
    with pytest.raises(ValueError, match="vit_h is a variant, expected a file or URL; set variant to it"):
        SamConfig(checkpoint="vit_h")


def test_half_precision_is_for_who_asks_for_it_on_a_cpu_and_finds_nearly_the_same(monkeypatch):
    model, image = small_sam(), picture()
    halves, preprocess = [], model.preprocess

    def noted(pixels):
        halves.append(torch.is_autocast_enabled("cpu"))
        return preprocess(pixels)

    monkeypatch.setattr(model, "preprocess", noted)
    plain, half = (
        SamProposer(model, SamConfig(points=6, iou=0, stability=0, nms=1, half=half))(image, np.ones((120, 160), bool))
        for half in (None, True)
    )
    assert halves == [False, True]
    assert len(plain) == len(half) > 0
    assert not np.array_equal(plain.iou_N, half.iou_N)
    np.testing.assert_allclose(np.sort(plain.iou_N), np.sort(half.iou_N), atol=0.2)  # they lie from -1.2 to 0.3
