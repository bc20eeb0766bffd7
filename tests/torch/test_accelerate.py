"""Accelerate's loop with masks: the Sparsifier is one of the things that it saves."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from masksolve.torch import Sparsifier
from tests.torch.test_transformers import llama, same

BATCHES, HALF = 8, 4


def start(seed: int) -> tuple[Accelerator, Any, Any, Sparsifier]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = llama(seed)
    sparsifier = Sparsifier(model, "3:8", include=["model.embed_tokens.weight", "*_proj.weight"], refresh_every=3)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.05))
    accelerator.register_for_checkpointing(sparsifier)
    return accelerator, model, optimizer, sparsifier


def train(accelerator: Accelerator, model: Any, optimizer: Any, sparsifier: Sparsifier, batches: range) -> None:
    for batch in batches:
        tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(batch))
        with accelerator.accumulate(model):
            accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
            optimizer.step()
            if accelerator.sync_gradients:
                sparsifier.step()
            optimizer.zero_grad()


def test_a_resumed_loop_is_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = start(0)
    train(*whole, range(HALF))
    whole[0].save_state(str(tmp_path))
    train(*whole, range(HALF, BATCHES))
    assert whole[3].steps == BATCHES // 2
    resumed = start(1)
    resumed[0].load_state(str(tmp_path))
    assert resumed[3].steps == HALF // 2
    train(*resumed, range(HALF, BATCHES))
    assert resumed[3].steps == whole[3].steps
    assert same(resumed[1], whole[1])
    assert resumed[3].last_refresh.layers == whole[3].last_refresh.layers
