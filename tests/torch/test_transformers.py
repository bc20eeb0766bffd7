"""Models of transformers under masks: their own checkpoints, tied weights, and a training that resumes from one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import masksolve as ms
from masksolve.torch import Sparsifier, add_adapters, merge_adapters

transformers = pytest.importorskip("transformers")


def gpt2(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def llama(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, tie_word_embeddings=True))


def train(model: Any, sparsifier: Sparsifier, steps: range) -> None:
    """As Trainer does: the optimizer chooses by name what decays, and is made after the model is loaded."""
    decaying = [each for name, each in model.named_parameters() if name.endswith(".weight") and each.ndim > 1]
    rest = [each for each in model.parameters() if not any(each is other for other in decaying)]
    optimizer = torch.optim.SGD([{"params": decaying, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], 0.5)
    for step in steps:
        tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        sparsifier.step()
        model.zero_grad()


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = dict(one.named_parameters()), dict(other.named_parameters())
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


MODELS = pytest.mark.parametrize(
    ("make", "include"),
    [
        (gpt2, ["transformer.wte.weight", "*.c_attn.weight"]),
        (llama, ["model.embed_tokens.weight", "*_proj.weight"]),
        (llama, None),
    ],
)


@MODELS
def test_a_checkpoint_of_a_masked_model_is_read_as_its_dense_weights_and_a_finalized_one_as_the_sparse(
    make: Any, include: Any, tmp_path: Path
) -> None:
    model = make()
    sparsifier = Sparsifier(model, "2:4", include=include, refresh_every=2)
    train(model, sparsifier, range(3))
    model.save_pretrained(tmp_path / "masked")
    plain, found = type(model).from_pretrained(tmp_path / "masked", output_loading_info=True)
    assert same(model, plain)
    assert not found["missing_keys"]
    assert all("weight_mask" in key for key in found["unexpected_keys"])
    assert plain.get_input_embeddings().weight is plain.lm_head.weight
    tokens = torch.arange(8)[None]
    expected = model(input_ids=tokens).logits
    sparsifier.finalize()
    model.save_pretrained(tmp_path / "sparse")
    sparse, found = type(model).from_pretrained(tmp_path / "sparse", output_loading_info=True)
    assert not found["unexpected_keys"]
    torch.testing.assert_close(sparse(input_ids=tokens).logits, expected)


@MODELS
def test_a_training_resumes_from_the_model_of_a_checkpoint_alone(make: Any, include: Any, tmp_path: Path) -> None:
    def start(seed: int) -> tuple[Any, Sparsifier]:
        model = make(seed)
        return model, Sparsifier(model, "2:4", include=include, refresh_every=2, until=5)

    model, sparsifier = start(0)
    train(model, sparsifier, range(3))
    model.save_pretrained(tmp_path)
    train(model, sparsifier, range(3, 7))
    resumed, other = start(1)
    from safetensors.torch import load_file

    missing = resumed.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).missing_keys
    # Tied to the embedding, which is there.
    assert missing in ([], ["lm_head.weight"])
    assert other.steps == 3
    train(resumed, other, range(3, 7))
    states: list[dict[str, Tensor]] = [model.state_dict(), resumed.state_dict()]
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_adapters_of_language_models_keep_zeros_and_leave_embeddings_alone(make: Any, tmp_path: Path) -> None:
    model = make().eval()
    Sparsifier(model, "1:4").finalize()
    names = list(model.state_dict())
    lines = add_adapters(model, 2)
    adapted = [line.name for line in lines if line.adapted]
    assert len(adapted) == (4 if make is gpt2 else 7)
    assert not any("embed" in name or "wte" in name or "wpe" in name or "lm_head" in name for name in adapted)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    tokens = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(5):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    expected = model(input_ids=tokens).logits
    merge_adapters(model)
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=tokens).logits, expected)
    for name, weight in model.named_parameters():
        if name in adapted:
            assert ms.is_valid_mask((weight != 0).numpy(), 1, 4), name
    model.save_pretrained(tmp_path)
    assert same(type(model).from_pretrained(tmp_path), model)
