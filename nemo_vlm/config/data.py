"""`model.data.*` and `model.tokenizer.*`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from nemo_vlm.config.checks import demand, only, refuse_others, show
from nemo_vlm.errors import ConfigError

# What a run on .bin/.idx files would not look at; the template, its system message and how images and videos are seen
# are for asking the model later
OF_RECORDS = (
    *("packing", "validation_split", "eval_samples", "eval_tokens", "too_long"),
    *("max_visual_tokens", "max_visual_tokens_per_micro_batch", "balance_visual_tokens", "cache_vision_features"),
)
OF_JSON = ("datasets_exclude", "image_folder", "video_folder")  # of records that are not in tars, with their images

# Of images and videos; which of them a family follows, its LanguageConfig.media_settings says
RATES = ("video_fps", "video_min_frames", "video_max_frames")  # which num_frames takes the place of
LIMITS = (
    *("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels"),
    *("video_total_min_pixels", "video_total_pixels"),
    *RATES,
    "max_visual_tokens",
)
OF_MEDIA = (
    *LIMITS,
    *("num_frames", "splice_single_frame", "image_aspect_ratio", "image_draft"),
    *("image_token_len", "crop_size", "image_size"),
)
PAIRS = (
    ("min_pixels", "max_pixels"),
    ("video_min_pixels", "video_max_pixels"),
    ("video_total_min_pixels", "video_total_pixels"),
    ("video_min_frames", "video_max_frames"),
)


@dataclass(frozen=True)
class DataConfig:
    """`model.data.*`."""

    # json, energon: records, in folders of tars that Megatron-Energon has prepared; of Megatron's .bin/.idx files,
    # mmap: tokenized text, sft_idxmap: conversations packed beforehand
    data_impl: Literal["json", "energon", "mmap", "sft_idxmap"] = "json"
    # LLaVA JSON, or JSONL; a list of files, with weights in between as Megatron has it: [0.7, a.json, 0.3, b.json]
    data_path: str | tuple[str | float, ...] | None = None
    concat_sampling_probabilities: tuple[float, ...] | None = None  # weights of the files; null: by their sizes
    image_folder: str | tuple[str, ...] | None = None  # or a .tar; one for all files, or one a file; null: beside them
    video_folder: str | tuple[str, ...] | None = None
    datasets_exclude: tuple[str, ...] = ()  # records whose field `dataset` is listed are left out
    # What the run reads, instead of trainer.max_steps; tokens only where every sample is encoder_seq_length long
    train_samples: int | None = None
    train_tokens: int | None = None
    validation_split: float = 0.0  # this share of the records is not trained on, and validates
    validation_path: str | tuple[str, ...] | None = None  # or these files do; their images stand where the others do
    # So many of the records that validate are also answered at each validation, greedily: val_accuracy, the share that
    # is exactly right
    eval_samples: int = 0
    eval_tokens: int = 64  # of each answer at most; each costs a pass over all that is before it
    splits_string: str | None = None  # of .bin/.idx: shares of the documents that train and validate; null: 99,1,0
    # data_impl=mmap: each document of a sample sees only itself, with positions from 0 on; both or none of them
    reset_attention_mask: bool = False
    reset_position_ids: bool = False
    eod_mask_loss: bool = False  # data_impl=mmap: what follows the end of a document is not to be predicted
    # of what is drawn, records of which no sample can be made, before the run gives up: at its end; before that, from
    # the 100th on (the 8th, while none could be used), it may be as many more as chance makes of it
    max_skip_fraction: float = 0.01
    # a demo data set that is written on first use
    prepare: (
        Literal["digits", "digit_pairs", "digit_captions", "docstrings", "docstring_questions", "word_kinds"] | None
    ) = None
    # how conversations are written; v1_fork is the guide's fork's v1; null: as the family's own chat template has it
    conv_template: (
        Literal[
            "plain",
            "v1",
            "v1_fork",
            "llama_2",
            "llama_3",
            "nvgpt",
            "nv_steerlm",
            "nv_dpo",
            "mistral",
            "yi_34b",
            "chatml",
            "qwen2",
        ]
        | None
    ) = None
    system_message: str | None = None  # null: the template's own
    sep_image_conv_front: bool = False  # all images in front of the first question, as the fork has it: <image>\n
    too_long: Literal["truncate", "drop"] = "truncate"  # a sample beyond encoder_seq_length; never within an image
    # square: the tower's own way; pad: a square canvas in the mean colour; keep: the whole image in its proportions
    image_aspect_ratio: Literal["square", "pad", "keep"] = "square"
    # JPEGs of three times the width and height that they are resized to, or more, are decoded at 1/2, 1/4 or 1/8: two
    # to three times as fast; pixels differ by 1 to 3 levels of 255 on the average
    image_draft: bool = False
    # What a frozen tower makes of images and videos is kept on disk, and read instead of computed from then on; in
    # vision_cache_dir, or $NEMO_VLM_CACHE/vision, or ~/.cache/nemo_vlm/vision
    cache_vision_features: bool = False
    vision_cache_dir: str | None = None
    # Of an image, between which it is resized, for families that see images in their own sizes; null: the family's
    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None  # of each frame of a video
    video_max_pixels: int | None = None
    # Of a video as a whole: in Qwen3-VL of all its frames together, between which it is resized; in Qwen2-VL of its
    # temporal patches together, which lowers video_max_pixels
    video_total_min_pixels: int | None = None
    video_total_pixels: int | None = None
    video_fps: float | None = None  # frames that are seen of each second; null: the family's
    video_min_frames: int | None = None
    video_max_frames: int | None = None
    num_frames: int | None = None  # of a video, equally spaced; -1: all; null: 8 in LLaVA, else by video_fps
    max_visual_tokens: int | None = None  # of a sample, for its images and videos; one of more is left out
    splice_single_frame: Literal["first", "middle", "last"] | None = None  # only this one of them
    # cyclic: shuffled by epoch; single: in file order; modality: shuffled, like lengths together, and no global batch
    # with and without images
    dataloader_type: Literal["cyclic", "single", "modality"] = "cyclic"
    # whole samples one behind the other, up to model.encoder_seq_length; the global batch stays the same samples, and
    # model.micro_batch_size says nothing
    packing: bool = False
    # visual tokens (image and video features in the text) of one pack at most; a sample of more is left out
    max_visual_tokens_per_micro_batch: int | None = None
    balance_visual_tokens: bool = False  # which rank reads which sample of a global batch is chosen to even them out
    pad_to: int | Literal["batch"] = "batch"  # tokens of every batch or pack; batch: of its longest sample
    num_workers: int = 2

    # What contradicts the model is an error
    image_token_len: int | None = None
    crop_size: tuple[int, int] | None = None
    image_size: int | tuple[int, int] | None = None

    # NeMo's, with a single way here
    media_type: Literal["image", "video"] = "image"  # of no effect: a record may have both
    lazy_preprocess: bool = only(True, "records are always parsed when they are drawn; leave it out")
    is_multimodal: bool = only(True, "records without images train as they are; text alone trains with model=gpt_tiny")
    packed_sequence: bool = only(False, "take model.data.packing=true, which packs while it trains")
    data_prefix: str | None = only(None, "give the JSON as model.data.data_path, with model.data.packing=true")
    sep_token_between_frames: bool = only(False, "frames follow each other without a token between")
    validation_drop_last: bool = True  # of no effect: every sample of the validation counts once

    def __post_init__(self) -> None:
        refuse_others(self, "model.data")
        demand(self.num_workers >= 0, "model.data.num_workers", self.num_workers, "0 or more")
        self._check_media()
        pad_to = self.pad_to
        right = "batch, or a number of tokens, model.encoder_seq_length or more"
        demand(pad_to == "batch" or pad_to > 0, "model.data.pad_to", pad_to, right)
        for key in ("train_samples", "train_tokens"):
            given = getattr(self, key)
            demand(given is None or given > 0, f"model.data.{key}", given, "1 or more, or null")
        if self.train_samples is not None and self.train_tokens is not None:
            raise ConfigError(f"model.data.train_samples={self.train_samples}: train_tokens is given too; give one")
        demand(0 <= self.max_skip_fraction <= 1, "model.data.max_skip_fraction", self.max_skip_fraction, "from 0 to 1")
        demand(
            0 <= self.validation_split < 1, "model.data.validation_split", self.validation_split, "from 0 to below 1"
        )
        demand(self.eval_samples >= 0, "model.data.eval_samples", self.eval_samples, "0 or more")
        demand(self.eval_tokens > 0, "model.data.eval_tokens", self.eval_tokens, "1 or more")
        if self.validation_split and self.validation_path:
            raise ConfigError("model.data.validation_split: model.data.validation_path is given too; give one of them")
        self._check_visual()
        self._check_files()
        self._check_impl()

    @property
    def most_visual_tokens(self) -> int | None:
        """Of a sample, which must fit into a pack too."""
        limits = (self.max_visual_tokens, self.max_visual_tokens_per_micro_batch)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def has_records(self) -> bool:
        """Whether the data are conversations, not tokens."""
        return self.data_impl in ("json", "energon")

    @property
    def files(self) -> tuple[str, ...]:
        """The paths of data_path."""
        paths = (self.data_path,) if isinstance(self.data_path, str) else self.data_path or ()
        return tuple(path for path in paths if isinstance(path, str))

    @property
    def weights(self) -> tuple[float, ...] | None:
        """How much of what is drawn comes from each file, adding up to 1; None: as their sizes are."""
        inside = self.data_path if isinstance(self.data_path, tuple) else ()
        given = tuple(float(item) for item in inside if not isinstance(item, str)) or self.concat_sampling_probabilities
        total = sum(map(abs, given or ()))  # so that those below 0 stay there, and are refused
        return tuple(weight / (total or 1) for weight in given) if given else None

    @property
    def validation_files(self) -> tuple[str, ...]:
        return (self.validation_path,) if isinstance(self.validation_path, str) else self.validation_path or ()

    @property
    def splits(self) -> tuple[float, ...]:
        """Shares of the documents of a .bin/.idx that train, validate, and do neither."""
        given = self.splits_string or ("1" if self.validation_path else "99,1,0")
        shares = tuple(float(share) for share in given.split(","))
        return shares + (0.0,) * (3 - len(shares))

    def _check_media(self) -> None:
        for name in LIMITS:
            given = getattr(self, name)
            demand(given is None or given > 0, f"model.data.{name}", given, "more than 0, or null")
        count = self.num_frames
        right = "1 or more, -1 for all, or null"
        demand(count is None or count == -1 or count > 0, "model.data.num_frames", count, right)
        for name in RATES if count is not None else ():
            if getattr(self, name) is not None:
                raise ConfigError(f"model.data.num_frames={count}: model.data.{name} is given too; give one of them")

    def _check_visual(self) -> None:
        key, most = "model.data.max_visual_tokens_per_micro_batch", self.max_visual_tokens_per_micro_batch
        demand(most is None or most > 0, key, most, "1 or more, or null")
        if most is not None and not self.packing:
            limit = "model.data.max_visual_tokens limits a sample's, and model.micro_batch_size their number"
            raise ConfigError(f"{key}={most}: goes with model.data.packing=true; without packs, {limit}")

    def _check_impl(self) -> None:
        """What belongs to records, to .bin/.idx files, or to one kind of these."""
        key, impl = "model.data", self.data_impl
        demand(is_split(self.splits_string), f"{key}.splits_string", self.splits_string, "shares, as 99,1,0")
        if self.splits_string and self.validation_path:
            raise ConfigError(f"{key}.splits_string={self.splits_string}: validation_path is given too; give one")
        if self.reset_attention_mask != self.reset_position_ids:
            raise ConfigError(f"{key}.reset_attention_mask, {key}.reset_position_ids: give both or none of them")
        foreign = {"reset_attention_mask": "mmap", "eod_mask_loss": "mmap"}
        if self.has_records:
            foreign["splits_string"] = "mmap or sft_idxmap; records have validation_split"
        else:
            foreign |= dict.fromkeys(OF_RECORDS, "json or energon")
            demand(self.dataloader_type != "modality", f"{key}.dataloader_type", "modality", "cyclic or single")
        foreign |= dict.fromkeys(OF_JSON, "json")
        defaults = {setting.name: setting.default for setting in fields(self)}
        for name, goes_with in foreign.items():
            given = getattr(self, name)
            if given != defaults[name] and impl not in goes_with:
                raise ConfigError(f"{key}.{name}={show(given)}: goes with {key}.data_impl={goes_with}")

    def _check_files(self) -> None:
        items, key = self.data_path if isinstance(self.data_path, tuple) else (), "concat_sampling_probabilities"
        kinds = [isinstance(item, str) for item in items]
        if not all(kinds):
            right = "a weight before each file, as [0.7,a.json,0.3,b.json], or files alone"
            demand(kinds == [False, True] * (len(items) // 2), "model.data.data_path", list(items), right)
            demand(
                self.concat_sampling_probabilities is None, f"model.data.{key}", "...", "null: data_path has weights"
            )
        weights, count = self.weights, len(self.files)
        if weights is not None:
            right = f"{count} weights, none below a ten-thousandth of all, one for each file of model.data.data_path"
            source, shown = (key, list(weights)) if all(kinds) else ("data_path", list(items))
            demand(len(weights) == count and min(weights) >= 1e-4, f"model.data.{source}", shown, right)
        for folder in ("image_folder", "video_folder"):
            given = getattr(self, folder)
            right = f"one folder, or one for each of {count} files"
            demand(not isinstance(given, tuple) or len(given) == count, f"model.data.{folder}", given, right)


def is_split(shares: str | None) -> bool:
    """Whether a text is up to three shares, the first more than 0."""
    found = (shares or "1").split(",")
    numbers = [float(share) for share in found if share.replace(".", "", 1).strip().isdecimal()]
    return len(found) == len(numbers) <= 3 and numbers[0] > 0


@dataclass(frozen=True)
class SpecialTokens:
    """`model.tokenizer.special_tokens.*`: roles that the tokenizer's own files do not give, or give otherwise."""

    bos_token: str | None = None
    eos_token: str | None = None
    unk_token: str | None = None
    pad_token: str | None = None


@dataclass(frozen=True)
class AdditionalTokens:
    """NeMo's form of `model.tokenizer.additional_special_tokens`, a group with a single key."""

    additional_special_tokens: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizerConfig:
    """`model.tokenizer.*`."""

    type: str | None = None  # a directory in Hugging Face's layout, or a name in its local cache
    library: Literal["huggingface", "sentencepiece", "megatron"] = "huggingface"
    model: str | None = None  # library=sentencepiece: the model's file
    vocab_file: str | None = None  # library=huggingface without a type: GPT-2's vocab.json, with merge_file
    merge_file: str | None = None
    use_fast: bool = True  # false: SentencePiece itself reads a tokenizer.model; fast ones make the same tokens of it
    sentencepiece_legacy: bool = False  # library=sentencepiece: a space in front of the text behind every special token
    special_tokens: SpecialTokens | None = field(default_factory=SpecialTokens)
    # added behind the vocabulary, where it lacks them
    additional_special_tokens: tuple[str, ...] | AdditionalTokens | None = None

    delimiter: str | None = only(None, "NeMo's tokenizers of tables have one, and are not here")
    trust_remote_code: bool = only(False, "code that comes with a tokenizer is never run; it must do without")

    def __post_init__(self) -> None:
        refuse_others(self, "model.tokenizer")
        if self.library == "megatron":
            raise ConfigError("model.tokenizer.library=megatron: take huggingface with vocab_file and merge_file")
        alone = self.library == "sentencepiece"
        if self.model is not None and not alone:
            raise ConfigError(f"model.tokenizer.model={self.model}: only with model.tokenizer.library=sentencepiece")
        if alone and self.model is None:
            raise ConfigError(
                "model.tokenizer.model=null: model.tokenizer.library=sentencepiece needs a tokenizer.model"
            )
        if (self.vocab_file is None) != (self.merge_file is None):
            raise ConfigError("model.tokenizer.vocab_file, model.tokenizer.merge_file: give both or none of them")
        if self.vocab_file is not None and (alone or self.type is not None):
            raise ConfigError(
                f"model.tokenizer.vocab_file={self.vocab_file}: model.tokenizer.type or model is given too"
            )

    @property
    def place(self) -> str | None:
        """The file or directory that it is read from."""
        return self.model or self.type or self.vocab_file

    @property
    def roles(self) -> dict[str, str]:
        """bos_token and the like, as far as they are given."""
        return {
            role: token for role, token in vars(self.special_tokens or SpecialTokens()).items() if token is not None
        }

    @property
    def added(self) -> tuple[str, ...]:
        given = self.additional_special_tokens
        return given.additional_special_tokens if isinstance(given, AdditionalTokens) else given or ()
