"""Loading models and data: what works, and that bad input gets an error that names the thing and the remedy."""

import json
import warnings
from importlib import import_module
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoProcessor, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import dyrate
from study import hub_sets
from study.caption_metrics import cider, tokenize_captions
from study.examples import examples, left_out
from study.intervals import bootstrap
from study.profiles import NOTEBOOKS, defaults


def test_loads_the_pocket_model():
    model, processor = dyrate.load("pocket")
    assert model.config.model_type == "llava"
    assert model.dtype == torch.float32 or torch.cuda.is_available()
    assert not model.training
    batch, images = next(examples("pocket", 2).batches(2))
    inputs = dyrate.encode(processor, images, [e.prompt for e in batch])
    assert (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist() == [144, 144]


def test_pocket_loads_without_our_code():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from dyrate.models import POCKET

    assert type(AutoProcessor.from_pretrained(POCKET)).__name__ == "LlavaProcessor"
    assert type(AutoModelForImageTextToText.from_pretrained(POCKET)).__name__ == "LlavaForConditionalGeneration"


def test_padding_does_not_change_an_answer():
    model, processor = dyrate.load("pocket")
    batch, images = next(examples("pocket", 3, tasks=["caption", "qa_place"]).batches(6))
    together = dyrate.record(model, processor, images, [e.prompt for e in batch], max_new_tokens=12)
    for example, image, found in zip(batch, images, together, strict=True):
        alone = dyrate.record(model, processor, [image], [example.prompt], max_new_tokens=12)[0]
        assert alone.text == found.text
        assert np.abs(alone.shares - found.shares).max() < 1e-4


def test_load_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"no such folder.*nowhere"):
        dyrate.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        dyrate.load(tmp_path)
    text = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(text).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="sees no images"):
        dyrate.load(tmp_path / "text")
    ViTModel(ViTConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path / "vit"
    )
    with pytest.raises(ValueError, match="vision-language model"):
        dyrate.load(tmp_path / "vit")
    (tmp_path / "blip").mkdir()
    (tmp_path / "blip" / "config.json").write_text(json.dumps({"model_type": "blip-2"}))
    with pytest.raises(ValueError, match=r"'blip-2', which dyrate does not support.*llava"):
        dyrate.load(tmp_path / "blip")
    for error in (ImportError("\nQwen2VLVideoProcessor requires the Torchvision library\n"), ValueError("needs `torchvision`")):
        with monkeypatch.context() as patched, pytest.raises(ImportError, match=r"^transformers' processor for pocket needs tor"):
            patched.setattr(AutoProcessor, "from_pretrained", Mock(side_effect=error))
            dyrate.load("pocket")
    with monkeypatch.context() as patched, pytest.raises(FileNotFoundError, match=r"cannot reach 'owner/nowhere'.*Connection"):
        patched.setattr("dyrate.models.snapshot_download", Mock(side_effect=ConnectionError()))
        patched.setattr(AutoConfig, "from_pretrained", Mock(side_effect=AssertionError("asked again")))
        dyrate.load("owner/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"hf download llava-hf/llava-1.5-7b-hf --revision b234b80"):
        dyrate.load("llava-hf/llava-1.5-7b-hf")


@pytest.fixture
def photographs(tmp_path):
    for i in range(3):
        Image.effect_noise((90 + 40 * i, 120), 60).convert("RGB").save(tmp_path / f"photo{i}.jpg")
    return tmp_path


def coco(folder, names=("photo0.jpg", "photo1.jpg", "photo2.jpg"), key="caption"):
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    annotations = [{"image_id": i, key: f"caption {j} of {i}"} for i in range(len(names)) for j in range(2)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def karpathy(folder, splits=("test", "test", "test")):
    images = [
        {"filename": f"photo{i}.jpg", "split": split, "sentences": [{"raw": f"words {j}"} for j in range(2)]}
        for i, split in enumerate(splits)
    ]
    (folder / "dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))


FORMS = {
    "karpathy.json": karpathy,
    "coco.json": lambda folder: coco(folder),
    "flickr8k": lambda folder: (folder / "captions.txt").write_text(
        "image,caption\n" + "".join(f'photo{i}.jpg,"one, or {j}"\n' for i in range(3) for j in range(2))
    ),
    "flickr30k": lambda folder: (folder / "results.csv").write_text(
        "image_name| comment_number| comment\n" + "".join(f"photo{i}.jpg| {j}| words {j}\n" for i in range(3) for j in range(2))
    ),
    "hub csv": lambda folder: (folder / "flickr.csv").write_text(
        "raw,filename\n" + "".join(f'"[""first"", ""second""]",photo{i}.jpg\n' for i in range(3))
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_caption_files(photographs, form):
    FORMS[form](photographs)
    found = examples(photographs)
    assert [e.name for e in found] == ["photo0.jpg", "photo1.jpg", "photo2.jpg"]
    assert all(len(e.references) == 2 for e in found)
    assert not found.problems
    assert len(examples(photographs, 2, seed=1)) == 2


def test_official_splits_are_kept(photographs):
    karpathy(photographs, ("train", "val", "test"))
    for split, name in (("train", "photo0.jpg"), ("validation", "photo1.jpg"), ("test", "photo2.jpg"), (None, "photo2.jpg")):
        found = examples(photographs, split=split)
        assert [e.name for e in found] == [name] and not found.problems
    karpathy(photographs, ("train", "val", "minival"))
    with pytest.raises(ValueError, match=r"photo2.jpg is in a split 'minival'"):
        examples(photographs)


@pytest.fixture
def hub(photographs, monkeypatch):
    """Stands in for the hub: nocaps' columns in its validation file, and where it was requested for."""
    datasets = pytest.importorskip("datasets", reason='hub data sets need `pip install -e ".[study,hub]" -e analysis`')
    rows = {
        "image": [str(photographs / f"photo{i}.jpg") for i in range(3)], "image_id": [4, 8, 6],
        "annotations_captions": [["one", "two"], ["three"], []],
    }  # fmt: skip
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (photographs / "data").mkdir()
    data.to_parquet(photographs / "data" / "validation-00000-of-00001.parquet")
    requested = {}

    def download(name, **how):
        requested.update(how, name=name)
        return str(photographs)

    monkeypatch.setattr(hub_sets, "snapshot_download", download)
    return requested


def test_a_hub_set_is_read_and_pinned(hub):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = examples("nocaps")
    assert hub["name"] == "lmms-lab/NoCaps" and len(hub["revision"]) == 40 and hub["allow_patterns"] == "data/validation-*"
    assert [(e.name, e.references) for e in found] == [("nocaps-4", ("one", "two")), ("nocaps-8", ("three",))]
    assert found.problems == ["nocaps: 1 images without a caption, left out (first: nocaps-6)"]
    assert found[1].image().size == (130, 120) and found[1].image().mode == "RGB"
    with pytest.raises(FileNotFoundError, match=r"lmms-lab/flickr30k at \w{40} has no file data/test-\*"):
        examples("flickr30k")


def test_hub_errors_name_the_remedy():
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RevisionNotFoundError

    from dyrate.models import unreachable

    data = "--repo-type dataset"
    error = OSError("cannot load")
    assert "hf download a/b --repo-type dataset" in str(unreachable("a/b", None, error, data))
    error.__cause__ = GatedRepoError.__new__(GatedRepoError)  # transformers wraps it so
    assert "accept its terms at https://huggingface.co/datasets/a/b" in str(unreachable("a/b", None, error, data))
    error.__cause__ = RevisionNotFoundError.__new__(RevisionNotFoundError)
    assert "no longer has the revision abc" in str(unreachable("a/b", "abc", error))
    assert "hf download a/b --revision abc" in str(unreachable("a/b", "abc", LocalEntryNotFoundError("offline")))


def test_without_the_package_a_hub_set_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[study,hub\]"'):
        examples("coco2017")


def truncate(path):
    path.write_bytes(path.read_bytes()[:400])


def test_images_that_cannot_be_used_are_listed_and_counted(photographs):
    """Missing, truncated, and of a shape that Qwen's own processor refuses: the rest goes on, with one warning."""
    Image.new("RGB", (1, 400)).save(photographs / "photo0.jpg")
    truncate(photographs / "photo1.jpg")
    coco(photographs, ("photo0.jpg", "photo1.jpg", "photo2.jpg", "missing.jpg", "lost.jpg"))
    qwen = SimpleNamespace(image_processor=Qwen2VLImageProcessorPil())
    with pytest.warns(UserWarning, match=r"2 of its 5 captioned images are not in .* \(first: missing.jpg\)"):
        found = examples(photographs)
    with pytest.warns(UserWarning, match="2 images left out: .*photo0.jpg is refused .*aspect ratio.*; .*photo1.jpg") as warned:
        assert [e.name for batch, _ in found.batches(2, qwen) for e in batch] == ["photo2.jpg"]
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    list(found.batches(2, qwen))  # a second pass lists nothing twice
    assert [e.name for e in found] == ["photo2.jpg"] and found.missing == ["missing.jpg", "lost.jpg"]
    assert len(found.unreadable) == 2 and left_out(found) == " (2 unreadable and 2 missing left out)"
    truncate(photographs / "photo2.jpg")
    with pytest.raises(ValueError, match=r"an image that can be used: .*photo0.jpg is refused.*photo2.jpg cannot be"):
        list(found.batches(2, qwen))


def test_where_no_image_can_be_read_no_model_is_loaded(photographs, monkeypatch):
    for i in range(3):
        truncate(photographs / f"photo{i}.jpg")
    karpathy(photographs, ("train", "val", "test"))
    monkeypatch.setattr(dyrate, "load", lambda *_, **__: pytest.fail("loaded"))
    for notebook in NOTEBOOKS:
        if "source" in (values := defaults(notebook)):
            values |= {"source": str(photographs)} | {k: ["caption"] for k in ("tasks", "learn_tasks") if k in values}
            values |= {"task": "caption"} if "task" in values else {}
            chapter = import_module(f"study.chapters.{notebook.stem[3:]}")
            with pytest.raises(ValueError, match=r"no example has an image that can be used: .*jpg cannot be read"):
                chapter.measure(**values)


def test_folder_errors(photographs, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        examples(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no image"):
        examples(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="holds no caption file"):
        examples(photographs)
    (photographs / "captions.txt").write_text("picture,words\nphoto0.jpg,a\n")
    with pytest.raises(ValueError, match=r"captions.txt has the columns \['picture', 'words'\]"):
        examples(photographs)
    (photographs / "captions.txt").unlink()
    (photographs / "captions.json").write_text("{")
    with pytest.raises(ValueError, match=r"captions.json is not valid JSON"):
        examples(photographs)
    coco(photographs, key="text")
    with pytest.raises(ValueError, match=r"captions.json: an entry lacks.*caption"):
        examples(photographs)
    coco(photographs, ("a.jpg",))
    with warnings.catch_warnings(), pytest.raises(ValueError, match="none of its 1 captioned images"):
        warnings.simplefilter("ignore")
        examples(photographs)
    with pytest.raises(ValueError, match="unknown pocket task"):
        examples("pocket", 1, tasks=["poem"])


def test_ptb_tokens_and_cider():
    assert tokenize_captions(["A red-brown dog, isn't it?", "Two   cats."]) == ["a red-brown dog is n't it", "two cats"]
    references = [
        ["a red cat on a mat", "a cat on the mat"],
        ["two blue birds", "blue birds in a tree"],
        ["a big green car", "the green car"],
    ]
    perfect = cider([r[0] for r in references], references)
    wrong = cider([references[(i + 1) % 3][0] for i in range(3)], references)
    assert (perfect > 2).all()
    assert (wrong < 0.5).all()


def test_bootstrap_by_hand():
    constant = bootstrap([0.5] * 10)
    assert constant == {"value": 0.5, "low": 0.5, "high": 0.5, "n": 10}
    rng = np.random.default_rng(0)
    hits = sum(b["low"] <= 0 <= b["high"] for b in (bootstrap(rng.normal(size=80), resamples=300) for _ in range(200)))
    assert 175 <= hits <= 199  # a 95 % interval covers the truth about 190 times in 200
    assert bootstrap([])["n"] == 0
