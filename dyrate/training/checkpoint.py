"""What a training needs to go on: weights, Adam's moments, and how far it has come."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file

from dyrate.atomic import write_whole

if TYPE_CHECKING:
    from dyrate.training.trainer import Trainer

PROGRESS = ("step", "multipliers", "history")


def save(trainer: Trainer, path: Path) -> None:
    """Write the training's state, whole or not at all."""
    tensors = {f"predictor.{name}": value for name, value in trainer.predictor.state_dict().items()}
    for name, parameter in trainer.predictor.named_parameters():
        tensors |= {f"adam.{name}:{moment}": value for moment, value in trainer.optimizer.state[parameter].items()}
    tensors = {name: value.detach().cpu() for name, value in tensors.items()}
    about = {"settings": asdict(trainer.settings)} | {name: getattr(trainer, name) for name in PROGRESS}
    write_whole(path, lambda part: save_file(tensors, part, metadata={"about": json.dumps(about)}))


def load(trainer: Trainer, path: Path) -> None:
    """Set the training to where it was. Raises ValueError if the state is of one with other settings."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    mine, theirs = asdict(trainer.settings), about["settings"]
    if differing := [name for name in mine | theirs if mine.get(name) != theirs.get(name)]:
        raise ValueError(
            f"{path} holds a training with other settings ({', '.join(differing)}): name another folder, "
            "or remove it to start anew"
        )
    weights = {name.removeprefix("predictor."): value for name, value in tensors.items() if name.startswith("predictor.")}
    trainer.predictor.load_state_dict(weights)
    for name, parameter in trainer.predictor.named_parameters():
        moments = {moment: tensors[f"adam.{name}:{moment}"] for moment in ("step", "exp_avg", "exp_avg_sq")}
        trainer.optimizer.state[parameter] = {k: v if k == "step" else v.to(parameter.device) for k, v in moments.items()}
    for name in PROGRESS:
        setattr(trainer, name, about[name])
