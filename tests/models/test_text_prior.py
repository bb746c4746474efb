"""TextPrior: similarity, state dict, the file's round trip, and every refusal."""

import json
import os

import pytest
import safetensors.torch
import torch

from models.text_prior import (
    CLIP_MODEL,
    TextPrior,
    load_text_prior,
    orthogonal_text_prior,
    save_text_prior,
)
from utils.errors import InputError

PROMPTS = ["the photo of car", "the photo of person", "the photo of bike"]
METADATA = {"model": CLIP_MODEL, "pretrained": "openai", "sha256": "40d365715913c9da" + 48 * "0"}


def unit_rows(count=3, dimension=512):
    generator = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(torch.randn(count, dimension, generator=generator), dim=1)


@pytest.fixture
def prior_file(tmp_path):
    path = tmp_path / "clip_text_mfnet.safetensors"
    save_text_prior(path, unit_rows(), PROMPTS, METADATA)
    return path


@pytest.mark.parametrize("leading", [(), (4,), (2, 5, 5)], ids=str)
def test_similarity_is_the_cosine(leading):
    features = unit_rows(3, 16)
    descriptor = torch.randn(*leading, 16) * 50
    got = TextPrior(features, source="test").similarity(descriptor)
    assert got.shape == (*leading, 3)
    expected = torch.nn.functional.cosine_similarity(
        descriptor.double()[..., None, :], features.double(), dim=-1
    )
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-6)


def test_similarity_stays_float32_under_autocast():
    prior = TextPrior(unit_rows(), source="test")
    descriptor = torch.randn(7, 512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = prior.similarity(descriptor)
    assert got.dtype == torch.float32
    assert torch.equal(got, prior.similarity(descriptor))


def test_gradient_reaches_the_descriptor_only():
    prior = TextPrior(unit_rows().requires_grad_(), source="test")
    descriptor = torch.randn(2, 512, requires_grad=True)
    prior.similarity(descriptor).sum().backward()
    assert descriptor.grad.abs().sum() > 0
    assert not list(prior.parameters()) and not prior.features.requires_grad


def test_state_dict_fills_an_empty_prior():
    state = TextPrior(unit_rows(), source="test").state_dict()
    assert list(state) == ["features"]
    empty = TextPrior(torch.zeros(3, 512), source="checkpoint")
    empty.load_state_dict(state)
    assert torch.equal(empty.features, unit_rows())


def test_features_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"\(Q, D\), got \(512,\)"):
        TextPrior(torch.zeros(512), source="test")


def test_orthogonal_rows():
    features, source = orthogonal_text_prior(8)
    assert features.shape == (8, 512) and features.dtype == torch.float32
    torch.testing.assert_close(features @ features.T, torch.eye(8), rtol=0, atol=1e-6)
    torch.randn(3)  # the global generator plays no part
    assert torch.equal(features, orthogonal_text_prior(8)[0])
    assert "no CLIP" in source
    with pytest.raises(ValueError, match="9 orthogonal rows do not fit into 8"):
        orthogonal_text_prior(9, 8)


def test_round_trip(prior_file):
    features, source = load_text_prior(prior_file, tuple(PROMPTS))
    assert torch.equal(features, unit_rows())
    for part in ("clip_text_mfnet.safetensors", CLIP_MODEL, "openai", "40d365715913c9da"):
        assert part in source
    assert os.listdir(prior_file.parent) == [prior_file.name]  # nothing aside is left


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (PROMPTS[:2], "3 in the file, 2 in the config"),
        ([*PROMPTS, "the photo of bump"], "3 in the file, 4 in the config"),
        ([PROMPTS[1], PROMPTS[0], PROMPTS[2]], "class 1 is 'the photo of car' in the file and"),
        ([*PROMPTS[:2], "a photo of bike"], "'a photo of bike' in the config"),
    ],
)
def test_other_prompts_are_refused(prior_file, prompts, message):
    with pytest.raises(InputError, match=message):
        load_text_prior(prior_file, prompts)


def test_missing_file_gives_the_command(tmp_path):
    with pytest.raises(InputError) as caught:
        load_text_prior("pretrained/clip_text_none_such.safetensors", PROMPTS)
    assert "`python tools/export_text_prior.py -n YOUR.yaml`" in str(caught.value)
    assert "--set model.text_prior=orthogonal" in str(caught.value)
    elsewhere = tmp_path / "clip_text_fmb.safetensors"
    with pytest.raises(InputError, match=rf"-n fmb --out {elsewhere}"):
        load_text_prior(elsewhere, PROMPTS)


def write(path, tensors, **changes):
    metadata = {**METADATA, "prompts": json.dumps(PROMPTS), **changes}
    kept = {key: value for key, value in metadata.items() if value is not None}
    safetensors.torch.save_file(tensors, path, kept)


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({"features": unit_rows(2)}, {}, r"holds torch.float32 \(2, 512\) instead of"),
        ({"features": unit_rows(3, 256)}, {}, r"holds torch.float32 \(3, 256\) instead of"),
        ({"features": unit_rows().half()}, {}, "holds torch.float16"),
        ({"features": 2 * unit_rows()}, {}, "not of length 1"),
        ({"features": unit_rows() * float("nan")}, {}, "not of length 1"),
        ({"text": unit_rows()}, {}, "cannot be read"),
        ({"features": unit_rows()}, {"model": "ViT-B-32"}, "CLIP ViT-B-32 instead of"),
        ({"features": unit_rows()}, {"sha256": None}, "cannot be read"),
        ({"features": unit_rows()}, {"prompts": "car"}, "cannot be read"),
        ({"features": unit_rows()}, {"prompts": "3"}, "cannot be read"),
    ],
    ids=range(10),
)
def test_foreign_file_is_refused(tmp_path, tensors, changes, message):
    path = tmp_path / "clip_text_mfnet.safetensors"
    write(path, tensors, **changes)
    with pytest.raises(InputError, match=message) as caught:
        load_text_prior(path, PROMPTS)
    assert "python tools/export_text_prior.py -n mfnet" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", None], ids=str)
def test_damaged_file_is_refused(prior_file, content):
    prior_file.write_bytes(prior_file.read_bytes()[:-100] if content is None else content)
    with pytest.raises(InputError, match="cannot be read"):
        load_text_prior(prior_file, PROMPTS)


def test_failed_write_leaves_the_old_file(prior_file, monkeypatch):
    old = prior_file.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*\.safetensors: No space left"):
        save_text_prior(prior_file, unit_rows(4), [*PROMPTS, "x"], METADATA)
    assert prior_file.read_bytes() == old
    assert os.listdir(prior_file.parent) == [prior_file.name]
