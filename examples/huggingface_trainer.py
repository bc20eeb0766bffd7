"""Train with Hugging Face's Trainer under 2:4 masks, stop, resume, and read the result without masksolve.

`python examples/huggingface_trainer.py`. Needs transformers and accelerate. The model and the text are made here.
"""

from __future__ import annotations

import inspect
import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import masksolve as ms
from masksolve.torch.integrations.transformers import SparsifierCallback


def examples() -> list[dict[str, torch.Tensor]]:
    """Return windows of the bytes of a module's source code."""
    tokens = torch.frombuffer(bytearray(inspect.getsource(json.decoder).encode()), dtype=torch.uint8).long()
    windows = tokens[: len(tokens) // 64 * 64].view(-1, 64)
    return [{"input_ids": window, "labels": window} for window in windows]


def trainer_in(folder: str, steps: int) -> Trainer:
    """Make a model, and what trains it."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=20,
        logging_steps=20,
        lr_scheduler_type="constant",
        learning_rate=2e-3,
        per_device_train_batch_size=8,
        report_to="none",
        use_cpu=True,
    )
    callback = SparsifierCallback("2:4", refresh_every=10)
    return Trainer(LlamaForCausalLM(config), arguments, train_dataset=examples(), callbacks=[callback])


def main() -> None:
    """Train for 20 steps, then for 20 more from the checkpoint of the first."""
    with tempfile.TemporaryDirectory() as folder:
        trainer_in(folder, 20).train()
        trainer = trainer_in(folder, 40)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model(f"{folder}/sparse")
        print("files:", sorted(path.name for path in Path(folder, "sparse").iterdir()))
        model = LlamaForCausalLM.from_pretrained(f"{folder}/sparse")
        mask = model.model.layers[0].mlp.up_proj.weight != 0
        print(f"read without masksolve: {float(mask.float().mean()):.0%} of a weight is not zero")
        assert ms.is_valid_mask(mask, 2, 4)
        assert ms.is_valid_mask(mask.T, 2, 4)


if __name__ == "__main__":
    main()
