"""Configs: every file loads, every wrong key and value is named, every field is read somewhere."""

import ast
from pathlib import Path

import pytest
from pydantic import BaseModel

from configs import Config, ConfigError, available_names, dump_config, load_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", available_names())
def test_every_dataset_loads_in_any_case(name):
    config = load_config(name.upper())
    assert config == load_config(name)
    assert len(config.data.palette) == config.data.num_classes
    assert len(config.data.prompts) == config.data.num_classes - 1
    assert config.data.path == f"datasets/{config.data.name}"


def test_known_names():
    assert available_names() == ["demo", "fmb", "mfnet", "msrs", "pst900"]


def test_class_order_of_pst900_is_its_authors():
    assert load_config("pst900").data.class_names == (
        "background", "fire extinguisher", "backpack", "hand drill", "survivor",
    )  # fmt: skip


def test_prompts_leave_out_the_background():
    assert load_config("mfnet").data.prompts[:2] == ("the photo of car", "the photo of person")


def test_defect_7_an_unknown_name_is_an_error_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown dataset 'mfnett' \(did you mean 'mfnet'\?\)"):
        load_config("mfnett")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.batchsize=2", r"unknown key 'train.batchsize' \(did you mean 'batch_size'\?\)"),
        ("trian.lr=1", r"unknown key 'trian' \(did you mean 'train'\?\)"),
        ("train.lr=-1", "train.lr: .*greater than 0.*got -1"),
        ("train.lr=fast", "train.lr: .*got 'fast'"),
        ("train.precision=fp8", "train.precision: .*'float32', 'bf16' or 'fp16'"),
        ("train.max_steps=010", "'010' is a date, or a number to base 8 or 60"),
        ("train.crop=[064,96]", "'064' is .*base 8"),
        ("train.epochs=1:30", "'1:30' is .*base 8 or 60"),
        ("train.lr=0b_", "not a YAML value"),
        ("data.dataset_path=2024-13-45", "put texts in quotes"),
        ("data.dataset_path=2024-02-20", "put texts in quotes"),
        ("data.thermal_folder=RGB", "must be different folders"),
        ("data.label_folder=RGB", "must be different folders"),
        ("model.recompute=ligth", "model.recompute: .*False, 'light' or True .got 'ligth'"),
        ("train.crop=[480]", "train.crop"),
        ("train.crop=[16,640]", "train.crop.0: .*greater than or equal to 32"),
        ("train=3", "'train' is a section"),
        ("train.batch_size=true", "train: .*batch_size takes no truth value, got true"),
        ("train.clip_grad_norm=false", "train: .*clip_grad_norm takes no truth value"),
        ("train.lr", "--set takes section.field=value"),
        ("train.crop=[1,", "not a YAML value"),
        ("data.class_names=[a,b,c]", "palette has 9 colours for 3 classes"),
        ("data.class_names=[a,b,c,d,e,f,b,h,i]", "data.class_names has more than once: b"),
        (
            "data.class_names=[a,b,' ',d,e,f,g,h,i]",
            r"class_names has a blank one: \['a', 'b',",
        ),
        ("train.warmup_epochs=.inf", "train.warmup_epochs: .*finite"),
        ("loss.rgb_gamma=.nan", "loss.rgb_gamma: "),
    ],
)
def test_bad_overrides_are_one_clear_line(override, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_config("mfnet", [override])
    assert "\n" not in str(error.value)


def test_overrides_beat_files_and_later_ones_win():
    config = load_config("mfnet", ["train.batch_size=2", "train.batch_size=3", "train.lr=1e-4"])
    assert config.train.batch_size == 3
    assert config.train.lr == 1e-4


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_is_a_word(word):
    config = load_config("mfnet", [f"model.pretrained={word}", f"train.max_steps={word}"])
    assert config.model.pretrained is None
    assert config.train.max_steps is None
    assert load_config("mfnet").data.cache == "none"


def test_a_user_s_own_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "data:\n  name: Mine\n  class_names: [ground, tree]\n"
        "  palette: [[0, 0, 0], [0, 255, 0]]\n  dataset_path: /data/{name}\n"
    )
    config = load_config(str(path))
    assert config.data.path == "/data/Mine"
    assert config.train.epochs == 500


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", "train:\n  speed: 3\n"])
def test_broken_files_are_named(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"broken\.yaml"):
        load_config(str(path))


@pytest.mark.parametrize("text", ["train: {lr: 1}\ndata: {}\ntrain: {lr: 2}", "a: {b: 1, b: 2}"])
def test_a_key_that_is_there_twice_is_an_error(tmp_path, text):
    """YAML's own loader would take the second and drop the first in silence."""
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"twice\.yaml.*'(train|b)' is there twice.*line [13],"):
        load_config(str(path))


def test_missing_file():
    with pytest.raises(ConfigError, match="does not exist"):
        load_config("nowhere/mine.yaml")


def test_dump_reads_back(tmp_path):
    config = load_config("fmb", ["train.max_steps=7", "eval.crop=[64,96]"])
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


@pytest.mark.parametrize("folder", ["../other", "/etc", "a/../../b", "C:/x", "..\\other", "''"])
@pytest.mark.parametrize("field", ["rgb_folder", "thermal_folder", "label_folder"])
def test_image_folders_stay_inside_the_dataset(field, folder):
    with pytest.raises(ConfigError, match=f"data.{field}.*inside data.dataset_path"):
        load_config("mfnet", [f"data.{field}={folder}"])


def test_image_folders_may_be_nested():
    assert load_config("mfnet", ["data.rgb_folder=images/rgb"]).data.rgb_folder == "images/rgb"


def test_config_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config("mfnet").train.lr = 1.0


def test_text_prior_path_holds_the_dataset_s_name():
    assert load_config("mfnet").text_prior == "pretrained/clip_text_mfnet.safetensors"
    assert load_config("demo").text_prior == "orthogonal"


def test_checkpoints_from_before_the_stronger_augmentation_still_load():
    tree = load_config("mfnet").model_dump(mode="json")
    del tree["augment"]
    config = Config.model_validate(tree)
    assert set(config.augment.model_dump().values()) == {0}


@pytest.mark.parametrize("override", ["augment.hue=0.6", "augment.cutmix=1.5", "augment.blur=-1"])
def test_augmentation_has_ranges(override):
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        load_config("mfnet", [override])


def _attributes_read_outside_configs() -> set[str]:
    names = set()
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0]
        if room in {"configs", "tests", "benchmarks"} or room.startswith("."):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return names


def _leaves(model: type[BaseModel]) -> list[str]:
    leaves = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            leaves += _leaves(section)
        else:
            leaves.append(name)
    return leaves


#: fields that the code reads through a property of the same section
READ_THROUGH = {"dataset_path": "path", "prompt": "prompts", "class_names": "num_classes"}


def test_every_field_is_read_by_the_program():
    read = _attributes_read_outside_configs()
    unread = {name for name in _leaves(Config) if READ_THROUGH.get(name, name) not in read}
    assert unread == set()
