"""The paper's predictor: from how attention divides over four kinds of tokens to a rate, Eqs. 1-6 of arXiv:2501.14204.

The equations are small pure functions; `RatePredictor` is the linear classifier, which `strategies.dyrate` puts to use.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from dyrate.features import n_features
from dyrate.seen import kept_count
from dyrate.strategy import current_name


def rate_grid(n_rates: int) -> Float[Tensor, " rate"]:
    """Eq. 1: r_k = (k - 1) / n_rates. The first keeps all; no rate drops all."""
    return torch.arange(n_rates) / n_rates


def kept_counts(n_image: Int[Tensor, " batch"], rates: Float[Tensor, " rate"]) -> Int[Tensor, "batch rate"]:
    """Image tokens that each rate keeps. Reads `n_image` on the host, for which a GPU must wait."""
    counts = [[kept_count(n, 1 - rate) for rate in rates.tolist()] for n in n_image.tolist()]
    return torch.tensor(counts, device=n_image.device)


def rate_masks(
    score: Float[Tensor, "batch image_token"], candidates: Bool[Tensor, "batch image_token"], counts: Int[Tensor, "batch rate"]
) -> Bool[Tensor, "batch rate image_token"]:
    """Eq. 3, corrected: the mask of rate k keeps the n - floor(n r_k) best tokens (as printed it would drop them).

    Candidates are the tokens not evicted yet; they go before all others, for ranking all alike and intersecting would let a
    constant rate keep shrinking the set. A count above theirs admits evicted tokens: times the mask of the step before it
    changes nothing, but through it that step's gradient sees that this one would have kept them.
    """
    score = score.float()
    below = score.amin(1, keepdim=True) - score.amax(1, keepdim=True) - 1
    order = (score + below.masked_fill(candidates, 0)).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    return rank[:, None] < counts[..., None]


def gumbel_noise(shape, generator: torch.Generator | None = None, device=None) -> Tensor:
    """Samples of the standard Gumbel distribution."""
    uniform = torch.rand(shape, generator=generator, device=device).clamp(1e-9, 1 - 1e-7)
    return -(-uniform.log()).log()


def gumbel_one_hot(logits: Float[Tensor, "*batch rate"], noise: Tensor, temperature: float) -> Float[Tensor, "*batch rate"]:
    """Eqs. 4-5: one-hot of the largest of log pi + noise; its gradient is that of the softmax at this temperature."""
    perturbed = logits.log_softmax(-1) + noise
    soft = (perturbed / temperature).softmax(-1)
    hard = F.one_hot(perturbed.argmax(-1), logits.shape[-1]).to(soft)
    return hard + soft - soft.detach()


def chosen_mask(choice: Float[Tensor, "batch rate"], masks: Bool[Tensor, "batch rate image_token"]) -> Tensor:
    """Eq. 5: m = sum_k choice_k m^k, (batch, image_token)."""
    return (choice[..., None] * masks).sum(1)


def query_bias(
    kept: Float[Tensor, "batch step image_token"], positions: Int[Tensor, "batch image_token"],
    image: Bool[Tensor, "batch image_token"], real: Bool[Tensor, "batch length"], n_prompt: int,
) -> Float[Tensor, "batch 1 length length"]:  # fmt: skip
    """Eq. 6 as an additive bias: query i sees key j <= i if i = j, or j is no image token, or the mask of i's step keeps j.

    Queries of the prompt have the mask of step 0, the query that chooses answer token t that of step t. The bias of an
    image key is log(m + 1e-24), so that the softmax equals the masked one and gradients reach m.
    """
    batch, length = real.shape
    order = torch.arange(length, device=real.device)
    step = (order - (n_prompt - 1)).clamp(0, kept.shape[1] - 1)
    bias = torch.zeros(batch, length, length, dtype=kept.dtype, device=kept.device)
    of_images = (kept[:, step] + 1e-24).log().masked_fill(~image[:, None], 0)
    bias = bias.scatter_add(2, positions[:, None].expand(-1, length, -1), of_images)
    itself = torch.eye(length, dtype=torch.bool, device=real.device)
    hidden = ((order > order[:, None]) | ~real[:, None]) & ~itself
    return bias.masked_fill(itself, 0).masked_fill(hidden, torch.finfo(bias.dtype).min)[:, None]


BELL = 0.15  # width of the logits around a rate
CARD_SETTINGS = ("recipe", "features", "unit", "budget", "budget_penalty", "steps", "seed")
CARD = """---
{data}
---
# DyRate rate predictor

A linear layer that chooses at each generation step which share of the image tokens a vision-language model drops
([arXiv:2501.14204](https://arxiv.org/abs/2501.14204)). It is no model of its own: it works in the one that it was trained for.

| | |
|---|---|
{table}

```python
import dyrate

model, processor = dyrate.load("{model}")
strategy = dyrate.DyRate.from_pretrained("this folder, or owner/name on the hub")
inputs = dyrate.encode(processor, [image], ["Describe the image in detail."])
with strategy(model, processor) as trace:
    tokens = model.generate(**inputs, max_new_tokens=64)
print(trace.retention().mean())  # the share of image tokens kept
```

All settings of the training are in `config.json`, the weights in `model.safetensors`.
"""


class RatePredictor(nn.Module, PyTorchModelHubMixin, license="mit", library_name="dyrate"):
    """Eq. 2: pi = softmax(C(v)), C linear, v the per-head shares of the four segments in the observed layers.

    heads, n_layers, family: of the model that it was trained for. features: what v is, one of `features.FEATURES`; "hidden"
    needs the model's width. with_step: the step number is one more feature. ordered: the linear layer gives the likeliest rate,
    in units of BELL, and logits fall off around it in a bell: Eq. 2 with weights tied along the grid. delay: steps at which
    everything is kept first. once: the rate of the prefill holds for the whole answer.
    Features are standardised with the training data's mean and deviation. rate_bias: is added to every logit times its rate;
    calibration moves it until a budget is met. about: how it was trained. Saved as safetensors, JSON and a model card
    (`save_pretrained`, `push_to_hub`).
    """

    def __init__(
        self, heads: int, n_layers: int, family: str, *, n_rates: int = 32, first_pruned_layer: int = 2,
        observed_layers: list[int] | None = None, with_step: bool = False, residency: str = "evict", about: dict | None = None,
        features: str = "shares", width: int = 0, delay: int = 0, ordered: bool = False,
        once: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.n_layers, self.family = heads, n_layers, family
        self.first_pruned_layer, self.residency, self.delay = first_pruned_layer, current_name(residency), delay
        self.reads, self.with_step = features, with_step or features == "step"
        self.observed_layers = observed_layers or [first_pruned_layer - 1]
        self.about = about or {}
        n = n_features(features, heads, len(self.observed_layers), width) + self.with_step
        self.ordered, self.once = ordered, once
        self.linear = nn.Linear(n, 1 if ordered else n_rates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("mean", torch.zeros(n))
        self.register_buffer("deviation", torch.ones(n))
        self.register_buffer("rate_bias", torch.zeros(()))
        self.register_buffer("rates", rate_grid(n_rates), persistent=False)

    def features(self, looks: list[Float[Tensor, "*batch head k"]], step: Tensor | int) -> Float[Tensor, "*batch feature"]:
        """What is read of each observed layer side by side, and the step (in units of 64) if it is a feature."""
        flat = torch.cat([look.flatten(-2) for look in looks], -1)
        if not self.with_step:
            return flat
        if isinstance(step, int):  # a number must not be sent to a GPU at every step
            return F.pad(flat, (0, 1), value=step / 64)
        step = step.to(flat) / 64
        return torch.cat([flat, step.expand(flat.shape[:-1])[..., None]], -1)

    def forward(self, features: Float[Tensor, "*batch feature"]) -> Float[Tensor, "*batch rate"]:
        """Logits of the rates."""
        scores = self.linear((features - self.mean) / self.deviation)
        logits = self._bell(BELL * scores) if self.ordered else scores
        return logits + self.rate_bias * self.rates

    def _bell(self, rate: Float[Tensor, "*batch 1"] | float) -> Float[Tensor, "*batch rate"]:
        """Logits that are highest at a rate and fall off around it."""
        return -(((self.rates - rate) / BELL) ** 2)

    def start_at(self, retention: float, features: Float[Tensor, "n feature"]) -> None:
        """Standardise by these features, and prefer rates near 1 - retention at first.

        With all rates equally likely the lowest of many samples would win at once, and later rates would do nothing.
        """
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp(min=1e-4))
        with torch.no_grad():
            self.linear.bias.copy_(torch.tensor([(1 - retention) / BELL]) if self.ordered else self._bell(1 - retention))

    def check_fits(self, model) -> None:
        """Raises ValueError that says what differs between a model and the one that this predictor was trained for."""
        text = model.config.get_text_config()
        mine = {"attention heads": self.heads, "decoder layers": self.n_layers, "family": self.family}
        theirs = {
            "attention heads": text.num_attention_heads, "decoder layers": text.num_hidden_layers,
            "family": model.config.model_type,
        }  # fmt: skip
        if differing := [f"{k}: {mine[k]} against the model's {theirs[k]}" for k in mine if mine[k] != theirs[k]]:
            raise ValueError(
                f"this predictor was trained for another model ({'; '.join(differing)}): train one with "
                "`dyrate.training.train`, or load the model that it belongs to"
            )

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if prefix + "tilt" in state_dict:  # the name of rate_bias in predictors that earlier versions saved
            state_dict[prefix + "rate_bias"] = state_dict.pop(prefix + "tilt")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        self._hub_mixin_config |= {"residency": self.residency, "about": self.about}  # the mixin has them as they were given
        (save_directory / "README.md").unlink(missing_ok=True)  # else the mixin keeps the card of an earlier training

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """What it is, for which model, how it was trained, which retention was measured, and how to load it."""
        about, settings = self.about, self.about.get("settings", {})
        measured = about.get("calibration", {}).get("retention")
        facts = {
            "base model": about.get("model"),
            "family": f"{self.family}, {self.n_layers} decoder layers, {self.heads} attention heads",
            "reads attention of layer": ", ".join(map(str, self.observed_layers)),
            "first pruned layer": self.first_pruned_layer,
            "residency": self.residency,
            "drop rates": f"{len(self.rates)}, from 0 to {float(self.rates[-1]):.3g}",
            "trained on": about.get("examples"),
            "training": ", ".join(f"{name} {settings[name]}" for name in CARD_SETTINGS if name in settings),
            "retention ratio measured in generation": measured and f"{measured:.3f}, mean over validation examples",
        }
        table = "\n".join(f"| {name} | {value} |" for name, value in facts.items() if value not in (None, ""))
        data = self._hub_mixin_info.model_card_data.to_yaml()
        return ModelCard(CARD.format(data=data, table=table, model=about.get("model", "the base model")))
