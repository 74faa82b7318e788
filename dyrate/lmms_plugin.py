"""The model class that lmms-eval finds by the entry point `lmms_eval.models`."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from importlib.metadata import version

from accelerate import Accelerator
from tqdm import tqdm

try:
    from lmms_eval import utils
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise ImportError(f"dyrate.lmms_plugin needs lmms-eval: pip install 'dyrate[lmms]' ({error})") from error

from dyrate.data import Example
from dyrate.lmms import answer, strategy_of
from dyrate.models import load


def manifest() -> ModelManifest:
    """Where lmms-eval finds the class."""
    return ModelManifest("dyrate_llava", chat_class_path=f"{__name__}.DyRateLlava", aliases=("dyrate",))


class DyRateLlava(lmms):
    """Any model that `dyrate.load` knows, under any strategy; see `dyrate.lmms.strategy_of` for strategy, predictor, budget.

    pretrained, revision, dtype, device, device_map: as in `dyrate.load`. Under `accelerate launch` each process holds the
    model on a device of its own and answers its part.
    """

    is_simple = False

    def __init__(
        self, pretrained: str = "llava-hf/llava-1.5-7b-hf", strategy: str = "full", predictor: str | None = None,
        budget: float | None = None, revision: str | None = None, dtype: str | None = None, device: str | None = None,
        device_map: str | None = None, batch_size: int | str = 1, **fields,
    ):  # fmt: skip
        super().__init__()
        wanted = {"predictor": predictor, "budget": budget, **fields}
        strategy_of(strategy, 1, **wanted)  # wrong arguments raise before a model is loaded
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size is a number of questions, not {batch_size!r}")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        if self.accelerator.num_processes > 1:
            if device_map is not None:
                raise ValueError("device_map spreads one model over all GPUs: use it with one process, or leave it out")
            device = self.accelerator.device
        self.model, self.processor = load(pretrained, revision=revision, dtype=dtype, device_map=device_map, device=device)
        self.device = self.model.device
        self.strategy = strategy_of(strategy, self.model.config.get_text_config().num_hidden_layers, **wanted)
        with self.strategy(self.model, self.processor):
            pass  # what does not fit this model raises before any data set is fetched

    def generate_until(self, requests) -> list[GenerationResult]:
        """Answers to requests of any tasks, in their order; batches hold requests of one kind and similar length."""
        order = utils.Collator([r.args for r in requests], lambda a: (a[4], len(a[0])), group_fn=lambda a: a[2], grouping=True)
        generated, retention, begun = [], defaultdict(list), time.monotonic()
        bar = tqdm(total=len(requests), desc="answers", disable=self.rank != 0)
        for chunk in order.get_batched(n=self.batch_size):
            chats = [to_chat(self.task_dict[task][split][doc]) for _, to_chat, _, doc, task, split in chunk]
            examples = [Example(f"{task} {doc}", task, context, ()) for context, _, _, doc, task, _ in chunk]
            answers = answer(self.model, self.processor, self.strategy, chats, examples, chunk[0][2])
            generated += answers
            for example, one in zip(examples, answers, strict=True):
                if not math.isnan(one.retention):
                    retention[example.task].append(one.retention)
            bar.update(len(chunk))
        bar.close()
        seconds, tokens = time.monotonic() - begun, sum(one.tokens for one in generated)
        # lmms-eval's result file has no other place for what its own fields do not know
        noted = {f"retention {task}": sum(ratios) / len(ratios) for task, ratios in retention.items()}
        log_metrics(seconds, tokens, tokens / seconds, noted | {f"lmms-eval {version('lmms-eval')}": 1})
        return order.get_original([GenerationResult(one.text, TokenCounts(output_tokens=one.tokens)) for one in generated])

    def loglikelihood(self, requests):
        """Not offered: no task of the paper asks for it; LLaVA's multiple-choice tasks in lmms-eval ask for generated text."""
        raise NotImplementedError("dyrate_llava generates answers (generate_until): choose tasks that ask for no likelihoods")

    def generate_until_multi_round(self, requests):
        """Not offered: no task of the paper asks for it."""
        raise NotImplementedError("dyrate_llava answers one prompt at a time (generate_until), not rounds of a dialogue")
