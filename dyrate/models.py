"""From a name or a folder to a vision-language model and its processor."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from dyrate.distributed import this_process

CHECKOUT = Path(__file__).resolve().parent.parent
POCKET = CHECKOUT / "data" / "pocket"
# Names of checkpoints that come with the repository: the folder, and what to do where it is missing
_INSTALL = "install dyrate from its repository with `pip install -e .`, or train it with `make "
BUILT_IN = {
    "pocket": (POCKET, f"{_INSTALL}pocket`"),
    "pocket-plain": (CHECKOUT / "data/pocket-plain", f"{_INSTALL}twins`"),
    "pocket-dropped": (CHECKOUT / "data/pocket-dropped", f"{_INSTALL}twins`"),
    "smol": (CHECKOUT / "build/smol", "put it together with `make smol`, in seconds"),
}
FAMILIES = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl", "idefics3", "smolvlm")
# A hub checkpoint may change under its name; the study names the state that it was written for.
REVISIONS = {
    "llava-hf/llava-1.5-7b-hf": "b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
    "llava-hf/llava-1.5-13b-hf": "5dda2880bda009266dda7c4baff660b95ca64540",
}


def load(name: str | Path = "pocket", *, revision: str | None = None, dtype=None, device_map=None, device=None):
    """Load a vision-language model for inference: returns (model, processor).

    name: one of BUILT_IN ("pocket", a small LLaVA, and others), a folder in Hugging Face format, or a hub name, with "@revision"
    if you like. revision: of a hub name; by default that of REVISIONS, else the newest, with a warning that says which it was.
    dtype: default bfloat16 on a GPU, float32 on a CPU. device: default this process's GPU, else the CPU; device_map ("auto":
    over all GPUs) is passed on to transformers instead. Nothing downloaded is executed.

    Raises FileNotFoundError (no such folder, or a hub checkpoint that is not at hand offline), ValueError (not a
    vision-language model, or a family that dyrate does not know) and ImportError (a processor that needs torchvision).
    """
    where = origin(name, revision)
    device = device or this_process().device
    on_gpu = (device_map is not None and torch.cuda.is_available()) or str(device).startswith("cuda")
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    config = read_config(name, revision)
    try:
        processor = AutoProcessor.from_pretrained(**where)
        model = AutoModelForImageTextToText.from_pretrained(**where, dtype=dtype, device_map=device_map)
    except OSError as error:
        raise _missing(where, error) from error
    except (ImportError, ValueError) as error:
        if "torchvision" not in str(error).lower():
            raise
        raise ImportError(
            f"transformers' processor for {name} needs torchvision: install the build that goes with torch {torch.__version__}"
        ) from error
    if isinstance(where["pretrained_model_name_or_path"], str) and where["revision"] is None:
        state = f"{where['pretrained_model_name_or_path']}@{config._commit_hash}"
        warnings.warn(f'took the newest state of a checkpoint: write "{state}" to keep it', stacklevel=2)
    if device_map is None:
        model = model.to(device)
    return model.eval(), processor


def read_config(name: str | Path, revision: str | None = None):
    """A checkpoint's configuration, without its weights. Raises what `load` does."""
    where = origin(name, revision)
    source = where["pretrained_model_name_or_path"]
    try:
        if isinstance(source, str):  # one request that fails at once, where transformers tries six times
            snapshot_download(source, revision=where["revision"], allow_patterns="config.json")
        config = AutoConfig.from_pretrained(**where)
    except OSError as error:
        raise _missing(where, error) from error
    _check_family(config, name)
    return config


def origin(name: str | Path, revision: str | None = None) -> dict:
    """Where transformers finds a checkpoint: arguments of `from_pretrained`."""
    if not isinstance(name, Path) and not Path(name).is_dir() and "@" in name:
        name, _, revision = name.partition("@")
    source = _source(name)
    revision = None if isinstance(source, Path) else revision or REVISIONS.get(source)
    return {"pretrained_model_name_or_path": source, "revision": revision, "trust_remote_code": False}


def _source(name: str | Path) -> str | Path:
    """The folder to load from, or the hub name."""
    if str(name) in BUILT_IN:
        folder, remedy = BUILT_IN[str(name)]
        if not (folder / "config.json").exists():
            raise FileNotFoundError(f"the {name} checkpoint is missing at {folder}: {remedy}")
        return folder
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"{path} has no config.json: it is not a checkpoint in Hugging Face format")
        return path
    is_path = isinstance(name, Path) or path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1
    if is_path or path.parent.is_dir():
        names = ", ".join(f'"{known}"' for known in BUILT_IN)
        raise FileNotFoundError(f'no such folder: {path}. Name a folder, a hub checkpoint as "owner/name", or {names}')
    return str(name)


def _check_family(config, name) -> None:
    if config.model_type in FAMILIES:
        return
    if not hasattr(config, "vision_config"):
        raise ValueError(f"{name} is a {config.model_type!r} model, which sees no images: dyrate needs a vision-language model")
    raise ValueError(
        f"{name} is of the family {config.model_type!r}, which dyrate does not support; supported: {', '.join(FAMILIES)}"
    )


def describe(model: PreTrainedModel) -> dict:
    """A model's facts for captions and records: family, parameters, layers, heads, dtype, device, revision (of a hub's)."""
    text = model.config.get_text_config()
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if on_gpu else str(model.device)
    dtype = str(model.dtype).removeprefix("torch.")
    if on_gpu and dtype == "float32" and torch.backends.cuda.matmul.allow_tf32:
        dtype += ", products in TF32"
    return {
        "family": model.config.model_type, "parameters": sum(p.numel() for p in model.parameters()),
        "layers": text.num_hidden_layers, "heads": text.num_attention_heads,
        "dtype": dtype, "device": device,
        "revision": getattr(model.config, "_commit_hash", None),
    }  # fmt: skip


def _missing(where: dict, error: OSError) -> FileNotFoundError:
    source = where["pretrained_model_name_or_path"]
    if isinstance(source, Path):
        return FileNotFoundError(f"{source} is not a complete checkpoint in Hugging Face format: {error}")
    return unreachable(source, where["revision"], error)


def unreachable(name: str, revision: str | None, error: BaseException, options: str = "") -> FileNotFoundError:
    """The error to raise where `error` says that a hub repository cannot be had: gated, rewritten, or not at hand.

    options: of `hf download` for this repository.
    """
    causes = []
    while error is not None and error not in causes:
        causes.append(error)
        error = error.__cause__ or error.__context__
    download = " ".join(filter(None, [f"hf download {name}", f"--revision {revision}" if revision else "", options]))
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return FileNotFoundError(
            f"{name} is gated: accept its terms at https://huggingface.co/{'datasets/' if 'dataset' in options else ''}{name}, "
            "then log in with `hf auth login`"
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return FileNotFoundError(
            f"{name} no longer has the revision {revision} that was asked for: the repository was rewritten. Look at its "
            "history, and if you trust the new state, name that"
        )
    return FileNotFoundError(
        f"cannot reach {name!r} on the Hugging Face hub, and it is not in the local cache ({type(causes[0]).__name__}). Download "
        f"it once where there is a network, with `{download}`, or name the folder of a local copy."
    )
