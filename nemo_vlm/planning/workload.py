"""How much a micro-batch asks of a data-parallel rank: as a batch has it, or estimated where no data are at hand."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_vlm.batch import IGNORE_INDEX, Batch, round_up
from nemo_vlm.config import LanguageConfig, RunConfig
from nemo_vlm.data.loader import pad_multiple
from nemo_vlm.errors import ConfigError
from nemo_vlm.layout import Layout

TEXT_TOKENS = 256  # of a sample in a pack, beside its images, at least


@dataclass(frozen=True)
class Workload:
    """One micro-batch of one data-parallel rank.

    Attributes:
        rows: of the batch; one of a pack, whatever its samples.
        positions: in all its rows, with padding.
        tokens: without padding.
        squared_lengths: the sum of the samples' squared lengths, in tokens.
        trained_tokens: positions with a label.
        visual_tokens: placeholders of images and videos.
        views: images, tiles and frames that the tower sees one by one.
        patches: of all views, before they are merged into tokens.
        squared_frames: the sum of the squared numbers of patches of images and frames.
        equal_frames: all frames have one size, and the tower sees them as a batch.
    """

    samples: int
    rows: int
    positions: int
    tokens: int
    squared_lengths: int
    trained_tokens: int
    visual_tokens: int = 0
    views: int = 0
    patches: int = 0
    squared_frames: int = 0
    equal_frames: bool = True

    @property
    def packed(self) -> bool:
        return self.samples > self.rows


def of_batch(batch: Batch, model: LanguageConfig) -> Workload:
    """What a batch is."""
    tokens, positions, squares, patches, frames, *_ = (int(count) for count in batch.counts().tolist())
    grids = batch.images.grids
    return Workload(
        samples=len(batch.lengths),
        rows=len(batch.tokens),
        positions=positions,
        tokens=tokens,
        squared_lengths=squares,
        trained_tokens=int((batch.labels != IGNORE_INDEX).sum()),
        visual_tokens=model.visual_tokens(grids),
        views=sum(time for time, _, _ in grids),
        patches=patches,
        squared_frames=frames,
        equal_frames=len({grid[1:] for grid in grids}) < 2,
    )


def workload(
    run: RunConfig,
    layout: Layout,
    tokens_per_sample: int | None = None,
    images_per_sample: int | None = None,
    fullest: bool = False,
) -> Workload:
    """An estimate without the data.

    Every row is as long as model.encoder_seq_length allows, or as it is given; each sample of a model that sees has one
    image, or what of it has room; all that is no image is trained on. Samples of a pack have TEXT_TOKENS of text.

    Args:
        fullest: of packs one that is full, which memory must be there for; else a rank's samples, shared out evenly.
    Raises:
        ConfigError: more tokens or images are given than a sample can have.
    """
    check_sizes(run, tokens_per_sample, images_per_sample)
    grids = list(run.model.typical_views(run.data)) * (1 if images_per_sample is None else images_per_sample)
    capacity, multiple = run.model.encoder_seq_length, pad_multiple(run, layout, packed=False)
    while (visual := run.model.visual_tokens(grids)) > (tokens_per_sample or capacity):
        grids.pop()
    if run.data.packing:
        samples, rows = max(capacity // (tokens_per_sample or visual + TEXT_TOKENS), 1), 1
        if (most := run.data.max_visual_tokens_per_micro_batch) is not None and visual:
            samples = max(min(samples, most // visual), 1)
        each = tokens_per_sample or capacity // samples
        if not fullest:
            samples = -(-layout.samples_per_rank // num_packs(layout, samples))
    else:
        samples = rows = layout.micro_batch_size
        each = tokens_per_sample or capacity
    frames = [rows * columns for time, rows, columns in grids for _ in range(time)]
    return Workload(
        samples=samples,
        rows=rows,
        positions=rows * round_up(samples // rows * each, multiple),
        tokens=samples * each,
        squared_lengths=samples * each**2,
        trained_tokens=samples * max(each - visual, 0),
        visual_tokens=samples * visual,
        views=samples * len(frames),
        patches=samples * sum(frames),
        squared_frames=samples * sum(frame**2 for frame in frames),
    )


def num_micro_batches(run: RunConfig, layout: Layout, work: Workload) -> int:
    """Of a data-parallel rank in a step; of packs as many as its samples fill."""
    return num_packs(layout, work.samples) if run.data.packing else layout.num_micro_batches


def num_packs(layout: Layout, samples: int) -> int:
    """Of so many samples, as data.loader.Packs makes them."""
    return round_up(-(-layout.samples_per_rank // samples), layout.pipeline if layout.virtual > 1 else 1)


def check_sizes(run: RunConfig, tokens: int | None, images: int | None) -> None:
    """Raises ConfigError for more tokens or images than a sample can have, in which an image must have room.

    Args:
        tokens, images: none is not given: where both are not, what has no room is left out of the estimate.
    """
    capacity = run.model.encoder_seq_length
    if tokens is not None and tokens > capacity:
        raise ConfigError(f"plan_tokens={tokens}: must be at most model.encoder_seq_length={capacity}")
    views, room = run.model.typical_views(run.data), tokens or capacity
    if images and not views:
        raise ConfigError(f"plan_images={images}: goes with a model that sees")
    visual = run.model.visual_tokens(views * (1 if images is None else images))
    if images is not None and visual > room:
        raise ConfigError(f"plan_images={images}: they are {visual} tokens, and a sample has {room}")
    if tokens is not None and visual > room:
        raise ConfigError(f"plan_tokens={tokens}: an image is {visual} tokens; plan_images=0 plans text alone")


def in_words(work: Workload, packing: bool, lacks_image: bool) -> str:
    """A note for the plan.

    Args:
        lacks_image: a sample would have one, had it room.
    """
    seen = f", {work.visual_tokens:,} of them of images in {work.patches:,} patches" if work.visual_tokens else ""
    if lacks_image:
        seen = " without an image, which has no room in model.encoder_seq_length"
    samples = "1 sample" if work.samples == 1 else f"{work.samples} samples"
    return (
        f"a micro-batch is counted as {samples} of {work.tokens // work.samples:,} tokens{seen} "
        f"(plan_tokens and plan_images say otherwise{'; memory is of a full pack' if packing else ''})"
    )
