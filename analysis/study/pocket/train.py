"""Train the pocket LLaVA from nothing, in two stages, on scenes rendered as they are needed.

    python -m study.pocket.train --work build/pocket --out data/pocket

Stage *tower* trains the vision tower on what each patch shows (a dense objective on patches that show a group or a word) and its
[CLS] on the caption (contrastively). Stage *language* trains everything: one picture carries many turns in
one sequence, each of which sees the shared prefix and itself. In its last quarter image tokens are dropped at random in
the deeper layers. A run killed at any moment goes on from its last checkpoint when started again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dyrate.atomic import write_whole
from study.pocket.batches import N_PATCHES, Batches, Config
from study.pocket.objectives import Lab, autocast, condition_projector
from study.pocket.vlm import build_processor


class Run:
    """Training state on disk: weights, optimizer moments, step and history; written whole or not at all."""

    save_seconds = 120.0

    def __init__(self, work: Path, config: Config, device: str, workers: int = 1):
        self.work, self.config, self.device, self.workers = work, config, device, workers
        work.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(config.seed)
        self.processor = build_processor()
        self.lab = Lab(self.processor, device).to(device)
        self.done = {"tower": 0, "language": 0}
        self.history: list[dict] = []
        self.seconds = 0.0

    def optimizers(self, stage: str) -> list[torch.optim.Optimizer]:
        """AdamW; in the language stage Muon for the matrices inside the blocks, which finds rare circuits sooner."""
        rest = dict(self.lab.named_parameters())
        matrices = [n for n, p in rest.items() if p.ndim == 2 and (".layers." in n or "projector" in n)]
        muon = [rest.pop(n) for n in matrices] if stage == "language" else []
        decayed = [{"params": [p for p in rest.values() if (p.ndim > 1) == wide], "weight_decay": 0.05 * wide} for wide in (0, 1)]
        chosen: list[torch.optim.Optimizer] = [torch.optim.AdamW(decayed, betas=(0.9, 0.98))]
        if muon:
            chosen.append(torch.optim.Muon(muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
        return chosen

    def save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        tensors = {f"lab.{k}": v for k, v in self.lab.state_dict().items() if k != "model.lm_head.weight"}
        write_state(self, tensors, dict(self.lab.named_parameters()), optimizers)

    def load(self) -> dict[str, Tensor]:
        """Take up the last checkpoint, if there is one; returns the optimizer's tensors."""
        tensors, moments = read_state(self)
        self.lab.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("lab.")}, strict=False)
        return moments

    def train(self) -> None:
        moments = self.load()
        for stage in ("tower", "language"):
            if self.done[stage] < getattr(self.config, f"{stage}_steps"):
                self._stage(stage, moments)
                moments = {}

    def _stage(self, stage: str, moments: dict[str, Tensor]) -> None:
        config, steps = self.config, getattr(self.config, f"{stage}_steps")
        optimizers = self.optimizers(stage)
        if self.done[stage]:
            restore_moments(moments, dict(self.lab.named_parameters()), optimizers)
        if stage == "language" and self.done[stage] == 0:
            pixels = normalized(Batches(stage, config, 0, self.processor)[0]["pixels"].to(self.device))
            with torch.no_grad():
                inner, patches = self.lab.model.model, self.lab.see(pixels)[0]
                condition_projector(inner.multi_modal_projector, patches, inner.language_model.embed_tokens.weight)
        drawn = Batches(stage, config, self.done[stage], self.processor)
        batches = DataLoader(drawn, None, num_workers=self.workers, prefetch_factor=3)
        bar = tqdm(batches, initial=self.done[stage], total=steps, desc=stage, mininterval=5, dynamic_ncols=True)
        self.lab.train()
        mean: dict[str, float] = {}
        saved = begun = time.monotonic()
        for batch in bar:
            step = self.done[stage]
            torch.manual_seed(step)  # which tokens a step drops does not depend on interruptions
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = getattr(config, f"{stage}_learning_rate") * schedule(step, steps)
            batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            pixels = normalized(batch.pop("pixels"))
            with autocast(self.device):
                patches, pooled = self.lab.see(pixels)
                loss, scores = self.lab.tower_loss(patches, pooled, batch)
                if stage == "language":
                    spoken, more = self.lab.language_loss(patches, batch, self._n_kept(step, steps), config.drop_layer)
                    loss = 0.3 * (loss + self.lab.word_loss(patches, batch["patch_words"])) + spoken
                    scores = {f"sees_{k}": v for k, v in scores.items()} | more
            self.lab.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(self.lab.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            self.done[stage] += 1
            for k, v in {"loss": loss.detach(), **scores}.items():
                mean[k] = float(v) if k not in mean else 0.97 * mean[k] + 0.03 * float(v)
            bar.set_postfix_str(" ".join(f"{k} {v:.2f}" for k, v in mean.items()))
            if self.done[stage] % 50 == 0:
                self.history.append({"stage": stage, "step": self.done[stage], **{k: round(v, 4) for k, v in mean.items()}})
            now = time.monotonic()
            if now - saved > self.save_seconds or self.done[stage] == steps:
                self.seconds += now - begun
                saved = begun = now
                self.save(optimizers)

    def _n_kept(self, step: int, steps: int) -> int:
        rng = random.Random(f"drop {self.config.seed} {step}")
        if step < 0.75 * steps or rng.random() > self.config.drop_share:
            return N_PATCHES
        return round(N_PATCHES * (1 - rng.uniform(0, 0.95)))

    def export(self, out: Path) -> None:
        """Write the model in Hugging Face format (bfloat16) with its processor and the record of how it was made."""
        model = self.lab.model.to(torch.bfloat16)
        model.set_attn_implementation("sdpa")
        model.save_pretrained(out)
        self.processor.save_pretrained(out)
        scenes = sum(self.done[s] * getattr(self.config, f"{s}_batch") for s in self.done)
        record = {
            "command": "python -m study.pocket.train", "config": asdict(self.config),
            "scenes_seen": scenes, "steps": self.done, **made(self.device, self.seconds), "history": self.history,
        }  # fmt: skip
        write_whole(out / "training.json", json.dumps(record, indent=1) + "\n")


# -- a training's state on disk, of any run with `work`, `config`, `done`, `seconds` and `history` ---------------------------


def write_state(run, tensors: dict[str, Tensor], parameters: dict, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write `tensors`, the optimizers' moments of each named parameter, and how far the run is."""
    for name, p in parameters.items():
        for optimizer in optimizers:
            tensors = tensors | {f"moments.{name}:{k}": v for k, v in optimizer.state.get(p, {}).items()}
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    about = {"config": asdict(run.config), "done": run.done, "seconds": run.seconds, "history": run.history}
    write_whole(run.work / "state.safetensors", lambda p: save_file(tensors, p, metadata={"about": json.dumps(about)}))


def read_state(run) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors and the moments of the last checkpoint, both empty where there is none; the run is as far as it was."""
    path = run.work / "state.safetensors"
    if not path.exists():
        return {}, {}
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    run.done, run.seconds, run.history = about["done"], about["seconds"], about["history"]
    tensors = load_file(path)
    return tensors, {k.removeprefix("moments."): v for k, v in tensors.items() if k.startswith("moments.")}


def restore_moments(moments: dict[str, Tensor], parameters: dict, optimizers: list[torch.optim.Optimizer]) -> None:
    """Give each optimizer the moments of the parameters that it holds."""
    for optimizer in optimizers:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for key, value in moments.items():
            name, moment = key.split(":")
            if id(p := parameters[name]) in held:
                optimizer.state[p][moment] = value if moment == "step" else value.to(p.device)


def made(device: str, seconds: float) -> dict:
    """Where, when and with what a training was done, for its record."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    name = torch.cuda.get_device_name() if "cuda" in device else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"commit": commit or None, "hours": round(seconds / 3600, 2), "device": name, "torch": torch.__version__}


def normalized(pixels: Tensor) -> Tensor:
    """Pixels (batch, 168, 168, 3) of 0 to 255 as the processor hands them to the tower."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def schedule(step: int, steps: int) -> float:
    """Linear warm-up over 5 % of the steps, then a cosine down to 2 %."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=Path("build/pocket"), help="checkpoints to resume from")
    parser.add_argument("--out", type=Path, default=Path("data/pocket"), help="where the finished model goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw scenes (a GPU needs about 6)")
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(argv))
    work, out, device, workers = (given.pop(k) for k in ("work", "out", "device", "workers"))
    run = Run(work, Config(**given), device, workers)
    run.train()
    run.export(out)


if __name__ == "__main__":
    main()
