"""Train the pocket LLaVA from nothing, in two stages, on scenes rendered as they are needed.

    python -m dyrate.pocket.train --work build/pocket --out data/pocket

Stage *tower* teaches the vision tower what each patch shows (a dense objective on patches that show a group or a word) and
its [CLS] what the caption says (contrastively). Stage *language* trains everything: one picture carries many turns in
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
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AttentionInterface

from dyrate.files import write_whole
from dyrate.pocket import language
from dyrate.pocket.scenes import COLOURS, GRID, PLACES, THINGS, WORDS, Group, Scene, compose, render, seeds
from dyrate.pocket.vlm import SYSTEM, build_model, build_processor

IGNORE = -100
N_PATCHES = GRID * GRID
SLOTS = {
    "object": set(" ".join([*THINGS, *language.PLURAL.values()]).split()) - {"of"},
    "colour": set(COLOURS) | {c.capitalize() for c in COLOURS},
    "count": {"A", "An", "Two", "Three", "a", "an", "one", "two", "three"},
    "place": set("top bottom left right centre middle".split()),
    "relation": {"above", "below"},
    "existence": {"yes", "no"},
    "reading": set(WORDS),
}


@dataclass(frozen=True)
class Config:
    """One run. Steps, batch sizes and peak learning rates of the two stages; see the module's text for their purpose."""

    tower_steps: int = 1700
    tower_batch: int = 64
    tower_rate: float = 2e-3
    language_steps: int = 5000
    language_batch: int = 24
    language_rate: float = 1.5e-3
    questions: int = 12  # turns of questions for each picture
    drop_share: float = 0.6  # of the steps in the last quarter drop image tokens
    drop_layer: int = 2  # first layer that misses them
    seed: int = 0


def _plain_attention(module, query, key, value, attention_mask, scaling, **_):
    """Two matrix products: in bfloat16 on a CPU, at this size, twice as fast as the fused kernel with its backward."""
    scores = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        scores += attention_mask
    return (scores.softmax(-1) @ value).transpose(1, 2), None


class Lab(nn.Module):
    """The model with what only training needs: a probe of each patch and a small text tower for the captions."""

    def __init__(self, processor, device: str):
        super().__init__()
        self.model = build_model(processor.tokenizer)
        if device == "cpu":
            AttentionInterface.register("pocket_training", _plain_attention)
            for config in (self.model.config.text_config, self.model.config.vision_config):
                config._attn_implementation = "pocket_training"
        width = self.model.config.vision_config.hidden_size
        self.probe = nn.ModuleDict({
            "object": nn.Linear(width, len(THINGS) + 1), "colour": nn.Linear(width, len(COLOURS)),
            "count": nn.Linear(width, 3), "place": nn.Linear(width, len(PLACES)), "word": nn.Linear(width, len(WORDS) + 1),
        })  # fmt: skip
        self.text = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 128))
        self.words = nn.Embedding(len(processor.tokenizer), width, padding_idx=processor.tokenizer.pad_token_id)
        self.cls = nn.Linear(width, 128)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.align = nn.RMSNorm(self.model.config.text_config.hidden_size)
        self.found = nn.RMSNorm(self.model.config.text_config.hidden_size)
        self.noun_layer = self.model.config.text_config.num_hidden_layers // 2 - 1

    def see(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (batch, 3, 168, 168) -> patches (batch, 144, width) of the used layer, pooled [CLS] (batch, width)."""
        out = self.model.model.vision_tower(pixels, output_hidden_states=True)
        return out.hidden_states[self.model.config.vision_feature_layer][:, 1:], out.pooler_output

    def tower_loss(self, patches: Tensor, pooled: Tensor, batch: dict) -> tuple[Tensor, dict]:
        """Dense objective on the patches and contrastive objective on [CLS]."""
        losses, scores = [], {}
        for name, head in self.probe.items():
            target = batch[f"patch_{name}"].flatten()
            logits = head(patches).flatten(0, 1)
            weight = torch.full((logits.shape[-1],), 2.0 if name in ("object", "word") else 1.0, device=logits.device)
            if name in ("object", "word"):
                weight[-1] = 0.3  # "none", the last class, is almost everywhere
            losses.append(F.cross_entropy(logits.float(), target, weight, ignore_index=IGNORE))
            counted = (target != IGNORE) & (target != len(weight) - 1 if name in ("object", "word") else target >= 0)
            scores[name] = (logits.argmax(-1) == target)[counted].float().mean()
        caption = batch["caption"]
        bag = self.words(caption).sum(1) / (caption > 0).sum(1, keepdim=True)
        images, texts = F.normalize(self.cls(pooled).float(), dim=-1), F.normalize(self.text(bag).float(), dim=-1)
        similarity = images @ texts.T * self.scale.exp().clamp(max=100)
        same = torch.arange(len(caption), device=caption.device)
        scores["cls"] = (similarity.argmax(1) == same).float().mean()
        contrast = (F.cross_entropy(similarity, same) + F.cross_entropy(similarity.T, same)) / 2
        return sum(losses) + 0.2 * contrast, scores

    @torch.no_grad()
    def condition_projector(self, patches: Tensor) -> None:
        """Start the projector from what the trained tower says: whitened, centred, as large as a word's embedding.

        The tower's patches share a constant part many times larger than what tells them apart. Left in, it makes all
        image tokens nearly equal for the decoder: position does not pass, and binding is learned late or never.
        """
        projector, words = self.model.model.multi_modal_projector, self.model.model.language_model.embed_tokens
        x = patches.flatten(0, 1).float()
        values, vectors = torch.linalg.eigh(x.T.cov())
        whiten = vectors @ torch.diag((values + 0.02 * values.mean()).rsqrt()) @ vectors.T
        nn.init.orthogonal_(projector.linear_1.weight)
        projector.linear_1.weight.copy_(projector.linear_1.weight @ whiten)
        projector.linear_1.bias.copy_(-(projector.linear_1.weight @ x.mean(0)))
        nn.init.orthogonal_(projector.linear_2.weight)
        projector.linear_2.bias.zero_()
        y = projector(x)
        scale = words.weight.std() / y.std(0).mean()
        projector.linear_2.weight.mul_(scale)
        projector.linear_2.bias.copy_(-scale * y.mean(0))

    def word_loss(self, patches: Tensor, words: Tensor) -> Tensor:
        """A dense objective in the decoder's own words: projected patches should resemble what is said of their group.

        words (batch, 144, 6): tokens of count, colour, thing and place. Without it the tower forgets where a patch is,
        and the words for places stay at chance long after those for things are right.
        """
        shown = (words != IGNORE).any(-1)
        features = self.align(self.model.model.multi_modal_projector(patches[shown]).float())
        return self._resembles(features, words[shown])[0]

    def _resembles(self, features: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of saying each of `words` (n, any number) from features (n, width), and the share among the likeliest."""
        wanted = words != IGNORE
        logits = (features @ self.model.model.language_model.embed_tokens.weight.T).float()
        chances = logits.log_softmax(-1).gather(1, words.clamp(min=0))
        least = logits.topk(words.shape[1]).values[:, -1:]
        hits = logits.gather(1, words.clamp(min=0)) >= least
        return -chances[wanted].mean(), hits[wanted].float().mean()

    def language_loss(self, patches: Tensor, batch: dict, n_kept: int, drop_layer: int) -> tuple[Tensor, dict]:
        """Next-token loss over all packed turns. n_kept: image tokens that layers >= drop_layer see.

        Beside it, at half depth: the noun of a question should say what its group is like. An answer needs two steps,
        finding the group by its name and telling one thing about it; left alone neither is learned, for each is of no
        use without the other.
        """
        inner = self.model.model
        ids, turn, positions = batch["ids"], batch["turn"], batch["positions"]
        hidden = inner.language_model.embed_tokens(ids)
        image = ids == self.model.config.image_token_id
        features = inner.multi_modal_projector(patches)
        hidden = torch.where(image[..., None], torch.zeros_like(hidden), hidden)
        first = int(image[0].nonzero()[0])  # the image stands at the same place in every row
        hidden = torch.cat([hidden[:, :first], features.to(hidden.dtype), hidden[:, first + N_PATCHES :]], 1)
        order = torch.arange(ids.shape[1], device=ids.device)
        # a turn sees the shared prefix (turn 0) and itself
        allowed = (order[:, None] >= order) & ((turn[:, None, :] == 0) | (turn[:, :, None] == turn[:, None, :]))
        bias = torch.zeros(allowed.shape, dtype=features.dtype, device=ids.device).masked_fill(~allowed, -1e4)
        cos, sin = inner.language_model.rotary_emb(hidden, positions)
        for i, layer in enumerate(inner.language_model.layers):
            if i == drop_layer and n_kept < N_PATCHES:
                kept = _kept_columns(len(ids), ids.shape[1], first, n_kept, ids.device)
                hidden, cos, sin = (x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])) for x in (hidden, cos, sin))
                rows = torch.arange(len(ids), device=ids.device)[:, None, None]
                bias = bias[rows, kept[:, :, None], kept[:, None, :]]
                batch = {**batch, **{k: batch[k].gather(1, kept) for k in ("labels", "weight", "slot")}}
                batch["noun"] = batch["noun"].gather(1, kept[..., None].expand(-1, -1, batch["noun"].shape[-1]))
            hidden = layer(hidden, attention_mask=bias[:, None], position_embeddings=(cos, sin))
            if i == self.noun_layer:
                noun = (batch["noun"] != IGNORE).any(-1)
                noun_loss, noun_hits = self._resembles(self.found(hidden[noun].float()), batch["noun"][noun])
        wanted = batch["labels"] != IGNORE
        logits = self.model.lm_head(inner.language_model.norm(hidden[wanted])).float()
        labels, weight, slot = batch["labels"][wanted], batch["weight"][wanted], batch["slot"][wanted]
        loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
        right = (logits.argmax(-1) == labels).float()
        scores = {"lm": loss.detach(), "noun": noun_hits}
        for i, name in enumerate(SLOTS):
            for prefix, code in (("", i + 1), ("qa_", -(i + 1))):
                if (here := slot == code).any():
                    scores[prefix + name] = right[here].mean()
        return loss + 0.3 * noun_loss, scores


def _kept_columns(n_rows: int, length: int, first: int, n_kept: int, device) -> Tensor:
    """Columns (rows, length - dropped) that stay: all text and a random `n_kept` of each row's image tokens."""
    chosen = torch.rand(n_rows, N_PATCHES, device=device).argsort(1)[:, :n_kept].sort(1).values + first
    before = torch.arange(first, device=device).expand(n_rows, -1)
    after = torch.arange(first + N_PATCHES, length, device=device).expand(n_rows, -1)
    return torch.cat([before, chosen, after], 1)


class Batches(Dataset):
    """Batch number i of a stage, made from the training scenes that belong to it: resuming repeats and skips none."""

    def __init__(self, stage: str, config: Config, start: int, processor):
        self.stage, self.config, self.start = stage, config, start
        self.tokenizer = processor.tokenizer
        self.vocabulary = {i: w for w, i in self.tokenizer.get_vocab().items()}
        slot_of = {word: i + 1 for i, words in enumerate(SLOTS.values()) for word in words}
        names = {word: thing for thing in THINGS for word in _last_words(thing)}
        self.thing = {self.tokenizer.convert_tokens_to_ids(word): thing for word, thing in names.items()}
        self.slot = np.array([slot_of.get(self.vocabulary[i], 0) for i in range(len(self.vocabulary))])
        self.prefix = self._ids(f"{SYSTEM} USER: <image>", first=True)
        at = self.prefix.index(self.tokenizer.convert_tokens_to_ids("<image>"))
        self.prefix[at : at + 1] = [self.prefix[at]] * N_PATCHES

    def __len__(self) -> int:
        return getattr(self.config, f"{self.stage}_steps") - self.start

    def __getitem__(self, index: int) -> dict:
        step, config = index + self.start, self.config
        size = getattr(config, f"{self.stage}_batch")
        skipped = 0 if self.stage == "tower" else config.tower_steps * config.tower_batch
        scenes = [compose(seed) for seed in seeds("train", size, skipped + step * size)]
        pictures = [render(scene) for scene in scenes]
        batch = {"pixels": torch.from_numpy(np.stack([np.asarray(p.image) for p in pictures]))}
        labels = [_patch_labels(*both) for both in zip(scenes, pictures, strict=True)]
        batch |= {f"patch_{k}": torch.from_numpy(np.stack([x[k] for x in labels])) for k in labels[0]}
        batch["caption"] = _padded([self._ids(language.captions(s, 1)[0]) for s in scenes], 0)
        if self.stage == "language":
            words = [self._patch_words(*both) for both in zip(scenes, pictures, strict=True)]
            batch["patch_words"] = torch.from_numpy(np.stack(words))
            rows = [self._packed(scene) for scene in scenes]
            fill = {"ids": 0, "turn": -1, "positions": 0, "labels": IGNORE, "weight": 0.0, "slot": 0, "noun": [IGNORE] * 4}
            batch |= {k: _padded([row[k] for row in rows], fill[k]) for k in fill}
        return batch

    def _ids(self, text: str, first: bool = False) -> list[int]:
        ids = self.tokenizer(text)["input_ids"]
        return ids if first else ids[1:]  # without the leading <s>

    def _patch_words(self, scene: Scene, picture) -> np.ndarray:
        """Tokens (144, 6) of the words for each patch's group: both forms of its name, and what is told about it."""
        found = np.full((GRID, GRID, 6), IGNORE)
        for group, cover in zip(scene.groups, picture.cover, strict=True):
            found[cover, :2] = self.tokenizer.convert_tokens_to_ids(_last_words(group.thing))
            found[cover, 2:] = self._told(group)
        return found.reshape(N_PATCHES, 6)

    def _told(self, group: Group) -> list[int]:
        """Tokens of a group's count, colour and place; four, the last may be IGNORE."""
        said = [language.COUNTS[group.count - 1], group.colour, *PLACES[group.place].split()]
        return (self.tokenizer.convert_tokens_to_ids(said) + [IGNORE])[:4]

    def _nouns(self, scene: Scene, prompt: list[int]) -> list[list[int]]:
        """For each token of a question (length, 4): at a thing's name what is told about it, or "no" where it is absent."""
        told = {thing: [self.tokenizer.convert_tokens_to_ids("no"), *[IGNORE] * 3] for thing in THINGS}
        told |= {group.thing: self._told(group) for group in scene.groups}
        return [told[self.thing[i]] if i in self.thing else [IGNORE] * 4 for i in prompt]

    def _turns(self, scene: Scene) -> list[language.Turn]:
        rng = random.Random(f"turns {scene.seed}")
        turns = [language.Turn("caption", rng.choice(language.CAPTION_PROMPTS), language.captions(scene, 1)[0])]
        turns.append(language.long_turn(scene, rng.choices(list(language.PROMPTS), (2, 1, 1))[0]))
        kinds = list(language.QUESTION_KINDS)
        while len(turns) < 2 + self.config.questions:
            kind = kinds[len(turns) % len(kinds)]
            if kind == "reading" and (scene.word is None or any(t.task == "qa_reading" for t in turns)):
                kind = rng.choice(("count", "relation", "existence"))
            turns.append(language.question(scene, kind, telling=len(turns)))
        return turns

    def _packed(self, scene: Scene) -> dict:
        n = len(self.prefix)
        row = {
            "ids": list(self.prefix), "turn": [0] * n, "positions": list(range(n)), "labels": [IGNORE] * n,
            "weight": [0.0] * n, "slot": [0] * n, "noun": [[IGNORE] * 4] * n,
        }  # fmt: skip
        for number, turn in enumerate(self._turns(scene), 1):
            prompt = self._ids(f"{turn.prompt} ASSISTANT:")
            response = [*self._ids(turn.response), self.tokenizer.eos_token_id]
            length = len(prompt) + len(response)
            slots = self.slot[response]
            weight = np.where(slots == 1, 3.0, np.where(slots > 1, 2.0, 1.0))
            if turn.task.startswith("qa_"):
                weight[0] = 3.0  # answers are few among all words
                kind = list(SLOTS).index(turn.task[3:]) + 1
                slots = np.array([-kind] + [0] * (len(response) - 1))
            row["ids"] += prompt + response
            row["turn"] += [number] * length
            row["positions"] += range(n, n + length)
            # the position before a word predicts it
            row["labels"] += [IGNORE] * (len(prompt) - 1) + response + [IGNORE]
            row["weight"] += [0.0] * (len(prompt) - 1) + weight.tolist() + [0.0]
            row["slot"] += [0] * (len(prompt) - 1) + slots.tolist() + [0]
            row["noun"] += self._nouns(scene, prompt) + [[IGNORE] * 4] * len(response)
        return row


def _last_words(thing: str) -> list[str]:
    """The last word of a thing's name, for one and for many: what its name is known by."""
    return [thing.split()[-1], language.PLURAL[thing].split()[-1]]


def _patch_labels(scene: Scene, picture) -> dict[str, np.ndarray]:
    """Classes of each patch (144,): its group's object, colour, count and place, the painted word; last class: none."""
    shape = (GRID, GRID)
    labels = {
        "object": np.full(shape, len(THINGS)), "colour": np.full(shape, IGNORE), "count": np.full(shape, IGNORE),
        "place": np.full(shape, IGNORE), "word": np.full(shape, len(WORDS)),
    }  # fmt: skip
    things, colours = list(THINGS), list(COLOURS)
    for group, cover in zip(scene.groups, picture.cover, strict=True):
        labels["object"][cover] = things.index(group.thing)
        labels["colour"][cover] = colours.index(group.colour)
        labels["count"][cover] = group.count - 1
        labels["place"][cover] = group.place
    if scene.word:
        labels["word"][picture.word_cover] = WORDS.index(scene.word)
    return {name: label.flatten() for name, label in labels.items()}


def _padded(rows: list[list], fill) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


class Run:
    """Training state on disk: weights, optimizer moments, step and history; written whole or not at all."""

    save_seconds = 120.0

    def __init__(self, work: Path, config: Config, device: str):
        self.work, self.config, self.device = work, config, device
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
        for name, p in self.lab.named_parameters():
            for optimizer in optimizers:
                tensors |= {f"moments.{name}:{k}": v for k, v in optimizer.state.get(p, {}).items()}
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        about = {"config": asdict(self.config), "done": self.done, "seconds": self.seconds, "history": self.history}
        write_whole(self.work / "state.safetensors", lambda p: save_file(tensors, p, metadata={"about": json.dumps(about)}))

    def load(self) -> dict[str, Tensor]:
        """Take up the last checkpoint, if there is one; returns the optimizer's tensors."""
        path = self.work / "state.safetensors"
        if not path.exists():
            return {}
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        tensors = load_file(path)
        self.lab.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("lab.")}, strict=False)
        self.done, self.seconds, self.history = about["done"], about["seconds"], about["history"]
        return {k[8:]: v for k, v in tensors.items() if k.startswith("moments.")}

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
            parameters = dict(self.lab.named_parameters())
            for optimizer in optimizers:
                held = {id(p) for group in optimizer.param_groups for p in group["params"]}
                for key, value in moments.items():
                    name, moment = key.split(":")
                    if id(p := parameters[name]) in held:
                        optimizer.state[p][moment] = value if moment == "step" else value.to(p.device)
        if stage == "language" and self.done[stage] == 0:
            pixels = _normalized(Batches(stage, config, 0, self.processor)[0]["pixels"].to(self.device))
            with torch.no_grad():
                self.lab.condition_projector(self.lab.see(pixels)[0])
        batches = DataLoader(Batches(stage, config, self.done[stage], self.processor), None, num_workers=1, prefetch_factor=3)
        bar = tqdm(batches, initial=self.done[stage], total=steps, desc=stage, mininterval=5, dynamic_ncols=True)
        self.lab.train()
        mean: dict[str, float] = {}
        saved = begun = time.monotonic()
        for batch in bar:
            step = self.done[stage]
            torch.manual_seed(step)  # which tokens a step drops does not depend on interruptions
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = getattr(config, f"{stage}_rate") * _schedule(step, steps)
            batch = {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}
            pixels = _normalized(batch.pop("pixels"))
            with torch.autocast(torch.device(self.device).type, torch.bfloat16):
                patches, pooled = self.lab.see(pixels)
                loss, scores = self.lab.tower_loss(patches, pooled, batch)
                if stage == "language":
                    more, told = self.lab.language_loss(patches, batch, self._n_kept(step, steps), config.drop_layer)
                    loss = 0.3 * (loss + self.lab.word_loss(patches, batch["patch_words"])) + more
                    scores = {f"sees_{k}": v for k, v in scores.items()} | told
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
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
        scenes = sum(self.done[s] * getattr(self.config, f"{s}_batch") for s in self.done)
        record = {
            "command": "python -m dyrate.pocket.train", "config": asdict(self.config), "commit": commit,
            "scenes_seen": scenes, "steps": self.done, "hours": round(self.seconds / 3600, 2),
            "device": torch.cuda.get_device_name() if "cuda" in self.device else f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__, "history": self.history,
        }  # fmt: skip
        write_whole(out / "training.json", json.dumps(record, indent=1) + "\n")


def _normalized(pixels: Tensor) -> Tensor:
    """Pixels (batch, 168, 168, 3) of 0 to 255 as the processor hands them to the tower."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25


def _schedule(step: int, steps: int) -> float:
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
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(argv))
    work, out, device = (given.pop(k) for k in ("work", "out", "device"))
    run = Run(work, Config(**given), device)
    run.train()
    run.export(out)


if __name__ == "__main__":
    main()
