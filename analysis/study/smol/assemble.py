"""Put smol together: the published language model, our adapter merged into it, our eyes and projector.

    python -m study.smol.assemble      # make smol: seconds, no training
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionConfig

from study.pocket.vlm import build_processor
from study.smol.parts import TEMPLATE, build_model, language_model


def assemble(trained: Path, out: Path, gguf: Path | None = None) -> None:
    """Write the whole model (float32, Hugging Face format) into `out`. trained: folder that `study.smol.train` wrote."""
    path = trained / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it comes with the repository, or train it with `python -m study.smol.train`")
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    tensors = {name: value.float() for name, value in load_file(path).items()}
    language, tokenizer = language_model(gguf)
    model = build_model(language, tokenizer, CLIPVisionConfig(**about["vision"]))
    for part in ("vision_tower", "multi_modal_projector"):
        getattr(model.model, part).load_state_dict(_under(tensors, part))
    merge(model.model.language_model, _under(tensors, "adapter"), about["scaling"])
    model.save_pretrained(out)
    build_processor(tokenizer, TEMPLATE).save_pretrained(out)


def _under(tensors: dict[str, torch.Tensor], part: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}


@torch.no_grad()
def merge(decoder, adapter: dict[str, torch.Tensor], scaling: float) -> None:
    """Add each adapted product to its weight: W + scaling B A (LoRA, arXiv:2106.09685)."""
    for name in [name for name in adapter if name.endswith("lora_A.weight")]:
        module = decoder.get_submodule(name.removesuffix(".lora_A.weight").removeprefix("base_model.model."))
        module.weight += scaling * adapter[name.replace("lora_A", "lora_B")] @ adapter[name]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="trained", type=Path, default=Path("data/smol"), help="what study.smol.train wrote")
    parser.add_argument("--out", type=Path, default=Path("build/smol"))
    parser.add_argument("--gguf", type=Path, help="the language model's file (default: of the installed package)")
    assemble(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
