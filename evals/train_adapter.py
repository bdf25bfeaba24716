"""Trains the long-context LoRA of SmolLM2-135M on the tasks of `tasks.py` over real text; minutes on one GPU.

    scripts/fetch_texts.sh && python -P -m kvsluice.evals.train_adapter --out adapter --seconds 330

The loss is that of the answers' tokens plus a tenth of the plain next-token loss at random places, which keeps the
model a language model. Writes `adapter_model.safetensors` and `adapter_config.json` as PEFT names them, and
`report.json` with the accuracy on the held-out tenth of the texts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.tokenizer import load_tokenizer
from .reference_model import BASE_MODEL, PEFT_PREFIX, extend_context, load_base
from .tasks import SUITE, Encode, TaskMaker, training_sample
from .texts import DEFAULT_FOLDER, TRAIN_SHARE, training_texts

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
LENGTH_WEIGHTS = (1, 1, 1.5, 2, 2, 1)
PUBLISHED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_SCALE = 2.0  # alpha / rank
PAD_TOKEN_ID = 2
PLAIN_LOSS_WEIGHT = 0.1
PLAIN_LOSS_TOKENS = 512  # places a step at which the plain next-token loss is taken
WARMUP_STEPS = 50
LEAST_RATE_SHARE = 0.05  # the learning rate falls along a cosine to this share
REPORT_LENGTHS = (4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Settings:
    """What a training run depends on, beside its texts.

    Attributes:
        seconds: how long to train; the schedule follows the clock.
        step_tokens: tokens a step; prompts of one length share a step.
        max_steps: stop after this many steps, whatever the clock says.
    """

    seconds: float = 330.0
    step_tokens: int = 32_768
    rank: int = 16
    learning_rate: float = 6e-4
    lengths: tuple[int, ...] = LENGTHS
    max_steps: int | None = None
    num_workers: int = 13
    seed: int = 1000


class LoraLinear(nn.Module):
    """A frozen linear layer plus a low-rank update: y = W x + scale * B A x."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        device = linear.weight.device
        self.down = nn.Parameter(torch.randn(rank, linear.in_features, device=device) / math.sqrt(linear.in_features))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return self.linear(x) + update * LORA_SCALE  # type: ignore[no-any-return]


def add_lora(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Freeze the model and wrap every target projection, in place. Returns what is left to train."""
    model.requires_grad_(False)
    trainable: list[nn.Parameter] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in TARGETS and isinstance(child, nn.Linear):
                wrapped = LoraLinear(child, rank)
                setattr(parent, name, wrapped)
                trainable += [wrapped.down, wrapped.up]
    return trainable


def lora_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained updates in bfloat16 under PEFT's names."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            for part, parameter in (("lora_A", module.down), ("lora_B", module.up)):
                tensors[f"{PEFT_PREFIX}{name}.{part}.weight"] = parameter.detach().to(torch.bfloat16).cpu().contiguous()
    return tensors


def adapter_config(rank: int) -> dict[str, Any]:
    """What PEFT writes beside the tensors."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": PUBLISHED_BASE,
        "r": rank,
        "lora_alpha": int(rank * LORA_SCALE),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": list(TARGETS),
        "modules_to_save": None,
    }


def save_adapter(folder: Path, model: nn.Module, rank: int) -> None:
    """Write the adapter as PEFT reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(lora_tensors(model), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config(rank), indent=1) + "\n")


class Batches(torch.utils.data.IterableDataset[tuple[Tensor, Tensor]]):
    """Endless steps: token ids int64 [b, n] and a mask bool [b, n] of the positions that predict an answer token."""

    def __init__(self, encode: Encode, texts: Sequence[Sequence[int]], settings: Settings) -> None:
        self._encode, self._texts, self._settings = encode, texts, settings

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        worker = torch.utils.data.get_worker_info()
        random = Random(self._settings.seed + (worker.id if worker else 0))
        maker = TaskMaker(self._encode, self._texts)
        lengths = self._settings.lengths
        while True:
            length = random.choices(lengths, LENGTH_WEIGHTS[: len(lengths)])[0]
            rows = []
            for _ in range(max(1, self._settings.step_tokens // length)):
                sample = training_sample(maker, random, length - random.randrange(length // 4))
                rows.append(((sample.prompt_ids + sample.answer_ids)[-length:], len(sample.answer_ids)))
            yield pad(rows)


def pad(rows: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Rows of (token ids, length of the answer at their end) as one step; see `Batches`."""
    longest = max(len(tokens) for tokens, _ in rows)
    ids = torch.full((len(rows), longest), PAD_TOKEN_ID)
    answers = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, (tokens, num_answer) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        answers[i, len(tokens) - num_answer - 1 : len(tokens) - 1] = True
    return ids, answers


def hidden_rows(model: Any, ids: Tensor) -> Tensor:
    """Rows before the head, [b, n, D]: the head is applied only where a loss is taken."""
    rows: Tensor = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return rows


def losses(model: Any, ids: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross entropy of the answers' tokens, and of the next token at random places."""
    hidden = hidden_rows(model, ids)
    following = ids.roll(-1, 1)
    answer_loss = F.cross_entropy(model.lm_head(hidden[answers]).float(), following[answers])
    anywhere = torch.zeros_like(answers)
    count = max(1, PLAIN_LOSS_TOKENS // ids.shape[0])
    places = torch.randint(0, ids.shape[1] - 1, (ids.shape[0], count), device=ids.device)
    anywhere.scatter_(1, places, True)
    plain_loss = F.cross_entropy(model.lm_head(hidden[anywhere]).float(), following[anywhere])
    return answer_loss, plain_loss


def learning_rate(settings: Settings, step: int, share_done: float) -> float:
    """Linear warm-up, then a cosine over the training time."""
    cosine = 0.5 * (1 + math.cos(math.pi * share_done))
    falling = LEAST_RATE_SHARE + (1 - LEAST_RATE_SHARE) * cosine
    return settings.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * falling


def train(
    model: Any,
    encode: Encode,
    texts: Sequence[Sequence[int]],
    settings: Settings,
    progress: Callable[[int, float, float], None] = lambda step, answer_loss, plain_loss: None,
) -> list[float]:
    """Wrap the model in LoRA and train it in place, on the device where it lies. Returns each step's answer loss."""
    trainable = add_lora(model, settings.rank)
    device = trainable[0].device
    optimizer = torch.optim.AdamW(trainable, lr=settings.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    steps = iter(
        torch.utils.data.DataLoader(
            Batches(encode, texts, settings),
            batch_size=None,
            num_workers=settings.num_workers,
            prefetch_factor=4 if settings.num_workers else None,
        )
    )
    model.train()
    history: list[float] = []
    began = time.monotonic()
    while (passed := time.monotonic() - began) < settings.seconds and len(history) != settings.max_steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, len(history), passed / settings.seconds)
        ids, answers = (tensor.to(device, non_blocking=True) for tensor in next(steps))
        answer_loss, plain_loss = losses(model, ids, answers)
        (answer_loss + PLAIN_LOSS_WEIGHT * plain_loss).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append(answer_loss.item())
        progress(len(history), history[-1], plain_loss.item())
    model.eval()
    return history


@torch.no_grad()
def accuracy(model: Any, maker: TaskMaker, task: str, num_tokens: int, num_samples: int) -> float:
    """Share of samples whose whole answer is the argmax under teacher forcing; for `quote`, share of tokens."""
    device = next(model.parameters()).device
    total = 0.0
    for seed in range(num_samples):
        sample = SUITE[task](maker, Random(f"{task}{num_tokens}{seed}"), num_tokens - 64)
        ids = torch.tensor([sample.prompt_ids + sample.answer_ids], device=device)
        rows = hidden_rows(model, ids)[0, len(sample.prompt_ids) - 1 : -1]
        right = model.lm_head(rows).argmax(-1) == ids[0, len(sample.prompt_ids) :]
        total += float(right.float().mean()) if task == "quote" else float(right.all())
    return total / num_samples


def main() -> None:
    """Train, save, and report the accuracy on held-out text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter and report.json")
    parser.add_argument("--texts", type=Path, default=DEFAULT_FOLDER, help="what scripts/fetch_texts.sh filled")
    parser.add_argument("--seconds", type=float, default=Settings.seconds)
    parser.add_argument("--samples", type=int, default=10, help="samples a task and length in the report")
    arguments = parser.parse_args()
    settings = Settings(seconds=arguments.seconds)
    encode = load_tokenizer(BASE_MODEL).encode
    model = load_base(torch.bfloat16).cuda()
    extend_context(model)

    def progress(step: int, answer_loss: float, plain_loss: float) -> None:
        if step % 100 == 0:
            print(f"step {step}: answers {answer_loss:.4f}, text {plain_loss:.3f}", flush=True)

    history = train(model, encode, training_texts(encode, arguments.texts), settings, progress)
    save_adapter(arguments.out, model, settings.rank)
    maker = TaskMaker(encode, training_texts(encode, arguments.texts, TRAIN_SHARE, 1.0))
    scores = {
        f"{task}@{length}": accuracy(model, maker, task, length, arguments.samples)
        for length in REPORT_LENGTHS
        for task in SUITE
    }
    report = {"settings": asdict(settings), "steps": len(history), "loss": history[-1], "accuracy": scores}
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
