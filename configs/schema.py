"""The typed config tree: every field with its unit and range; values live in base_config.yaml."""

from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)


def _none_from_text(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() == "none" else value


def _stays_inside(value: str) -> str:
    for path in (PurePosixPath(value), PureWindowsPath(value)):
        if not value or path.anchor or ".." in path.parts:
            raise ValueError("must be a folder inside data.dataset_path, without a leading / or ..")
    return value


_none_word = BeforeValidator(_none_from_text)
FolderInside = Annotated[str, AfterValidator(_stays_inside)]
PositiveInt = Annotated[int, Field(ge=1)]
Colour = tuple[
    Annotated[int, Field(ge=0, le=255)],
    Annotated[int, Field(ge=0, le=255)],
    Annotated[int, Field(ge=0, le=255)],
]
SizeHW = tuple[Annotated[int, Field(ge=32)], Annotated[int, Field(ge=32)]]  # height, width; pixels


class _Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _truth_is_no_number(cls, values: Any) -> Any:
        """Pydantic takes true for 1."""
        for name, value in values.items() if isinstance(values, dict) else ():
            known = cls.model_fields.get(name)
            if known is None or not isinstance(value, bool):
                continue
            if known.annotation is not bool and value not in get_args(known.annotation):
                raise ValueError(f"{name} takes no truth value, got {str(value).lower()}")
        return values


class DataConfig(_Section):
    """One dataset: where it lies, what its classes are, how it is read."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    dataset_path: str  # "{name}" stands for data.name
    rgb_folder: FolderInside  # in dataset_path
    thermal_folder: FolderInside
    label_folder: FolderInside
    class_names: Annotated[tuple[str, ...], Field(min_length=2, max_length=255)]
    palette: tuple[Colour, ...]  # RGB, one per class
    prompt: Annotated[str, Field(pattern=r"\{\}")]  # "{}" stands for the class name
    ignore_background: bool  # class 0 is neither trained nor scored, like 255
    train_on_val: bool  # train on train.txt + val.txt, as some published tables do
    modalities: Literal["both", "rgb", "thermal"]  # the withheld one is mid-grey (ablation)
    num_workers: Annotated[int, Field(ge=0)]  # loader processes per rank
    cache: Literal["none", "ram"]  # decoded images kept in memory

    @model_validator(mode="after")
    def _each_class_once(self) -> "DataConfig":
        if not all(name.strip() for name in self.class_names):
            raise ValueError(f"data.class_names has a blank one: {list(self.class_names)}")
        repeated = {name for name in self.class_names if self.class_names.count(name) > 1}
        if repeated:
            raise ValueError(f"data.class_names has more than once: {', '.join(sorted(repeated))}")
        return self

    @model_validator(mode="after")
    def _each_folder_once(self) -> "DataConfig":
        images = {self.rgb_folder, self.thermal_folder}
        if self.label_folder in images or (len(images) == 1 and self.modalities == "both"):
            raise ValueError(
                f"data.rgb_folder {self.rgb_folder}, data.thermal_folder {self.thermal_folder} and "
                f"data.label_folder {self.label_folder} must be different folders"
            )
        return self

    @model_validator(mode="after")
    def _one_colour_per_class(self) -> "DataConfig":
        if len(self.palette) != len(self.class_names):
            raise ValueError(
                f"data.palette has {len(self.palette)} colours for {len(self.class_names)} classes"
            )
        return self

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def path(self) -> str:
        """dataset_path with the dataset's name filled in."""
        return self.dataset_path.replace("{name}", self.name)

    @property
    def prompts(self) -> tuple[str, ...]:
        """CLIP prompts of every class but the background (MIA's text prior)."""
        return tuple(self.prompt.replace("{}", name) for name in self.class_names[1:])


class ModelConfig(_Section):
    """The network: its size, its priors and its scan backend."""

    size: Literal["tiny", "demo"]  # tiny = the paper's, demo = small with every module
    text_prior: str  # path of a clip_text_<name>.safetensors ("{name}" stands for data.name in
    # lower case), or "orthogonal", the explicit stand-in without CLIP
    pretrained: Annotated[str | None, _none_word]  # path of the VMamba weights
    scan_backend: Literal["auto", "reference", "chunked", "native", "cuda", "triton", "mamba_ssm"]
    recompute: Literal[False, "light", True] = False  # of the activations in training: none, all
    # but the scans', all; the default is for checkpoints older than the field
    drop_path: Annotated[float, Field(ge=0, lt=1)]  # rate at the last encoder block
    image_mean: tuple[float, float, float]  # standardisation inside each encoder
    image_std: tuple[
        Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
    ]


class TrainConfig(_Section):
    """The recipe of one run."""

    epochs: PositiveInt
    max_steps: Annotated[
        PositiveInt | None, _none_word
    ]  # ends earlier; the schedule ends there too
    batch_size: PositiveInt  # over all ranks
    crop: SizeHW
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], Field(min_length=1)]
    mirror: bool
    lr: Annotated[float, Field(gt=0)]  # peak, after warm-up
    weight_decay: Annotated[float, Field(ge=0)]
    poly_power: Annotated[float, Field(ge=0)]
    warmup_epochs: Annotated[float, Field(ge=0)]
    clip_grad_norm: Annotated[Annotated[float, Field(gt=0)] | None, _none_word]
    precision: Literal["float32", "bf16", "fp16"]  # of autocast
    accumulation: PositiveInt  # parts into which a rank's batch is cut, one after the other
    ema_decay: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, _none_word]  # of the average
    # of the weights that is scored and kept; none scores the trained weights themselves
    max_bad_steps: Annotated[int, Field(ge=0)]  # left out for a loss or gradient that is not
    # finite before the run ends
    tf32: bool  # TF32 matrix units for float32 products on GPU
    cuda_graph: bool = True  # replay forward and backward instead of launching them kernel by
    # kernel, on GPUs; older checkpoints do not have it
    side_by_side: bool = True  # where steps are replayed and there is one rank, independent parts
    # of the network beside one another: faster, for more memory; older checkpoints lack it
    save_every_s: Annotated[float, Field(ge=0)]  # least age of epoch-last.pth when an epoch's
    # end replaces it
    checkpoint_start: Annotated[int, Field(ge=0)]  # epoch of the first kept checkpoint
    checkpoint_every: PositiveInt  # epochs
    keep_last: PositiveInt  # newest epoch-N.pth files that stay on disk
    val_every: PositiveInt  # epochs
    log_every: PositiveInt  # steps


class AugmentConfig(_Section):
    """Stronger augmentation, after scale, crop and mirror; older checkpoints do not have it."""

    probability: Annotated[float, Field(ge=0, le=1)] = 0  # of each of the groups below; 0 = off
    rotation: Annotated[float, Field(ge=0, le=180)] = 0  # of the pair, degrees to either side
    shear: Annotated[float, Field(ge=0, lt=90)] = 0  # of the pair, degrees to either side
    brightness: Annotated[float, Field(ge=0, le=1)] = 0  # of rgb, a factor of 1 - x to 1 + x
    contrast: Annotated[float, Field(ge=0, le=1)] = 0  # of rgb, a factor, too
    saturation: Annotated[float, Field(ge=0, le=1)] = 0  # of rgb, a factor, too
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0  # of rgb, turns of the colour circle
    blur: Annotated[float, Field(ge=0, le=20)] = 0  # of rgb, largest sigma in pixels
    thermal_gain: Annotated[float, Field(ge=0, le=1)] = 0  # a factor of 1 - x to 1 + x
    thermal_offset: Annotated[float, Field(ge=0, le=1)] = 0  # of the whole range, up or down
    thermal_noise: Annotated[float, Field(ge=0, le=1)] = 0  # largest deviation, of the whole range
    cutmix: Annotated[float, Field(ge=0, le=1)] = 0  # of samples that get a box of another pair


class LossConfig(_Section):
    """Weights of the joint loss (method, Sec. 7) and the brightening of its targets."""

    segmentation_weight: Annotated[float, Field(ge=0)]
    fusion_weight: Annotated[float, Field(ge=0)]
    intensity_weight: Annotated[float, Field(ge=0)]
    gradient_weight: Annotated[float, Field(ge=0)]
    color_weight: Annotated[float, Field(ge=0)]
    balance_weight: Annotated[float, Field(ge=0)]
    rgb_gamma: Annotated[float, Field(gt=0)]  # exponent on rgb in [0, 1]; below 1 brightens
    thermal_contrast: Annotated[float, Field(gt=0)]  # factor about the image's mean grey


class EvalConfig(_Section):
    """How a checkpoint is scored."""

    batch_size: PositiveInt
    crop: Annotated[SizeHW | None, _none_word]  # sliding window; none = the whole image
    stride: Annotated[float, Field(gt=0, le=1)]  # of the window, as a fraction of eval.crop
    scales: Annotated[tuple[Annotated[float, Field(gt=0, le=8)], ...], Field(min_length=1)]
    flip: bool  # average with the mirrored input
    luma_only: bool = False  # fused takes Cb and Cr from rgb; older checkpoints do not have it
    protocol: Literal["tang", "cddfuse", "strict"]  # of the fusion metrics


class Config(_Section):
    """Everything a run depends on; saved resolved beside its results."""

    seed: Annotated[int, Field(ge=0, lt=2**32)]
    experiment_path: str  # runs land in <experiment_path>/<data.name>/<exp>
    data: DataConfig
    model: ModelConfig
    train: TrainConfig
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig
    eval: EvalConfig

    @property
    def text_prior(self) -> str:
        """model.text_prior with the dataset's name filled in."""
        return self.model.text_prior.replace("{name}", self.data.name.lower())
