"""The confusion matrix against scikit-learn and torchmetrics, its edges and two ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torchmetrics.classification import MulticlassJaccardIndex

from utils.segmentation_metrics import ConfusionMatrix

ROOT = Path(__file__).resolve().parents[2]


def maps(seed=0, classes=5, shape=(3, 20, 30)):
    """Prediction and label that agree in half of the pixels; a tenth of the label is 255."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, classes, shape, generator=generator)
    prediction = torch.randint(0, classes, shape, generator=generator)
    prediction = torch.where(torch.rand(shape, generator=generator) < 0.5, label, prediction)
    label[torch.rand(shape, generator=generator) < 0.1] = 255
    return prediction, label


def test_every_metric_is_scikit_learn_s():
    prediction, label = maps()
    matrix = ConfusionMatrix(5)
    for one_prediction, one_label in zip(prediction, label, strict=True):
        matrix.update(one_prediction, one_label)
    found = matrix.compute()
    y, p = label[label != 255].numpy(), prediction[label != 255].numpy()
    assert found["confusion"] == confusion_matrix(y, p).tolist()
    iou = jaccard_score(y, p, average=None)
    assert found["class_iou"] == pytest.approx(iou.tolist())
    assert found["miou"] == pytest.approx(iou.mean())
    assert found["miou_without_background"] == pytest.approx(iou[1:].mean())
    assert found["class_accuracy"] == pytest.approx(recall_score(y, p, average=None).tolist())
    assert found["mean_accuracy"] == pytest.approx(recall_score(y, p, average="macro"))
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(y, p))
    weighted = jaccard_score(y, p, average="weighted")
    assert found["frequency_weighted_iou"] == pytest.approx(weighted)
    assert found["classes_in_mean"] == 5


def test_miou_is_torchmetrics_s():
    prediction, label = maps(seed=1)
    matrix = ConfusionMatrix(5)
    matrix.update(prediction, label)
    oracle = MulticlassJaccardIndex(num_classes=5, ignore_index=255)
    assert matrix.compute()["miou"] == pytest.approx(oracle(prediction, label).item(), rel=1e-6)


def test_a_class_without_labels_has_no_score_even_where_it_is_predicted():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 1, 3, 3]), torch.tensor([0, 1, 1, 0]))
    found = matrix.compute()
    assert found["class_iou"] == [0.5, 0.5, None, None]
    assert found["class_accuracy"] == [0.5, 0.5, None, None]
    assert (found["miou"], found["classes_in_mean"]) == (0.5, 2)


@pytest.mark.parametrize("label", [torch.full((4, 4), 255), torch.zeros(0, 4)], ids=["255", "none"])
def test_nothing_counted(label):
    matrix = ConfusionMatrix(3)
    matrix.update(torch.zeros_like(label), label)
    found = matrix.compute()
    assert found["miou"] is None and found["pixel_accuracy"] is None
    assert found["class_iou"] == [None] * 3
    assert found["classes_in_mean"] == 0


def test_only_background():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.zeros(2, 2).long(), torch.zeros(2, 2).long())
    found = matrix.compute()
    assert (found["miou"], found["miou_without_background"]) == (1.0, None)


def test_counts_beyond_32_bits():
    matrix = ConfusionMatrix(2)
    matrix.counts += 3_000_000_000
    matrix.update(torch.tensor([1]), torch.tensor([0]))
    found = matrix.compute()
    assert found["confusion"] == [[3_000_000_000, 3_000_000_001], [3_000_000_000, 3_000_000_000]]
    assert found["class_iou"][0] == pytest.approx(3_000_000_000 / 9_000_000_001, rel=1e-12)


def test_another_ignored_value_and_integer_types():
    matrix = ConfusionMatrix(3, ignore_index=0)
    prediction = torch.tensor([[1, 2]], dtype=torch.uint8)
    matrix.update(prediction, torch.tensor([[1, 0]], dtype=torch.int16))
    assert matrix.compute()["confusion"] == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([0, 3], [0, 1], "prediction 3 is outside 0 … 2"),
        ([0, 1], [0, 7], "label 7 is outside 0 … 2"),
        ([0, 1], [0, -1], "label -1 is outside"),
        ([0], [0, 1], r"prediction \(1,\) and label \(2,\) differ"),
    ],
)
def test_wrong_values_are_named(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(3).update(torch.tensor(prediction), torch.tensor(label))


@pytest.mark.skipif(
    torch.__version__.startswith("2.4"),
    reason="PyTorch 2.4 makes no stand-ins of CUDA tensors here",
)
def test_update_does_not_wait_for_a_gpu():
    """Tensors without values tell: whoever asks for one raises. The GPU need not be there."""
    with FakeTensorMode():
        label = torch.zeros(2, 8, 9, dtype=torch.int64, device="cuda")
        matrix = ConfusionMatrix(3)
        matrix.update(label, label)
        assert matrix.counts.device.type == "cuda"
        with pytest.raises(DataDependentOutputException):
            matrix.compute()


@pytest.mark.parametrize("read", [ConfusionMatrix.reduce, ConfusionMatrix.compute])
def test_a_wrong_value_is_named_when_the_counts_are_read(read, monkeypatch):
    """Where update() does not look itself, as on a GPU; good batches after it do not hide it."""
    check = ConfusionMatrix._check_values
    monkeypatch.setattr(ConfusionMatrix, "_check_values", lambda _: None)
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([0, 1, 2]), torch.tensor([0, 9, 255]))
    matrix.update(torch.tensor([0]), torch.tensor([0]))
    monkeypatch.setattr(ConfusionMatrix, "_check_values", check)
    with pytest.raises(ValueError, match="label 9 is outside 0 … 2"):
        read(matrix)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_counts_of_a_gpu():
    prediction, label = maps()
    expected, found = ConfusionMatrix(5), ConfusionMatrix(5, device="cuda")
    expected.update(prediction, label)
    prediction, label = prediction.cuda(), label.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found.update(prediction, label)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.compute() == expected.compute()
    found.update(prediction + 5, label)
    with pytest.raises(ValueError, match="prediction .* is outside 0 … 4"):
        found.compute()


def test_two_ranks_give_the_counts_of_both(tmp_path):
    program = """
import json
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from utils.segmentation_metrics import ConfusionMatrix
dist.init_process_group("gloo")
matrix = ConfusionMatrix(2)
matrix.update(torch.full((4,), dist.get_rank()), torch.zeros(4).long())
matrix.reduce()
path = Path(sys.argv[1], f"{dist.get_rank()}.json")  # lines of two ranks could mix on stdout
path.write_text(json.dumps(matrix.compute()["confusion"]))
dist.destroy_process_group()
"""
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = ["--no-python", sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(
        [*command, *script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [[4, 4], [0, 0]]
