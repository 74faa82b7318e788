"""Train smol: a new projector and an adapter (LoRA) of the frozen language model, before frozen eyes.

    python -m study.smol.train --work build/smol-training --out data/smol

One picture carries many turns in one sequence, each of which sees the shared prefix and itself. Image tokens are never
dropped. A run killed at any moment goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AttentionInterface, AutoModelForImageTextToText

from dyrate.atomic import write_whole
from study.pocket.batches import IGNORE
from study.pocket.objectives import (
    autocast,
    condition_projector,
    fast_bfloat16,
    packed_bias,
    plain_attention,
    resembles,
    with_image,
)
from study.pocket.train import made, normalized, read_state, restore_moments, schedule, write_state
from study.pocket.vlm import build_processor
from study.smol.batches import Batches, Config
from study.smol.parts import TEMPLATE, build_model, language_model

SCALING = 2.0  # of the adapter: alpha / rank


class Run:
    """Training state on disk: what is trained, optimizer moments, step and history; written whole or not at all."""

    save_seconds = 120.0

    def __init__(self, work: Path, config: Config, eyes: Path, device: str, workers: int = 1, gguf: Path | None = None):
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise ModuleNotFoundError("training smol needs the package peft: pip install peft") from None
        self.work, self.config, self.device, self.workers = work, config, device, workers
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        language, tokenizer = language_model(gguf)
        self.processor = build_processor(tokenizer, TEMPLATE)
        seeing = AutoModelForImageTextToText.from_pretrained(eyes, dtype=torch.float32)
        self.model = build_model(language, tokenizer, seeing.config.vision_config)
        self.model.model.vision_tower.load_state_dict(seeing.model.vision_tower.state_dict())
        self.model.requires_grad_(False)
        decoder = self.model.model.language_model
        if fast_bfloat16(device):  # frozen: half the memory, and no cast at every step
            for module in decoder.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)
        adapter = LoraConfig(r=config.rank, lora_alpha=SCALING * config.rank, target_modules="all-linear")
        inject_adapter_in_model(adapter, decoder)
        self.model.model.multi_modal_projector.requires_grad_(True)
        self.align = nn.RMSNorm(decoder.config.hidden_size)
        if device == "cpu":
            AttentionInterface.register("plain_training", plain_attention)
            decoder.config._attn_implementation = "plain_training"
        self.model.to(device)
        self.align.to(device)
        prefix = Batches(config, 0, self.processor).prefix
        self.first = prefix.index(self.model.config.image_token_id)  # where the image stands in every sequence
        self.done, self.seconds, self.history = 0, 0.0, []

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter that is trained: adapter and projector, and the norm of the dense objective."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        return named | {f"align.{n}": p for n, p in self.align.named_parameters()}

    def train(self) -> None:
        config, parameters = self.config, self.trained()
        optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.98), weight_decay=0.0)
        if not self._load(optimizer):
            self._start()
        drawn = Batches(config, self.done, self.processor)
        batches = DataLoader(drawn, None, num_workers=self.workers, prefetch_factor=3)
        bar = tqdm(batches, initial=self.done, total=config.steps, desc="smol", mininterval=5, dynamic_ncols=True)
        mean: dict[str, float] = {}
        saved = begun = time.monotonic()
        for batch in bar:
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * schedule(self.done, config.steps)
            loss, scores = self.loss({k: v.to(self.device, non_blocking=True) for k, v in batch.items()})
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.step()
            self.done += 1
            if self.done % 10 == 0:
                for k, v in {"loss": loss.detach(), **scores}.items():
                    mean[k] = float(v) if k not in mean else 0.8 * mean[k] + 0.2 * float(v)
                bar.set_postfix_str(" ".join(f"{k} {v:.3f}" for k, v in mean.items()))
            if self.done % 50 == 0:
                self.history.append({"step": self.done, **{k: round(v, 4) for k, v in mean.items()}})
            now = time.monotonic()
            if now - saved > self.save_seconds or self.done == config.steps:
                self.seconds += now - begun
                saved = begun = now
                self._save(optimizer)

    def see(self, pixels: Tensor) -> Tensor:
        """pixels (batch, 168, 168, 3) of 0 to 255 -> patches (batch, 144, width) of the used layer."""
        with torch.no_grad():
            out = self.model.model.vision_tower(normalized(pixels), output_hidden_states=True)
        return out.hidden_states[self.model.config.vision_feature_layer][:, 1:]

    def loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Next-token loss over all packed turns, and the dense objective: patches resemble the words that describe them."""
        inner, words = self.model.model, self.model.model.language_model.embed_tokens
        with autocast(self.device):
            features = inner.multi_modal_projector(self.see(batch["pixels"]))
            hidden = with_image(words(batch["ids"]), features, self.first)
            bias = packed_bias(batch["turn"], features.dtype)[:, None]
            rotary = inner.language_model.rotary_emb(hidden, batch["positions"])
            for layer in inner.language_model.layers:
                hidden = layer(hidden, attention_mask=bias, position_embeddings=rotary)
            wanted = batch["labels"] != IGNORE
            logits = F.linear(inner.language_model.norm(hidden[wanted]), words.weight).float()
            labels, weight = batch["labels"][wanted], batch["weight"][wanted]
            spoken = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
            shown = (batch["patch_words"] != IGNORE).any(-1)
            dense, named = resembles(self.align(features[shown].float()), batch["patch_words"][shown], words.weight)
        right = (logits.detach().argmax(-1) == labels).float()
        telling = weight > 1
        scores = {"lm": spoken.detach(), "telling": (right * telling).sum() / telling.sum(), "patches": named}
        return spoken + 0.3 * dense, scores

    def _start(self) -> None:
        batch = Batches(self.config, 0, self.processor)
        pixels = torch.cat([batch[-i - 1]["pixels"] for i in range(max(1, 32 // self.config.batch))]).to(self.device)
        words = self.model.model.language_model.embed_tokens.weight
        condition_projector(self.model.model.multi_modal_projector, self.see(pixels), words)

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        tensors = {f"trained.{n}": p for n, p in self.trained().items()}
        write_state(self, tensors, self.trained(), [optimizer])

    def _load(self, optimizer: torch.optim.Optimizer) -> bool:
        """Take up the last checkpoint; whether there is one."""
        tensors, moments = read_state(self)
        with torch.no_grad():
            for name, p in self.trained().items() if tensors else ():
                p.copy_(tensors[f"trained.{name}"])
        restore_moments(moments, self.trained(), [optimizer])
        return bool(tensors)

    def export(self, out: Path) -> None:
        """Write what is ours (bfloat16): the adapter by peft's names, tower and projector, and the record of the training."""
        from peft import get_peft_model_state_dict

        out.mkdir(parents=True, exist_ok=True)
        adapter = get_peft_model_state_dict(self.model.model.language_model)
        parts = {"adapter": adapter} | {
            name: getattr(self.model.model, name).state_dict() for name in ("vision_tower", "multi_modal_projector")
        }
        named = {f"{part}.{k}": v for part, held in parts.items() for k, v in held.items()}
        tensors = {k: v.detach().cpu().bfloat16().contiguous() for k, v in named.items()}
        about = {"rank": self.config.rank, "scaling": SCALING, "vision": self.model.config.vision_config.to_diff_dict()}
        write_whole(out / "model.safetensors", lambda p: save_file(tensors, p, metadata={"about": json.dumps(about)}))
        record = {
            "command": "python -m study.smol.train", "config": asdict(self.config),
            "scenes_seen": self.done * self.config.batch, "steps": self.done, **made(self.device, self.seconds),
            "history": self.history,
        }  # fmt: skip
        write_whole(out / "training.json", json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/smol-training"), help="checkpoints to resume from")
    parser.add_argument("--out", type=Path, default=Path("data/smol"), help="where the adapter, the eyes and the projector go")
    parser.add_argument("--eyes", type=Path, default=Path("data/pocket"), help="folder of the LLaVA whose tower is taken")
    parser.add_argument("--gguf", type=Path, help="the language model's file (default: of the installed package)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes (a GPU needs about 6)")
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(argv))
    work, out, eyes, gguf, device, workers = (given.pop(k) for k in ("work", "out", "eyes", "gguf", "device", "workers"))
    run = Run(work, Config(**given), eyes, device, workers, gguf)
    run.train()
    run.export(out)


if __name__ == "__main__":
    main()
